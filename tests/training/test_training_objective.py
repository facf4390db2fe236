"""The loss of a micro-batch: every kind against a slow loop over rows with dense logits, and the layout it is computed in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from trainer_helpers import TASK, make_trainer, prompts_of
from trainer_helpers import settings as run_settings
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prune_opd_hf import DriftConfig, PruneOPDTrainer
from prune_opd_hf.algorithm.losses import (
    generalized_jsd_loss,
    sampled_token_loss,
    topk_kl_loss,
    topk_policy_gradient_loss,
)
from prune_opd_hf.algorithm.rewards import choose_candidates, topk_rewards
from prune_opd_hf.models.forward_pass import can_pack, lay_out
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.tasks import load_student, load_teacher, load_tokenizer
from prune_opd_hf.training.micro_batches import micro_batch


def by_hand(prompts, responses):
    """Rollouts of given token lists, with zeros for everything that the layout does not look at."""
    rows, left, right = len(prompts), max(map(len, prompts)), max(map(len, responses))
    ids = torch.zeros(rows, left, dtype=torch.long), torch.zeros(rows, right, dtype=torch.long)
    masks = torch.zeros(rows, left, dtype=torch.bool), torch.zeros(rows, right, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[0][row, left - len(prompt) :], masks[0][row, left - len(prompt) :] = torch.tensor(prompt), True
        ids[1][row, : len(response)], masks[1][row, : len(response)] = torch.tensor(response), True
    zeros = torch.zeros(rows, right)
    return Rollouts(
        prompt_ids=ids[0],
        prompt_mask=masks[0],
        response_ids=ids[1],
        response_mask=masks[1],
        teacher_token_log_probs=zeros,
        teacher_topk_ids=torch.zeros(rows, right, 1, dtype=torch.long),
        teacher_topk_log_probs=torch.zeros(rows, right, 1),
        drift_events=masks[1] & False,
        reliability=masks[1].float(),
        stop_reason=("length",) * rows,
        config=DriftConfig("overlap", top_k=1),
    )


TOKENS = st.lists(st.integers(1, 99), min_size=1, max_size=5)


@settings(max_examples=50)
@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4))
def test_rows_stand_at_the_left_edge_and_each_predicting_place_is_before_its_token(rows):
    layout = lay_out(by_hand([prompt for prompt, _ in rows], [response for _, response in rows]))
    width = max(len(prompt) + len(response) for prompt, response in rows)
    assert layout.input_ids.shape == (len(rows), width)
    expected_places, expected_tokens = [], []
    for row, (prompt, response) in enumerate(rows):
        padding = [0] * (width - len(prompt) - len(response))
        assert layout.input_ids[row].tolist() == prompt + response + padding
        for index, token in enumerate(response):
            expected_places.append(row * width + len(prompt) + index - 1)
            expected_tokens.append(token)
    assert layout.predicting.tolist() == expected_places
    assert layout.input_ids.flatten()[layout.predicting + 1].tolist() == expected_tokens


@settings(max_examples=50)
@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4))
def test_packed_rows_follow_one_another(rows):
    rollouts = by_hand([prompt for prompt, _ in rows], [response for _, response in rows])
    layout = lay_out(rollouts, packed=True)
    assert layout.input_ids.tolist() == [[token for prompt, response in rows for token in prompt + response]]
    assert layout.lengths == tuple(len(prompt + response) for prompt, response in rows)
    assert layout.input_ids[0, layout.predicting + 1].tolist() == [token for _, response in rows for token in response]


def test_packing_is_left_alone_where_it_would_cost_a_square_or_depend_on_the_longest_sequence():
    model = tiny_model("qwen3", 1).train()
    model.model.layers[0].eval()  # as where a part is kept from its dropout
    modes = [part.training for part in model.modules()]
    assert can_pack(model)
    assert [part.training for part in model.modules()] == modes
    eager = tiny_model("qwen3", 1)
    eager.set_attn_implementation("eager")
    switching = tiny_model("phi3", 1)
    switching.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 16}
    chunked = tiny_model("llama", 1)
    chunked.config.attention_chunk_size = 8
    assert [can_pack(model) for model in (eager, switching, chunked)] == [False, False, False]


def test_an_attention_function_that_someone_registered_is_called_for_each_sequence_and_stays():
    seen, model = [], tiny_model("llama", 1)
    library = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def own(module, query, *rest, **kwargs):
        seen.append(query.shape[2])
        return library(module, query, *rest, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"], make_mask = own, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    try:
        rollouts = by_hand([[3, 4], [5]], [[6, 7, 8], [9]])
        lay_out(rollouts, packed=True).read_by(model)
        model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = library
    assert seen == [5, 2] * 2 + [3] * 2  # of each of two layers
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is make_mask


def slow_loss(trainer, rollouts, old=None):
    """Row by row: a full forward pass without padding, dense log-probabilities, the pure losses."""
    args, count, vocab = trainer.args, float(rollouts.response_mask.sum()), trainer.teacher.vocab_size
    weights = rollouts.reliability + 0.5
    total, position = torch.zeros(()), 0
    for row in range(len(rollouts)):
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
        response = rollouts.response_ids[row][rollouts.response_mask[row]]
        length = len(response)
        ids, mask = torch.cat([prompt, response]).unsqueeze(0), torch.ones(1, length, dtype=torch.bool)
        left_out = torch.zeros(vocab, dtype=torch.bool)
        left_out[list(trainer.teacher.excluded_ids)] = True
        logits = trainer.model(ids).logits[:, len(prompt) - 1 : -1, :vocab].masked_fill(left_out, -torch.inf)
        with torch.no_grad():
            teacher_logits = trainer.teacher.model(ids).logits[:, len(prompt) - 1 : -1, :vocab]
            teacher_logits = teacher_logits.masked_fill(left_out, -torch.inf)
        log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        weight, k = weights[row : row + 1, :length], args.loss_top_k
        shared = {"token_count": count}
        if args.loss_type in ("generalized_jsd", "reverse_kl"):
            beta = args.beta if args.loss_type == "generalized_jsd" else 1.0
            total = total + generalized_jsd_loss(
                logits, teacher_logits, weight, mask, beta=beta, temperature=args.loss_temperature, **shared
            )
            continue
        if args.loss_type == "sampled_token":
            mine, theirs = (values.gather(-1, response.reshape(1, -1, 1))[..., 0] for values in (log_p, log_q))
            loss = sampled_token_loss(
                mine, mine.detach(), theirs, weight, mask, estimator=args.sampled_estimator, **shared
            )
            total = total + loss.loss
            continue
        top = rollouts.student_topk_ids[row : row + 1, :length, :k], log_q.topk(k).indices
        candidates = choose_candidates(
            top[0], log_q.gather(-1, top[0]), top[1], log_q.gather(-1, top[1]), args.loss_support
        )
        mine = log_p.gather(-1, candidates.ids)
        before = mine.detach() if old is None else old[:, position : position + length]
        position += length
        if args.loss_type == "topk_kl":
            total = total + topk_kl_loss(
                mine,
                candidates.teacher_log_probs,
                weight,
                mask,
                direction=args.topk_kl_direction,
                tail=args.topk_kl_tail,
                support=candidates.support,
                **shared,
            )
            continue
        rewards = topk_rewards(
            before,
            candidates.teacher_log_probs,
            mask,
            support=candidates.support,
            weighting=args.loss_weighting,
            centered=True,
        )
        total = total + topk_policy_gradient_loss(mine, before, rewards * weight.unsqueeze(-1), mask, **shared).loss
    return total


def gradient_of(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat(
        [parameter.grad.flatten() for parameter in trainer.model.parameters() if parameter.grad is not None]
    )


KINDS = [
    {"loss_type": "topk_policy_gradient", "loss_support": "union", "loss_weighting": "teacher"},
    {"loss_type": "topk_policy_gradient", "loss_support": "intersection", "loss_weighting": "uniform"},
    {"loss_type": "topk_kl", "topk_kl_direction": "forward", "topk_kl_tail": "bucket", "loss_support": "teacher"},
    {"loss_type": "topk_kl"},
    {"loss_type": "sampled_token", "sampled_estimator": "k3"},
    {"loss_type": "generalized_jsd", "beta": 0.3, "loss_temperature": 2.0},
    {"loss_type": "reverse_kl"},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(value) for value in kind.values()))
def test_every_loss_and_its_gradient_equal_a_slow_loop_with_dense_logits_padded_and_packed(tmp_path, kind):
    on_candidates = {"loss_top_k": 6} if kind["loss_type"].startswith("topk") else {}
    trainer = make_trainer(tmp_path, max_tokens_per_micro_batch=1000, **on_candidates, **kind)
    assert trainer.objective.packs
    rollouts = trainer.generate_rollouts(prompts_of(trainer, 4))
    assert len(set(rollouts.lengths.tolist())) > 1  # there is something to pad
    expected = slow_loss(trainer, rollouts)
    found = [expected, gradient_of(trainer, expected)]
    for trainer.objective.packs in (True, False):
        received = trainer.compute_loss(trainer.model, {"rollouts": rollouts})
        found += [received, gradient_of(trainer, received)]
    expected, expected_gradient, packed, packed_gradient, padded, padded_gradient = found
    torch.testing.assert_close(packed, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(packed_gradient, expected_gradient, atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed_gradient, padded_gradient, atol=1e-5, rtol=0)


def renamed(*token_ids):
    """The embedded task's tokenizer with other names for some of its tokens, which are then added ones."""
    tokenizer, plain = load_tokenizer(), load_tokenizer().get_vocab()
    names = {index: token for token, index in plain.items()} | {index: f"<renamed {index}>" for index in token_ids}
    tokenizer.get_vocab = lambda: {token: index for index, token in names.items()}
    return tokenizer


