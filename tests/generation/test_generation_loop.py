"""The decoding loop that drops finished rows: contracts 1 to 4, against plain `generate` and full forward passes."""

from itertools import accumulate

import pytest
import torch
import transformers
from generation_helpers import CONFIG, generate, oracle, padded_prompts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import assert_record_equals
from packaging.version import Version
from tiny_models import FAMILIES, checkpoint_inplace, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList, MaxLengthCriteria, StoppingCriteria
from transformers.generation import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from prune_opd_hf import DriftConfig, DriftStoppingCriteria, pruned_generate
from prune_opd_hf.errors import InputError, MonitorStateError, NonFiniteLogitsError, UnsupportedGenerationError
from prune_opd_hf.generation import DriftMonitor, decoding_loop
from prune_opd_hf.generation.draw import STREAM_STEPS


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_tokens_equal_plain_generate(family):
    student = tiny_model(family, 1)
    ids, mask = padded_prompts([9, 4, 6, 1, 5])
    expected = generate(student, ids, mask, max_new_tokens=40)
    received = generate(student, ids, mask, loop=True, max_new_tokens=40)
    assert torch.equal(received, expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_record_equals_two_full_forward_passes_in_every_family(family):
    student, teacher = tiny_model(family, 1), tiny_model(family, 2)
    ids, mask = padded_prompts([9, 4, 6, 1])
    untouched = generate(student, ids, mask, max_new_tokens=33)
    config = DriftConfig("overlap", top_k=4, threshold=0.5, weight_drop=0.1)
    monitor = DriftMonitor(teacher, config, check_every=4)
    sequences = generate(student, ids, mask, monitor, loop=True, max_new_tokens=33)
    rollouts = monitor.finish(sequences)
    assert_record_equals(rollouts, oracle(student, teacher, ids, mask, untouched, weight_drop=0.1))
    width = rollouts.response_ids.shape[1]
    assert torch.equal(sequences[:, ids.shape[1] :], rollouts.response_ids)
    assert width == int(rollouts.lengths.max())


@torch.no_grad()
def sampled_by_full_passes(student, ids, mask, tokens, seed, warpers):
    """Each row by itself, one full pass a token; the row's number at each step decides, as the docstring says."""
    torch.manual_seed(seed)
    generators = [torch.Generator().manual_seed(own) for own in torch.randint(2**63 - 1, (len(ids),)).tolist()]
    rows = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
    for step in range(tokens):
        if step % STREAM_STEPS == 0:
            uniforms = [torch.rand(STREAM_STEPS, generator=generator, dtype=torch.float64) for generator in generators]
        for index, row in enumerate(rows):
            scores = student(row.unsqueeze(0)).logits[:, -1].float()
            for warper in warpers:
                scores = warper(row.unsqueeze(0), scores)
            cumulative = list(accumulate(scores.softmax(dim=-1)[0].double().tolist()))
            target = float(uniforms[index][step % STREAM_STEPS]) * cumulative[-1]
            token = next(token for token, value in enumerate(cumulative) if value > target)
            rows[index] = torch.cat([row, torch.tensor([token])])
    return torch.stack([row[-tokens:] for row in rows])


@pytest.mark.parametrize("drop_every", [1, 8])
def test_sampled_tokens_are_those_of_full_passes_with_one_number_for_each_row_and_step(monkeypatch, drop_every):
    monkeypatch.setattr(decoding_loop, "steps_between_compactions", lambda device: drop_every)
    student = tiny_model("qwen3", 1, eos=None)
    ids, mask = padded_prompts([4, 6])
    ids, mask = ids.repeat_interleave(3, dim=0), mask.repeat_interleave(3, dim=0)
    tokens = STREAM_STEPS + 6  # into a second draw of random numbers
    warpers = [TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9)]
    expected = sampled_by_full_passes(student, ids, mask, tokens, 5, warpers)
    torch.manual_seed(5)
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0, "max_new_tokens": tokens}
    assert torch.equal(generate(student, ids, mask, loop=True, **sampling)[:, ids.shape[1] :], expected)


