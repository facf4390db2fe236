"""Rows of different lengths, scored in any order and any blocks, against full forward passes without cache or padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import full_log_probs
from tiny_models import FAMILIES, checkpoint_inplace, tiny_model

from prune_opd_hf.errors import ConfigError, InputError, NonFiniteLogitsError
from prune_opd_hf.models.slot_cache import SlotCache
from prune_opd_hf.teachers.base import require
from prune_opd_hf.teachers.local import LocalTeacher

VOCAB = 48
RECURRENT = {"falcon_h1", "lfm2", "qwen3_next"}
ATTENTION = sorted({*FAMILIES, "gemma4"} - RECURRENT)
MODELS = {}


def model_of(family):
    return MODELS.setdefault(family, tiny_model(family, 3))


def text(length, seed):
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def assert_follows(teacher, model, prompt_lengths, passes):
    """Score as `passes` say, each a dict of row -> tokens, and compare everything with full passes."""
    rows = teacher.follow_rows()
    prompts = [text(length, seed) for seed, length in enumerate(prompt_lengths)]
    responses = [text(60, 100 + row) for row in range(len(prompts))]
    expected = [full_log_probs(model, *pair).float() for pair in zip(prompts, responses, strict=True)]
    done = dict.fromkeys(range(len(prompts)), 0)
    for row, prompt in enumerate(prompts):
        rows.start_row(row, prompt.tolist())
    for widths in passes:
        numbers, time = list(widths), max(widths.values())
        tokens = torch.full((len(numbers), time), VOCAB + 5)  # what stands behind a row's tokens does not count
        for line, row in enumerate(numbers):
            tokens[line, : widths[row]] = responses[row][done[row] : done[row] + widths[row]]
        wanted = torch.arange(time) < torch.tensor([widths[row] for row in numbers]).unsqueeze(-1)
        candidates = torch.randint(0, VOCAB, (len(numbers), time, 3))
        scores = rows.score(numbers, tokens, candidates, wanted=wanted)
        for line, row in enumerate(numbers):
            span = expected[row][done[row] : done[row] + widths[row]]
            own = tokens[line, : widths[row], None]
            close = {"atol": 2e-4, "rtol": 1e-4}
            top = scores.topk_ids[line, : widths[row]]
            assert top.tolist() == span.topk(teacher.top_k).indices.tolist()
            torch.testing.assert_close(scores.topk_log_probs[line, : widths[row]], span.gather(-1, top), **close)
            torch.testing.assert_close(
                scores.token_log_probs[line, : widths[row]], span.gather(-1, own).squeeze(-1), **close
            )
            picked = candidates[line, : widths[row]]
            torch.testing.assert_close(
                scores.candidate_log_probs[line, : widths[row]], span.gather(-1, picked), **close
            )
            assert not scores.topk_log_probs[line, widths[row] :].any()
            done[row] += widths[row]


@pytest.mark.parametrize("family", ATTENTION)
def test_rows_at_any_pace_are_scored_as_by_a_full_pass_in_every_family_of_attention(family):
    model = model_of(family)
    passes = [{0: 5, 2: 3}, {1: 9}, {2: 1, 1: 4, 0: 2, 3: 7}, {3: 1}, {0: 12, 3: 12}]
    assert_follows(LocalTeacher(model, top_k=4), model, [6, 1, 14, 3], passes)


@st.composite
def any_passes(draw):
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    some = st.dictionaries(st.integers(0, len(lengths) - 1), st.integers(1, 9), min_size=1)
    return lengths, draw(st.lists(some, min_size=1, max_size=6))


@settings(max_examples=30)
@given(any_passes(), st.sampled_from(["gemma2", "llama"]), st.sampled_from([1, 30, 512]))
def test_scores_do_not_depend_on_which_rows_go_together(rows, family, at_once):
    model = model_of(family)
    teacher = LocalTeacher(model, top_k=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prune_opd_hf.teachers.local.BLOCK_TOKENS", {"cpu": at_once, "elsewhere": 1})
        assert_follows(teacher, model, *rows)


def test_a_head_that_cannot_be_split_off_makes_few_logits_at_once():
    model = model_of("llama")
    teacher = LocalTeacher(model, top_k=4, max_logit_elements=6 * VOCAB)
    teacher._parts.separable = False
    assert teacher.columns_at_once == 6
    assert_follows(teacher, model, [4, 2, 3], [{0: 3, 1: 4, 2: 2}, {2: 5, 0: 1}])


def test_a_row_that_begins_anew_is_another_sequence_and_dropped_rows_leave_their_slots():
    model = model_of("qwen3")
    teacher = LocalTeacher(model, top_k=4)
    rows = teacher.follow_rows()
    for number in range(40):
        prompt, response = text(4, number), text(6, 200 + number)
        row = number % 3
        rows.start_row(row, prompt.tolist())
        received = rows.score([row], response.unsqueeze(0), wanted=torch.ones(1, 6, dtype=torch.bool))
        expected = full_log_probs(model, prompt, response).float().gather(-1, response.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(received.token_log_probs[0], expected, atol=2e-4, rtol=1e-4)
        if number % 2:
            rows.drop_rows([row])
    assert len(rows._cache.lengths) < 16  # 40 sequences, of which no more than three were followed at a time


def test_the_slots_of_a_pass_are_laid_out_as_the_picture_shows():
    cache = SlotCache(model_of("llama"), torch.device("cpu"))
    slots = torch.tensor(cache.new_slots(3))
    cache.begin_pass(slots, torch.tensor([5, 2, 3]))
    mask = cache.begin_pass(slots[[0, 2]], torch.tensor([2, 1]))
    assert mask.tolist() == [[1] * 7, [0, 0, 0, 1, 1, 1, 1]]
    assert cache.past == 5
    assert cache.lengths[slots].tolist() == [7, 2, 4]
    assert [place.tolist() for place in cache.fresh] == [[0, 0, 1], [0, 1, 1]]  # G and W stand in the last column


@pytest.mark.parametrize("family", sorted(RECURRENT))
def test_recurrent_layers_cannot_and_are_refused_by_capability(family):
    teacher = LocalTeacher(model_of(family), top_k=4)
    with pytest.raises(
        ConfigError, match="vLLM needs a teacher that follows rows of different lengths, and LocalTeacher"
    ):
        require(teacher, "ragged_rows", "vLLM", "use the loop")


def test_what_cannot_be_scored_is_refused_in_one_line():
    model = tiny_model("llama", 3, max_position_embeddings=12)
    teacher = LocalTeacher(model, top_k=4)
    rows = teacher.follow_rows()
    with pytest.raises(InputError, match="at least one token"):
        rows.start_row(0, [])
    with pytest.raises(InputError, match="token id 48 is outside the teacher's vocabulary of 48"):
        rows.start_row(0, [5, 48])
    rows.start_row(0, [5, 6])
    one = torch.ones(1, 12, dtype=torch.bool)
    with pytest.raises(InputError, match="context holds 12 tokens, and a sequence of 13"):
        rows.score([0], torch.full((1, 12), 7), wanted=one)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(NonFiniteLogitsError, match="row 0, token 0"):
        rows.score([0], torch.full((1, 2), 7), wanted=one[:, :2])


def test_a_model_that_is_being_trained_with_checkpointing_is_followed_all_the_same():
    model = tiny_model("llama", 3)
    checkpoint_inplace(model)
    model.train()
    assert_follows(LocalTeacher(model, top_k=4, role="student"), tiny_model("llama", 3), [4, 2], [{0: 3}, {0: 2, 1: 4}])
    assert model.training


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_off_while_rows_are_scored():
    peft = pytest.importorskip("peft")
    from prune_opd_hf.teachers.adapter import AdapterBaseTeacher

    base = tiny_model("llama", 3)
    prompt, response = text(4, 0), text(6, 1)
    expected = full_log_probs(base, prompt, response).float().gather(-1, response.unsqueeze(-1)).squeeze(-1)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    rows = AdapterBaseTeacher(adapted, top_k=4).follow_rows()
    rows.start_row(0, prompt.tolist())
    received = rows.score([0], response.unsqueeze(0), wanted=torch.ones(1, 6, dtype=torch.bool))
    torch.testing.assert_close(received.token_log_probs[0], expected, atol=2e-4, rtol=1e-4)
    with_adapter = full_log_probs(adapted, prompt, response).float().gather(-1, response.unsqueeze(-1)).squeeze(-1)
    assert not torch.allclose(with_adapter, expected, atol=1e-2)
