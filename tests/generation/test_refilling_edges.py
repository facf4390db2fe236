"""Where blocks, caps, contexts and criteria meet: every record against full passes, whatever `check_every` is."""

import pytest
import torch
from generation_helpers import CONFIG, generate, oracle, oracle_of_requests, padded_prompts
from oracle import assert_record_equals
from test_loop_engine import answered, models, requests_of, sampling, slow_response
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import LogitsProcessorList, PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation import RepetitionPenaltyLogitsProcessor

from prune_opd_hf import DriftConfig, DriftMonitor
from prune_opd_hf.errors import ConfigError, UnsupportedGenerationError
from prune_opd_hf.generation import LoopEngine, Request

EVENTS_EVERYWHERE = DriftConfig("overlap", top_k=4, threshold=1.0, weight_drop=0.25)


def assert_recorded(student, teacher, requests, how, *, check_every, slots=2):
    """All rows run to their own end or cap, and the record is that of full passes."""
    monitor = DriftMonitor(teacher, CONFIG, check_every=check_every, truncate=False)
    watch = monitor.begin(eos_token_ids=how.eos_token_ids, pad_token_id=0)
    answered(LoopEngine(student, how, slots=slots), requests, watch)
    responses = [slow_response(student, request, how)[0] for request in requests]
    rows = oracle_of_requests(student, teacher, requests, responses, truncate=False, eos=how.eos_token_ids)
    assert_record_equals(watch.rollouts(), rows)


def test_rows_that_all_meet_their_cap_at_the_end_of_a_block_have_left_before_others_begin():
    student, teacher = models("gemma2")  # its rows cannot join others
    assert_recorded(student, teacher, requests_of([4, 6, 2, 5, 3]), sampling(8), check_every=4)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@pytest.mark.parametrize("check_every", [3, 4, 8])
def test_a_row_that_fills_the_context_ends_while_its_block_goes_on(family, check_every):
    student, teacher = (tiny_model(family, seed, max_position_embeddings=32, eos=None) for seed in (1, 2))
    requests = requests_of([28, 4, 20, 4], caps=[4, 20, 12, 7])
    assert_recorded(student, teacher, requests, sampling(20, eos_token_ids=()), check_every=check_every)


@pytest.mark.parametrize("arguments", [{"min_new_tokens": 5}, {"repetition_penalty": 1.3}])
def test_equal_prompts_are_shared_also_where_processors_want_prompts_of_one_width(arguments):
    student, _ = models()
    short = requests_of([4, 2], seed=9)
    requests = [*requests_of([8, 8, 7]), short[0], Request(short[0].prompt_ids, 5), short[1]]
    engine = LoopEngine(student, sampling(9, generation_kwargs=arguments), slots=3)
    for request, (tokens, _) in zip(requests, answered(engine, requests), strict=True):
        ids = torch.tensor([request.prompt_ids])
        alone = generate(student, ids, torch.ones_like(ids), max_new_tokens=9, **arguments)
        assert tokens == alone[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_with_an_end_token_is_not_penalized_as_an_end(use_cache):
    student, requests = tiny_model("qwen3", 1, pad=None), requests_of([8, 2, 5, 3])
    how = sampling(20, pad_token_id=1, generation_kwargs={"repetition_penalty": 3.0, "use_cache": use_cache})
    for request, (tokens, _) in zip(requests, answered(LoopEngine(student, how, slots=3), requests), strict=True):
        ids = torch.tensor([request.prompt_ids])
        alone = generate(student, ids, torch.ones_like(ids), max_new_tokens=20, repetition_penalty=3.0, pad_token_id=1)
        assert tokens == alone[0, ids.shape[1] :].tolist()


class EndAtColumn(StoppingCriteria):
    def __init__(self, column):
        self.column = column

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.column, dtype=torch.bool)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("check_every", [1, 2, 3, 4, 32])
def test_a_criterion_at_the_exhausted_token_is_the_reason_for_every_check_every(check_every, use_cache):
    student, teacher = models(eos=None)
    ids, mask = padded_prompts([4, 2, 6])
    monitor = DriftMonitor(teacher, EVENTS_EVERYWHERE, check_every=check_every)
    criterion = EndAtColumn(ids.shape[1] + 4)  # four events use the reliability up
    arguments = {"max_new_tokens": 9, "stopping_criteria": [criterion], "use_cache": use_cache}
    rollouts = monitor.finish(generate(student, ids, mask, monitor, loop=True, **arguments))
    assert rollouts.drift_events[:, :4].all()
    assert rollouts.lengths.tolist() == [4, 4, 4]
    assert rollouts.stop_reason == ("criterion",) * 3


