"""The teacher's block scores against full forward passes without cache or padding, and everything it refuses."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import full_log_probs
from tiny_models import COMMON, FAMILIES, checkpoint_inplace, tiny_model

from prune_opd_hf.errors import (
    ConfigError,
    InputError,
    MonitorStateError,
    NonFiniteLogitsError,
    UnsupportedGenerationError,
)
from prune_opd_hf.teachers.base import Teacher, TeacherCapabilities, require
from prune_opd_hf.teachers.local import LocalTeacher

VOCAB = 48


def text(*lengths, seed=0):
    """Random tokens for rows of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def left_padded(prompts, pad=0):
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.full((width - len(prompt),), pad), prompt]) for prompt in prompts])
    return ids, torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])


def assert_scores(scores, row, expected, tokens, candidates, k, atol=2e-4):
    """Row `row` of `scores` against log-probabilities (time, vocab) of a full pass."""
    close = {"atol": atol, "rtol": 1e-4}
    expected = expected.float()
    torch.testing.assert_close(scores.token_log_probs[row], expected.gather(-1, tokens[:, None])[:, 0], **close)
    torch.testing.assert_close(scores.candidate_log_probs[row], expected.gather(-1, candidates), **close)
    assert scores.topk_ids[row].tolist() == expected.topk(k).indices.tolist()
    torch.testing.assert_close(scores.topk_log_probs[row], expected.topk(k).values, **close)


def follow(teacher, model, prompt_lengths, blocks, vocab=None):
    """Score `blocks` of (width, rows kept after it), compare every block of every live row with a full pass."""
    prompts = text(*prompt_lengths)
    responses = text(*[sum(width for width, _ in blocks)] * len(prompts), seed=1)
    expected = [full_log_probs(model, *pair, vocab=vocab) for pair in zip(prompts, responses, strict=True)]
    teacher.start(*left_padded(prompts))
    live, begin = list(range(len(prompts))), 0
    for width, kept in blocks:
        span = slice(begin, begin + width)
        tokens = torch.stack([responses[row][span] for row in live])
        candidates = torch.randint(0, vocab or VOCAB, (len(live), width, 3))
        scores = teacher.score(tokens, candidates)
        for place, row in enumerate(live):
            assert_scores(scores, place, expected[row][span], tokens[place], candidates[place], teacher.top_k)
        teacher.keep_rows(torch.tensor(kept))
        live, begin = [live[place] for place in kept], begin + width


BLOCKS = [(1, [0, 1, 2, 3]), (5, [3, 1, 0]), (2, [2, 1]), (9, [1]), (1, [0]), (6, [0])]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_block_scores_equal_a_full_pass_while_rows_leave_in_every_family(family):
    model = tiny_model(family, 3)
    follow(LocalTeacher(model, top_k=4), model, [6, 1, 4, 9], BLOCKS)


@st.composite
def followed_rows(draw):
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    blocks, rows = [], len(lengths)
    for width in draw(st.lists(st.integers(1, 8), min_size=1, max_size=5)):
        kept = draw(st.permutations(range(rows)))[: draw(st.integers(1, rows))]
        blocks.append((width, kept))
        rows = len(kept)
    return lengths, blocks


MODEL = {}


def shared_model():
    """One model for all examples of a property."""
    return MODEL.setdefault("gemma2", tiny_model("gemma2", 3))  # sliding and full layers, capped logits


@settings(max_examples=15)
@given(followed_rows(), st.sampled_from([1, 2, 5, 1000]))
def test_block_scores_equal_a_full_pass_for_any_split_padding_departure_and_slice(rows, positions_at_once):
    model = shared_model()
    follow(LocalTeacher(model, top_k=4, max_logit_elements=positions_at_once * VOCAB), model, *rows)


