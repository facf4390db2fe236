"""The monitor's manners: one line of use, other prompts for the teacher, and everything that is refused."""

from inspect import unwrap

import pytest
import torch
from generation_helpers import CONFIG, SETTINGS, generate, oracle, padded_prompts
from oracle import assert_record_equals, oracle_row
from tiny_models import tiny_model
from transformers import T5Config, T5ForConditionalGeneration, TextStreamer

from prune_opd_hf import DriftConfig, DriftMonitor, DriftStoppingCriteria, Teacher, pruned_generate
from prune_opd_hf.errors import (
    ConfigError,
    InputError,
    MonitorStateError,
    NonFiniteLogitsError,
    UnsupportedGenerationError,
    VocabularyMismatchError,
)

NUCLEUS = DriftConfig(metric="nucleus", top_k=4, threshold=0.5, weight_drop=0.25)


@pytest.fixture
def pair():
    return tiny_model("qwen3", 1), tiny_model("qwen3", 2)


@pytest.mark.parametrize("loop", [False, True])
def test_the_record_depends_neither_on_torchs_default_dtype_nor_on_its_default_device(pair, loop):
    student, teacher = pair
    ids, mask = padded_prompts([5, 3, 4])
    monitor, records = DriftMonitor(teacher, CONFIG, check_every=4, attention_mask=mask), []
    for dtype, device in ((torch.float32, None), (torch.bfloat16, None), (torch.float64, "meta")):
        torch.manual_seed(1)
        try:
            torch.set_default_dtype(dtype)
            torch.set_default_device(device)
            records.append(
                monitor.finish(generate(student, ids, mask, monitor, loop=loop, max_new_tokens=12)).tensors()
            )
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
    for record in records[1:]:
        assert all(torch.equal(record[name], tensor) for name, tensor in records[0].items())


@pytest.mark.parametrize(("config", "with_student"), [(NUCLEUS, False), (CONFIG, True), (NUCLEUS, True)])
def test_the_criterion_alone_stops_and_records(pair, config, with_student):
    student, teacher = pair
    ids, mask = padded_prompts([5, 3, 4])
    untouched = generate(student, ids, mask, max_new_tokens=25)
    criterion = DriftStoppingCriteria(
        teacher, config, student=student if with_student else None, check_every=4, attention_mask=mask
    )
    sequences = generate(student, ids, mask, max_new_tokens=25, stopping_criteria=[criterion])
    rows = oracle(student, teacher, ids, mask, untouched, metric=config.metric)
    rollouts = criterion.finish(sequences)
    assert_record_equals(rollouts, rows, watched=with_student)
    assert "drift" in rollouts.stop_reason
    if not with_student:
        assert rollouts.overlap is None
        assert rollouts.student_topk_ids is None


@pytest.mark.parametrize(("check_every", "with_student"), [(1, False), (4, False), (32, False), (1, True), (32, True)])
def test_the_processor_alone_records(pair, check_every, with_student):
    student, teacher = pair
    ids, mask = padded_prompts([5, 3, 4])
    untouched = generate(student, ids, mask, max_new_tokens=12)
    monitor = DriftMonitor(
        teacher,
        CONFIG,
        check_every=check_every,
        truncate=False,
        attention_mask=mask,
        student=student if with_student else None,
    )
    sequences = generate(student, ids, mask, max_new_tokens=12, logits_processor=[monitor.logits_processor])
    assert_record_equals(monitor.finish(sequences), oracle(student, teacher, ids, mask, untouched, truncate=False))


def test_the_criterion_finds_the_prompts_padding_by_itself(pair):
    student, teacher = pair
    ids, mask = padded_prompts([5, 2])
    criterion = DriftStoppingCriteria(teacher, NUCLEUS, truncate=False)
    rollouts = criterion.finish(generate(student, ids, mask, max_new_tokens=6, stopping_criteria=[criterion]))
    assert torch.equal(rollouts.prompt_mask, mask.bool())


