"""Whatever stands in a field of a file that the package reads, loading answers with a usable record or one line of its own.

Training summary, evaluation report and the budget's state are in test_files.py.
"""

import io
import json
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from loopback_hub.student_folders import training_summary
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import tiny_model
from tiny_tokenizers import byte_tokenizer
from wrong_values import OTHER, with_another_value

from prune_opd_hf.algorithm.drift import DriftConfig
from prune_opd_hf.errors import ConfigError, PruneOPDError
from prune_opd_hf.evaluation import read_samples
from prune_opd_hf.evaluation.sample_log import Sample, SampleLog
from prune_opd_hf.models.end_tokens import find_end_tokens
from prune_opd_hf.models.generation_config import make_savable, warping_settings
from prune_opd_hf.models.loading import load_causal_lm
from prune_opd_hf.preflight import PreflightReport
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.study.arm_training import ArmRun
from prune_opd_hf.study.learning_curve import CurvePoint
from prune_opd_hf.training.checkpoints import (
    ProcessState,
    TrainingState,
    is_complete,
)
from prune_opd_hf.training.metrics import MetricMeans, TokenCounts
from prune_opd_hf.training.safeguards import SafeguardsState

RESULTS = Path(__file__).parents[2] / "examples" / "results"

MANY = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True, scope="module")
def _without_type_checker():
    """Users have no type checker: what is refused, the package refuses itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


def refused_in_one_line(use) -> bool:
    """Whether `use` fails with an error of the package, which is one printable line; any other error is raised."""
    message = None
    try:
        use()
    except PruneOPDError as error:
        message = str(error)
    assert message is None or (message.isprintable() and len(message) < 600)
    return message is not None


@MANY
@given(data=st.data())
def test_a_preflight_report_is_shown_or_refused(tmp_path, data):
    document = json.loads((RESULTS / "preflight" / "preflight.json").read_text())
    document["report"]["grid"] = document["report"]["grid"][:2]
    (tmp_path / "preflight.json").write_text(json.dumps(with_another_value(data, document)))
    console = Console(file=io.StringIO(), width=80)
    refused_in_one_line(lambda: PreflightReport.load(tmp_path).show(console))
    assert not {"\x1b", "\x07", "\u202e"} & set(console.file.getvalue())


@MANY
@given(data=st.data())
def test_the_samples_of_an_evaluation_are_read_or_refused(tmp_path, data):
    sampling = {"seed": 0, "weights": "sha256:1"}
    lines = [sampling, vars(Sample("sums", "ab", 0, 0, "2", 5, 1, True, 0, 0.1))]
    line = data.draw(st.integers(0, 1))
    lines[line] = with_another_value(data, {"sampling": sampling} if line == 0 else lines[1])
    lines[0] = lines[0] if line == 0 else {"sampling": sampling}
    (tmp_path / "samples-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused_in_one_line(lambda: list(read_samples(tmp_path)))
    refused_in_one_line(lambda: SampleLog(tmp_path, sampling).close())


@MANY
@given(data=st.data())
def test_the_state_of_a_training_is_taken_up_or_no_complete_checkpoint(tmp_path, data):
    state = TrainingState(
        pruning={"length": 100, "misses": 0},
        counts=TokenCounts(8, 80, 40, 20),
        safeguards=SafeguardsState(nonfinite=1, capped_shares=[0.5]),
        phase_seconds={"generate": 1.5},
        last_logged_step=3,
        processes=[ProcessState(MetricMeans({"a": 1 / 3}, {"a": 1.0}, {"b": 2.0}), 0.25)],
        trained_weights=7,
    )
    state.save(tmp_path)
    path = tmp_path / "prune_opd_state.json"
    path.write_text(json.dumps(with_another_value(data, json.loads(path.read_text()))))
    (tmp_path / "trainer_state.json").write_text("{}")
    refused = refused_in_one_line(lambda: TrainingState.load(tmp_path))
    assert is_complete(tmp_path) is not refused
    if not refused:
        for process in TrainingState.load(tmp_path).processes:
            process.means.take()


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}])
def test_means_that_cannot_be_gone_on_from_are_refused(weights):
    with pytest.raises(ConfigError, match="means must hold sums and weights above 0 of the same names"):
        MetricMeans({"a": 1.0}, weights)


@pytest.mark.parametrize("content", ["[]", "null", '"text"', "{", '{"surprise": 1}', "\ud800"])
def test_a_trainers_state_that_is_none_makes_no_complete_checkpoint(tmp_path, content):
    TrainingState({}, TokenCounts(), SafeguardsState(), {}, 0, [ProcessState(MetricMeans(), 0.0)], 7).save(tmp_path)
    (tmp_path / "trainer_state.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert not is_complete(tmp_path)


@MANY
@given(data=st.data())
def test_a_run_of_a_study_is_read_or_refused(tmp_path, data):
    run = ArmRun("drift", 0, "f", None, (CurvePoint(0, 0.0, 0, 0.5), CurvePoint(1, 2.0, 30, 0.75)), training_summary())
    run.save(tmp_path / "run.json")
    document = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(with_another_value(data, document)))
    refused_in_one_line(lambda: ArmRun.load(tmp_path / "run.json").mean_kept_length)


@MANY
@given(data=st.data())
def test_rollouts_are_read_or_refused(tmp_path, data):
    rows, time, k = 2, 3, 2
    whole, flags = torch.zeros(rows, time, dtype=torch.long), torch.ones(rows, time, dtype=torch.bool)
    path = tmp_path / "rollouts.safetensors"
    Rollouts(
        prompt_ids=whole,
        prompt_mask=flags,
        response_ids=whole,
        response_mask=flags,
        teacher_token_log_probs=torch.zeros(rows, time),
        teacher_topk_ids=torch.zeros(rows, time, k, dtype=torch.long),
        teacher_topk_log_probs=torch.zeros(rows, time, k),
        drift_events=~flags,
        reliability=torch.ones(rows, time),
        stop_reason=("eos", "length"),
        config=DriftConfig("tail", top_k=k),
    ).save(path)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(tensors)))
        shape = data.draw(st.sampled_from([(), (rows,), (rows, time), (rows, time, k + 1), (0, 0), (0, 0, 0)]))
        tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
    else:
        name = data.draw(st.sampled_from(sorted(metadata)))
        known = {"kind": metadata["kind"]} if name == "kind" else json.loads(metadata[name])
        other = with_another_value(data, known)
        metadata[name] = json.dumps(other) if name != "version" or not isinstance(other, str) else repr(other)
    save_file(tensors, path, metadata=metadata)
    refused_in_one_line(lambda: repr(Rollouts.load(path)))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    tiny_model("qwen3", 1).save_pretrained(folder)
    return folder, (folder / "generation_config.json").read_text()


GENERATION = {
    "temperature": 0.7,
    "top_k": 20,
    "do_sample": True,
    "repetition_penalty": 1.1,
    "max_length": 50,
    "stop_strings": ["a"],
    "suppress_tokens": [1],
    "eos_token_id": [1, 2],
}


@settings(MANY, max_examples=40)
@given(name=st.sampled_from(sorted(GENERATION)), value=OTHER)
@example(name="eos_token_id", value="12")
@example(name="eos_token_id", value=[2.5])
@example(name="eos_token_id", value=-1)
@example(name="eos_token_id", value=float("nan"))
def test_a_students_generation_config_names_its_ends_or_is_refused(student, name, value):
    folder, text = student
    (folder / "generation_config.json").write_text(json.dumps({**json.loads(text), **GENERATION, name: value}))

    def load():
        model = load_causal_lm(folder)
        ends = find_end_tokens(model, byte_tokenizer(), shared=48)
        assert all(type(token) is int for token in ends.token_ids)
        ends.describe(byte_tokenizer())
        warping_settings(model.generation_config)
        make_savable(model.generation_config)

    refused = refused_in_one_line(load)
    if name == "eos_token_id" and not isinstance(value, list | int) and value is not None:
        assert refused