def test_rows_may_leave_before_the_first_block_and_a_new_batch_may_begin_at_any_time():
    model = tiny_model("qwen3", 3)
    teacher = LocalTeacher(model, top_k=4)
    teacher.start(*left_padded(text(5, 2)))
    teacher.score(torch.tensor([[7], [8]]))
    prompts, responses = text(4, 6, 3, seed=5), text(5, 5, 5, seed=6)
    teacher.start(*left_padded(prompts))
    teacher.keep_rows(torch.tensor([2, 0]))
    candidates = torch.randint(0, VOCAB, (2, 5, 2))
    scores = teacher.score(torch.stack([responses[2], responses[0]]), candidates)
    for place, row in enumerate([2, 0]):
        expected = full_log_probs(model, prompts[row], responses[row])
        assert_scores(scores, place, expected, responses[row], candidates[place], 4)


def test_only_wanted_positions_are_scored_and_the_others_hold_zero():
    model = tiny_model("qwen3", 3)
    teacher = LocalTeacher(model, top_k=4)
    prompts, responses = text(3, 5), text(6, 6, seed=1)
    teacher.start(*left_padded(prompts))
    wanted = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    tokens = torch.stack(responses)
    tokens[1, 2:] = VOCAB + 7  # padding that this model does not know
    candidates = torch.randint(0, VOCAB, (2, 6, 3)).masked_fill(~wanted.unsqueeze(-1), -100)
    scores = teacher.score(tokens, candidates, wanted=wanted)
    for name in ("topk_ids", "topk_log_probs", "candidate_log_probs", "token_log_probs"):
        assert not getattr(scores, name)[~wanted].any(), name
    assert_scores(scores, 0, full_log_probs(model, prompts[0], responses[0]), responses[0], candidates[0], 4)
    short = full_log_probs(model, prompts[1], responses[1][:2])
    torch.testing.assert_close(scores.token_log_probs[1, :2], short.float().gather(-1, tokens[1, :2, None])[:, 0])
    nothing = teacher.score(tokens[:, :1], wanted=torch.zeros(2, 1, dtype=torch.bool))
    assert not nothing.topk_log_probs.any()


@pytest.mark.parametrize("pad", [VOCAB, -100, 5])
def test_what_stands_under_the_padding_of_a_prompt_does_not_matter(pad):
    model = tiny_model("qwen3", 3)
    received = []
    for filler in (0, pad):
        teacher = LocalTeacher(model, top_k=4)
        teacher.start(*left_padded(text(2, 6), pad=filler))
        received.append(teacher.score(torch.tensor([[7, 9], [8, 4]])).topk_log_probs)
    torch.testing.assert_close(*received)


# ---------------------------------------------------------------------- memory


class Unfinished(transformers.LlamaForCausalLM):
    """A head that cannot be split off, and a note of how many logits it ever made at once."""

    most_logits = 0

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        self.most_logits = max(self.most_logits, outputs.logits.numel())
        outputs.logits = outputs.logits + outputs.logits**2 / 8
        return outputs


def test_never_more_logits_than_allowed_where_the_head_can_be_split_off():
    model = tiny_model("qwen3", 3)
    teacher = LocalTeacher(model, top_k=4, max_logit_elements=3 * VOCAB + 1)
    sizes = []
    teacher._parts.lm_head.register_forward_hook(lambda module, inputs, logits: sizes.append(logits.numel()))
    teacher.start(*left_padded(text(7, 30)))
    teacher.score(torch.stack(text(5, 5)))
    assert max(sizes) == 3 * VOCAB
    assert sum(sizes) == 2 * 5 * VOCAB  # the prompts have none


def test_never_more_logits_than_allowed_where_the_head_cannot_be_split_off():
    torch.manual_seed(1)
    model = Unfinished(transformers.LlamaConfig(**COMMON, vocab_size=VOCAB)).eval()
    teacher = LocalTeacher(model, top_k=4, max_logit_elements=4 * VOCAB)
    assert not teacher._parts.separable
    model.most_logits = 0
    prompts, responses = text(3, 9), text(5, 5, seed=1)
    teacher.start(*left_padded(prompts))
    candidates = torch.randint(0, VOCAB, (2, 5, 3))
    scores = teacher.score(torch.stack(responses), candidates)
    assert model.most_logits == 4 * VOCAB  # two columns of two rows
    for row in range(2):
        expected = full_log_probs(model, prompts[row], responses[row])
        assert_scores(scores, row, expected, responses[row], candidates[row], 4)


