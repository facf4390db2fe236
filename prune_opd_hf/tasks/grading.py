"""Exact-match grading of the embedded task: the answer is the digit just before the end of the sequence.

A response that was truncated before it ended has no answer, whatever its last word. This module knows neither tokenizers nor
models.
"""

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
