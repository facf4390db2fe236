"""Completions that a run shows: the drifted tail marked, how each ended, and the same as a table in trackers."""

import io
import json
import re
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from trainer_helpers import make_trainer, prompts_of, settings

from prune_opd_hf.tasks import load_tokenizer
from prune_opd_hf.training.completions import (
    TABLE_TRACKERS,
    completions,
    completions_table,
    log_completions,
    marked_completion,
)


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("run"))
    return trainer.generate_rollouts(prompts_of(trainer, 8))


def test_the_drifted_tail_is_marked_where_reliability_falls_and_where_it_is_used_up(rollouts):
    tokenizer = load_tokenizer()
    row = next(row for row, reason in enumerate(rollouts.stop_reason) if reason == "drift")
    reliability = rollouts.reliability[row][rollouts.response_mask[row]]
    ids = rollouts.response_ids[row][rollouts.response_mask[row]]
    first = int((reliability < 1).int().argmax())
    text = marked_completion(rollouts, row, tokenizer)
    before, _, tail = text.plain.partition(" ⟦ ")
    middle, _, lost = tail.partition(" ⟧ ")
    assert before == tokenizer.decode(ids[:first])
    assert lost == tokenizer.decode(ids[-1:])  # a row that drift stopped ends at its exhausted token
    assert middle == tokenizer.decode(ids[first:-1])
    assert [str(span.style) for span in text.spans] == ["yellow", "red"]


def test_in_80_columns_the_table_shows_what_became_of_each_row(rollouts):
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(completions_table(completions(rollouts, load_tokenizer(), rows=2), step=7))
    shown = console.export_text()
    assert "Completions of step 7" in shown
    assert max(map(len, shown.splitlines())) <= 80
    for row in range(2):
        mask = rollouts.response_mask[row]
        overlap = rollouts.overlap[row][mask].mean()
        for said in (rollouts.stop_reason[row], f"{mask.sum()} tokens", f"overlap {overlap:.2f}"):
            assert f"│ {said} " in shown


def test_what_a_model_writes_does_not_steer_the_terminal(rollouts, monkeypatch):
    tokenizer = load_tokenizer()
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "clear \x1b[2J")
    assert "\x1b" not in marked_completion(rollouts, 0, tokenizer).plain


def test_trackers_get_the_same_rows_as_a_table(rollouts, tmp_path, monkeypatch, capsys):
    args = settings(tmp_path, num_completions_to_print=3)
    sent = {name: [] for name in TABLE_TRACKERS}
    steps = []
    for name, log in sent.items():

        def record(values, log=log, step=None):
            log.append(values)
            steps.append(step)

        module = SimpleNamespace(Table=lambda dataframe: dataframe, log=record, run=object())
        monkeypatch.setitem(sys.modules, name, module)
    args.report_to = list(TABLE_TRACKERS)
    log_completions(rollouts, load_tokenizer(), args, step=5)
    assert steps == [5, None]  # trackio, which would count the table as a step of its own; wandb
    for log in sent.values():
        [logged] = log
        table = logged["completions"].to_dict("records")
        assert [row["step"] for row in table] == [5] * 3
        for row, found in enumerate(table):
            count = int(rollouts.lengths[row])
            assert found["tokens"] == count
            assert found["stop_reason"] == rollouts.stop_reason[row]
            assert found["drift_events"] == sum(rollouts.drift_events[row][:count].tolist())
            assert found["overlap"] == pytest.approx(sum(rollouts.overlap[row][:count].tolist()) / count)
            assert found["effective_length"] == int(rollouts.effective_lengths[row])
            text = load_tokenizer().decode(rollouts.response_ids[row][:count])
            assert re.sub("[⟦⟧ ]", "", found["completion"]) == text.replace(" ", "")


def test_a_tracker_that_is_switched_off_gets_nothing(rollouts, tmp_path, monkeypatch, capsys):
    args = settings(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))  # which has neither Table nor log
    args.report_to = ["wandb"]
    log_completions(rollouts, load_tokenizer(), args, step=1)
    assert "Completions of step 1" in capsys.readouterr().out


def rows_in_wandb(folder):
    [file] = folder.glob("wandb/offline-run-*/files/media/table/completions_*.table.json")
    table = json.loads(file.read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def test_wandb_offline_has_the_table(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer = make_trainer(tmp_path, max_steps=1, report_to="wandb", log_completions=True, num_completions_to_print=2)
    trainer.train()
    import wandb

    wandb.finish()
    rows = rows_in_wandb(tmp_path)
    assert [row["stop_reason"] for row in rows] == list(trainer.step.rollouts.stop_reason[:2])
    assert [row["tokens"] for row in rows] == trainer.step.rollouts.lengths[:2].tolist()


def test_tensorboard_has_every_number_of_a_line(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(tmp_path, max_steps=2, report_to="tensorboard")
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    logged = {f"train/{name}" for name, value in trainer.state.log_history[0].items() if name not in ("step", "epoch")}
    assert logged <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/prune/overlap")] == [1, 2]