# ---------------------------------------------------------------------- numbers


@torch.no_grad()
def test_a_bfloat16_teacher_equals_its_own_full_pass_and_is_normalised_in_float32():
    model = tiny_model("llama", 3).bfloat16()
    teacher = LocalTeacher(model, top_k=VOCAB)
    prompt, response = text(6, 12)
    teacher.start(prompt[None])
    blocks = [teacher.score(response[None, span]) for span in (slice(0, 5), slice(5, 12))]
    log_q = torch.cat([block.topk_log_probs for block in blocks], dim=1)[0]
    ids = torch.cat([block.topk_ids for block in blocks], dim=1)[0]
    assert log_q.dtype == torch.float32
    # In bfloat16 the sum would be off by about 2 ** -8.
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(12), atol=1e-5, rtol=0)
    logits = model(torch.cat([prompt, response])[None]).logits[0, 5:-1]
    expected = logits.float().log_softmax(-1).gather(-1, ids)
    rounding = 2**-8 * float(logits[:, 1:].abs().max())  # of one logit; id 0 has a bias of -1000 in these models
    torch.testing.assert_close(log_q[:, :-1], expected[:, :-1], atol=4 * rounding, rtol=0)


@pytest.mark.parametrize("how", ["at the start", "later"])
def test_unused_vocabulary_rows_enter_neither_a_topk_nor_the_normalisation(how):
    model = tiny_model("qwen3", 3)
    with torch.no_grad():
        model.lm_head.bias[40:] = torch.tensor([50.0, float("nan"), float("inf")] + [60.0] * 5)
    teacher = LocalTeacher(model, top_k=4, vocab_size=40 if how == "at the start" else None)
    if how == "later":
        teacher.restrict_vocabulary(45)
        teacher.restrict_vocabulary(40)
        teacher.restrict_vocabulary(1000)  # never grows again
    assert teacher.vocab_size == 40
    prompts = [prompt % 37 + 3 for prompt in text(4, 2)]
    response = torch.tensor([5, 39, 3])
    teacher.start(*left_padded(prompts))
    candidates = torch.randint(0, 40, (2, 3, 3))
    scores = teacher.score(response.expand(2, 3), candidates)
    for row, prompt in enumerate(prompts):
        assert_scores(scores, row, full_log_probs(model, prompt, response, vocab=40), response, candidates[row], 4)


@pytest.mark.parametrize("at_once", [1, 1000])
@pytest.mark.parametrize("family", ["qwen3", "lfm2"])
@pytest.mark.parametrize("rubbish", [float("nan"), float("inf")])
def test_rubbish_is_refused_with_its_row_and_token(family, at_once, rubbish):
    def spoil(module, inputs, named, outputs):  # what the backbone says after token 40
        outputs.last_hidden_state[named["input_ids"] == 40] = rubbish

    teacher = LocalTeacher(tiny_model(family, 3), top_k=4, max_logit_elements=at_once * VOCAB)
    teacher._parts.backbone.register_forward_hook(spoil, with_kwargs=True)
    teacher.start(torch.tensor([[5, 6], [7, 8], [9, 9]]))
    teacher.score(torch.tensor([[5, 5], [5, 5], [5, 5]]))
    with pytest.raises(NonFiniteLogitsError, match="teacher returned NaN or infinite logits at row 1, token 3 of"):
        teacher.score(torch.tensor([[3, 3, 3, 3, 3], [3, 3, 40, 3, 3], [3, 3, 3, 40, 3]]))


@pytest.mark.parametrize(("bias", "refused"), [(float("inf"), True), (-float("inf"), False)])
def test_an_infinite_logit_is_refused_unless_it_only_rules_a_token_out(bias, refused):
    model = tiny_model("qwen3", 3)
    with torch.no_grad():
        model.lm_head.bias[30] = bias
    teacher = LocalTeacher(model, top_k=4, role="student")
    teacher.start(torch.tensor([[5, 6]]))
    if refused:
        with pytest.raises(NonFiniteLogitsError, match="the student returned NaN or infinite logits at row 0, token 0"):
            teacher.score(torch.tensor([[7]]))
    else:
        scores = teacher.score(torch.tensor([[7]]), torch.tensor([[[30]]]))
        assert scores.candidate_log_probs.item() == -float("inf")
        assert scores.topk_log_probs.isfinite().all()


