"""What a training step holds in memory, by part, and the most tokens of a pass that fit.

    peak = always + the larger of generation and update
    always      weights of both models, AdamW's two moments
    generation  KV caches of both models, the logits that the teacher scores at once, the rollouts
    update      the rollouts and the micro-batches made of them, gradients, and the larger of
                  what a forward pass keeps, the logits, and the LM head's gradient      (where the backward pass begins)
                  gradients of LM head and embeddings that are still to be added up      (where it ends)

Counted from shapes, and from what autograd keeps in short passes; nothing is fitted to measurements, which lie at 0.9 to 1.1 of it
(examples/results/packing), those of QLoRA on a CPU at 1.14, of losses over the vocabulary at up to 1.26. Each process has this much
where nothing is sharded.
"""

import copy
import logging
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_layers import GradientCheckpointingLayer

from prune_opd_hf.generation.sampling_copy import copied_bytes
from prune_opd_hf.models.chunked_head.projection import MAX_LOGIT_ELEMENTS
from prune_opd_hf.models.compatibility import context_length
from prune_opd_hf.models.forward_pass import Layout, hidden_states
from prune_opd_hf.models.kv_cache import SPARE_TOKENS
from prune_opd_hf.models.lm_head import base_causal_lm, evaluating, input_device, text_config
from prune_opd_hf.models.loading import is_adapted
from prune_opd_hf.models.packed_attention import may_pack
from prune_opd_hf.teachers.local import MAX_LOGIT_ELEMENTS as MAX_TEACHER_LOGITS

PROBE = 128
"""Tokens of the shortest of three passes that tell how much a longer one keeps for its backward pass: linear attention goes by
chunks of 64 tokens, and attention on GPUs keeps sums for whole multiples of 32."""

FLOAT32_BYTES = 4
"""The trainer's weights are float32: bfloat16 ones round updates of a learning rate of 1e-6 to nothing."""

MOST_TOKENS = 2**22
"""No budget is told beyond this many tokens of a pass."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step.

    Attributes:
        always, generation, update: by part; what is held all the time, while rollouts are made, and while weights are updated.
        most_tokens: the largest `max_tokens_per_micro_batch` that fits the memory that was asked about; 0 where none does, None
            where none was asked about.
    """

    always: Mapping[str, int] = field(default_factory=dict)
    generation: Mapping[str, int] = field(default_factory=dict)
    update: Mapping[str, int] = field(default_factory=dict)
    most_tokens: int | None = None

    @property
    def peak(self) -> int:
        """Bytes that must be there."""
        return sum(self.always.values()) + max(sum(self.generation.values()), sum(self.update.values()))


def step_memory(
    student: nn.Module,
    teacher: nn.Module | None,
    *,
    rows: int,
    tokens: int,
    pass_tokens: int | None = None,
    rollouts: int | None = None,
    check_every: int = 32,
    top_k: int = 16,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    rollout_dtype: str | None = None,
    compile_decoding: bool = False,
    available: int | None = None,
) -> StepMemory:
    """Bytes that a training step holds, by part.

    Args:
        student, teacher: may be fake (`torch._subclasses.FakeTensorMode`), made of configs alone. The teacher is None where its
            weights lie on servers. Of weights that are offloaded to the disk those of one module are held, the largest:
            Accelerate brings in one at a time.
        rows: generated at once.
        tokens: of the longest row, prompt and response.
        pass_tokens: of one pass of the update (`max_tokens_per_micro_batch`), which has one row at least.
        rollouts: of the step, of the same length; by default `rows`.
        check_every: tokens of a row between two teacher passes.
        top_k: candidates recorded at each position.
        bf16, gradient_checkpointing, rollout_dtype, compile_decoding: as in training.
        available: bytes that `most_tokens` must fit into.
    """
    student_bytes = held_bytes(student.parameters(), FLOAT32_BYTES)
    trained = sum(weight.numel() for weight in student.parameters() if weight.requires_grad) * FLOAT32_BYTES
    of_teacher = [] if teacher is None or teacher is student else _held_weights(teacher)
    room, vocab = _with_spare_room(tokens), student.get_output_embeddings().weight.shape[0]
    count = rows if rollouts is None else rollouts
    recorded = count * tokens * (26 + 28 * top_k)  # records/rollouts.py: 6 numbers of a token, 5 of a candidate
    scored = min(MAX_TEACHER_LOGITS, rows * min(check_every, tokens) * vocab)
    cache = {"student's KV cache": cache_bytes_per_token(student, is_trained=True) * rows * room}
    always = {
        "student, weights": student_bytes,
        "AdamW": 2 * trained,
        **({"copy to sample with": copied_bytes(student, getattr(torch, rollout_dtype))} if rollout_dtype else {}),
        f"teacher, weights{_dtypes(of_teacher)}": held_bytes(of_teacher),
        **(cache if compile_decoding else {}),
    }
    generation = {
        **({} if compile_decoding else cache),
        "teacher's KV cache": 0 if teacher is None else cache_bytes_per_token(teacher) * rows * room,
        "teacher's logits at once": 0 if teacher is None else scored * _bytes_of_logit(teacher),
        "rollouts": recorded,
    }
    largest = _largest_dequantized(student)
    whole = {"a quantized weight, made whole": largest} if largest else {}
    kept = activations(student, bf16=bf16, gradient_checkpointing=gradient_checkpointing)

    def of_update(tokens: int) -> dict[str, int]:
        parts = {"rollouts and micro-batches": 2 * recorded, "gradients": trained, **whole}
        begins, ends = _head_bytes(student, tokens, bf16)
        begins = {f"activations of {tokens:,} tokens": kept(tokens), **begins}
        return parts | max(begins, ends, key=lambda moment: sum(moment.values()))

    made, most = partial(StepMemory, always, generation), None
    if available is not None:  # a row that is longer than the budget has a pass of its own
        budgets = range(1, MOST_TOKENS + 1)
        most = bisect_right(budgets, available, key=lambda budget: made(of_update(max(budget, tokens))).peak)
    return made(of_update(max(tokens, pass_tokens or 0)), most)


