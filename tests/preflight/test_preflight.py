"""Preflight: what is found about a pair, that the projections come from the rollouts alone, and what it advises."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from fake_vllm import FakeVLLM
from rich.console import Console
from tiny_models import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from prune_opd_hf import DriftConfig
from prune_opd_hf.cli import main
from prune_opd_hf.errors import ConfigError, FileFormatError, InputError
from prune_opd_hf.generation import Sampling
from prune_opd_hf.models.end_tokens import EndTokens, Source
from prune_opd_hf.preflight import PreflightReport, preflight, run_preflight, step_cost
from prune_opd_hf.preflight.falling_agreement import confirm_falling_agreement, describe_profile, measure_contrast
from prune_opd_hf.preflight.pair_checks import (
    check_contexts,
    check_end_tokens,
    check_rollout_end_tokens,
    check_thoughts,
    check_tokenizers,
)
from prune_opd_hf.preflight.preflight_report import draw_preflight
from prune_opd_hf.preflight.replay import TokenBill, replay
from prune_opd_hf.preflight.run_preflight import check_fixed_length, early_agreement, probability_taken_away
from prune_opd_hf.preflight.settings_grid import (
    GridRow,
    Recommendation,
    recommend,
    settings_grid,
    try_settings,
    unpruned_seconds,
)
from prune_opd_hf.preflight.step_cost import (
    BlockTime,
    StepCost,
)
from prune_opd_hf.preflight.step_memory import activations, cache_bytes_per_token, kept_for_backward, step_memory
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.tasks import ChainTask, load_student, load_teacher, load_tokenizer
from prune_opd_hf.tasks.pair import WEIGHTS
from prune_opd_hf.teachers.local import LocalTeacher
from prune_opd_hf.teachers.served import ServedTeacher

FREE = StepCost(0.0, 0.0, 0.0, 1.0, 0.0, 0.0, None, 0.0)
"""One second for each sampled token and nothing else."""


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """A small preflight of the embedded pair, and its rollouts."""
    path = tmp_path_factory.mktemp("preflight") / "rollouts.safetensors"
    prompts = [problem.prompt for problem in ChainTask().problems(24, seed=0)]
    report = preflight(
        load_student(),
        load_teacher(),
        prompts,
        processing_class=load_tokenizer(),
        teacher_processing_class=load_tokenizer(),
        num_generations=2,
        generation_batch_size=20,
        max_completion_length=112,
        check_every=8,
        rollouts_path=path,
    )
    return report, Rollouts.load(path)


def test_the_embedded_pair_gets_few_false_alarms_and_a_real_saving(embedded):
    report, rollouts = embedded
    assert report.works
    row = report.recommendation.row
    assert row.false_alarms <= 0.05
    assert row.detection >= 0.5
    assert row.step_share < 0.7
    assert report.rollouts == len(rollouts) == 48
    assert "drift" not in rollouts.stop_reason  # nothing was pruned


def test_the_published_setting_is_seen_to_flag_nearly_every_good_token_of_a_small_vocabulary(embedded):
    report, _ = embedded
    published = [
        row
        for row in report.grid
        if (row.config.metric, row.config.top_k, row.config.threshold) == ("overlap", 16, 0.7)
    ]
    assert all(row.false_alarms > 0.8 for row in published)


def test_every_row_of_the_grid_equals_a_replay_of_its_own_setting(embedded):
    report, rollouts = embedded
    p, q = rollouts.token_log_probs.exp(), rollouts.teacher_token_log_probs.exp()
    agreed = (q / p >= 0.5) & rollouts.response_mask
    for row in report.grid[::17]:
        pruned = replay(rollouts, row.config)
        assert row.kept_share == pytest.approx(int(pruned.lengths.sum()) / int(rollouts.lengths.sum()))
        assert row.stopped_share == pytest.approx(pruned.stop_reason.count("drift") / len(rollouts))
        kept_agreed = int(agreed[:, : pruned.response_mask.shape[1]][pruned.response_mask].sum())
        assert row.agreed_before == pytest.approx(kept_agreed / int(pruned.lengths.sum()))
        assert row.agreed_lost == pytest.approx(1 - kept_agreed / int(agreed.sum()))
        everything = replay(rollouts, replace(row.config, weight_drop=0.0))
        flagged = int((everything.drift_events & agreed).sum()) / int(agreed.sum())
        assert row.false_alarms == pytest.approx(flagged)


def test_bands_are_means_over_rollouts(embedded):
    report, rollouts = embedded
    band = report.bands[1]
    values = []
    for row in range(len(rollouts)):
        inside = rollouts.response_mask[row, band.first : band.last + 1]
        if inside.any():
            values.append(float(rollouts.overlap[row, band.first : band.last + 1][inside].mean()))
    assert band.rollouts == len(values)
    assert band.overlap[0] == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert band.overlap[1:] == pytest.approx(np.percentile(values, [10, 90]).tolist(), abs=1e-5)


def test_the_report_survives_the_disk_and_shows_what_it_found(embedded, tmp_path):
    report, _ = embedded
    assert PreflightReport.load(report.save(tmp_path)) == report
    assert PreflightReport.load(tmp_path) == report
    console = Console(record=True, width=150, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        report.show(console)
    text = console.export_text()
    assert report.recommendation.row.setting in text
    assert f"drift_threshold: {report.recommendation.row.config.threshold:g}" in text
    figures = draw_preflight(report, tmp_path)
    assert len(figures) == 3
    for path in figures:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.with_suffix(".csv").is_file()
    for broken in ({"kind": "something else"}, {**json.loads(report.to_json()), "version": 2}):
        (tmp_path / "preflight.json").write_text(json.dumps(broken))
        with pytest.raises(FileFormatError, match="not a valid preflight report"):
            PreflightReport.load(tmp_path)
    with pytest.raises(FileFormatError, match="no such file"):
        PreflightReport.load(tmp_path / "nothing.json")


def test_in_a_terminal_of_80_columns_every_row_of_a_table_is_one_line_and_every_column_explained():
    report = PreflightReport.load(Path(__file__).parents[2] / "examples" / "results" / "preflight")
    longest = DriftConfig("weighted_overlap", top_k=16, threshold=0.95, weight_drop=0.25)
    row = replace(report.grid[0], config=longest, false_alarms=0.0, step_seconds=0.0, step_share=1.0)
    text = io.StringIO()
    replace(report, grid=(row, *report.grid)).show(Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("Memory of a training step"))
    assert max(map(len, lines[begin:])) <= 80  # the checks before are sentences, which the terminal wraps
    first = next(number for number, line in enumerate(lines) if line.startswith("setting "))
    names = " ".join(lines[first - 1 : first + 1]).split()  # the longest words of a name stand below each other
    table = lines[first + 2 : lines.index("", first)]
    legend = [line for line in table if not line.endswith("%")]
    rows = [line for line in table if line.endswith("%")]
    assert len(rows) == 12
    assert all(len(line.split()) - line.startswith("→") == 4 + 6 for line in rows)  # the setting has four words
    assert any("weighted_overlap 16, 0.95, 0.25" in line for line in rows)
    for name in ("setting", "false alarms", "detection", "kept", "stopped", "agreed lost", "step"):
        assert set(name.split()) <= set(names)
        assert any(line.startswith(f"{name}  ") for line in legend)


def test_progress_is_told_while_rollouts_are_under_way():
    seen = []
    prompts = [problem.prompt for problem in ChainTask().problems(6, seed=0)]
    settings = {"num_generations": 1, "generation_batch_size": 4, "max_completion_length": 32, "drift_top_k": 2}
    report = preflight(
        load_student(),
        load_teacher(),
        prompts,
        processing_class=load_tokenizer(),
        check_every=4,
        on_progress=lambda *progress: seen.append(progress),
        **settings,
    )
    assert seen[0] == (0, 6, 16)  # four rows, four tokens each
    assert seen[-1] == (6, 6, report.tokens)
    assert [tokens for *_, tokens in seen] == sorted(tokens for *_, tokens in seen)


def test_the_stored_report_of_the_embedded_pair_can_be_read():
    report = PreflightReport.load(Path(__file__).parents[2] / "examples" / "results" / "preflight")
    assert report.works
    assert report.recommendation.row in report.grid


@pytest.mark.parametrize("wrong", ["\x1b[2J", math.nan, {"a": []}, [[None]]], ids=repr)
def test_a_field_of_a_wrong_type_or_with_control_characters_is_one_line(embedded, tmp_path, wrong):
    document = json.loads(embedded[0].to_json())
    for name in document["report"]:
        broken = {**document, "report": {**document["report"], name: wrong}}
        (tmp_path / "preflight.json").write_text(json.dumps(broken))
        with pytest.raises(FileFormatError) as refusal:
            PreflightReport.load(tmp_path)
        assert str(refusal.value).isprintable()


class Words:
    """A tokenizer over blank-separated words."""

    bos_token = pad_token = unk_token = None

    def __init__(self, *words, eos="</s>", template=None, extra=()):
        self.words, self.eos_token, self.chat_template, self.extra = words, eos, template, list(extra)

    def __len__(self):
        return len(self.words)

    def __call__(self, text):
        return {"input_ids": [*self.extra, *(hash(word) % 7 for word in text.split())]}

    def get_vocab(self):
        return {word: index for index, word in enumerate(self.words)}

    def convert_ids_to_tokens(self, index):
        return self.words[index] if index < len(self.words) else None

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        if self.chat_template == "broken":
            raise ValueError("only system messages\nplease")
        return f"{self.chat_template}{messages[0]['content']}"


def levels(student, teacher):
    checks, shared = check_tokenizers(student, teacher)
    return {check.name: check.level for check in checks}, shared, {check.name: check.message for check in checks}


def test_tokenizers_that_mean_other_tokens_stop_everything():
    found, shared, messages = levels(Words("a", "b"), Words("a", "c"))
    assert found["vocabulary"] == "stop"
    assert shared is None
    assert "'b'" in messages["vocabulary"]


def test_differences_that_matter_less_are_named():
    found, shared, messages = levels(
        Words("a", "b", eos="</s>", template="<u>"), Words("a", "b", "c", eos="<end>", template="<user>", extra=[1])
    )
    assert found == {
        "vocabulary": "note",
        "special tokens": "note",
        "tokenization": "warning",
        "chat template": "warning",
    }
    assert shared.size == 2
    assert "eos_token '</s>' and '<end>'" in messages["special tokens"]
    assert "'<u>What" in messages["chat template"]
    assert levels(Words("a", template="t"), Words("a"))[0]["chat template"] == "warning"
    assert levels(Words("a", template="broken"), Words("a", template="t"))[0]["chat template"] == "warning"
    assert set(levels(Words("a", template="t"), Words("a", template="t"))[0].values()) == {"fine"}


def renamed():
    tokenizer = load_tokenizer()
    vocabulary = {
        f"<other {token}>" if index in (0, 2) else token: index for token, index in tokenizer.get_vocab().items()
    }
    tokenizer.get_vocab = lambda: vocabulary
    return tokenizer


def test_renamed_special_tokens_rule_a_pair_out_unless_they_are_let_pass():
    pair = load_student(), load_teacher(), [problem.prompt for problem in ChainTask().problems(4, seed=0)]
    arguments = {"processing_class": load_tokenizer(), "teacher_processing_class": renamed()}
    arguments |= {"num_generations": 1, "max_completion_length": 24, "drift_top_k": 2}
    report = preflight(*pair, **arguments)
    assert not report.works
    assert "set allow_renamed_special_tokens" in report.recommendation.reason[0]
    report = preflight(*pair, **arguments, allow_renamed_special_tokens=True)
    assert report.rollouts == 4
    check = next(check for check in report.checks if check.name == "vocabulary")
    assert check.level == "warning"
    assert "token id 0 is '<pad>' for the student and '<other <pad>>' for the teacher" in check.message
    assert "token id 2" not in check.message  # what ends the responses of both is shared


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("frozen", ["adapter", "whole", "vision tower"])
def test_memory_and_times_of_an_update_are_of_what_is_trained(frozen):
    student = tiny_model("gemma3_vision", 1) if frozen == "vision tower" else load_student().requires_grad_(False)
    if frozen == "adapter":
        student = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        student.requires_grad_(False)
    settings = {
        "num_generations": 1,
        "max_completion_length": 8,
        "drift_top_k": 2,
        "processing_class": load_tokenizer(),
    }
    report = preflight(student, load_teacher(), [", +3 = 4"] * 4, **settings)
    assert (report.cost.per_kept_token is not None) == (frozen != "whole")
    parts = {name.split(".")[1] for name, weight in student.named_parameters() if weight.requires_grad}
    assert "vision_tower" not in parts
    trained = sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
    assert (report.memory.always["AdamW"], report.memory.update["gradients"]) == (8 * trained, 4 * trained)
    told = [check.message for check in report.checks if check.name == "what is trained"]
    assert [message.split(":")[0] for message in told] == ["no weight of the student gets a gradient"] * (trained == 0)


def test_prompts_may_be_text_and_conversations_and_the_one_that_cannot_be_used_is_named():
    tokenizer = load_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    prompts = [", +3 = 4", [{"role": "user", "content": ", +3 = 4"}]]
    arguments = {"processing_class": tokenizer, "num_generations": 1, "max_completion_length": 8, "drift_top_k": 2}
    assert preflight(load_student(), load_teacher(), prompts, **arguments).rollouts == 2
    prompts += [[*prompts[1], {"role": "assistant", "content": "= 7"}]]
    with pytest.raises(InputError, match="prompt 2: the last message is the assistant's"):
        preflight(load_student(), load_teacher(), prompts, **arguments)
    assert preflight(load_student(), load_teacher(), prompts, **arguments, final_assistant_message="drop").rollouts == 3


def end_tokens(student, teacher):
    named: dict[int, tuple[Source, ...]] = dict.fromkeys(student, (Source("student", "generation config"),))
    for token in teacher:
        named[token] = (*named.get(token, ()), Source("teacher"))
    return EndTokens(named, ())


# modelscope/ms-swift#9526
def test_an_end_of_the_teacher_at_which_the_student_alone_would_not_stop_is_warned_of():
    tokenizer = Words("a", "b", "c")
    assert check_end_tokens(end_tokens([1], [1]), tokenizer).level == "fine"
    assert check_end_tokens(end_tokens([1, 2], [1]), tokenizer).level == "note"
    assert check_end_tokens(end_tokens([1], []), tokenizer).level == "note"
    for student in ([1], []):
        warned = check_end_tokens(end_tokens(student, [2]), tokenizer)
        assert warned.level == "warning"
        assert "At 'c' 2 the student alone would not stop" in warned.message
        assert f"pass eos_token_id={[*student, 2]}" in warned.message


THINKING = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking is defined %}<think></think>{% endif %}"
)


# trl#7039, #3046: a template that thinks, and a student whose prompts do not lead there
@pytest.mark.parametrize(
    ("prompts", "student", "teacher", "level"),
    [
        (["q"], ["it is"], ["<think>"], "warning"),
        (["q"], ["it is"], ["\n<think> so"], "warning"),
        (["q<think>"], ["it is"], ["<think>"], "fine"),
        (["q"], ["it is"], ["[THINK] so"], "warning"),
        (["q[THINK]"], ["it is"], ["[THINK] so"], "fine"),
        (["q[THINK]no[/THINK]"], ["it is"], ["<thought>"], "warning"),
        (["q<think></think>"], ["it is"], ["it is"], "fine"),
        (["q"], ["<think>"], ["<think>"], "fine"),
        (["q"], ["it is"], ["it is"], "fine"),
    ],
)
def test_a_teacher_that_opens_with_a_thought_the_students_prompts_do_not_lead_to_is_warned_of(
    prompts, student, teacher, level
):
    tokenizer = Words("a", template=THINKING)
    found = check_thoughts(prompts * 4, student * 4, teacher * 4, tokenizer, Words("a"))
    assert found.level == level
    if level == "warning":
        assert "chat_template_kwargs ({'enable_thinking': False}, which its template knows)" in found.message


def test_a_teachers_template_that_opens_a_thought_is_warned_of():
    for opening in ("<think>", "[THINK]"):
        teacher = Words("a", template=opening)
        found = check_thoughts(["q"], ["a"], ["a"], Words("a", template="plain"), teacher)
        assert found.level == "warning"
        assert "give chat_template_kwargs; if it shall" in found.message


def test_the_preflight_lets_the_teacher_answer_for_itself_to_see_how_it_begins(embedded):
    report, _ = embedded
    assert {check.name: check.level for check in report.checks}["thoughts"] == "fine"


@pytest.mark.parametrize(
    ("eos", "message"), [(None, "names a token that ends a response"), (70, "token 70, which lies outside")]
)
def test_a_pair_without_an_end_that_both_know_is_ruled_out_before_anything_is_generated(eos, message):
    student, teacher, tokenizer = tiny_model("qwen3", 1, vocab_size=96, eos=eos), load_teacher(), load_tokenizer()
    tokenizer.eos_token = None
    for config in (teacher.config, teacher.generation_config):
        config.eos_token_id = None
    student.generate = None  # calling it would fail
    report = preflight(student, teacher, [", +3 = 4"], processing_class=tokenizer, max_completion_length=8)
    assert {check.name: check.level for check in report.checks}["end tokens"] == "stop"
    assert message in report.recommendation.reason[0]


def test_contexts_name_the_length_that_fits():
    fine, short, unknown = check_contexts({"student": 100, "teacher": 60, "other": None}, 40, 50)
    assert (fine.level, short.level, unknown.level) == ("fine", "stop", "fine")
    assert "lower max_completion_length to 20" in short.message


def record(q, ids=None, reasons=None, top=None):
    """A record whose sampled tokens have these teacher probabilities; 0 ends a row. EOS is token 1."""
    q = torch.tensor(q)
    mask = q > 0
    rows, time = q.shape
    ids = torch.full((rows, time), 5) if ids is None else torch.tensor(ids)
    top = torch.full((rows, time, 1), 5) if top is None else torch.tensor(top).unsqueeze(-1)
    zeros = torch.zeros(rows, time, 1)
    return Rollouts(
        prompt_ids=torch.arange(1, rows + 1).unsqueeze(-1),
        prompt_mask=torch.ones(rows, 1, dtype=torch.bool),
        response_ids=ids,
        response_mask=mask,
        teacher_token_log_probs=q.clamp(min=1e-9).log() * mask,
        teacher_topk_ids=top,
        teacher_topk_log_probs=zeros,
        drift_events=torch.zeros(rows, time, dtype=torch.bool),
        reliability=torch.zeros(rows, time),
        stop_reason=reasons or ("length",) * rows,
        config=DriftConfig("tail", 1, weight_drop=0.0),
        student_topk_ids=top,
        student_topk_log_probs=zeros,
        teacher_log_probs=zeros,
        token_log_probs=torch.zeros(rows, time),
        overlap=torch.zeros(rows, time),
    )


def agreeing(agreed):
    """A record whose tokens the teacher finds as likely as the student where `agreed`, and next to impossible elsewhere."""
    ones = torch.ones(agreed.shape)
    return replace(
        record(ones.tolist(), ones.long().tolist()),
        token_log_probs=0 * ones,
        teacher_token_log_probs=torch.where(agreed, 0.0, -9.0),
        teacher_topk_ids=torch.where(agreed, 1, 2).unsqueeze(-1),
    )


def test_ends_that_the_teacher_rejects_differ_from_ends_of_text_that_it_does_not_follow():
    ids = [[5, 5, 1], [5, 5, 1]]
    rejected = record([[0.9, 0.9, 0.001], [0.9, 0.8, 0.002]], ids, ("eos", "eos"))
    found = {check.name: check for check in check_rollout_end_tokens(rejected, [1])}
    assert found["the student's end tokens"].level == "warning"
    assert "responses grow" in found["the student's end tokens"].message
    lost = record([[0.9, 0.01, 0.001], [0.9, 0.02, 0.002]], ids, ("eos", "eos"))
    assert {check.name: check.level for check in check_rollout_end_tokens(lost, [1])}[
        "the student's end tokens"
    ] == "note"
    accepted = record([[0.9, 0.9, 0.9], [0.9, 0.01, 0.001]], ids, ("eos", "eos"))
    assert {check.name: check.level for check in check_rollout_end_tokens(accepted, [1])}[
        "the student's end tokens"
    ] == "fine"


def test_a_student_that_goes_on_where_the_teacher_would_end_is_noticed():
    goes_on = record([[0.9, 0.1, 0.9]], ids=[[5, 6, 7]], top=[[5, 1, 7]])
    found = {check.name: check for check in check_rollout_end_tokens(goes_on, [1])}
    assert found["the teacher's end tokens"].level == "warning"
    assert found["responses at the cap"].level == "warning"  # it met the cap
    agrees = record([[0.9, 0.9, 0.9]], ids=[[5, 6, 1]], top=[[5, 6, 1]], reasons=("eos",))
    assert {check.level for check in check_rollout_end_tokens(agrees, [1])} == {"fine"}


def test_memory_is_counted_from_the_shapes():
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2).half()
    memory = step_memory(student, teacher, rows=3, tokens=50, check_every=10, top_k=2)
    numbers = sum(value.numel() for value in student.parameters())
    assert memory.always["student, weights"] == memory.update["gradients"] == 4 * numbers
    assert memory.always["AdamW"] == 8 * numbers
    assert memory.always["teacher, weights (float16)"] == 2 * numbers
    # 2 layers x 2 key-value heads of 8 numbers, keys and values: 64 numbers a token; a cache of 50 tokens has room for 129
    assert cache_bytes_per_token(student) == 64 * 4
    assert memory.generation["teacher's KV cache"] == 64 * 2 * 3 * 129
    # as projected in float16, in float32, and exponentials
    assert memory.generation["teacher's logits at once"] == 3 * 10 * 48 * (2 + 4 + 4)
    assert memory.generation["rollouts"] == 3 * 50 * (26 + 28 * 2)
    updating, generating = sum(memory.update.values()), sum(memory.generation.values())
    assert memory.peak == sum(memory.always.values()) + max(updating, generating)
    assert step_memory(student, student, rows=1, tokens=1).always["teacher, weights"] == 0
    # On the disk: one module at a time, the largest of 48 x 32 numbers and 48 more: the head with its bias.
    away = step_memory(student, teacher.float().to("meta"), rows=1, tokens=1)
    assert away.always["teacher, weights (float32)"] == 4 * (48 * 32 + 48)
    student.model.requires_grad_(False)
    trained = 48 * 32 + 48
    frozen = step_memory(student, None, rows=1, tokens=1)
    assert frozen.always["student, weights"] == 4 * numbers
    assert (frozen.update["gradients"], frozen.always["AdamW"]) == (4 * trained, 8 * trained)
    teacher.to_empty(device="cpu").get_input_embeddings().requires_grad_(False)
    in_float32 = step_memory(teacher, None, rows=1, tokens=40).update["activations of 40 tokens"]
    assert step_memory(teacher.bfloat16(), None, rows=1, tokens=40).update["activations of 40 tokens"] == in_float32 > 0


def test_a_recorded_token_has_as_many_bytes_as_memory_counts():
    rollouts = record([[0.9, 0.8]], [[5, 6]])
    rows, time, k = rollouts.teacher_topk_ids.shape
    of_tokens = sum(
        value.numel() * value.element_size()
        for value in rollouts.tensors().values()
        if value.shape[:2] == (rows, time) and value is not rollouts.prompt_ids and value is not rollouts.prompt_mask
    )
    assert of_tokens == rows * time * (26 + 28 * k)


@pytest.mark.parametrize("how", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=["plain", "both"])
def test_the_largest_budget_fits_and_one_token_more_does_not(how):
    student = tiny_model("qwen3", 1)
    asked = {"rows": 1, "tokens": 20, **how}
    available = step_memory(student, None, pass_tokens=333, **asked).peak
    assert step_memory(student, None, available=available, **asked).most_tokens == 333
    assert step_memory(student, None, available=1, **asked).most_tokens == 0


def test_a_budget_below_the_longest_row_holds_that_row_and_none_fits_where_it_does_not():
    student = tiny_model("qwen3", 1)
    of_row = step_memory(student, None, rows=1, tokens=200).peak
    assert step_memory(student, None, rows=1, tokens=200, pass_tokens=1).peak == of_row
    assert step_memory(student, None, rows=1, tokens=200, available=of_row).most_tokens == 200
    assert step_memory(student, None, rows=1, tokens=200, available=of_row - 1).most_tokens == 0


def test_the_activations_of_a_model_that_computes_in_chunks_are_told_far_beyond_the_passes_that_were_tried():
    student = tiny_model("qwen3_next", 1)
    kept = kept_for_backward(student, 600)
    assert activations(student)(600) == pytest.approx(kept.layers + kept.outside, rel=0.1)


def test_a_copy_to_sample_with_is_two_bytes_for_each_weight_all_the_time():
    student = tiny_model("qwen3", 1)
    without, beside = (step_memory(student, None, rows=1, tokens=20, rollout_dtype=how) for how in (None, "bfloat16"))
    assert beside.peak - without.peak == 2 * sum(weight.numel() for weight in student.parameters())


def test_the_cache_of_a_compiled_step_is_there_in_the_update_as_well():
    student = tiny_model("qwen3", 1)
    freed, kept = (step_memory(student, None, rows=2, tokens=20, compile_decoding=how) for how in (False, True))
    name = "student's KV cache"
    assert kept.always[name] == freed.generation[name]
    assert name not in kept.generation
    update = sum(freed.update.values())
    assert kept.peak == sum(freed.always.values()) + freed.generation[name] + update  # here an update holds more


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_activations_of_a_long_row_follow_from_short_ones(attention):
    """Against a pass of that length; and never less than the MLPs keep: gate, up, what activates it, and their product."""
    student = tiny_model("qwen3", 1)
    student.set_attn_implementation(attention)
    config, found, kept = student.config, activations(student)(300), kept_for_backward(student, 300)
    assert found == pytest.approx(kept.layers + kept.outside, rel=1e-3)
    assert found > 4 * 300 * config.num_hidden_layers * 4 * config.intermediate_size
    again = activations(student, gradient_checkpointing=True)(300)
    assert again == pytest.approx(kept.inputs + kept.largest_layer + kept.outside, rel=1e-3)
    assert kept.inputs == 4 * 300 * config.num_hidden_layers * config.hidden_size


def test_under_autocast_the_copies_of_the_weights_are_held_until_a_layer_keeps_more_than_they():
    """24 layers: the copies outweigh what one layer keeps of 128 tokens, and not what it keeps of 256."""
    student = tiny_model("qwen3", 1, num_hidden_layers=24)
    copies = 2 * sum(part.weight.numel() for part in student.modules() if isinstance(part, torch.nn.Linear))
    predicted = activations(student, bf16=True, gradient_checkpointing=True)
    for tokens, held in ((128, False), (600, True)):
        kept = kept_for_backward(student, tokens, bf16=True)
        assert (kept.largest_layer > copies) == held
        expected = kept.inputs + kept.outside + max(kept.largest_layer, copies)
        assert predicted(tokens) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3_vision"])
def test_a_model_whose_passes_depend_on_values_is_asked_itself(family, capfd):
    student = tiny_model(family, 1)
    kept = kept_for_backward(student, 90)
    assert activations(student)(90) == pytest.approx(kept.layers + kept.outside, rel=0.05)
    assert "Error" not in capfd.readouterr().err


def test_the_activations_of_a_model_with_a_short_context_are_told_within_it():
    student = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=20, n_embd=16, n_layer=1, n_head=2))
    kept = kept_for_backward(student, 18)
    assert activations(student)(18) == pytest.approx(kept.layers + kept.outside, rel=1e-3)


def test_the_cost_of_reading_the_prompts_is_separated_from_that_of_decoding():
    def block(rows, first):
        extra = (0.5, 0.25) if first else (0.0, 0.0)
        return BlockTime(
            first, 4, 4 * rows, 4 * rows, 4 * 0.01 + 4 * rows * 0.001 + extra[0], 0.02 + 4 * rows * 0.002 + extra[1]
        )

    cost = StepCost.fit([block(rows, first) for rows, first in ((9, True), (9, False), (5, False), (2, False))])
    assert cost.prompt_student == pytest.approx(0.5)
    assert cost.prompt_teacher == pytest.approx(0.25)
    assert cost.per_position == pytest.approx(0.01)
    assert cost.per_scored_token == pytest.approx(0.002)
    assert cost.fit_error == pytest.approx(0, abs=1e-9)


def test_a_teacher_that_reads_anew_costs_what_it_reads():
    """Two generations of 100 and 200 tokens read, at 10 ms a token; later ones read 150 at two checks."""
    blocks = [BlockTime(True, 20, 80, 100, 1.0, 1.0), BlockTime(True, 30, 170, 200, 2.0, 2.0)]
    cost = StepCost.fit(blocks, reads_anew=True)
    assert cost.per_scored_token == pytest.approx(0.01)
    assert cost.per_block == 0
    bill = TokenBill(sampled=60, kept=50, positions=20, read=150)
    without = cost.seconds(bill._replace(read=0), check_every=10)
    assert cost.seconds(bill, check_every=10) - without == pytest.approx(1.5)


def test_an_engine_that_fails_is_closed(monkeypatch):
    """What it holds, such as weights saved for a server, is given back."""

    class Engine:
        closed = False

        def update_weights(self, model, step):
            raise InputError("the server is gone")

        def close(self):
            self.closed = True

    engine = Engine()
    monkeypatch.setattr(step_cost, "make_engine", lambda *_, **__: engine)
    teacher = LocalTeacher(load_teacher(), top_k=2)
    with pytest.raises(InputError, match="the server is gone"):
        step_cost.generate_unpruned(
            load_student(), teacher, [[3]], Sampling(8, (1,), 0), batch_size=1, check_every=8, seed=0
        )
    assert engine.closed


def test_projected_seconds_count_what_is_sampled_beyond_a_stop():
    # Nucleus of the top 1: tokens that are not 5 are drift. The first row drifts at its second token of six.
    ids = [[5, 6, 6, 6, 6, 6], [5, 5, 5, 5, 5, 5]]
    part = record([[0.95, 0.001, 0.001, 0.001, 0.001, 0.001], [0.95] * 6], ids)
    [row] = try_settings(part, [DriftConfig("nucleus", 1, 0.5, weight_drop=1.0)], FREE, batch_size=8, check_every=4)
    assert unpruned_seconds(part, FREE, batch_size=8, check_every=4) == 12
    assert row.step_seconds == 4 + 6  # the stopped row runs to the end of its block of four
    assert row.kept_share == pytest.approx((2 + 6) / 12)
    assert row.sampled_share == pytest.approx(10 / 12)
    assert (row.false_alarms, row.detection) == (0.0, 1.0)
    assert (row.agreed_before, row.agreed_after, row.agreed_lost) == (7 / 8, 0.0, 0.0)
    later = DriftConfig("nucleus", 1, 0.5, weight_drop=1.0, min_length=5)
    [late] = try_settings(part, [later], FREE, batch_size=8, check_every=4)
    assert late.kept_share == pytest.approx((5 + 6) / 12)


def row(metric="overlap", threshold=0.5, **changes):
    values = {
        "config": DriftConfig(metric, 4, threshold, 0.1),
        "false_alarms": 0.01,
        "detection": 0.9,
        "kept_share": 0.4,
        "sampled_share": 0.5,
        "stopped_share": 0.8,
        "agreed_before": 0.8,
        "agreed_after": 0.1,
        "agreed_lost": 0.05,
        "step_seconds": 1.0,
        "step_share": 0.5,
    }
    return GridRow(**{**values, **changes})


def advise(rows, **changes):
    return recommend(rows, **{"rollouts": 256, "early_agreement": 0.9, "taken_away": 0.5, **changes})


def test_the_advice_is_the_cheapest_setting_that_passes_every_test():
    cheap_but_blind = row(step_seconds=0.1, detection=0.1)
    cheap_but_shrill = row(step_seconds=0.1, false_alarms=0.5)
    cheap_but_anywhere = row(step_seconds=0.1, agreed_after=0.8)
    good, gentler = row(threshold=0.6), row(threshold=0.7, step_seconds=1.05, agreed_lost=0.01)
    nucleus = row(metric="nucleus", step_seconds=0.2)
    rows = [cheap_but_blind, cheap_but_shrill, cheap_but_anywhere, good, gentler, nucleus]
    advice = advise(rows)
    assert (advice.works, advice.row) == (True, gentler)
    assert advise([nucleus, cheap_but_blind]).row == nucleus


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(false_alarms=0.2)], "flags more than 5%"),
        ([row(detection=0.1)], "notices 30%"),
        ([row(agreed_after=0.7)], "about as agreed"),
        ([row(agreed_after=None)], "about as agreed"),
        ([row(agreed_lost=0.2)], "loses more than 10%"),
        ([row(sampled_share=0.99)], "saves 5%"),
    ],
)
def test_where_pruning_is_not_worth_it_the_advice_gives_the_reason(rows, message):
    advice = advise(rows)
    assert (advice.works, advice.row) == (True, None)
    assert message in advice.reason[0]


def synthetic_pair(noise, rows=64, vocabulary=60, seed=0):
    """Rollouts of a student with random flat distributions, and a teacher whose logits differ by noise of this scale, which is
    given for each row and position."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, noise.shape[-1], vocabulary)
    p = (1.5 * torch.randn(shape, generator=generator)).log_softmax(-1)
    q = (p + noise.unsqueeze(-1) * torch.randn(shape, generator=generator)).log_softmax(-1)
    tokens = p.exp().flatten(0, 1).multinomial(1, generator=generator).view(shape[:2])
    student, teacher, at = p.topk(16), q.topk(16), tokens.unsqueeze(-1)
    base = record(torch.ones(shape[:2]).tolist(), tokens.tolist())
    return replace(
        base,
        teacher_token_log_probs=q.gather(-1, at).squeeze(-1),
        token_log_probs=p.gather(-1, at).squeeze(-1),
        student_topk_ids=student.indices,
        student_topk_log_probs=student.values,
        teacher_topk_ids=teacher.indices,
        teacher_topk_log_probs=teacher.values,
        teacher_log_probs=q.gather(-1, student.indices),
    )