# ---------------------------------------------------------------------- the context


def test_the_context_may_be_filled_and_not_exceeded():
    model = tiny_model("llama", 3, max_position_embeddings=12)
    teacher = LocalTeacher(model, top_k=4)
    teacher.start(*left_padded(text(10, 4)))
    with pytest.raises(InputError, match="context holds 12 tokens, and a sequence of 13 would"):
        teacher.score(torch.tensor([[5, 5, 5, 5]] * 2))
    teacher.score(torch.tensor([[5, 5, 5]] * 2))  # 13 tokens: the last one is scored by the 12th, and not read
    with pytest.raises(InputError, match="a sequence of 13"):
        teacher.score(torch.tensor([[5]] * 2))
    teacher.keep_rows(torch.tensor([1]))  # the long row is gone: 7 tokens so far
    teacher.score(torch.tensor([[5] * 6]))
    with pytest.raises(InputError, match="a sequence of 13"):
        teacher.score(torch.tensor([[5]]))


def test_a_prompt_beyond_the_context_is_refused():
    teacher = LocalTeacher(tiny_model("llama", 3, max_position_embeddings=12), top_k=4)
    with pytest.raises(InputError, match="context holds 12 tokens, and a sequence of 13 would"):
        teacher.start(torch.full((1, 13), 5))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[5, 6, 7]], [[1, 1, 0]], "padded on the left .*; row 0 is not"),
        ([[5, 6, 7], [5, 6, 7]], [[0, 1, 1], [1, 0, 1]], "row 1 is not"),
        ([[5, 6], [0, 0]], [[1, 1], [0, 0]], "got an empty one"),
        ([[]], [[]], "got an empty one"),
        ([[5, VOCAB]], [[1, 1]], f"token id {VOCAB} is outside the teacher's vocabulary of {VOCAB}"),
        ([[5, -1]], [[1, 1]], "token id -1 is outside"),
    ],
)
def test_prompts_that_cannot_be_worked_with_are_refused(ids, mask, message):
    teacher = LocalTeacher(tiny_model("llama", 3), top_k=4)
    with pytest.raises(InputError, match=message):
        teacher.start(torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long))


@pytest.mark.parametrize(
    ("tokens", "candidates", "message"),
    [
        ([[5]], None, "follows 2 rows, got tokens of 1"),
        ([[], []], None, "without tokens"),
        ([[5], [VOCAB]], None, f"token id {VOCAB} is outside"),
        ([[5], [-100]], None, "token id -100 is outside"),
        ([[5], [6]], [[[1, 2]], [[3, VOCAB]]], f"token id {VOCAB} is outside"),
        ([[5], [6]], [[[1, 2]], [[-1, 3]]], "token id -1 is outside"),
    ],
)
def test_blocks_that_cannot_be_scored_are_refused_and_change_nothing(tokens, candidates, message):
    model = tiny_model("llama", 3)
    received = []
    for disturbed in (False, True):
        teacher = LocalTeacher(model, top_k=4)
        teacher.start(torch.tensor([[5, 6], [7, 8]]))
        teacher.score(torch.tensor([[9], [9]]))
        if disturbed:
            candidate_ids = None if candidates is None else torch.tensor(candidates)
            with pytest.raises(InputError, match=message):
                teacher.score(torch.tensor(tokens, dtype=torch.long), candidate_ids)
        received.append(teacher.score(torch.tensor([[5, 6], [7, 8]])).topk_log_probs)
    assert torch.equal(*received)


