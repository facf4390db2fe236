"""A copy of the student in a shorter dtype, which the loop samples with."""

import copy

import pytest
import torch
from generation_helpers import CONFIG
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import nn
from trainer_helpers import make_trainer

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.generation import DriftMonitor, LoopEngine, Request, Sampling
from prune_opd_hf.generation.sampling_copy import SamplingCopy, copied_bytes

REQUESTS = [Request((5, 6, 7), 1), Request((8, 9), 2), Request((4, 4, 4, 4), 3)]
SAMPLING = Sampling(12, (1,), 0)


def in_bfloat16(model):
    """Every weight in bfloat16, and the buffers as they are, as Transformers loads a model."""
    own = copy.deepcopy(model)
    for weight in own.parameters():
        weight.data = weight.data.bfloat16()
    return own


@torch.no_grad()
def in_full_passes(model, rollouts):
    """Log-probabilities of the sampled tokens."""
    ids = torch.cat([rollouts.prompt_ids, rollouts.response_ids], dim=1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.response_mask], dim=1).long()
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits.float()
    width = rollouts.response_ids.shape[1]
    scored = logits[:, -width - 1 : -1].log_softmax(dim=-1).gather(-1, rollouts.response_ids[..., None])[..., 0]
    return scored * rollouts.response_mask


def rolled_out(engine, model, step):
    engine.update_weights(model, step)
    watch = DriftMonitor(tiny_model("qwen3", 2), CONFIG, check_every=4).begin(eos_token_ids=(1,), pad_token_id=0)
    list(engine.generate(REQUESTS, watch))
    return watch.rollouts()


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2"])
def test_after_each_step_it_samples_what_the_weights_in_bfloat16_do(family):
    model = tiny_model(family, 1)
    engine = LoopEngine(model, SAMPLING, slots=2, sampling_copy=SamplingCopy(torch.bfloat16))
    for step in (0, 1):
        found = rolled_out(engine, model, step)
        expected = rolled_out(LoopEngine(model, SAMPLING, slots=2), in_bfloat16(model), step)
        assert torch.equal(found.response_ids, expected.response_ids)
        assert torch.equal(found.student_topk_ids, expected.student_topk_ids)
        assert torch.equal(found.student_topk_log_probs, expected.student_topk_log_probs)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_another_sampling_shares_the_copy_and_tied_weights_stay_tied():
    model = tiny_model("qwen3", 1)
    model.lm_head.weight = model.model.embed_tokens.weight
    engine = LoopEngine(model, SAMPLING, sampling_copy=SamplingCopy(torch.bfloat16))
    engine.update_weights(model, 0)
    other = engine.with_sampling(Sampling(5, (1,), 0), slots=1)
    other.update_weights(model, 0)
    assert other.model is engine.model is not model
    assert engine.model.get_output_embeddings().weight is engine.model.get_input_embeddings().weight
    own = sum(weight.numel() for weight in model.parameters())
    assert copied_bytes(model, torch.bfloat16) == 2 * own == sum(w.nbytes for w in engine.model.parameters())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_of_an_adapted_student_the_adapter_is_renewed_and_a_base_that_is_short_already_is_shared():
    base = tiny_model("qwen3", 1).bfloat16()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=True)
    sampling_copy = SamplingCopy(torch.bfloat16)
    first = sampling_copy.of(model)
    named = dict(model.named_parameters())
    adapters = [name for name, weight in named.items() if weight.dtype == torch.float32]
    assert adapters
    assert all("lora" in name for name in adapters)
    with torch.no_grad():
        for name in adapters:
            named[name] += 1.0
    assert sampling_copy.of(model) is first
    for name, weight in first.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, named[name].bfloat16())
        assert (weight is named[name]) == (name not in adapters)
    assert copied_bytes(model, torch.bfloat16) == 2 * sum(named[name].numel() for name in adapters)


def test_what_is_frozen_at_first_or_later_is_renewed_with_every_update_it_had():
    model, sampling_copy = nn.Linear(2, 2).requires_grad_(False), SamplingCopy(torch.bfloat16)
    sampling_copy.of(model)
    model.requires_grad_(True)
    with torch.no_grad():
        model.weight.add_(1.0)
    assert torch.equal(sampling_copy.of(model).weight, model.weight.bfloat16())
    with torch.no_grad():
        model.weight.add_(1.0)
    model.requires_grad_(False)  # its last update counts as well
    assert torch.equal(sampling_copy.of(model).weight, model.weight.bfloat16())


def test_weights_that_a_family_keeps_in_float32_stay_so():
    class Kept(nn.Module):
        _keep_in_fp32_modules_strict = ("router",)

        def __init__(self):
            super().__init__()
            self.router, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

    own = SamplingCopy(torch.bfloat16).of(Kept())
    assert (own.router.weight.dtype, own.other.weight.dtype) == (torch.float32, torch.bfloat16)
    assert copied_bytes(Kept(), torch.bfloat16) == 6 * 4 + 6 * 2


def test_a_sharded_student_is_refused():
    model = nn.Linear(2, 2)
    model.weight.ds_id = 0  # as DeepSpeed's ZeRO-3 marks what it shards
    with pytest.raises(ConfigError, match="rollout_dtype makes a copy of a whole student"):
        SamplingCopy(torch.bfloat16).of(model)


def test_a_run_trains_float32_weights_on_rollouts_of_the_copy_and_evaluates_with_it(tmp_path):
    """One step: its rollouts are those of the weights before it in bfloat16, an evaluation after it those of the weights then."""
    how = {"rollout_engine": "loop", "max_steps": 1, "learning_rate": 1e-2}
    trainer = make_trainer(tmp_path / "a", rollout_dtype="bfloat16", **how)
    before = in_bfloat16(trainer.model)
    trainer.train()
    sampled = trainer.step.rollouts
    log_probs = in_full_passes(before, sampled)
    assert torch.allclose(sampled.token_log_probs, log_probs, atol=1e-2)
    trained = {weight.dtype for weight in trainer.model.parameters()}
    assert trained == {torch.float32}
    trainer.evaluate()
    copied, now = trainer.engine.model, in_bfloat16(trainer.model)
    assert all(map(torch.equal, copied.parameters(), now.parameters()))
    assert not all(map(torch.equal, before.parameters(), now.parameters()))