def advice_on(rollouts):
    rows = tuple(try_settings(rollouts, settings_grid(16), FREE, batch_size=64, check_every=4))
    advice = recommend(
        rows, rollouts=64, early_agreement=early_agreement(rollouts), taken_away=probability_taken_away(rollouts)
    )
    return confirm_falling_agreement(advice, rollouts)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_steady_disagreement_is_no_drift_and_disagreement_that_sets_in_is(seed):
    """Seen on SmolLM2 without three layers: an overlap of .7 at every position, of which earlier advice kept 16 % of the tokens.
    Drift that sets in anywhere in the rollout, and stays, is to be pruned; the same share of bad positions everywhere is not."""
    onset = torch.randint(0, 64, (64, 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(64).expand(64, 64)
    drifting = torch.where(positions < onset, 0.5, 6.0)
    shuffled = drifting.flatten()[torch.randperm(64 * 64, generator=torch.Generator().manual_seed(seed))].view(64, 64)
    assert advice_on(synthetic_pair(drifting, seed=seed)).row is not None
    for steady in (shuffled, torch.full((64, 64), 1.5)):
        advice = advice_on(synthetic_pair(steady, seed=seed))
        assert (advice.works, advice.row) == (True, None)
    itself = advice_on(synthetic_pair(torch.zeros(64, 64), seed=seed))
    assert "nothing to prune" in itself.reason[0]


def test_the_contrast_at_the_stops_is_counted_and_has_a_control():
    """Ten rows of ten tokens: five agreed, then five that are events. With drop 0.5 a row ends at its second event: 5 of the 7
    tokens before are agreed and none of the 3 behind. Shuffled, as many are agreed behind as before, up to the two events."""
    agreed = torch.arange(10).expand(10, 10) < 5
    rollouts = agreeing(agreed)
    found = measure_contrast(rollouts, DriftConfig("nucleus", 1, 0.9, 0.5, min_length=0))
    assert (found.value, found.low, found.high, found.stopped) == (0, 0, 0, 10)
    assert found.shuffled > 1
    assert found.beyond_shuffled == 0


@pytest.mark.parametrize(
    ("behind", "stopped", "says"), [(0.0, 10, None), (0.0, 4, "Take about"), (0.4, 12, "Take about")]
)
def test_advice_to_prune_rests_on_enough_rollouts_that_stop_where_agreement_falls(behind, stopped, says):
    """Twelve rows; those that stop do so at token 8 of 16, and this share of the tokens behind is agreed, in blocks of rows."""
    agreed = torch.ones(12, 16, dtype=torch.bool)
    agreed[:stopped, 7:9] = False
    agreed[round(behind * stopped) : stopped, 9:] = False
    rollouts = agreeing(agreed)
    chosen = replace(row(), config=DriftConfig("nucleus", 1, 0.9, 0.5, min_length=0))
    advice = confirm_falling_agreement(Recommendation(True, chosen, ("Take it.", "It saves.")), rollouts)
    assert (advice.row is None) == (says is not None)
    assert any((says or "95% interval") in line for line in advice.reason)
    if says:
        assert int(advice.reason[0].split("Take about ")[1].split(",")[0]) >= 24


def test_where_pruning_is_not_advised_the_profile_of_agreement_is_told():
    """Ten rows of ten tokens: all of the first five are agreed, and of the last five one in five."""
    agreed = (torch.arange(10).expand(10, 10) < 5) | (torch.arange(10) == 9)
    rollouts = agreeing(agreed)
    told = confirm_falling_agreement(Recommendation(True, None, ("Do not.",)), rollouts).reason[1]
    assert "agrees with 100% of the tokens, of the second with 20%: 0.20 of it, 95% interval [0.20, 0.20]" in told
    for row, why in (([True], "no rollout has a second token"), ([False, True], "no token of their first halves")):
        assert describe_profile(agreeing(torch.tensor([row] * 10))).endswith(f"{why}.")
    ruled_out = Recommendation(False, None, ("It will not work.",))
    assert confirm_falling_agreement(ruled_out, rollouts) == ruled_out


def test_answers_to_one_prompt_are_no_evidence_of_their_own():
    """The same rollouts three times over, as of a prompt that is always answered alike: the interval stays as wide."""
    agreed = torch.ones(12, 16, dtype=torch.bool)
    agreed[:, 7:9], agreed[5:, 9:] = False, False
    once = agreeing(agreed)
    config = DriftConfig("nucleus", 1, 0.9, 0.5, min_length=0)
    alone, thrice = (measure_contrast(rollouts, config) for rollouts in (once, Rollouts.cat([once] * 3)))
    assert (thrice.low, thrice.high, thrice.prompts) == (alone.low, alone.high, 12)
    assert thrice.stopped == 3 * alone.stopped


def test_a_setting_that_flags_agreed_tokens_as_well_is_a_fixed_length_and_is_called_so():
    """Nucleus of the top 1: tokens that are not 5 are events, here 94 of 100, all agreed. A hundred events take 100 / .94 = 106
    tokens. Where the events are those that surprise the teacher the setting is none."""
    ids = [[5] * 6 + [6] * 94] * 3
    everywhere = record(torch.ones(3, 100).tolist(), ids)
    [warning] = check_fixed_length(everywhere, DriftConfig("nucleus", 1, 0.9, 0.01))
    assert warning.level == "warning"
    assert "94% of the tokens are events, and 94% of those that the teacher agrees with" in warning.message
    assert "drop 0.01 stops every row that gets there at about 106 tokens" in warning.message
    late = check_fixed_length(everywhere, DriftConfig("nucleus", 1, 0.9, 0.25, min_length=50))
    assert "about 50 tokens" in late[0].message
    assert check_fixed_length(everywhere, DriftConfig("nucleus", 1, 0.9, 0.0)) == []
    surprised = replace(everywhere, teacher_token_log_probs=torch.where(torch.tensor(ids) == 6, -9.0, 0.0))
    assert check_fixed_length(surprised, DriftConfig("nucleus", 1, 0.9, 0.01)) == []


def test_a_pair_that_disagrees_from_the_first_tokens_is_ruled_out():
    advice = advise([row()], early_agreement=0.05)
    assert not advice.works
    assert "will not work" in advice.reason[0]


def test_a_handful_of_rollouts_rules_no_pair_out():
    prompt = [problem.prompt for problem in ChainTask().problems(8, seed=0)][:1]
    torch.manual_seed(0)
    untrained = type(load_student())(load_student().config)  # as many rollouts of this student would rule the pair out
    settings = {"processing_class": load_tokenizer(), "num_generations": 1, "max_completion_length": 48}
    report = preflight(untrained, load_teacher(), prompt, **settings)
    assert report.works
    assert "1 rollout cannot decide" in report.recommendation.reason[0]
    many = preflight(untrained, load_teacher(), prompt, **{**settings, "num_generations": 64})
    assert not many.works


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_student_that_is_its_own_teacher_is_not_to_be_pruned(temperature):
    """Unsure as this student is, both models are so in the same way: Σ min(p, p) = Σ p, so nothing is taken away."""
    student = load_student()
    prompts = [problem.prompt for problem in ChainTask().problems(8, seed=0)]
    report = preflight(
        student,
        student,
        prompts,
        processing_class=load_tokenizer(),
        num_generations=2,
        max_completion_length=48,
        temperature=temperature,
    )
    assert report.works
    assert report.recommendation.row is None
    assert "nothing to prune" in report.recommendation.reason[0]


def test_a_model_that_is_named_twice_is_loaded_once():
    folder = str(WEIGHTS / "student")
    report = preflight(folder, folder, [", +3 = 4"], num_generations=1, max_completion_length=8)
    assert report.memory.always["teacher, weights"] == 0
    assert {check.name: check.level for check in report.checks}["vocabulary"] == "fine"


def test_prompts_that_are_left_out_as_too_long_are_counted_in_the_report():
    prompts = [", +3 = 4", ", +3 , +3 , +3 , +3 , +3 = 4"]
    short = len(load_tokenizer()(prompts[0])["input_ids"])
    settings = {
        "processing_class": load_tokenizer(),
        "num_generations": 1,
        "max_completion_length": 8,
        "drift_top_k": 2,
    }
    report = preflight(load_student(), load_teacher(), prompts, max_prompt_length=short, **settings)
    assert report.rollouts == 1
    notes = [check.message for check in report.checks if check.name == "prompts"]
    assert notes == [f"1 of 2 prompts have more than max_prompt_length={short} tokens and were left out"]
    fitting = preflight(load_student(), load_teacher(), prompts[:1], max_prompt_length=short, **settings)
    assert "prompts" not in {check.name for check in fitting.checks}


def test_a_teacher_that_is_not_there_is_found_before_the_student_is_loaded(monkeypatch):
    monkeypatch.setattr(run_preflight, "load_causal_lm", None)  # calling it would fail otherwise
    with pytest.raises(InputError, match="cannot load the teacher"):
        preflight(str(WEIGHTS / "student"), "./no-such-teacher", [", +3 = 4"], max_completion_length=8)


def test_an_untrained_pair_is_ruled_out_by_its_rollouts():
    student, teacher = tiny_model("qwen3", 1, vocab_size=64), tiny_model("qwen3", 2, vocab_size=64)
    report = preflight(
        student,
        teacher,
        [", +3 , x7 = 4"] * 2,
        processing_class=load_tokenizer(),
        num_generations=5,
        max_completion_length=20,
        drift_top_k=4,
    )
    assert not report.works
    assert report.rollouts == 10


def test_unused_vocabulary_rows_of_the_student_are_never_sampled():
    student, teacher = tiny_model("qwen3", 1, vocab_size=96), tiny_model("qwen3", 2, vocab_size=64)
    tokenizer = load_tokenizer()
    report = preflight(
        student, teacher, [", +3 = 4"] * 3, processing_class=tokenizer, max_completion_length=12, drift_top_k=4
    )
    assert report.rollouts == 12  # a token of those rows would have been refused by the teacher


def test_an_obstacle_is_found_before_anything_is_generated():
    student, teacher = load_student(), load_teacher()
    student.generate = teacher.generate = None  # calling it would fail
    report = preflight(student, teacher, [", +3 = 4"], processing_class=load_tokenizer(), max_completion_length=4096)
    assert not report.works
    assert report.rollouts == 0
    assert "max_completion_length" in report.recommendation.reason[0]
    report.show(Console(quiet=True))
    assert draw_preflight(report, "unused") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ({"engine": "vlm"}, "engine must be one of auto, loop, continuous_batching, vllm; got 'vlm'"),
        ({"rollout_dtype": "float31"}, "rollout_dtype must be bfloat16"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"drift_min_length": -1}, "min_length must be a whole number of at least 0"),
        ({"prompts": [[{"role": "user", "content": "+3"}]]}, "no chat template"),
        ({"processing_class": None}, "processing_class is needed"),
        ({"chat_template_kwargs": {"think": True}}, "chat_template_kwargs has no effect on prompts that are text"),
    ],
)
def test_arguments_that_cannot_be_worked_with_are_refused(change, message):
    arguments = {"prompts": [", +3 = 4"], "processing_class": load_tokenizer(), "max_completion_length": 8, **change}
    student = load_student()
    student.generate = None  # calling it would fail otherwise
    with pytest.raises((ConfigError, InputError), match=message):
        preflight(student, load_teacher(), **arguments)