@pytest.mark.parametrize("check_every", [1, 5, 32])
def test_what_a_sequence_samples_depends_neither_on_check_every_nor_on_who_leaves(check_every):
    student, teacher = tiny_model("qwen3", 1, vocab_size=12, eos=None), tiny_model("qwen3", 2, vocab_size=12, eos=None)
    ids, mask = padded_prompts([4, 6, 3, 5, 6, 2], vocab=12)
    tokens = STREAM_STEPS + 16  # rows leave before and after the second draw of random numbers
    sampling = {"do_sample": True, "max_new_tokens": tokens, "top_k": 0}
    torch.manual_seed(12)
    untouched = generate(student, ids, mask, loop=True, **sampling)[:, ids.shape[1] :]
    monitor = DriftMonitor(
        teacher, DriftConfig("overlap", top_k=4, threshold=0.5, weight_drop=0.06), check_every=check_every
    )
    torch.manual_seed(12)
    rollouts = monitor.finish(generate(student, ids, mask, monitor, loop=True, **sampling))
    lengths = rollouts.lengths.tolist()
    assert min(lengths) + check_every < STREAM_STEPS < max(lengths), "rows must leave before it, and one stay"
    for row, length in enumerate(lengths):
        assert torch.equal(rollouts.response_ids[row, :length], untouched[row, :length])


class StopRow(StoppingCriteria):
    """Ends one row at a length."""

    def __init__(self, row, columns):
        self.row, self.columns = row, columns

    def __call__(self, input_ids, scores, **kwargs):
        return (torch.arange(len(input_ids)) == self.row) & (input_ids.shape[1] >= self.columns)


class Break(LogitsProcessor):
    """Spoils the scores of one row, behind so many response tokens after prompts of six."""

    def __init__(self, value, row, after):
        self.value, self.row, self.after = value, row, after

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        if input_ids.shape[1] >= 6 + self.after:
            scores[self.row] = self.value
        return scores


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tokens", [5, 12], ids=["in the last stretch", "before a look"])
@pytest.mark.parametrize(("drop_every", "where"), [(1, "for row 2 at response token 2,"), (4, "row 2 before .* token")])
def test_scores_that_nothing_can_be_sampled_from_are_named(monkeypatch, drop_every, where, tokens, value):
    monkeypatch.setattr(decoding_loop, "steps_between_compactions", lambda device: drop_every)
    student = tiny_model("qwen3", 1, eos=None)
    ids, mask = padded_prompts([4, 6, 3])
    broken = Break(value, 2, after=2 if tokens == 12 or drop_every == 1 else 4)
    with pytest.raises(NonFiniteLogitsError, match=where):
        generate(student, ids, mask, loop=True, do_sample=True, max_new_tokens=tokens, logits_processor=[broken])


@pytest.mark.parametrize("drop_every", [1, 4])
def test_a_student_that_goes_bad_is_named_with_row_and_token(monkeypatch, drop_every):
    monkeypatch.setattr(decoding_loop, "steps_between_compactions", lambda device: drop_every)
    student, teacher = tiny_model("qwen3", 1, eos=None), tiny_model("qwen3", 2, eos=None)
    ids, mask = padded_prompts([4, 6, 3])

    def spoil(module, inputs, outputs):
        if calls and len(calls) >= 6:  # the prompt's pass is the first
            outputs.logits[1] = float("nan")
        calls.append(None)

    calls = []
    student.register_forward_hook(spoil)
    monitor = DriftMonitor(teacher, CONFIG, check_every=32, truncate=False)
    with pytest.raises(NonFiniteLogitsError, match=r"the student returned .* for row 1, response token 6$"):
        generate(student, ids, mask, monitor, loop=True, do_sample=True, max_new_tokens=12)