@pytest.mark.parametrize("loop", [False, True])
def test_the_teacher_may_see_another_prompt(pair, loop):
    student, teacher = pair
    ids, mask = padded_prompts([5, 3])
    hints, hint_mask = padded_prompts([7, 9], seed=8)
    untouched = generate(student, ids, mask, max_new_tokens=20)
    monitor = DriftMonitor(
        teacher, CONFIG, check_every=6, attention_mask=mask, teacher_prompt_ids=hints, teacher_prompt_mask=hint_mask
    )
    rollouts = monitor.finish(generate(student, ids, mask, monitor, loop=loop, max_new_tokens=20))
    rows = [
        oracle_row(
            student,
            teacher,
            ids[row][mask[row].bool()],
            untouched[row, ids.shape[1] :],
            **SETTINGS,
            teacher_prompt=hints[row][hint_mask[row].bool()],
        )
        for row in range(2)
    ]
    assert_record_equals(rollouts, rows)


@pytest.mark.parametrize("loop", [False, True])
def test_a_student_may_be_its_own_teacher(pair, loop):
    student, _ = pair
    ids, mask = padded_prompts([5, 3])
    monitor = DriftMonitor(student, CONFIG, check_every=6, attention_mask=mask)
    rollouts = monitor.finish(generate(student, ids, mask, monitor, loop=loop, max_new_tokens=20))
    assert (rollouts.overlap[rollouts.response_mask] == 1).all()
    torch.testing.assert_close(rollouts.token_log_probs, rollouts.teacher_token_log_probs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loop", [False, True])
def test_without_any_eos_token_a_stopped_row_is_padded(loop):
    student, teacher = (tiny_model("qwen3", seed, eos=None) for seed in (1, 2))
    ids, mask = padded_prompts([5, 3, 4])
    monitor = DriftMonitor(teacher, CONFIG, check_every=4, attention_mask=mask)
    sequences = generate(student, ids, mask, monitor, loop=loop, max_new_tokens=40)
    rollouts = monitor.finish(sequences)
    assert "drift" in rollouts.stop_reason
    for row, length in enumerate(rollouts.lengths.tolist()):
        stopped_by = -(-length // 4) * 4  # the check after the exhausted token
        assert not sequences[row, ids.shape[1] + stopped_by :].any()


@pytest.mark.parametrize("loop", [False, True])
def test_padding_with_the_eos_token_confuses_nothing(loop):
    student, teacher = (tiny_model("qwen3", seed, eos=1, pad=None) for seed in (1, 2))
    for model in (student, teacher):
        model.generation_config.pad_token_id = 1
    ids, mask = padded_prompts([5, 2, 4], pad=1)
    untouched = generate(student, ids, mask, max_new_tokens=30)
    monitor = DriftMonitor(teacher, CONFIG, check_every=4, attention_mask=mask)
    rollouts = monitor.finish(generate(student, ids, mask, monitor, loop=loop, max_new_tokens=30))
    assert_record_equals(rollouts, oracle(student, teacher, ids, mask, untouched))


def test_ambiguous_padding_without_a_mask_is_refused():
    student, teacher = (tiny_model("qwen3", seed, eos=1, pad=None) for seed in (1, 2))
    ids, mask = padded_prompts([5, 2], pad=1)
    monitor = DriftMonitor(teacher, CONFIG, pad_token_id=1)
    with pytest.raises(InputError, match="pass attention_mask="):
        generate(student, ids, mask, monitor, max_new_tokens=4, pad_token_id=1)


@pytest.mark.parametrize("loop", [False, True])
def test_unequal_vocabulary_sizes_count_only_the_shared_ids(loop):
    student, teacher = tiny_model("qwen3", 1, vocab_size=48), tiny_model("qwen3", 2, vocab_size=56)
    ids, mask = padded_prompts([5, 3])
    untouched = generate(student, ids, mask, max_new_tokens=20)
    monitor = DriftMonitor(teacher, CONFIG, check_every=6, attention_mask=mask)
    rollouts = monitor.finish(generate(student, ids, mask, monitor, loop=loop, max_new_tokens=20))
    assert int(rollouts.teacher_topk_ids.max()) < 48
    assert_record_equals(rollouts, oracle(student, teacher, ids, mask, untouched, vocab=48))


class Words:
    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: index for index, word in enumerate(self.words)}


def test_other_tokenizers_are_refused_before_any_generation(pair):
    with pytest.raises(VocabularyMismatchError, match="token id 1 is 'b' for the student and 'c' for the teacher"):
        DriftMonitor(pair[1], CONFIG, tokenizer=Words("a", "b"), teacher_tokenizer=Words("a", "c"))


def test_overlap_with_nobody_watching_the_student_names_both_remedies(pair):
    student, teacher = pair
    ids, mask = padded_prompts([5])
    with pytest.raises(ConfigError, match=r"monitor\.logits_processor.*student=model"):
        DriftStoppingCriteria(teacher, CONFIG)
    monitor = DriftMonitor(teacher, CONFIG)
    with pytest.raises(ConfigError, match=r"monitor\.logits_processor.*student=model"):
        generate(student, ids, mask, max_new_tokens=3, stopping_criteria=[monitor.stopping_criterion])


@pytest.mark.parametrize("loop", [False, True])
def test_a_monitor_serves_many_calls_and_each_begins_a_fresh_record(pair, loop):
    student, teacher = pair
    monitor, records = DriftMonitor(teacher, CONFIG, check_every=4), []
    assert monitor.logits_processor is monitor.logits_processor
    assert monitor.stopping_criterion is monitor.stopping_criterion
    for lengths, finished in (([5, 3], True), ([4, 2, 6], False), ([5, 3], True)):
        ids, mask = padded_prompts(lengths)
        sequences = generate(student, ids, mask, monitor, loop=loop, max_new_tokens=9)
        if finished:
            records.append(monitor.finish(sequences))
            with pytest.raises(MonitorStateError, match="twice"):
                monitor.finish(sequences)
    first, second = (record.tensors() for record in records)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_finish_takes_nothing_but_what_was_observed(pair):
    student, teacher = pair
    ids, mask = padded_prompts([5, 4])
    with pytest.raises(MonitorStateError, match="no generation was observed"):
        DriftMonitor(teacher, CONFIG).finish(ids)
    for spoil in (lambda s: s[:1], lambda s: s[:, :5], lambda s: torch.cat([s, s[:, :1]], 1)):
        monitor = DriftMonitor(teacher, CONFIG, attention_mask=mask)
        sequences = generate(student, ids, mask, monitor, max_new_tokens=6)
        with pytest.raises(MonitorStateError, match="not those of the generation"):
            monitor.finish(spoil(sequences))
    monitor = DriftMonitor(teacher, DriftConfig("overlap", top_k=4, weight_drop=0.0), attention_mask=mask)
    sequences = generate(student, ids, mask, monitor, max_new_tokens=6)
    sequences[0, 6] = (sequences[0, 6] + 1) % 48
    with pytest.raises(MonitorStateError, match="not those that were observed"):
        monitor.finish(sequences)


@pytest.mark.parametrize("loop", [False, True])
def test_beam_search_is_refused_at_once(pair, loop):
    student, teacher = pair
    ids, mask = padded_prompts([5])
    with pytest.raises(UnsupportedGenerationError, match="beam search"):
        generate(student, ids, mask, DriftMonitor(teacher, CONFIG), loop=loop, max_new_tokens=8, num_beams=3)


def test_beam_search_is_refused_at_once_also_by_the_criterion_alone(pair):
    student, teacher = pair
    ids, mask = padded_prompts([5, 4])
    criterion = DriftStoppingCriteria(teacher, NUCLEUS, check_every=64)
    with pytest.raises(UnsupportedGenerationError, match="beam search"):
        generate(student, ids, mask, max_new_tokens=30, num_beams=4, stopping_criteria=[criterion])
    with pytest.raises(MonitorStateError, match="no generation was observed"):
        criterion.finish(ids)


@pytest.mark.parametrize("changed", ["other tokens", "two tokens at once"])
def test_tokens_that_change_under_another_decoding_loop_are_noticed(pair, changed):
    criterion = DriftStoppingCriteria(pair[1], DriftConfig("tail", 4, weight_drop=0.0), check_every=2)
    criterion(torch.tensor([[5, 6, 7], [8, 9, 10]]))
    later = [[5, 6, 11, 3], [8, 9, 12, 3]] if changed == "other tokens" else [[5, 6, 7, 3, 3], [8, 9, 10, 3, 3]]
    with pytest.raises(MonitorStateError, match="beam search"):
        criterion(torch.tensor(later))


def test_assisted_decoding_is_refused(pair):
    student, teacher = pair
    ids, mask = padded_prompts([5])
    assistant = {"assistant_model": tiny_model("qwen3", 3), "max_new_tokens": 12}
    with pytest.raises(UnsupportedGenerationError, match="assisted"):
        generate(student, ids, mask, DriftMonitor(teacher, CONFIG), **assistant)
    with pytest.raises(UnsupportedGenerationError, match="assisted"):
        generate(student, ids, mask, stopping_criteria=[DriftStoppingCriteria(teacher, NUCLEUS)], **assistant)
    with pytest.raises(UnsupportedGenerationError, match="assisted"):
        generate(student, ids, mask, loop=True, max_new_tokens=12, prompt_lookup_num_tokens=2)
    with pytest.raises(UnsupportedGenerationError, match="assisted"):
        generate(student, ids, mask, loop=True, **assistant)


def test_an_encoder_decoder_model_is_refused():
    config = T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    with pytest.raises(UnsupportedGenerationError, match="encoder-decoder"):
        Teacher(model)
    ids, mask = padded_prompts([5])
    with pytest.raises(UnsupportedGenerationError, match="encoder-decoder"):
        generate(model, ids, mask, loop=True, max_new_tokens=3)
    teacher, start = tiny_model("qwen3", 2), {"decoder_start_token_id": 4, "max_new_tokens": 3}
    with pytest.raises(UnsupportedGenerationError, match="encoder-decoder"):
        generate(model, ids, mask, DriftMonitor(teacher, CONFIG), **start)
    with pytest.raises(UnsupportedGenerationError, match="encoder-decoder"):
        generate(model, ids, mask, stopping_criteria=[DriftStoppingCriteria(teacher, NUCLEUS)], **start)


@pytest.mark.parametrize("loop", [False, True])
def test_right_padding_is_refused(pair, loop):
    student, teacher = pair
    ids, mask = padded_prompts([5, 3])
    ids, mask = ids.flip(-1), mask.flip(-1)
    with pytest.raises(InputError, match="padded on the left"):
        generate(student, ids, mask, DriftMonitor(teacher, CONFIG, attention_mask=mask), loop=loop, max_new_tokens=3)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_name_the_model_and_the_position(pair, loop, value):
    ids, mask = padded_prompts([5, 3])
    for broken in ("student", "teacher"):
        student, teacher = tiny_model("qwen3", 1, eos=None), tiny_model("qwen3", 2, eos=None)
        target = int(generate(student, ids, mask, max_new_tokens=6)[1, -1])
        model = student if broken == "student" else teacher
        with torch.no_grad():
            model.get_input_embeddings().weight[target] = value
        monitor = DriftMonitor(teacher, CONFIG, check_every=4, truncate=False, attention_mask=mask)
        with pytest.raises(NonFiniteLogitsError, match=f"the {broken} returned NaN or infinite logits .*row \\d+"):
            monitor.finish(generate(student, ids, mask, monitor, loop=loop, max_new_tokens=12))


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_the_row_and_the_position_of_rubbish_are_those_of_the_batch_also_after_rows_have_left(loop, broken):
    # Row 0 leaves at its first token; what row 2 says at response position 5 spoils the logits of position 6.
    ids, mask = torch.tensor([[5, 6], [7, 8], [9, 10]]), torch.ones(3, 2, dtype=torch.long)
    script = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0], [3] * 8, [3, 3, 3, 3, 3, 40, 3, 3]])
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)

    def spoil(module, inputs, named, outputs):  # what the backbone says after token 40
        outputs.last_hidden_state[named["input_ids"] == 40] = float("nan")

    (student if broken == "student" else teacher).model.register_forward_hook(spoil, with_kwargs=True)
    monitor = DriftMonitor(teacher, CONFIG, check_every=4, truncate=False, attention_mask=mask)
    say = {"prefix_allowed_tokens_fn": lambda row, seen: [int(script[row, len(seen) - 2])]}
    with pytest.raises(NonFiniteLogitsError, match=f"the {broken} returned .* for row 2, response token 6$"):
        monitor.finish(generate(student, ids, mask, monitor, loop=loop, max_new_tokens=8, **say))


