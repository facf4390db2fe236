"""The student's step against `model(...)`, and when it must go through it."""

from functools import wraps

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import FAMILIES, tiny_model
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from prune_opd_hf.errors import UnsupportedGenerationError
from prune_opd_hf.generation import decoding_step, pruned_generate
from prune_opd_hf.generation.decoding_step import DecodingStep
from prune_opd_hf.models.kv_cache import use_growing_layers_inplace
from prune_opd_hf.models.lm_head import BackboneAndHead

PROMPT, LENGTH = 6, 14  # beyond the sliding window of 8


def prompts(padded):
    ids = torch.randint(3, 48, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, PROMPT, dtype=torch.long)
    if padded:
        mask[0, :4] = mask[2, :1] = 0
    return ids, mask


def steps(model, padded):
    """Logits of each step and of `model(...)` over everything so far, row by row; row 1 leaves half-way."""
    ids, mask = prompts(padded)
    positions = mask.cumsum(dim=-1) - 1
    cache = DynamicCache(config=model.config)
    use_growing_layers_inplace(cache)
    step = DecodingStep(model)
    step.use(cache, mask if padded else None, max_length=LENGTH)
    inputs = {
        "attention_mask": mask,
        "position_ids": positions.clamp(min=0),
        "past_key_values": cache,
        "use_cache": True,
    }
    step.read({"input_ids": ids[:, :PROMPT], **inputs}, ids.device)
    rows, taken = [0, 1, 2], []
    for length in range(PROMPT + 1, LENGTH + 1):
        if length == 10 and step.mask is not None:
            step.mask[1] = step.mask[2]
        if length == 10:
            rows = [0, 2]
            with step.context():
                cache.reorder_cache(torch.tensor(rows))
        at = mask.sum(dim=-1, keepdim=True)[rows] + length - 1 - PROMPT
        logits = step.next(ids[rows, length - 1 : length], at, length, ids.device)
        assert not logits.is_inference()
        for place, row in enumerate(rows):
            whole = ids[row, :length][torch.cat([mask[row], mask.new_ones(length - PROMPT)]).bool()]
            taken.append((logits[place], model(whole.unsqueeze(0)).logits[0, -1].clone()))
    return step, taken


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"lfm2"}))
def test_a_step_gives_the_logits_of_a_full_pass(family, padded):
    model = tiny_model(family, 1)
    _, taken = steps(model, padded)
    for ours, expected in taken:
        torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "form"),
    [("qwen3", "by kind of layer"), ("llama", "four axes"), ("gemma2", None), ("gemma3", None)],
)
def test_masks_are_made_once_where_all_attention_is_full(family, form):
    model = tiny_model(family, 1)
    step, _ = steps(model, padded=True)
    assert step.mask.dtype == (torch.long if form is None else torch.bool)
    assert step.mask.shape == ((3, LENGTH) if form is None else (3, 1, 1, LENGTH))
    unpadded, _ = steps(model, padded=False)
    assert unpadded.mask is None
    assert unpadded.no_mask == ({"full_attention": None} if form == "by kind of layer" else None)


def test_other_kinds_of_attention_make_their_own_masks():
    model = tiny_model("qwen3", 1)
    model.set_attn_implementation("eager")
    step, taken = steps(model, padded=True)
    assert step.mask.ndim == 2
    for ours, expected in taken:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_family_that_refuses_or_ignores_a_ready_mask_makes_its_own():
    backbone = tiny_model("qwen3", 1).model
    forward = type(backbone).forward

    class Picky(type(backbone)):
        def forward(self, *args, attention_mask=None, **kwargs):
            assert attention_mask.ndim == 2
            return forward(self, *args, attention_mask=attention_mask, **kwargs)

    class Deaf(type(backbone)):
        def forward(self, *args, attention_mask=None, **kwargs):
            heeded = attention_mask if torch.is_tensor(attention_mask) and attention_mask.ndim == 2 else None
            return forward(self, *args, attention_mask=heeded, **kwargs)

    class Half(type(backbone)):
        def forward(self, *args, attention_mask=None, **kwargs):
            if isinstance(attention_mask, dict):
                raise KeyError("sliding_attention")
            return forward(self, *args, attention_mask=attention_mask, **kwargs)

    for kind, form in ((Picky, None), (Deaf, None), (Half, "four axes")):
        backbone = tiny_model("qwen3", 1).model
        backbone.__class__ = kind
        assert decoding_step.ready_form(backbone) == form


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_the_model_are_called_at_every_step(kind):
    calls = []
    model = tiny_model("llama", 1)
    getattr(model, kind)(lambda *_: calls.append("hook"))
    step, _ = steps(model, padded=False)
    assert step.parts is None
    assert len(calls) >= 1 + LENGTH - PROMPT


