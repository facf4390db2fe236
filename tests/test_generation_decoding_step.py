"""The student's step against `model(...)`, and when it must go through it."""

from functools import wraps

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from transformers import DynamicCache

from prune_opd_hf.generation import decoding_step
from prune_opd_hf.generation.decoding_step import DecodingStep
from prune_opd_hf.kv_cache import use_growing_layers_inplace

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
    step = DecodingStep(model, cache, mask if padded else None, max_length=LENGTH)
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
            taken.append((logits[place], model(whole.unsqueeze(0)).logits[0, -1]))
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
        backbone.__class__ = kind
        assert decoding_step._ready_form(backbone) == form


def test_hooks_and_replaced_forwards_are_gone_through():
    calls = []
    model = tiny_model("llama", 1)
    hook = model.register_forward_hook(lambda *_: calls.append("hook"))
    steps(model, padded=False)
    assert len(calls) >= 1 + LENGTH - PROMPT
    hook.remove()
    calls.clear()
    original = model.forward

    @wraps(original)
    def mine(*args, **inputs):
        calls.append("mine")
        return original(*args, **inputs)

    model.forward = mine  # as accelerate and torch.compile do
    step, taken = steps(model, padded=True)
    assert step.halves is None
    assert len(calls) >= 1 + LENGTH - PROMPT
    for ours, expected in taken:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_is_called_as_a_whole():
    model = tiny_model("llama", 1)
    model.compile(backend="eager")
    step, taken = steps(model, padded=False)
    assert step.halves is None
    for ours, expected in taken:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