@pytest.mark.parametrize("drop_every", [1, 8])
def test_scores_of_rows_that_have_ended_may_be_anything(monkeypatch, drop_every):
    monkeypatch.setattr(decoding_loop, "steps_between_compactions", lambda device: drop_every)
    student = tiny_model("qwen3", 1, eos=None)
    ids, mask = padded_prompts([4, 6, 3])
    broken, stop = Break(-float("inf"), 2, after=3), StopRow(2, columns=6 + 2)
    sequences = generate(
        student,
        ids,
        mask,
        loop=True,
        do_sample=True,
        max_new_tokens=12,
        logits_processor=[broken],
        stopping_criteria=[stop],
    )
    assert sequences[2, 6 + 2 :].tolist() == [0] * 10


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    check_every=st.integers(1, 20),
    max_new_tokens=st.integers(1, 30),
    threshold=st.sampled_from([0.25, 0.5, 0.75, 1.0]),
    weight_drop=st.sampled_from([0.0, 0.09, 1 / 3, 1.0]),
    min_length=st.integers(0, 12),
    metric=st.sampled_from(["overlap", "nucleus"]),
    loop=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_stop_pattern_equals_the_oracle(
    lengths, check_every, max_new_tokens, threshold, weight_drop, min_length, metric, loop, seed
):
    student, teacher = tiny_model("qwen3", seed, vocab_size=24), tiny_model("qwen3", 10 + seed, vocab_size=24)
    ids, mask = padded_prompts(lengths, vocab=24, seed=seed)
    untouched = generate(student, ids, mask, max_new_tokens=max_new_tokens)
    config = DriftConfig(metric, 4, threshold, weight_drop, min_length=min_length)
    monitor = DriftMonitor(teacher, config, check_every=check_every, attention_mask=mask)
    sequences = generate(student, ids, mask, monitor, loop=loop, max_new_tokens=max_new_tokens)
    rows = oracle(
        student,
        teacher,
        ids,
        mask,
        untouched,
        metric=metric,
        threshold=threshold,
        weight_drop=weight_drop,
        min_length=min_length,
    )
    assert_record_equals(monitor.finish(sequences), rows)


class FavourRowNumber(LogitsProcessor):
    """Knows rows by their number, as a prefix constraint does."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row in range(len(scores)):
            scores[row, 3 + row] += 3.0
        return scores


class StopAtToken(StoppingCriteria):
    def __init__(self, token, rows):
        self.token, self.rows = token, rows

    def __call__(self, input_ids, scores, **kwargs):
        assert len(input_ids) == self.rows
        return input_ids[:, -1] == self.token


def test_processors_and_criteria_that_know_rows_by_number_see_the_whole_batch():
    student = tiny_model("qwen3", 1)
    ids, mask = padded_prompts([3, 5, 2, 4])
    arguments = {"max_new_tokens": 30, "repetition_penalty": 1.2, "min_new_tokens": 3}
    custom = {"logits_processor": [FavourRowNumber()], "stopping_criteria": [StopAtToken(5, 4)]}
    expected = generate(student, ids, mask, **arguments, **custom)
    assert (expected[:, -1] == 0).any(), "no row ended early: the test shows nothing"
    assert torch.equal(generate(student, ids, mask, loop=True, **arguments, **custom), expected)


BY_ROW = pytest.param(
    torch.tensor([5, 5, 5, 5]),
    marks=pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.23"), reason="Transformers before 5.23 refuses numbers by row"
    ),
)


@pytest.mark.parametrize("ignored", [None, 5, BY_ROW])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_repetition_penalty_that_was_passed_is_respected_and_stays_as_it_was(ignored, use_cache):
    student, (ids, mask) = tiny_model("qwen3", 1), padded_prompts([3, 5, 2, 4])
    arguments = {"max_new_tokens": 12, "use_cache": use_cache}
    sequences = {}
    for name, processor in (
        ("plain", RepetitionPenaltyLogitsProcessor(1.5, ignored)),
        ("loop", penalty := RepetitionPenaltyLogitsProcessor(1.5, ignored)),
        ("other", RepetitionPenaltyLogitsProcessor(1.5, None if ignored is not None else 5)),
    ):
        loop, given = name == "loop", LogitsProcessorList([processor])
        sequences[name] = generate(student, ids, mask, loop=loop, logits_processor=given, **arguments)
    assert torch.equal(sequences["loop"], sequences["plain"])
    assert not torch.equal(sequences["other"], sequences["plain"]), "the prompt changes nothing: the test shows nothing"
    assert penalty.prompt_ignore_length is ignored  # so it fits a batch of another size as well


@pytest.mark.parametrize(("ours", "theirs"), [([1, *range(5, 20)], [1]), ([1], [1, *range(5, 20)])])
def test_the_loop_ends_rows_at_the_students_eos_whatever_the_teachers_is(ours, theirs):
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    student.generation_config.eos_token_id, teacher.generation_config.eos_token_id = ours, theirs
    ids, mask = padded_prompts([3, 5, 2, 4])
    expected = generate(student, ids, mask, max_new_tokens=16)
    monitor = DriftMonitor(teacher, CONFIG, check_every=4, truncate=False)
    sequences = generate(student, ids, mask, monitor, loop=True, max_new_tokens=16)
    assert torch.equal(sequences, expected)
    rows = oracle(student, teacher, ids, mask, expected, eos=tuple(ours), truncate=False)
    assert_record_equals(monitor.finish(sequences), rows)


def test_position_ids_given_to_generate_go_on_from_where_they_end():
    student = tiny_model("qwen3", 1)
    ids, mask = padded_prompts([5, 5, 5])
    positions = torch.tensor([[0, 2, 4, 6, 8], [0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    expected = generate(student, ids, mask, max_new_tokens=20, position_ids=positions)
    assert not torch.equal(expected, generate(student, ids, mask, max_new_tokens=20)), "positions change nothing here"
    assert torch.equal(generate(student, ids, mask, loop=True, max_new_tokens=20, position_ids=positions), expected)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_criterion_of_length_that_the_prompts_meet_already_leaves_one_token_as_in_plain_generate(use_cache):
    student, (ids, mask) = tiny_model("qwen3", 1), padded_prompts([5, 3])
    how = {"max_new_tokens": 9, "stopping_criteria": [MaxLengthCriteria(4)], "use_cache": use_cache}
    expected = generate(student, ids, mask, **how)
    assert expected.shape[1] == 6
    assert torch.equal(generate(student, ids, mask, loop=True, **how), expected)


class StopAll(StoppingCriteria):
    """Ends all rows at nine columns."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, input_ids, scores, **kwargs):
        return self.answer(input_ids.shape[1] >= 9)