def test_the_grid_holds_no_two_overlap_thresholds_that_no_set_can_tell_apart():
    for recorded in (1, 2, 5, 16, 64):
        seen = set()
        for config in settings_grid(recorded, weight_drops=(0.1,)):
            assert config.top_k <= recorded
            needed = math.ceil(round(config.threshold * config.top_k, 9))
            key = (config.metric, config.top_k, needed if config.metric == "overlap" else config.threshold)
            assert key not in seen
            seen.add(key)


def test_the_command_leaves_report_figures_and_rollouts(tmp_path, capsys):
    pair = [
        "preflight",
        "--model_name_or_path",
        "embedded",
        "--teacher_model_name_or_path",
        "embedded",
        "--dataset_name",
    ]
    options = (
        "embedded --num_prompts 24 --num_generations 1 --max_completion_length 64 --check_every 8 --output_dir".split()
    )
    code = main([*pair, *options, str(tmp_path / "out")])
    assert code == 0
    assert {"preflight.json", "rollouts.safetensors", "settings.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert "Preflight: student embedded, teacher embedded" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert main([*pair, *options, str(tmp_path / "out")]) == 2
    assert "exists and is not empty: remove it, or choose another output_dir" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert main([*pair, "no.jsonl"]) == 2
    beside = [
        "--teacher_model_server_url",
        "http://nobody.example",
        "--teacher_quantization_config",
        '{"load_in_8bit": true}',
    ]
    assert main([*pair, "embedded", *beside]) == 2
    assert "teacher_quantization_config is for a teacher that is loaded here" in capsys.readouterr().err
    assert main([*pair, "embedded", "--dtype", "junk"]) == 2
    assert "dtype must be auto, float32, bfloat16 or float16, got 'junk'" in capsys.readouterr().err


def test_without_matplotlib_the_table_is_printed_and_the_report_left(tmp_path, capsys, caplog, without_matplotlib):
    arguments = "preflight --model_name_or_path embedded --teacher_model_name_or_path embedded --dataset_name embedded"
    arguments += " --num_prompts 4 --num_generations 1 --max_completion_length 24 --check_every 8 --output_dir"
    assert main([*arguments.split(), str(tmp_path / "out")]) == 0
    assert "Preflight: student embedded, teacher embedded" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"preflight.json", "rollouts.safetensors"}
    assert caplog.text.count("no figures are drawn: figures need matplotlib") == 1


def test_a_served_teacher_that_scores_given_ids_is_looked_at_as_one_of_this_process():
    prompts = [problem.prompt for problem in ChainTask().problems(4, seed=0)]
    settings = {
        "processing_class": load_tokenizer(),
        "num_generations": 1,
        "max_completion_length": 12,
        "drift_top_k": 2,
    }
    with FakeVLLM(load_teacher()) as server:
        with pytest.raises(
            ConfigError, match=r"the preflight needs a teacher that scores any token ids.*server on a GPU"
        ):
            preflight(load_student(), ServedTeacher(server.url, top_k=2), prompts, **settings)
        server.scores_ids = True
        served = preflight(load_student(), ServedTeacher(server.url, top_k=2), prompts, **settings)
    local = preflight(load_student(), load_teacher(), prompts, **settings)
    assert served.cost.reads_anew
    assert not local.cost.reads_anew
    assert served.teacher == "student, on vLLM servers"  # what the stand-in calls its model
    assert served.memory.always["teacher, weights"] == served.memory.generation["teacher's KV cache"] == 0
    assert [band.overlap for band in served.bands] == [band.overlap for band in local.bands]
