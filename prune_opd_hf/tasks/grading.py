"""Exact-match grading of the embedded task: the answer is the digit just before the end of the sequence.

A response that was cut off before it ended has no answer, whatever its last word. Text and token ids are graded alike; this
module knows neither tokenizers nor models.
"""

from jaxtyping import Bool, Int
from torch import Tensor

from prune_opd_hf.tasks.chain import DIGITS, END, HESITATION


def extract_answer(response: str, *, ended: bool | None = None) -> str | None:
    """The digit before the end of a response, or `None` where there is none.

    Args:
        response: decoded with or without special tokens. What follows the first end is ignored.
        ended: whether the response ended by itself. By default this is read from the text, which must then have been
            decoded with `skip_special_tokens=False`; pass it for text without special tokens.

    Example:
        >>> extract_answer("+3 7 x7 9 <eos> <pad>"), extract_answer("HMM wait ANS 4 <eos>")
        ('9', '4')
        >>> extract_answer("+3 7 x7 9"), extract_answer("+3 <eos>"), extract_answer("+3 7 x7 9", ended=True)
        (None, None, '9')
    """
    words = response.split()
    if END in words:
        words = words[: words.index(END)]
    elif ended is None:
        ended = False
    if ended is False or not words or words[-1] not in DIGITS:
        return None
    return words[-1]


def is_correct(response: str, answer: str, *, ended: bool | None = None) -> bool:
    """Whether `extract_answer` finds exactly the answer.

    Example:
        >>> is_correct("+3 7 <eos>", "7"), is_correct("+3 7", "7"), is_correct("+3 8 <eos>", "7")
        (True, False, False)
    """
    return extract_answer(response, ended=ended) == answer


def is_drifting(response: str) -> bool:
    """Whether a response left style A for style B.

    Example:
        >>> is_drifting("+3 7 HMM wait so"), is_drifting("+3 7 x7 9 <eos>")
        (True, False)
    """
    return HESITATION in response.split()


def correct_tokens(
    response_ids: Int[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
    answer_ids: Int[Tensor, " batch"],
    eos_token_id: int,
) -> Bool[Tensor, " batch"]:
    """Which responses have the answer just before their first end: `is_correct` on token ids.

    Args:
        response_ids: without the prompt, padded on the right.
        response_mask: True on response tokens, the end included.
        answer_ids: the token id of the right digit, one for each response.
        eos_token_id: the token that ends a response.

    Example: the answer is 7 (id 15): right, cut off before the end, wrong.
        >>> import torch
        >>> ids = torch.tensor([[18, 15, 2], [18, 15, 0], [18, 16, 2]])
        >>> mask = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
        >>> correct_tokens(ids, mask, torch.tensor([15, 15, 15]), eos_token_id=2)
        tensor([ True, False, False])
    """
    ends = (response_ids == eos_token_id) & response_mask
    first_end = ends & (ends.cumsum(dim=-1) == 1)
    answers = (response_ids == answer_ids.unsqueeze(-1)) & response_mask
    return (first_end[:, 1:] & answers[:, :-1]).any(dim=-1)