SPECIAL_IDS = (0, 3)  # <pad> and <unk>


@pytest.mark.parametrize("separable", [True, False], ids=["backbone and head", "dense logits"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(value) for value in kind.values()))
def test_renamed_special_tokens_count_for_nothing_in_any_loss(tmp_path, kind, separable, monkeypatch):
    pair = load_student(), load_teacher()
    with torch.no_grad():
        for model in pair:  # left alone, they would say little else
            weight = model.get_output_embeddings().weight
            weight[list(SPECIAL_IDS)] = 1.5 * weight.mean(dim=0)
    on_candidates = {"loss_top_k": 6} if kind["loss_type"].startswith("topk") else {}
    trainer = PruneOPDTrainer(
        *pair,
        run_settings(tmp_path, **on_candidates, allow_renamed_special_tokens=True, **kind),
        TASK.dataset(8, seed=0),
        processing_class=load_tokenizer(),
        teacher_processing_class=renamed(*SPECIAL_IDS),
    )
    assert trainer.teacher.excluded_ids == SPECIAL_IDS
    assert set(SPECIAL_IDS) <= set(trainer.engine.sampling.suppress_tokens)
    rollouts = trainer.generate_rollouts(prompts_of(trainer, 4))
    assert not torch.isin(rollouts.student_topk_ids[rollouts.response_mask], torch.tensor(SPECIAL_IDS)).any()
    assert rollouts.excluded_ids == SPECIAL_IDS
    if not separable:
        monkeypatch.setattr(trainer.objective.parts, "_transform", None)
        monkeypatch.setattr(trainer.objective.parts, "separable", False)
    expected = slow_loss(trainer, rollouts)
    expected_gradient = gradient_of(trainer, expected)
    received = trainer.compute_loss(trainer.model, {"rollouts": rollouts})
    torch.testing.assert_close(received, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(gradient_of(trainer, received), expected_gradient, atol=2e-5, rtol=2e-4)


def test_a_renamed_end_of_both_still_ends_a_response(tmp_path):
    end = load_tokenizer().eos_token_id
    arguments = {"processing_class": load_tokenizer(), "teacher_processing_class": renamed(0, end)}
    arguments["args"] = run_settings(tmp_path, allow_renamed_special_tokens=True)
    trainer = PruneOPDTrainer(load_student(), load_teacher(), train_dataset=TASK.dataset(8, seed=0), **arguments)
    assert trainer.teacher.excluded_ids == (0,)
    assert end in trainer.monitor.settings.eos_token_ids


@pytest.mark.parametrize("loss_type", ["topk_policy_gradient", "generalized_jsd"])
@pytest.mark.parametrize(
    ("family", "teacher", "packs"),
    [
        ("gemma2", "qwen3", None),  # a soft cap
        ("gpt2", "qwen3", None),  # another layout of the model
        *((family, "qwen3", True) for family in ("llama", "gemma3", "qwen3_moe", "gpt2", "phi3")),
        ("gemma2", "qwen3", False),  # attends eagerly, for its soft cap
        ("qwen3_next", "qwen3", False),  # linear attention lets the first sequence into the second
        ("qwen3", "gemma2", True),  # a teacher that reads again, for losses over the vocabulary, must pack as well
    ],
)
def test_other_families_go_through_the_same_loss(tmp_path, family, teacher, packs, loss_type):
    tokens = {"eos": load_tokenizer().eos_token_id, "pad": load_tokenizer().pad_token_id, "vocab_size": 64}
    on_candidates = {"loss_top_k": 6} if loss_type.startswith("topk") else {}
    pair = tiny_model(family, 1, **tokens), tiny_model(teacher, 2, **tokens)
    limit = None if packs is None else 1000
    trainer = make_trainer(tmp_path, *pair, loss_type=loss_type, max_tokens_per_micro_batch=limit, **on_candidates)
    assert trainer.objective.packs == (bool(packs) and (teacher == "qwen3" or loss_type != "generalized_jsd"))
    rollouts = trainer.generate_rollouts(prompts_of(trainer, 4))
    expected = slow_loss(trainer, rollouts)
    expected_gradient = gradient_of(trainer, expected)
    received = trainer.compute_loss(trainer.model, {"rollouts": rollouts})
    torch.testing.assert_close(gradient_of(trainer, received), expected_gradient, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("loss_type", ["topk_policy_gradient", "generalized_jsd"])
def test_a_head_that_cannot_be_taken_apart_gives_the_same_loss(tmp_path, loss_type, monkeypatch):
    trainer = make_trainer(tmp_path, loss_type=loss_type)
    rollouts = trainer.generate_rollouts(prompts_of(trainer, 4))
    split = gradient_of(trainer, trainer.compute_loss(trainer.model, {"rollouts": rollouts}))
    monkeypatch.setattr(trainer.objective.parts, "separable", False)
    dense = gradient_of(trainer, trainer.compute_loss(trainer.model, {"rollouts": rollouts}))
    torch.testing.assert_close(split, dense, atol=2e-5, rtol=2e-4)


def test_a_second_update_measures_its_ratio_against_the_weights_that_generated(tmp_path):
    trainer = make_trainer(tmp_path, num_iterations=2, loss_top_k=6, loss_support="union")
    rollouts = trainer.generate_rollouts(prompts_of(trainer, 4))
    inputs = micro_batch(rollouts)
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs))  # which makes copies of dictionaries
    old = inputs["old"].values
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    expected = slow_loss(trainer, rollouts, old)
    expected_gradient = gradient_of(trainer, expected)
    received = trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs))
    torch.testing.assert_close(received, expected, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(gradient_of(trainer, received), expected_gradient, atol=5e-5, rtol=1e-3)
    assert torch.equal(inputs["old"].values, old)
    assert trainer._means.take()["clip_share"] > 0
