"""Prompts as tensors: which tokens are padding, one line for every sequence, several batches as one."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from prune_opd_hf.errors import InputError


def left_padded(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str = "cpu", *, width: int = 0
) -> tuple[Int[Tensor, "rows prompt"], Int[Tensor, "rows prompt"]]:
    """Prompts as one batch, padded on the left to at least `width` columns: ids, and a mask that is 1 on tokens."""
    width = max(width, *map(len, prompts))
    ids = [[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def pad_left(
    parts: Sequence[tuple[Tensor, Tensor]], pad_token_id: int
) -> tuple[Int[Tensor, "batch prompt"], Bool[Tensor, "batch prompt"]]:
    """Several left-padded batches, each ids and mask of shape (rows, width), as one."""
    width = max(ids.shape[1] for ids, _ in parts)
    ids = [pad(ids, (width - ids.shape[1], 0), value=pad_token_id) for ids, _ in parts]
    return torch.cat(ids), torch.cat([pad(mask, (width - mask.shape[1], 0), value=False) for _, mask in parts])


def repeat_for_sequences(
    values: Int[Tensor, "prompts width"] | Bool[Tensor, "prompts width"],
    prompt_ids: Int[Tensor, "batch prompt"],
    name: str,
) -> Tensor:
    """One line for each sequence, where one for each prompt was given (`num_return_sequences`).

    Raises:
        InputError: the sequences are not that many prompts, each repeated equally often.
    """
    given, batch = values.shape[0], prompt_ids.shape[0]
    if given == 0 or batch % given != 0:
        raise InputError(f"{name} has {given} rows for {batch} sequences")
    copies = batch // given
    if not torch.equal(prompt_ids, prompt_ids[::copies].repeat_interleave(copies, dim=0)):
        raise InputError(
            f"{name} has {given} rows for {batch} sequences, which are not {given} prompts repeated {copies} times each "
            "(num_return_sequences): give one row for each prompt"
        )
    return values.repeat_interleave(copies, dim=0)


def mask_from_padding(
    prompt_ids: Int[Tensor, "batch prompt"], pad_token_id: int | None, end_ids: Iterable[int], start_ids: Iterable[int]
) -> Int[Tensor, "batch prompt"]:
    """The prompts' attention mask, found from the leading run of padding tokens of each row.

    Args:
        prompt_ids: padded on the left.
        pad_token_id: the padding token; None means that nothing is padded.
        end_ids, start_ids: tokens that end and that begin text.

    Raises:
        InputError: the padding token also begins or ends text, so that the two cannot be told apart; or padding on the right.
    """
    if pad_token_id is None:
        return torch.ones_like(prompt_ids)
    end_ids = tuple(end_ids)
    is_pad = prompt_ids == pad_token_id
    leading = is_pad.long().cumprod(dim=-1).bool()
    if pad_token_id in (*end_ids, *start_ids) and bool(leading.any()):
        raise InputError(
            f"a prompt begins with token {pad_token_id}, which also begins or ends text, so padding cannot be "
            'told from text: pass attention_mask=inputs["attention_mask"] to the monitor'
        )
    if pad_token_id not in end_ids and bool(is_pad[:, -1].any()):
        raise InputError('prompts must be padded on the left (tokenizer.padding_side = "left")')
    return (~leading).long()