@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize("pad", [0, 5])
def test_a_monitor_with_ends_of_its_own_knows_those_of_generate_as_well(loop, pad):
    student, teacher = models()
    ids, mask = padded_prompts([4, 2, 6])
    untouched = generate(student, ids, mask, max_new_tokens=60)
    monitor = DriftMonitor(teacher, CONFIG, check_every=4, truncate=False, eos_token_id=47, attention_mask=mask)
    sequences = generate(student, ids, mask, monitor, loop=loop, max_new_tokens=60, pad_token_id=pad)
    rows = oracle(student, teacher, ids, mask, untouched, truncate=False, eos=(1, 47))
    assert "eos" in [row.stop_reason for row in rows]
    assert_record_equals(monitor.finish(sequences), rows)


@pytest.mark.parametrize("hooks", ["both", "processor"])
def test_a_generation_in_inference_mode_may_be_finished_outside_of_it(hooks):
    student, teacher = models()
    ids, mask = padded_prompts([4, 2, 6])
    untouched = generate(student, ids, mask, max_new_tokens=20)
    monitor = DriftMonitor(teacher, CONFIG, check_every=7, truncate=False, attention_mask=mask)
    given = {"logits_processor": [monitor.logits_processor]}
    if hooks == "both":
        given["stopping_criteria"] = [monitor.stopping_criterion]
    with torch.inference_mode():
        sequences = generate(student, ids, mask, max_new_tokens=20, **given)
    rollouts = monitor.finish(sequences)
    assert_record_equals(rollouts, oracle(student, teacher, ids, mask, untouched, truncate=False))
    assert not any(values.is_inference() for values in rollouts.tensors().values())


def test_what_an_engine_cannot_do_right_is_refused_at_once():
    student, teacher = models()
    engine, requests = LoopEngine(student, sampling(5)), requests_of([3])
    with pytest.raises(ConfigError, match="max_completion_length must be at least 1, got 0"):
        Request((5,), max_completion_length=0)
    with pytest.raises(ConfigError, match="token 1 ends a response, and the watch does not know"):
        list(engine.generate(requests, DriftMonitor(teacher, CONFIG).begin(eos_token_ids=(47,))))
    with pytest.raises(ConfigError, match="teacher_prompt_ids belong to the sequences of one generate call"):
        DriftMonitor(teacher, CONFIG, teacher_prompt_ids=torch.tensor([[5, 6]])).begin()
    ignoring = RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=3)
    for arguments in (
        {"min_length": 4},
        {"encoder_repetition_penalty": 1.3},
        {"logits_processor": LogitsProcessorList([ignoring])},
    ):
        with pytest.raises(UnsupportedGenerationError, match="made for the prompts of one batch"):
            LoopEngine(student, sampling(5, generation_kwargs=arguments))


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize("check_every", [1, 4])
def test_stop_strings_end_the_rows_of_an_engine(family, check_every):
    letters = Tokenizer(BPE(vocab={chr(75 + number): number for number in range(48)}, merges=[]))  # K to z
    letters.decoder = decoders.Fuse()
    stopping = {"tokenizer": PreTrainedTokenizerFast(tokenizer_object=letters), "stop_strings": ["_", "i", "W"]}
    student, teacher = models(family)
    requests, how = requests_of([4, 8, 1, 4, 2, 6]), sampling(14, generation_kwargs=stopping)
    watch = DriftMonitor(teacher, CONFIG, check_every=check_every, truncate=False).begin(eos_token_ids=(1,))
    answers = answered(LoopEngine(student, how, slots=3), requests, watch)
    for request, (tokens, _) in zip(requests, answers, strict=True):
        ids = torch.tensor([request.prompt_ids])
        alone = generate(student, ids, torch.ones_like(ids), max_new_tokens=14, **stopping)
        assert tokens == alone[0, ids.shape[1] :].tolist()
    assert "criterion" in watch.rollouts().stop_reason