@pytest.mark.parametrize("loop", [False, True])
def test_a_student_whose_logits_cannot_be_sampled_from_is_named(pair, loop):
    student, teacher = tiny_model("qwen3", 1, eos=None), pair[1]
    ids, mask = padded_prompts([5, 3])
    with torch.no_grad():
        student.get_input_embeddings().weight[ids[1, -1]] = float("nan")
    monitor = DriftMonitor(teacher, CONFIG, check_every=4, attention_mask=mask)
    with pytest.raises(NonFiniteLogitsError, match=r"the student returned .* for row 1, response token 0$"):
        generate(student, ids, mask, monitor, loop=loop, max_new_tokens=6, do_sample=True)


def test_one_teacher_under_two_monitors_at_once_is_noticed(pair):
    student, teacher = pair[0], Teacher(pair[1], top_k=4)
    ids, mask = padded_prompts([5, 3, 4])
    settings = {"check_every": 32, "truncate": False, "attention_mask": mask}
    first, second = (DriftMonitor(teacher, CONFIG, **settings) for _ in range(2))
    sequences = [generate(student, ids, mask, monitor, max_new_tokens=6) for monitor in (first, second)]
    with pytest.raises(MonitorStateError, match="call finish before the next generation"):
        first.finish(sequences[0])
    rows = oracle(student, pair[1], ids, mask, sequences[1], truncate=False)
    assert_record_equals(second.finish(sequences[1]), rows)


