"""Prompts as the monitor needs them: which tokens are padding, which end a row, and one line for every sequence.

It knows tensors and what models tell of their special tokens; it knows neither the monitor nor `generate`.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from prune_opd_hf.errors import InputError
from prune_opd_hf.models.lm_head import text_config


def special_token_ids(given: int | Iterable[int] | None, model: nn.Module, name: str) -> tuple[int, ...]:
    """Token ids as given, else those of the model's generation config, else of its config; none where nobody knows.

    Args:
        given: what the user says.
        model: whose configs are asked.
        name: of the setting, such as `eos_token_id`.

    Example:
        >>> special_token_ids([5, 7], nn.Identity(), "eos_token_id"), special_token_ids(3, nn.Identity(), "pad_token_id")
        ((5, 7), (3,))
    """
    if given is not None:
        return (given,) if isinstance(given, int) else tuple(int(value) for value in given)
    for source in (
        getattr(getattr(model, "generation_config", None), name, None),
        getattr(text_config(model), name, None),
    ):
        if source is not None:
            return (source,) if isinstance(source, int) else tuple(int(value) for value in source)
    return ()


def repeat_for_sequences(
    values: Int[Tensor, "prompts width"] | Bool[Tensor, "prompts width"],
    prompt_ids: Int[Tensor, "batch prompt"],
    name: str,
) -> Tensor:
    """One line for each sequence, where one for each prompt was given (`num_return_sequences`).

    Raises:
        InputError: the sequences are not that many prompts, each repeated equally often.

    Example:
        >>> repeat_for_sequences(torch.tensor([[1], [2]]), torch.tensor([[5], [5], [6], [6]]), "teacher_prompt_ids").tolist()
        [[1], [1], [2], [2]]
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

    Example:
        >>> mask_from_padding(torch.tensor([[0, 0, 5], [6, 7, 8]]), 0, [1], [2]).tolist()
        [[0, 0, 1], [1, 1, 1]]
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