def test_hooks_on_layers_and_on_all_modules_see_the_passes_of_generate_and_no_others():
    model = tiny_model("llama", 1, eos=None)
    ids, _ = prompts(padded=False)
    shapes = []
    hook = model.model.layers[0].register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape[:2])))
    model.generate(ids, max_new_tokens=3, do_sample=False, custom_generate=pruned_generate)
    assert shapes == [(3, LENGTH), (3, 1), (3, 1)]
    hook.remove()
    shapes.clear()

    def note(module, inputs, outputs):
        if module is model:
            shapes.append("model")

    hook = register_module_forward_hook(note)
    try:
        model.generate(ids, max_new_tokens=3, do_sample=False, custom_generate=pruned_generate)
    finally:
        hook.remove()
    assert shapes == ["model"] * 3


class Steered(LlamaForCausalLM):
    """Does more than backbone and head, but not at first."""

    bias = None

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if self.bias is not None:
            outputs.logits = outputs.logits + self.bias
        return outputs


@pytest.mark.parametrize("how", ["subclass", "patched class"])
def test_a_model_whose_forward_is_not_transformers_own_is_called_as_a_whole(monkeypatch, how):
    model = tiny_model("llama", 1, eos=None)
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False, custom_generate=pruned_generate)
    if how == "subclass":
        model.__class__ = Steered
    else:
        monkeypatch.setattr(LlamaForCausalLM, "bias", None, raising=False)
        original = LlamaForCausalLM.forward

        def steered(self, *args, **kwargs):
            outputs = original(self, *args, **kwargs)
            outputs.logits = outputs.logits if self.bias is None else outputs.logits + self.bias
            return outputs

        monkeypatch.setattr(LlamaForCausalLM, "forward", steered)
    model.bias = torch.zeros(48).index_fill(0, torch.tensor([5]), 50.0)
    sequences = model.generate(
        torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False, custom_generate=pruned_generate
    )
    assert sequences[0, 2:].tolist() == [5, 5, 5, 5]


def test_what_was_found_of_a_model_is_looked_for_again_when_it_may_have_changed(monkeypatch):
    asked = []
    find = BackboneAndHead._find_transform
    monkeypatch.setattr(BackboneAndHead, "_find_transform", lambda self: (asked.append(None), find(self))[1])
    torch.manual_seed(1)
    settings = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = CohereConfig(**settings, num_attention_heads=4, eos_token_id=None, pad_token_id=0, logit_scale=0.25)
    model = CohereForCausalLM(config).eval()

    def changed_scale():
        model.logit_scale = -2.0  # what the family's forward pass reads

    def another_head():
        model.lm_head = torch.nn.Linear(32, 48, bias=False)

    def fewer_tokens():
        model.resize_token_embeddings(40)

    def nothing():
        pass

    for change, expected in ((nothing, 1), (nothing, 1), (changed_scale, 2), (another_head, 3), (fewer_tokens, 4)):
        change()
        arguments = {"max_new_tokens": 8, "do_sample": False}
        plain = model.generate(torch.tensor([[5, 6]]), **arguments)
        assert torch.equal(model.generate(torch.tensor([[5, 6]]), **arguments, custom_generate=pruned_generate), plain)
        assert len(asked) == expected


@pytest.mark.parametrize("broken", ["head", "backbone"])
def test_a_model_that_the_probe_cannot_take_apart_is_called_as_a_whole(broken):
    model = tiny_model("llama", 1)
    if broken == "head":
        model.lm_head = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 48))
    else:
        model.base_model_prefix = "lm_head"
    step, taken = steps(model, padded=True)
    assert step.parts is None
    for ours, expected in taken:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def falcon(*, alibi):
    torch.manual_seed(1)
    settings = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": alibi}
    return FalconForCausalLM(FalconConfig(**settings, initializer_range=0.25, eos_token_id=None, pad_token_id=0)).eval()