def test_a_prompt_for_the_teacher_belongs_to_one_prompt_of_the_student(pair):
    student, teacher = pair
    hints, hint_mask = padded_prompts([7, 9], seed=8)
    given = {"teacher_prompt_ids": hints, "teacher_prompt_mask": hint_mask}
    ids, mask = padded_prompts([5, 3, 4, 6])
    with pytest.raises(InputError, match="2 rows for 4 sequences, which are not 2 prompts repeated 2 times each"):
        generate(student, ids, mask, DriftMonitor(teacher, CONFIG, **given), loop=True, max_new_tokens=3)
    ids, mask = padded_prompts([5, 3])
    repeated = {"num_return_sequences": 2, "do_sample": True, "max_new_tokens": 6}
    monitor = DriftMonitor(teacher, CONFIG, truncate=False, **given)
    sequences = generate(student, ids, mask, monitor, loop=True, **repeated)
    rows = [
        oracle_row(
            student,
            teacher,
            ids[row // 2][mask[row // 2].bool()],
            sequences[row, ids.shape[1] :],
            **SETTINGS,
            truncate=False,
            teacher_prompt=hints[row // 2][hint_mask[row // 2].bool()],
        )
        for row in range(4)
    ]
    assert_record_equals(monitor.finish(sequences), rows)


@pytest.mark.parametrize(("ours", "theirs"), [([1, *range(5, 20)], [1]), ([1], [1, *range(5, 20)])])
def test_rows_end_beside_generate_at_its_own_eos_and_padding_whatever_the_teachers_are(ours, theirs):
    student, teacher = tiny_model("qwen3", 1), tiny_model("qwen3", 2)
    student.generation_config.eos_token_id, teacher.generation_config.eos_token_id = ours, theirs
    teacher.generation_config.pad_token_id = 30
    ids, mask = padded_prompts([3, 5, 2, 4])
    untouched = generate(student, ids, mask, max_new_tokens=16)
    monitor = DriftMonitor(teacher, CONFIG, check_every=4, truncate=False)
    rollouts = monitor.finish(generate(student, ids, mask, monitor, max_new_tokens=16))
    rows = oracle(student, teacher, ids, mask, untouched, eos=tuple(ours), truncate=False)
    assert_record_equals(rollouts, rows)
    assert torch.equal(rollouts.prompt_mask, mask.bool())


def test_where_generate_knows_no_padding_token_a_stopped_row_runs_on_and_is_cut_in_the_record():
    student, teacher = tiny_model("qwen3", 1, eos=None, pad=None), tiny_model("qwen3", 2, eos=None)
    ids, mask = padded_prompts([5, 5])
    untouched = generate(student, ids, mask, max_new_tokens=20)
    criterion = DriftStoppingCriteria(teacher, NUCLEUS, check_every=4, attention_mask=mask)
    rollouts = criterion.finish(generate(student, ids, mask, max_new_tokens=20, stopping_criteria=[criterion]))
    rows = oracle(student, teacher, ids, mask, untouched, metric="nucleus", eos=())
    assert_record_equals(rollouts, rows, watched=False)
    assert "drift" in rollouts.stop_reason


def test_embeddings_in_place_of_a_prompt_are_refused(pair):
    student, teacher = pair
    embeddings = student.get_input_embeddings()(torch.tensor([[5, 6]]))
    for give in (
        {"logits_processor": [DriftMonitor(teacher, CONFIG).logits_processor]},
        {"stopping_criteria": [DriftStoppingCriteria(teacher, NUCLEUS)]},
    ):
        with pytest.raises(InputError, match="without a prompt"):
            student.generate(inputs_embeds=embeddings, max_new_tokens=3, **give)


def test_a_student_without_truth_value_may_be_scored(pair):
    student, teacher = pair

    class Compiled(type(student)):
        def __len__(self):  # as that of torch.compile's wrapper
            raise TypeError("does not support len()")

    student.__class__ = Compiled
    assert DriftMonitor(teacher, CONFIG, student=student).settings.eos_token_ids == (1,)


def test_streamers_and_outputs_of_every_row_are_refused_by_the_loop(pair):
    student, _ = pair
    ids, mask = padded_prompts([5])
    with pytest.raises(UnsupportedGenerationError, match="output_scores"):
        generate(student, ids, mask, loop=True, max_new_tokens=3, return_dict_in_generate=True, output_scores=True)
    with pytest.raises(UnsupportedGenerationError, match="streamer"):
        generate(student, ids, mask, loop=True, max_new_tokens=3, streamer=TextStreamer(Decoder()))


class Decoder:
    def decode(self, *args, **kwargs):
        return ""


def test_an_output_object_is_returned_on_request(pair):
    student, teacher = pair
    ids, mask = padded_prompts([5, 3])
    expected = generate(student, ids, mask, max_new_tokens=9)
    monitor = DriftMonitor(teacher, CONFIG, truncate=False)
    output = generate(student, ids, mask, monitor, loop=True, max_new_tokens=9, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert len(monitor.finish(output)) == 2


def test_a_model_whose_batch_cannot_be_compacted_says_so_once_and_stays_right(pair, caplog):
    student, teacher = pair
    ids, mask = padded_prompts([5, 3, 4])
    untouched = generate(student, ids, mask, max_new_tokens=20)
    for _ in range(2):
        monitor = DriftMonitor(teacher, CONFIG, check_every=4)
        sequences = generate(student, ids, mask, monitor, loop=True, max_new_tokens=20, use_cache=False)
        assert_record_equals(monitor.finish(sequences), oracle(student, teacher, ids, mask, untouched))
    assert caplog.text.count("rows of Qwen3ForCausalLM stay in the batch when they have ended: use_cache is off") == 1


def test_progress_adds_up(pair):
    student, teacher = pair
    ids, mask = padded_prompts([5, 3, 4, 2])
    seen = []
    monitor = DriftMonitor(teacher, CONFIG, check_every=4, on_check=seen.append)
    rollouts = monitor.finish(generate(student, ids, mask, monitor, loop=True, max_new_tokens=30))
    last = seen[-1]
    assert last.rows == last.running_rows + last.drifted_rows + last.ended_rows == 4
    assert last.kept_tokens == int(rollouts.lengths.sum())
    assert last.drifted_rows == rollouts.stop_reason.count("drift")
    assert [progress.tokens for progress in seen] == sorted({progress.tokens for progress in seen})


def test_settings_that_contradict_each_other_are_refused(pair):
    _, teacher = pair
    for wrong in (0, True):
        with pytest.raises(ConfigError, match="check_every must be at least 1"):
            DriftMonitor(teacher, CONFIG, check_every=wrong)
    with pytest.raises(ConfigError, match="teacher must be a loaded model or a Teacher, got 'Qwen/Qwen3-4B'"):
        unwrap(DriftMonitor.__init__)(
            object.__new__(DriftMonitor), "Qwen/Qwen3-4B"
        )  # without the tests' own type checks
    with pytest.raises(ConfigError, match="records 2 candidates, the drift metric needs 4"):
        DriftMonitor(Teacher(teacher, top_k=2), CONFIG)
    with pytest.raises(ConfigError, match="top_k must lie in 1 to 48"):
        DriftMonitor(teacher, DriftConfig("overlap", top_k=49))
    with pytest.raises(ConfigError, match="without teacher_prompt_ids"):
        DriftMonitor(teacher, CONFIG, teacher_prompt_mask=torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_student_and_teacher_may_differ_in_dtype(pair, dtype):
    student, teacher = pair
    ids, mask = padded_prompts([5, 3])
    monitor = DriftMonitor(teacher, CONFIG, check_every=4)
    rollouts = monitor.finish(generate(student.to(dtype), ids, mask, monitor, loop=True, max_new_tokens=12))
    assert rollouts.student_topk_log_probs.dtype == rollouts.teacher_log_probs.dtype == torch.float32


def test_the_loop_is_the_public_one():
    from prune_opd_hf.generation.loop import pruned_generate as inside

    assert inside is pruned_generate