def test_nothing_works_before_the_prompt_is_known():
    teacher = LocalTeacher(tiny_model("llama", 3), top_k=4)
    with pytest.raises(MonitorStateError, match="call start"):
        teacher.score(torch.tensor([[5]]))
    with pytest.raises(MonitorStateError, match="call start"):
        teacher.keep_rows(torch.tensor([0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k must lie in 1 to 48"),
        ({"top_k": 49}, "top_k must lie in 1 to 48"),
        ({"top_k": 9, "vocab_size": 8}, "top_k must lie in 1 to 8"),
        ({"top_k": 1, "vocab_size": 0}, "top_k must lie in 1 to 0"),
        ({"top_k": 4, "max_logit_elements": 47}, "at least one position of the teacher's 48 logits, got 47"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        LocalTeacher(tiny_model("llama", 3), **arguments)


def test_a_shared_vocabulary_smaller_than_the_topk_is_refused():
    teacher = LocalTeacher(tiny_model("llama", 3), top_k=16)
    with pytest.raises(ConfigError, match="top_k is 16, above the 15 tokens"):
        teacher.restrict_vocabulary(15)


# ---------------------------------------------------------------------- the model itself


def test_the_model_is_in_evaluation_mode_without_gradient_and_its_parameters_are_left_alone():
    model = tiny_model("llama", 3, attention_dropout=0.5).train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    teacher = LocalTeacher(model, top_k=4)
    teacher.start(torch.tensor([[5, 6]]))
    scores = teacher.score(torch.tensor([[7, 8]]), torch.tensor([[[1], [2]]]))
    assert not model.training
    assert not scores.candidate_log_probs.requires_grad
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(map(torch.equal, model.parameters(), before))


def test_a_student_that_is_scored_stays_in_the_mode_it_was_in():
    model = tiny_model("llama", 3).train()
    LocalTeacher(model, top_k=4, role="student")
    assert model.training


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_model_in_training_that_drops_its_cache_is_refused(role):
    model = tiny_model("llama", 3)
    teacher = LocalTeacher(model, top_k=4, role=role)
    checkpoint_inplace(model)
    teacher.start(torch.tensor([[5, 6]]))
    model.train()
    with pytest.raises(UnsupportedGenerationError, match=rf"the {role} is in training mode.*model\.eval\(\)"):
        teacher.start(torch.tensor([[5, 6]]))


def test_time_spent_scoring_adds_up():
    teacher = LocalTeacher(tiny_model("llama", 3), top_k=4)
    teacher.start(torch.tensor([[5, 6]]))
    spent = [teacher.wall_seconds]
    for _ in range(2):
        teacher.score(torch.tensor([[7]]))
        spent.append(teacher.wall_seconds)
    assert 0 == spent[0] < spent[1] < spent[2]


def follow_with_arrivals(model, prompts, script, k=4):
    """Start with the first `script[0]` prompts; then (width, kept, arrivals): score a block, keep rows, let prompts join."""
    responses = text(*[40] * len(prompts), seed=1)
    expected = [full_log_probs(model, *pair) for pair in zip(prompts, responses, strict=True)]
    teacher, waiting = LocalTeacher(model, top_k=k), list(range(len(prompts)))
    live, waiting = waiting[: script[0]], waiting[script[0] :]
    done = dict.fromkeys(range(len(prompts)), 0)
    teacher.start(*left_padded([prompts[row] for row in live]))
    for width, kept, arrivals in script[1:]:
        tokens = torch.stack([responses[row][done[row] : done[row] + width] for row in live])
        candidates = torch.randint(0, VOCAB, (len(live), width, 3))
        scores = teacher.score(tokens, candidates)
        for place, row in enumerate(live):
            span = slice(done[row], done[row] + width)
            assert_scores(scores, place, expected[row][span], tokens[place], candidates[place], k)
            done[row] += width
        live = [live[place] for place in kept]
        teacher.keep_rows(torch.tensor(kept))
        joining, waiting = waiting[:arrivals], waiting[arrivals:]
        if joining:
            teacher.add_rows(*left_padded([prompts[row] for row in joining]))
        live += joining


JOINING = ("llama", "qwen3")


@st.composite
def arrivals(draw):
    lengths = draw(st.lists(st.integers(1, 9), min_size=2, max_size=6))
    rows = draw(st.integers(1, len(lengths)))
    script, waiting = [rows], len(lengths) - rows
    for width in draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)):
        kept = draw(st.permutations(range(rows)))[: draw(st.integers(1, rows))]
        joining = draw(st.integers(0, waiting))
        script.append((width, kept, joining))
        rows, waiting = len(kept) + joining, waiting - joining
    return lengths, [*script, (3, list(range(rows)), 0)]


@settings(max_examples=25)
@given(arrivals(), st.sampled_from(JOINING))
def test_rows_that_join_a_batch_under_way_are_scored_as_in_a_full_pass(case, family):
    lengths, script = case
    model = MODEL.setdefault(family, tiny_model(family, 3))
    follow_with_arrivals(model, text(*lengths), script)


def test_rows_may_join_before_the_first_block():
    model = tiny_model("qwen3", 3)
    teacher = LocalTeacher(model, top_k=4)
    prompts, responses = text(4, 1, 6), text(3, 3, 3, seed=1)
    teacher.start(*left_padded(prompts[:1]))
    teacher.add_rows(*left_padded(prompts[1:]))
    candidates = torch.randint(0, VOCAB, (3, 3, 2))
    scores = teacher.score(torch.stack(responses), candidates)
    for row in range(3):
        assert_scores(
            scores, row, full_log_probs(model, prompts[row], responses[row]), responses[row], candidates[row], 4
        )


def test_where_a_layer_forgets_tokens_rows_cannot_join_and_the_teacher_says_so():
    teacher = LocalTeacher(tiny_model("gemma2", 3), top_k=4)
    assert not teacher.capabilities.adds_rows
    teacher.start(*left_padded(text(4, 2)))
    with pytest.raises(MonitorStateError, match="call start when all of its rows have left"):
        teacher.add_rows(*left_padded(text(3)))


def test_what_a_setting_needs_and_a_teacher_lacks_is_refused_in_one_line():
    class TopKOnly(LocalTeacher):
        capabilities = TeacherCapabilities(scores_candidates=False)

    model = tiny_model("qwen3", 3)
    require(LocalTeacher(model, top_k=4), "scores_candidates", "metric", "nothing")
    with pytest.raises(
        ConfigError, match=r"^metric='mass' needs a teacher that scores any .*, and TopKOnly does not: use"
    ):
        require(TopKOnly(model, top_k=4), "scores_candidates", "metric='mass'", "use 'nucleus'")


def test_the_local_teacher_has_all_that_the_protocol_asks_for():
    assert isinstance(LocalTeacher(tiny_model("qwen3", 3), top_k=4), Teacher)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_the_padding_of_a_finished_row_may_run_beyond_the_context(family):
    model = tiny_model(family, 1, max_position_embeddings=12)
    teacher = LocalTeacher(model, top_k=4)
    prompts, responses = text(10, 3), text(8, 8, seed=1)
    teacher.start(*left_padded(prompts))
    tokens, wanted = torch.stack(responses), torch.tensor([[True] * 2 + [False] * 6, [True] * 8])
    scores = teacher.score(tokens, wanted=wanted)
    for row, kept in enumerate((2, 8)):
        expected = full_log_probs(model, prompts[row], responses[row][:kept]).float()
        found = scores.token_log_probs[row, :kept]
        torch.testing.assert_close(found, expected.gather(-1, responses[row][:kept, None])[:, 0], atol=2e-4, rtol=1e-4)
    with pytest.raises(InputError, match="context holds 12 tokens"):
        teacher.score(tokens)


def test_a_teacher_that_is_a_student_in_training_answers_without_dropout():
    model = tiny_model("gpt2", 1)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    teacher = LocalTeacher(model, top_k=4)
    (prompt,), (response,) = text(4), text(6, seed=1)
    expected = full_log_probs(model, prompt, response)
    model.train()
    teacher.start(prompt[None])
    assert_scores(
        teacher.score(response[None], response[None, :, None]), 0, expected, response, response[:, None], teacher.top_k
    )
    assert model.training


def test_a_model_that_takes_no_key_value_cache_is_refused():
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UnsupportedGenerationError, match="MambaForCausalLM keeps its state outside of past_key_values"):
        LocalTeacher(transformers.MambaForCausalLM(config), top_k=4)