@pytest.mark.parametrize("answer", [bool, torch.tensor, lambda ends: torch.full((2,), int(ends))])
@pytest.mark.parametrize("use_cache", [True, False])
def test_one_answer_of_a_criterion_stands_for_all_rows_as_in_plain_generate(answer, use_cache):
    student, (ids, mask) = tiny_model("qwen3", 1), padded_prompts([5, 3])
    how = {"max_new_tokens": 9, "stopping_criteria": [StopAll(answer)], "use_cache": use_cache}
    expected = generate(student, ids, mask, **how)
    assert expected.shape[1] == 9
    assert torch.equal(generate(student, ids, mask, loop=True, **how), expected)


NUCLEUS = DriftConfig("nucleus", 4, 0.5, 0.25)


@pytest.mark.parametrize("pad", [0, 1], ids=["a padding token", "the end token pads"])
@pytest.mark.parametrize("how", ["loop", "both hooks", "the criterion alone", "the processor alone"])
def test_a_row_that_another_criterion_ends_is_recorded_up_to_there(how, pad):
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    ids, mask = padded_prompts([3, 5, 2, 4], pad=pad)
    stop = StopAtToken(5, 4)
    stop.monitor = None  # which those of a second monitor have as well
    arguments = {"max_new_tokens": 30, "pad_token_id": pad, "stopping_criteria": [stop]}
    plain = generate(student, ids, mask, **arguments)
    config = NUCLEUS if how == "the criterion alone" else CONFIG
    monitor = DriftMonitor(teacher, config, check_every=4, truncate=False, attention_mask=mask)
    if how == "loop":
        arguments |= {"custom_generate": pruned_generate, "drift_monitor": monitor}
    if how in ("both hooks", "the processor alone"):
        arguments["logits_processor"] = [monitor.logits_processor]
    if how in ("both hooks", "the criterion alone"):
        arguments["stopping_criteria"] = [stop, monitor.stopping_criterion]
    rollouts = monitor.finish(generate(student, ids, mask, **arguments))
    reasons = {1: "eos", 5: "criterion"}
    for row, response in enumerate(plain[:, 5:].tolist()):
        end = next((n for n, token in enumerate(response) if token in reasons), 29)
        assert (int(rollouts.lengths[row]), rollouts.stop_reason[row]) == (
            end + 1,
            reasons.get(response[end], "length"),
        )
    assert "criterion" in rollouts.stop_reason


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("hooks", [("processor", "criterion"), ("criterion",)])
def test_a_monitor_that_comes_by_its_hooks_alone_is_the_loops_monitor(hooks, use_cache):
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    ids, mask = padded_prompts([5, 3, 4])
    untouched = generate(student, ids, mask, max_new_tokens=20)
    monitor = DriftStoppingCriteria(teacher, NUCLEUS, check_every=4).monitor
    pair = {"stopping_criteria": [monitor.stopping_criterion]}
    if "processor" in hooks:
        pair["logits_processor"] = [monitor.logits_processor]
    sequences = generate(student, ids, mask, loop=True, max_new_tokens=20, use_cache=use_cache, **pair)
    rollouts = monitor.finish(sequences)
    assert "drift" in rollouts.stop_reason
    assert_record_equals(rollouts, oracle(student, teacher, ids, mask, untouched, metric="nucleus"))