def _head_bytes(student: nn.Module, tokens: int, bf16: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Of LM head and embeddings, where the backward pass begins and where it ends (`models/chunked_head/candidates.py`)."""
    head, embeddings = student.get_output_embeddings().weight, student.get_input_embeddings().weight
    computed = 2 if bf16 else head.element_size() if not head.requires_grad else FLOAT32_BYTES
    logits = min(MAX_LOGIT_ELEMENTS, tokens * head.shape[0])
    projected = logits * (computed + FLOAT32_BYTES * (computed < FLOAT32_BYTES))
    copied = head.numel() * computed if bf16 and head.requires_grad else 0
    gradient = head.numel() * FLOAT32_BYTES if head.requires_grad else 0
    looked_up = embeddings.numel() * FLOAT32_BYTES if embeddings.requires_grad else 0
    begins = {"logits at once, and the LM head": copied + projected + max(logits * FLOAT32_BYTES, gradient)}
    pending = looked_up + (gradient if head is embeddings else 0)
    return begins, {"gradients of embeddings, to be added up": pending}


# ---------------------------------------------------------------------- activations


class Kept(NamedTuple):
    """Bytes that a forward pass keeps for its backward pass: of the layers, their inputs, and whatever lies outside of layers."""

    layers: int
    largest_layer: int
    inputs: int
    outside: int


def activations(
    student: nn.Module, *, bf16: bool = False, gradient_checkpointing: bool = False
) -> Callable[[int], int]:
    """Bytes that a pass over so many tokens keeps for the backward pass, without the LM head, whose logits are made in slices.

    Autograd tells what short passes keep; at most the square of the length grows (eager attention). With gradient checkpointing
    that is each layer's input, and what one layer keeps when it is computed again; under autocast also the weights' copies, which
    last from the forward pass of a layer to its end.
    """
    step = max(1, min(PROBE, (context_length(student) or 3 * PROBE) // 3))
    lengths = (step, 2 * step, 3 * step)
    passes = _short_passes(student, lengths, bf16)
    copies = 2 * sum(
        part.weight.numel() for part in student.modules() if isinstance(part, nn.Linear) and part.weight.requires_grad
    )

    curves = [np.polyfit(lengths, [kept[part] for kept in passes], deg=2) for part in range(len(Kept._fields))]

    def held(tokens: int) -> int:
        layers, largest, inputs, outside = (float(np.polyval(curve, tokens)) for curve in curves)
        if gradient_checkpointing:
            return round(outside + inputs + max(largest, copies if bf16 else 0))
        return round(outside + layers)

    return held


def _short_passes(student: nn.Module, lengths: Sequence[int], bf16: bool) -> list[Kept]:
    """Of a twin in float32, as the trainer has the model, with the same weights trained; of the model itself where there is no such
    twin (adapters, quantized weights), and where steps depend on values (the choice of experts)."""
    if not is_adapted(student) and not getattr(student, "is_quantized", False):
        log = logging.getLogger(FakeTensorMode.__module__)  # it reports what is caught here
        before, log.disabled = log.disabled, True
        try:
            twin = _twin(student)
            return [kept_for_backward(twin, length, bf16=bf16) for length in lengths]
        except RuntimeError:
            pass
        finally:
            log.disabled = before
    return [kept_for_backward(student, length, bf16=bf16) for length in lengths]


def _twin(student: nn.Module) -> nn.Module:
    """A fake model of the same config in float32, as the trainer has it: it takes no memory, and its passes no time."""
    model: Any = base_causal_lm(student)
    config = copy.deepcopy(model.config)
    if (model.config._attn_implementation or "").startswith("flash"):
        config._attn_implementation = "sdpa"  # keeps the same, and runs everywhere
    with FakeTensorMode():
        twin = type(model)(config)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    for name, weight in twin.named_parameters():
        weight.requires_grad_(name in trained)
    return twin


def kept_for_backward(student: nn.Module, tokens: int, *, bf16: bool = False) -> Kept:
    """Bytes that a forward pass over one row keeps, by what autograd saves: weights are not counted."""
    head: Any = student.get_output_embeddings()
    own = {weight.untyped_storage()._cdata for weight in (*student.parameters(), *student.buffers())}
    sizes: dict[int, tuple[Tensor, int | None]] = {}  # what is kept lives on, so that no two have one place
    inputs: dict[int, int] = {}
    current: list[int] = []

    def note(value: Tensor) -> Tensor:
        place = value.untyped_storage()._cdata
        if place not in own:
            sizes.setdefault(place, (value, current[-1] if current else None))
        return value

    def enter(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        current.append(id(layer))
        states = next(value for value in arguments if isinstance(value, Tensor))
        inputs[states.untyped_storage()._cdata] = states.untyped_storage().nbytes()
        sizes.setdefault(states.untyped_storage()._cdata, (states, None))

    def leave(*_: Any) -> None:
        current.pop()

    layers = [part for part in student.modules() if isinstance(part, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    fake = getattr(head.weight, "fake_mode", None)
    device = input_device(student)
    try:
        with (
            evaluating(student),
            fake or torch.enable_grad(),
            torch.enable_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=bf16),
            torch.autograd.graph.saved_tensors_hooks(note, lambda value: value),
        ):
            student.train()
            ids = torch.arange(tokens, device=device) % head.weight.shape[0]
            layout = Layout(ids.unsqueeze(0), torch.arange(tokens), (tokens,) if may_pack(student) else None)
            note(hidden_states(student, head, layout))
    finally:
        for hook in hooks:
            hook.remove()
    bytes_of: dict[int | None, int] = {}
    for place, (value, layer) in sizes.items():
        layer = None if place in inputs else layer
        bytes_of[layer] = bytes_of.get(layer, 0) + value.untyped_storage().nbytes()
    outside = bytes_of.pop(None, 0) - sum(inputs.values())
    return Kept(
        sum(bytes_of.values()) + sum(inputs.values()), max(bytes_of.values(), default=0), sum(inputs.values()), outside
    )


# ---------------------------------------------------------------------- weights and caches


def held_bytes(weights: Iterable[Tensor], of_trained: int | None = None) -> int:
    """Bytes of weights, the scales of 4-bit ones among them; `of_trained`: of a number that gets a gradient."""
    total = 0
    for value in weights:
        number = of_trained if of_trained is not None and value.requires_grad else value.element_size()
        total += value.numel() * number
        state = getattr(value, "quant_state", None)
        while state is not None:
            total += state.absmax.numel() * state.absmax.element_size()
            state = state.state2 if state.nested else None
    return total


def _largest_dequantized(model: nn.Module) -> int:
    """4-bit weights are made whole for each product, one at a time."""
    states = [weight.quant_state for weight in model.parameters() if hasattr(weight, "quant_state")]
    return max((math.prod(state.shape) * state.dtype.itemsize for state in states), default=0)


def _held_weights(model: nn.Module) -> list[Tensor]:
    held = [weight for weight in model.parameters() if not weight.is_meta]
    away = ([weight for weight in part.parameters(recurse=False) if weight.is_meta] for part in model.modules())
    return held + max(away, key=held_bytes, default=[])


def _bytes_of_logit(teacher: nn.Module) -> int:
    """As projected, in float32, and in the sum of exponentials (`teachers/local.py: score_span`)."""
    number = next(value for value in teacher.parameters() if value.is_floating_point()).element_size()
    return 2 * FLOAT32_BYTES + (number if number < FLOAT32_BYTES else 0)


def _dtypes(weights: Sequence[Tensor]) -> str:
    """The dtypes that weights are kept in, those of the most bytes first: quantized ones are whole numbers."""
    sizes: dict[str, int] = {}
    for value in weights:
        name = str(value.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + value.numel() * value.element_size()
    return f" ({', '.join(sorted(sizes, key=lambda name: -sizes[name]))})" if sizes else ""


def cache_bytes_per_token(model: nn.Module, *, is_trained: bool = False) -> int:
    """Keys and values of one token in all layers: 2 x layers x heads x head size x bytes of a number, those of weights that are
    trained being float32."""
    config: Any = text_config(model)
    layers, heads, hidden = (
        getattr(config, name, 0) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or hidden // max(heads, 1)
    number = next(value for value in model.parameters() if value.is_floating_point())
    of_number = FLOAT32_BYTES if is_trained and number.requires_grad else number.element_size()
    return 2 * layers * key_heads * size * of_number


def _with_spare_room(tokens: int) -> int:
    """Tokens that a growing cache has room for when it holds so many (`models/kv_cache.py`)."""
    room = 0
    while room < tokens:
        room = max(room + 1 + SPARE_TOKENS, (room + 1) * 5 // 4)
    return room


def available_bytes() -> tuple[str, int] | None:
    """The memory of the first accelerator, else of the machine, with its name; None where the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0), int(torch.cuda.get_device_properties(0).total_memory)
    try:
        return "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
