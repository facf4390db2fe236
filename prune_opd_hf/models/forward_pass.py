"""One forward pass over a micro-batch: from rollouts to hidden states at the positions that predict response tokens.

Sequences are laid out without the space that prompts were padded with, response tokens right behind, and padding only at the
end of a row. Under causal attention no token looks at it, so the pass needs no mask. Or they are packed: one row without any
padding, in which positions that begin again at 0 tell the model where a sequence begins. Hidden states are taken from the input
of the LM head, so the pass goes through the model as the trainer wraps it (DDP, FSDP2, DeepSpeed, PEFT) and still makes no
logits.

It knows models and rollouts; it does not know losses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from prune_opd_hf.models.lm_head import evaluating, input_device
from prune_opd_hf.models.packed_attention import may_pack, packed_arguments, packed_masks
from prune_opd_hf.models.vocabulary import id_tensor, without_ids
from prune_opd_hf.records.rollouts import Rollouts

PACKING_TOLERANCE = {torch.float32: 1e-3}
"""How much a packed sequence may differ from itself alone, as a share of what another sequence before it changes; 0.1 where numbers
are rounded more."""


class Layout(NamedTuple):
    """A micro-batch as the models read it.

    Attributes:
        input_ids: prompt and response tokens from column 0 on; padding behind them.
        predicting: flat indices (row * columns + column) of the positions that predict a response token, in the order of the
            response mask's True entries.
        lengths: of packed sequences; None where each row is one sequence.
    """

    input_ids: Int[Tensor, "batch columns"]
    predicting: Int[Tensor, " tokens"]
    lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> "Layout":
        return self._replace(input_ids=self.input_ids.to(device))

    def read_by(self, model: nn.Module) -> Any:
        """The output of a forward pass of this model."""
        if self.lengths is None:
            return model(input_ids=self.input_ids, use_cache=False)
        device = self.input_ids.device
        positions = torch.cat([torch.arange(length, device=device) for length in self.lengths]).unsqueeze(0)
        with packed_masks(model):
            packed = packed_arguments(model, self.lengths)
            return model(input_ids=self.input_ids, position_ids=positions, use_cache=False, **packed)

    def pick(self, states: Float[Tensor, "batch columns features"]) -> Float[Tensor, "tokens features"]:
        """The rows of `states` that predict response tokens."""
        return states.flatten(0, 1).index_select(0, self.predicting.to(states.device))


def lay_out(rollouts: Rollouts, *, for_teacher: bool = False, packed: bool = False) -> Layout:
    """The sequences of a micro-batch as the student reads them, or as the teacher does: moved to the left edge, or packed in one
    row without padding. A model that packs gives the same hidden states for either, see `can_pack`."""
    prompt_ids, prompt_mask = rollouts.prompt_ids, rollouts.prompt_mask
    if for_teacher and rollouts.teacher_prompt_ids is not None and rollouts.teacher_prompt_mask is not None:
        prompt_ids, prompt_mask = rollouts.teacher_prompt_ids, rollouts.teacher_prompt_mask
    prompt_lengths = prompt_mask.sum(dim=-1)
    totals = prompt_lengths + rollouts.lengths
    width = int(totals.max())
    columns = torch.arange(width, device=totals.device)
    sequences = torch.cat([prompt_ids, rollouts.response_ids], dim=-1)
    left = (prompt_ids.shape[1] - prompt_lengths).unsqueeze(-1)
    input_ids = sequences.gather(1, (columns + left).clamp(max=sequences.shape[1] - 1))
    inside: Bool[Tensor, "batch columns"] = columns < totals.unsqueeze(-1)
    input_ids = torch.where(inside, input_ids, rollouts.pad_token_id)
    predicting = (columns >= prompt_lengths.unsqueeze(-1) - 1) & (columns < totals.unsqueeze(-1) - 1)
    if packed:
        return Layout(input_ids[inside].unsqueeze(0), predicting[inside].nonzero().squeeze(-1), tuple(totals.tolist()))
    return Layout(input_ids, predicting.flatten().nonzero().squeeze(-1))


@torch.no_grad()
def can_pack(model: nn.Module) -> bool:
    """Whether the model keeps packed sequences apart, probed by two short ones.

    Recurrent layers, and families that make masks or positions of their own, let the first sequence into the second. How much that
    changes is the scale of the comparison.
    """
    if not may_pack(model):
        return False
    embeddings = model.get_input_embeddings().weight
    device, vocabulary = input_device(model), embeddings.shape[0]
    tolerance = PACKING_TOLERANCE.get(embeddings.dtype, 0.1)
    first, second = (
        torch.arange(start, start + count, device=device)[None] % vocabulary for start, count in ((3, 5), (11, 7))
    )
    together, nothing = torch.cat([first, second], dim=1), second.new_zeros(0)
    layouts = (Layout(second, nothing), Layout(together, nothing), Layout(together, nothing, (5, 7)))
    try:
        with evaluating(model):
            alone, behind, packed = (layout.read_by(model).logits[0, -second.shape[1] :].float() for layout in layouts)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):  # it takes no positions, or not these
        return False
    return bool((packed - alone).abs().max() <= tolerance * (behind - alone).abs().max())


def hidden_states(model: nn.Module, head: nn.Module, layout: Layout) -> Float[Tensor, "tokens hidden"]:
    """What the LM head would read at the predicting positions, with gradient."""
    # DDP looks from the model's output for weights that get no gradient. The loss reads the head's outside of the pass: without a
    # sign of them there they would be taken for unused, and then get one.
    with _silent(head, shows_weights=isinstance(model, DistributedDataParallel)) as seen:
        layout.read_by(model)
    if isinstance(model, FSDPModule):
        # FSDP2 gathers the outermost weights again when the gradient reaches the model's output. Here the loss hangs on the
        # head's input instead, so they are gathered now; its end of the backward pass shards them again.
        model.unshard()
    return layout.pick(seen[0])


def logits(
    model: nn.Module, layout: Layout, vocab_size: int, excluded_ids: tuple[int, ...] = ()
) -> Float[Tensor, "tokens vocab"]:
    """float32 logits at the predicting positions, for models whose head is more than a linear map; -inf at `excluded_ids`."""
    output = layout.read_by(model)
    picked = layout.pick(output.logits)[:, :vocab_size].float()
    return without_ids(picked, id_tensor(excluded_ids, picked.device))


@contextmanager
def _silent(head: nn.Module, *, shows_weights: bool) -> Iterator[list[Tensor]]:
    """While this lasts the head notes its input and returns an empty slice of it in place of logits.

    Args:
        shows_weights: whether empty slices of the head's trained weights are part of what it returns.
    """
    seen: list[Tensor] = []
    weights = [weight for weight in head.parameters() if shows_weights and weight.requires_grad]

    def note(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(hidden)
        nothing = [weight.flatten()[:0].to(hidden).expand(*hidden.shape[:-1], 0) for weight in weights]
        return torch.cat([hidden[..., :0], *nothing], dim=-1)

    had_own = "forward" in vars(head)
    before = head.forward
    head.forward = note
    try:
        yield seen
    finally:
        if had_own:
            head.forward = before
        else:
            del head.forward
