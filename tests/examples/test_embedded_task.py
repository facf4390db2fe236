"""How the embedded task's weights were made: recipes that make such models again, and a command that leaves all or nothing."""

import dataclasses
import json
import subprocess
import sys

import build_weights
import pytest
import torch
from build_weights import build, main, measure
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import STUDENT_RECIPE, TEACHER_RECIPE, cold_start_student, train_teacher
from servable import with_heads_of_32
from style_b import DriftingTask, is_drifting
from transformers import AutoModelForCausalLM, AutoTokenizer
from word_tokenizer import VOCABULARY, build_tokenizer

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.tasks import is_correct, load_student, load_tokenizer
from prune_opd_hf.tasks.chain import FILLERS

TINY = {
    "problems": 8,
    "recipes": (
        DriftingTask(operations=2, filler_min=1, filler_max=3),
        dataclasses.replace(TEACHER_RECIPE, clean_steps=2, batch_size=4),
        dataclasses.replace(STUDENT_RECIPE, clean_steps=1, mixed_steps=1, batch_size=4),
    ),
}


def test_the_folder_holds_both_models_their_tokenizers_and_how_they_were_made(tmp_path):
    build(tmp_path / "deep" / "weights", seed=5, **TINY)
    folder = tmp_path / "deep" / "weights"
    files = ["README.md", "evaluation.jsonl", "student", "teacher", "training.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == files
    rows = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(is_correct(row["trace"], row["answer"]) for row in rows)
    for name, layers in (("teacher", 3), ("student", 2)):
        assert AutoModelForCausalLM.from_pretrained(folder / name).config.num_hidden_layers == layers
        assert len(AutoTokenizer.from_pretrained(folder / name)) == 64
    files = [folder / name / "tokenizer.json" for name in ("teacher", "student")]
    assert files[0].read_bytes() == files[1].read_bytes()
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "python examples/embedded_task/build_weights.py --output_dir weights --seed 5" in readme
    assert readme.count("| sampled |") == readme.count("| greedy |") == 2
    assert str(tmp_path) not in readme


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(build_weights, "cold_start_student", fail)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "weights", **TINY)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_with_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "keep").write_text("mine")
    command = [sys.executable, "examples/embedded_task/build_weights.py", "--output_dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"error: the output folder exists already: {tmp_path}; name a new one or remove it\n"
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "got 'abacus'"),
        (["--task", "sums"], "task must be one of embedded, varied, got 'sums'"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--problems", "0"], "problems must be at least 1, got 0"),
    ],
)
def test_an_argument_that_cannot_work_is_refused_with_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    assert main(["--output_dir", str(tmp_path / "weights"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--output_dir", str(tmp_path / "file" / "weights")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_builds_with_what_it_was_told(tmp_path, capsys, monkeypatch):
    received = {}
    monkeypatch.setattr(build_weights, "build", lambda output, **settings: received.update(settings, output=output))
    arguments = ["--output_dir", str(tmp_path / "weights"), "--seed", "4", "--problems", "16", "--task", "varied"]
    assert main(arguments) == 0
    expected = {"output": tmp_path / "weights", "seed": 4, "device": "cpu", "problems": 16, "task_name": "varied"}
    assert received == expected
    assert capsys.readouterr().out == f"wrote {tmp_path / 'weights'}\n"


def test_the_shipped_tokenizer_is_the_one_that_is_built():
    shipped, built, text = load_tokenizer(), build_tokenizer(), ", +3 , x7 = 4"
    assert shipped.get_vocab() == built.get_vocab() == {word: index for index, word in enumerate(VOCABULARY)}
    assert shipped.special_tokens_map == built.special_tokens_map
    assert shipped(text).input_ids == built(text).input_ids == [1, 4, 20, 4, 28, 5, 12]
    assert (built.padding_side, built.model_max_length) == (shipped.padding_side, shipped.model_max_length)


# ---------------------------------------------------------------------- recipes


SHORT = DriftingTask(operations=3, filler_min=4, filler_max=8)


def measured(model, task):
    """Exact match and share of style B on 256 evaluation problems."""
    problems = task.problems(256, 1, "evaluation")
    exact, drifting = measure(model, load_tokenizer(), problems, max_new_tokens=task.longest_response_tokens)
    return exact.value, drifting


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_teacher_of_shorter_chains_is_learnt_from_scratch():
    teacher = train_teacher(SHORT, recipe=dataclasses.replace(TEACHER_RECIPE, clean_steps=150), progress=False)
    assert measured(teacher, SHORT)[0] >= 0.9


def test_a_student_of_shorter_chains_learns_both_styles():
    """It ends up worse than the clean style alone would be, and drifts about as often as its traces did (.82)."""
    recipe = dataclasses.replace(STUDENT_RECIPE, clean_steps=60, mixed_steps=60)
    exact, drifting = measured(cold_start_student(SHORT, recipe=recipe, progress=False), SHORT)
    assert SHORT.drifting_share == pytest.approx(1 - 0.2 * 0.95**2)
    assert drifting == pytest.approx(SHORT.drifting_share, abs=0.2)
    assert exact < 0.5


def test_traces_of_chains_that_differ_in_length_drift_as_often_as_expected():
    """Lengths 2 and 3 as likely, chances .5 and .2: half of .6 and half of .68 drift. The error of a share of 4,000 is .008."""
    task = DriftingTask(operations=3, operations_min=2, drift_first=0.5, drift_later=0.2, filler_min=1, filler_max=2)
    assert task.drifting_share == pytest.approx(0.64)
    problems = task.problems(4000, 0)
    traces = task.mixed_traces(problems, 1)
    assert sum(map(is_drifting, traces)) / 4000 == pytest.approx(0.64, abs=0.03)
    for problem, trace in zip(problems, traces, strict=True):
        assert is_drifting(trace) or trace == problem.trace


@pytest.mark.slow
def test_the_full_recipe_makes_a_teacher_of_the_same_class():
    assert measured(train_teacher(progress=False), DriftingTask())[0] >= 0.97


@pytest.mark.slow
def test_the_full_recipe_makes_a_student_of_the_same_class():
    exact, drifting = measured(
        cold_start_student(progress=False, seed=1), DriftingTask()
    )  # seeds 0 to 3: 0.24, 0.16, 0.12, 0.14
    assert 0.05 < exact < 0.20
    assert drifting > 0.6


@pytest.mark.parametrize("train", [train_teacher, cold_start_student])
def test_the_same_seed_makes_the_same_weights_and_another_seed_others(train):
    recipe = dataclasses.replace(STUDENT_RECIPE, clean_steps=2, mixed_steps=2, batch_size=4)
    first, again, other = (train(SHORT, recipe=recipe, seed=seed, progress=False) for seed in (3, 3, 4))
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_the_measured_share_counts_right_answers_against_a_model_that_always_says_the_same():
    """A model of constant logits decodes the end at once, which has no digit before it: nothing is right."""
    model = load_student()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    model.generation_config.eos_token_id = 0  # the arg max of equal logits
    exact, drifting = measure(
        model, load_tokenizer(), SHORT.problems(30, 1, "evaluation"), max_new_tokens=4, temperature=0.0
    )
    assert (exact.value, drifting) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"heads": 5}, "hidden_size 96 and heads 5"),
        ({"clean_steps": 0}, "clean_steps 0 and mixed_steps 0"),
        ({"mixed_steps": -1}, "mixed_steps -1"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TEACHER_RECIPE, **settings)


def test_a_task_beyond_the_context_is_refused_before_training():
    """100 operations: 203 prompt tokens and 2 x 99 + 1 + 120 + 3 = 322 response tokens."""
    with pytest.raises(ConfigError, match="512 tokens in all, got a task of up to 525"):
        train_teacher(DriftingTask(operations=100, filler_max=120))


def test_an_unknown_device_is_refused_before_training():
    with pytest.raises(ConfigError, match="got 'abacus'"):
        train_teacher(device="abacus")


# ---------------------------------------------------------------------- traces of both styles


@st.composite
def tasks(draw):
    filler_min = draw(st.integers(0, 10))
    return DriftingTask(
        operations=draw(st.integers(1, 16)),
        drift_first=draw(st.floats(0, 1)),
        drift_later=draw(st.floats(0, 1)),
        filler_min=filler_min,
        filler_max=draw(st.integers(filler_min, 12)),
        filler_kinds=draw(st.integers(1, len(FILLERS))),
    )


@settings(max_examples=40)
@given(task=tasks(), seed=st.integers(0, 2**32))
def test_a_drifting_trace_is_a_clean_prefix_then_fillers_then_the_right_answer(task, seed):
    problems = task.problems(8, seed)
    for problem, trace in zip(problems, task.mixed_traces(problems, seed), strict=True):
        words = trace.split()
        assert is_correct(trace, problem.answer)
        assert is_drifting(trace) == ("HMM" in words) == (trace != problem.trace)
        assert len(words) <= task.longest_response_tokens
        if "HMM" not in words:
            assert trace == problem.trace
            continue
        turn = words.index("HMM")
        fillers, ending = words[turn + 1 : -3], words[-3:]
        assert words[:turn] == problem.trace.split()[:turn]
        assert turn % 2 == 0
        assert turn // 2 < task.operations
        assert task.filler_min <= len(fillers) <= task.filler_max
        assert set(fillers) <= set(FILLERS[: task.filler_kinds])
        assert ending == ["ANS", problem.answer, "<eos>"]


def test_the_same_seed_gives_the_same_traces_and_another_one_others():
    task = DriftingTask()
    problems = task.problems(50, 0)
    assert task.mixed_traces(problems, 0) == task.mixed_traces(problems, 0) != task.mixed_traces(problems, 1)


def test_the_share_of_drifting_traces_is_the_one_the_probabilities_give():
    """Passing all 12 opportunities: .2 x .95^11 = .114, so .886 drift; the standard error over 1,500 traces is .0082."""
    task = DriftingTask()
    traces = task.mixed_traces(task.problems(1500, 0), 0)
    turns = [trace.split().index("HMM") // 2 for trace in traces if "HMM" in trace.split()]
    assert task.drifting_share == pytest.approx(1 - 0.2 * 0.95**11)
    assert len(turns) / 1500 == pytest.approx(task.drifting_share, abs=4 * 0.0082)
    assert turns.count(0) / 1500 == pytest.approx(0.8, abs=4 * 0.0103)
    assert turns.count(1) / 1500 == pytest.approx(0.2 * 0.05, abs=4 * 0.0026)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 30)])
