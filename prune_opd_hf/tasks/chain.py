"""The embedded task: a chain of arithmetic modulo 10, the two ways of reasoning about it, and exact-match grading.

Words only: this module knows neither tokenizers nor models. A prompt lists the operations and gives the start digit last:

    , +3 , x7 , +1 = 4

Style A, the teacher's, works through the chain and ends with the answer. Style B, the drift, leaves it after a prefix,
rambles, and names the answer out of the blue:

    A: +3 7 x7 9 +1 0 <eos>
    B: +3 7 HMM wait maybe again ... check ANS 0 <eos>

The teacher never sees style B. The answer is the digit before the end of the sequence in both; a response that was truncated
before it ended has no answer, whatever its last word. Which traces the shipped student learnt: examples/embedded_task.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from datasets import Dataset

from prune_opd_hf.errors import ConfigError, InputError

END = "<eos>"
"""The word that ends every trace."""

SEPARATOR, EQUALS, HESITATION, ANSWER = ",", "=", "HMM", "ANS"
DIGITS = tuple("0123456789")
OPERATIONS = (*(f"+{digit}" for digit in range(1, 10)), "x3", "x7", "x9")
FILLERS = (
    "wait", "maybe", "but", "actually", "so", "let", "me", "check", "again", "perhaps", "first", "then", "if",
    "not", "this", "that", "is", "right", "think", "now", "ok", "hold", "on", "redo", "hmm", "well",
    "alternatively", "still", "seems", "could", "might", "what", "about", "no",
)  # fmt: skip

SPLITS = ("train", "evaluation")
EVALUATION_PARTS = 8
"""One prompt in this many belongs to the evaluation split."""

BLOCK = 32
"""Problems are drawn in blocks of this size, so that a longer draw begins with the shorter one of the same seed."""


def apply_operation(value: int, operation: str) -> int:
    """One step of a chain.

    Example:
        >>> apply_operation(4, "x7"), apply_operation(8, "+3")
        (8, 1)
    """
    operand = int(operation[1:])
    return (value * operand if operation[0] == "x" else value + operand) % len(DIGITS)


@dataclass(frozen=True)
class Problem:
    """One chain: the digit it starts from and the operations to apply in order.

    Attributes:
        start: the start digit.
        operations: words of `OPERATIONS`.
    """

    start: int
    operations: tuple[str, ...]

    @property
    def values(self) -> list[int]:
        """The value after each operation."""
        values, value = [], self.start
        for operation in self.operations:
            value = apply_operation(value, operation)
            values.append(value)
        return values

    @property
    def answer(self) -> str:
        """The digit after the last operation."""
        return DIGITS[self.values[-1]]

    @property
    def prompt(self) -> str:
        """What the model is asked, without the token that begins the sequence: the tokenizer adds it."""
        words = [word for operation in self.operations for word in (SEPARATOR, operation)]
        return " ".join([*words, EQUALS, DIGITS[self.start]])

    @property
    def trace(self) -> str:
        """The response in style A: every operation with its value, and the end."""
        return " ".join([*self._worked(len(self.operations)), END])

    @property
    def split(self) -> str:
        """ "train" or "evaluation", decided by the prompt alone: no prompt is ever in both, whatever the seeds."""
        return SPLITS[hashlib.sha256(self.prompt.encode()).digest()[0] % EVALUATION_PARTS == 0]

    def drifting_trace(self, prefix: int, fillers: Iterable[str]) -> str:
        """The response in style B: the first `prefix` operations worked, then the filler words, then the right answer."""
        return " ".join([*self._worked(prefix), HESITATION, *fillers, ANSWER, self.answer, END])

    def _worked(self, count: int) -> list[str]:
        steps = zip(self.operations[:count], self.values, strict=False)
        return [word for operation, value in steps for word in (operation, DIGITS[value])]


@dataclass(frozen=True)
class ChainTask:
    """Makes problems.

    Attributes:
        operations: operations in each chain, at least 1; in the longest, where `operations_min` says that lengths differ.
        operations_min: operations in the shortest chain; every length from there to `operations` is as likely.

    Raises:
        ConfigError: there are none, or the shortest chain is longer than the longest.

    Example: a prompt has 3 + 2 x 12 tokens with the one that begins the sequence, a clean response 2 x 12 + 1.
        >>> task = ChainTask(operations=12)
        >>> task.prompt_tokens, task.clean_response_tokens
        (27, 25)
        >>> ChainTask(operations=3).dataset(1, seed=0)[0]
        {'prompt': ', x9 , +1 , +8 = 4', 'answer': '5', 'trace': 'x9 6 +1 7 +8 5 <eos>'}
    """

    operations: int = 12
    operations_min: int | None = None

    def __post_init__(self) -> None:
        if self.operations < 1:
            raise ConfigError(f"operations must be at least 1, got {self.operations}")
        if self.operations_min is not None and not 1 <= self.operations_min <= self.operations:
            raise ConfigError(f"operations_min must lie in [1, {self.operations}], got {self.operations_min}")

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the longest prompt: the beginning, two for each operation, `=` and the start digit."""
        return 2 * self.operations + 3

    @property
    def clean_response_tokens(self) -> int:
        """Tokens of the longest response in style A, the end included."""
        return 2 * self.operations + 1

    def problems(self, count: int, seed: int | torch.Generator, split: str = "train") -> list[Problem]:
        """Random problems of one split; the same for the same seed on every machine.

        Args:
            count: how many.
            seed: a whole number, or a CPU generator, which is advanced.
            split: "train" or "evaluation". No prompt is in both, whatever the seeds.

        Raises:
            InputError: a negative count or an unknown split.
        """
        if count < 0:
            raise InputError(f"the number of problems must be at least 0, got {count}")
        if split not in SPLITS:
            raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        problems: list[Problem] = []
        while len(problems) < count:
            starts = torch.randint(len(DIGITS), (BLOCK,), generator=generator).tolist()
            chains = torch.randint(len(OPERATIONS), (BLOCK, self.operations), generator=generator).tolist()
            lengths = [self.operations] * BLOCK
            if self.operations_min is not None:
                lengths = torch.randint(
                    self.operations_min, self.operations + 1, (BLOCK,), generator=generator
                ).tolist()
            for start, chain, length in zip(starts, chains, lengths, strict=True):
                problem = Problem(start, tuple(OPERATIONS[index] for index in chain[:length]))
                problems += [problem] if problem.split == split else []
        return problems[:count]

    def dataset(self, count: int, seed: int | torch.Generator, split: str = "train") -> Dataset:
        """The same problems as `problems` as a dataset with the columns `prompt`, `answer` and `trace` (style A)."""
        problems = self.problems(count, seed, split)
        columns = ("prompt", "answer", "trace")
        return Dataset.from_dict({name: [getattr(problem, name) for problem in problems] for name in columns})


def extract_answer(response: str, *, ended: bool | None = None) -> str | None:
    """The digit before the end of a response, or `None` where there is none.

    Args:
        response: decoded with or without special tokens. What follows the first end is ignored.
        ended: whether the response ended by itself. By default this is read from the text, which must then have been
            decoded with `skip_special_tokens=False`; pass it for text without special tokens.
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
    """Whether `extract_answer` finds exactly the answer."""
    return extract_answer(response, ended=ended) == answer