def test_hooks_of_two_monitors_are_refused():
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    ids, mask = padded_prompts([5])
    with pytest.raises(MonitorStateError, match="one drift monitor"):
        generate(
            student,
            ids,
            mask,
            DriftMonitor(teacher, CONFIG),
            loop=True,
            max_new_tokens=3,
            stopping_criteria=[DriftMonitor(teacher, CONFIG).stopping_criterion],
        )


@pytest.mark.parametrize("monitored", [False, True])
@pytest.mark.parametrize("drop_every", [2, 8])
def test_looking_less_often_for_finished_rows_changes_nothing(monkeypatch, drop_every, monitored):
    # As on an accelerator: rows that have ended stay in the batch until the next look.
    monkeypatch.setattr(decoding_loop, "steps_between_compactions", lambda device: drop_every)
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    ids, mask = padded_prompts([3, 5, 2, 4])
    widths = set()
    for ends in ([1], [1, *range(5, 20)], [1, *range(20, 30)]):
        student.generation_config.eos_token_id = ends
        expected = generate(student, ids, mask, max_new_tokens=30)
        monitor = DriftMonitor(teacher, CONFIG, check_every=6, truncate=False) if monitored else None
        received = generate(student, ids, mask, monitor, loop=True, max_new_tokens=30)
        assert torch.equal(received, expected)
        widths.add(received.shape[1] - 5)
        if monitored:
            rows = oracle(student, teacher, ids, mask, expected, eos=tuple(ends), truncate=False)
            assert_record_equals(monitor.finish(received), rows)
    assert any(width < 30 and width % drop_every for width in widths), "no generation ended between two looks"


def test_the_record_is_padded_as_the_sequences_are():
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    teacher.generation_config.pad_token_id = 3
    ids, mask = padded_prompts([5, 3, 4, 2, 6, 7])
    monitor = DriftMonitor(teacher, CONFIG, check_every=4)
    sequences = generate(student, ids, mask, monitor, loop=True, max_new_tokens=20)
    rollouts = monitor.finish(sequences)
    assert not rollouts.response_mask.all(), "no row is padded: the test shows nothing"
    assert rollouts.pad_token_id == 0
    assert torch.equal(rollouts.sequences, sequences)


@pytest.mark.parametrize(("lengths", "tokens"), [([12, 9], 12), ([6, 5], 9)])
def test_a_student_with_fewer_positions_than_the_sequences_need_is_named(lengths, tokens):
    student = tiny_model("gpt2", 1, max_position_embeddings=8, eos=None)
    ids, mask = padded_prompts(lengths)
    with pytest.raises(InputError, match=f"the student's context holds 8 tokens, and a sequence of {tokens} would"):
        generate(student, ids, mask, loop=True, max_new_tokens=12)


def test_a_student_in_training_that_drops_its_cache_is_refused():
    student = tiny_model("qwen3", 1).train()
    checkpoint_inplace(student)
    ids, mask = padded_prompts([5])
    with pytest.raises(UnsupportedGenerationError, match=r"the student is in training mode.*model\.eval\(\)"):
        generate(student, ids, mask, loop=True, max_new_tokens=3)