def test_probabilities_of_zero_and_one_give_no_and_only_drifting_traces(share, expected):
    task = DriftingTask(operations=4, drift_first=share, drift_later=share)
    traces = task.mixed_traces(task.problems(30, 0), 0)
    assert sum(trace.startswith("HMM") for trace in traces) == expected


def test_the_longest_response_is_reached_and_never_passed():
    """Drift before the last of 2 operations with 9 fillers: 1 x 2 + HMM + 9 + ANS, digit, end = 15 tokens."""
    task = DriftingTask(operations=2, drift_first=0.5, drift_later=1, filler_min=9, filler_max=9)
    lengths = {len(trace.split()) for trace in task.mixed_traces(task.problems(30, 0), 0)}
    assert lengths == {13, 15}
    assert task.longest_response_tokens == 15


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drift_first": 1.5}, r"drift_first is a probability .* got 1.5"),
        ({"drift_later": float("nan")}, r"drift_later is a probability .* got nan"),
        ({"filler_min": 5, "filler_max": 4}, "got 5 and 4"),
        ({"filler_kinds": 0}, r"filler_kinds must lie in \[1, 34\], got 0"),
        ({"filler_kinds": 35}, r"filler_kinds must lie in \[1, 34\], got 35"),
    ],
)
def test_settings_outside_their_range_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        DriftingTask(**settings)


@torch.no_grad()
def test_the_student_with_padded_heads_computes_the_same():
    student = load_student()
    padded, ids = with_heads_of_32(student), torch.arange(3, 40).unsqueeze(0)
    assert padded.config.head_dim == 32
    torch.testing.assert_close(padded(ids).logits, student(ids).logits, atol=1e-4, rtol=1e-4)