def test_two_models_of_one_class_may_take_masks_in_two_ways():
    ids, mask = prompts(padded=True)
    for alibi in (False, True):  # the second computes its positions from a mask of two axes
        model, arguments = falcon(alibi=alibi), {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        expected = model.generate(ids[:, :PROMPT], **arguments)
        assert torch.equal(model.generate(ids[:, :PROMPT], **arguments, custom_generate=pruned_generate), expected)


def test_a_window_is_heeded_with_a_cache_that_knows_nothing_of_it():
    torch.manual_seed(1)
    settings = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6, "initializer_range": 0.25}
    model = MistralForCausalLM(MistralConfig(**settings, eos_token_id=None, pad_token_id=0)).eval()
    ids, mask = prompts(padded=True)
    for cache in (lambda: DynamicCache(), lambda: None):
        arguments = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
        expected = model.generate(ids[:, :PROMPT], **arguments, past_key_values=cache())
        received = model.generate(
            ids[:, :PROMPT], **arguments, past_key_values=cache(), custom_generate=pruned_generate
        )
        assert torch.equal(received, expected)


def test_probes_take_no_random_numbers_from_a_model_with_dropout():
    model = tiny_model("gpt2", 1, eos=None).train()
    ids, mask = prompts(padded=True)
    sequences = []
    for _ in range(2):  # only the first generation of a model asks how it takes masks
        torch.manual_seed(3)
        sequences.append(
            model.generate(
                ids[:, :PROMPT], attention_mask=mask, max_new_tokens=12, do_sample=True, custom_generate=pruned_generate
            )
        )
    assert torch.equal(*sequences)
    assert model.training


class BufferedHead(torch.nn.Linear):
    """Answers into one buffer, as a compiled head may."""

    def forward(self, hidden):
        answer = super().forward(hidden)
        if not hasattr(self, "buffer") or self.buffer.shape != answer.shape:
            self.buffer = torch.empty_like(answer)
        return self.buffer.copy_(answer)


@torch.no_grad()
def test_logits_of_one_step_survive_the_next():
    model = tiny_model("llama", 1)
    model.lm_head.__class__ = BufferedHead
    _, taken = steps(model, padded=False)
    for ours, expected in taken:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_ignores_its_cache_is_refused():
    class Forgetful(LlamaForCausalLM):
        def forward(self, *args, past_key_values=None, **kwargs):
            return super().forward(*args, **kwargs)

    model = tiny_model("llama", 1)
    model.__class__ = Forgetful
    with pytest.raises(UnsupportedGenerationError, match="does not use the KV cache"):
        steps(model, padded=False)


def test_replaced_forwards_are_called_at_every_step():
    calls = []
    model = tiny_model("llama", 1)
    original = model.forward

    @wraps(original)
    def mine(*args, **inputs):
        calls.append("mine")
        return original(*args, **inputs)

    model.forward = mine  # as torch.compile does
    step, taken = steps(model, padded=True)
    assert step.parts is None
    assert len(calls) >= 1 + LENGTH - PROMPT
    for ours, expected in taken:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_step_of_a_model_that_accelerate_prepared_has_the_numbers_under_autocast(monkeypatch, family):
    model = tiny_model(family, 1)
    _, in_float32 = steps(model, padded=True)
    AcceleratorState._reset_state(reset_partial_state=True)  # a trainer's of another test in this process
    try:
        Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    step, taken = steps(model, padded=True)
    monkeypatch.setattr(decoding_step, "_parts", lambda model: None)
    whole, expected = steps(model, padded=True)
    assert (step.parts is None, whole.parts is None) == (False, True)
    for (ours, _), (theirs, _), (other, _) in zip(taken, expected, in_float32, strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, other)


def test_a_compiled_model_is_called_as_a_whole():
    model = tiny_model("llama", 1)
    model.compile(backend="eager")
    step, taken = steps(model, padded=False)
    assert step.parts is None
    for ours, expected in taken:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
