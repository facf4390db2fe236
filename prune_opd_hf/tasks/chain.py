"""The embedded task: a chain of arithmetic modulo 10, and the two ways of reasoning about it.

Words only: this module knows neither tokenizers nor models. A prompt lists the operations and gives the start digit last:

    , +3 , x7 , +1 = 4

Style A, the teacher's, works through the chain and ends with the answer. Style B, the drift, leaves it after a prefix,
rambles, and names the answer out of the blue:

    A: +3 7 x7 9 +1 0 <eos>
    B: +3 7 HMM wait maybe again ... check ANS 0 <eos>

The teacher never sees style B. The answer is the digit before the end of the sequence in both.
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


def apply_operation(value: int, operation: str, modulus: int) -> int:
    """One step of a chain.

    Example:
        >>> apply_operation(4, "x7", 10), apply_operation(8, "+3", 10)
        (8, 1)
    """
    operand = int(operation[1:])
    return (value * operand if operation[0] == "x" else value + operand) % modulus


@dataclass(frozen=True)
class Problem:
    """One chain: the digit it starts from and the operations to apply in order.

    Attributes:
        start: the start digit.
        operations: words of `OPERATIONS`.
        modulus: all values are taken modulo this.

    Example: 4 + 3 = 7, 7 x 7 = 49.
        >>> problem = Problem(start=4, operations=("+3", "x7"))
        >>> problem.prompt, problem.trace, problem.answer, problem.split
        (', +3 , x7 = 4', '+3 7 x7 9 <eos>', '9', 'train')
        >>> problem.drifting_trace(1, ["wait", "so"])
        '+3 7 HMM wait so ANS 9 <eos>'
    """

    start: int
    operations: tuple[str, ...]
    modulus: int = 10

    @property
    def values(self) -> list[int]:
        """The value after each operation."""
        values, value = [], self.start
        for operation in self.operations:
            value = apply_operation(value, operation, self.modulus)
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
        """The response in style B: `prefix` operations worked, then the filler words, then the right answer.

        Raises:
            InputError: there are fewer than `prefix` operations.
        """
        if not 0 <= prefix <= len(self.operations):
            raise InputError(f"the prefix must lie in [0, {len(self.operations)}], the operations, got {prefix}")
        return " ".join([*self._worked(prefix), HESITATION, *fillers, ANSWER, self.answer, END])

    def _worked(self, count: int) -> list[str]:
        steps = zip(self.operations[:count], self.values, strict=False)
        return [word for operation, value in steps for word in (operation, DIGITS[value])]


@dataclass(frozen=True)
class ChainTask:
    """How long the chains are, and how often, from where and for how long style B drifts. Makes problems and traces.

    Attributes:
        operations: operations in each chain, at least 1.
        modulus: values are taken modulo this, in [2, 10]; guessing is right once in `modulus`.
        drift_first: probability that a drifting trace switches to style B at its first opportunity, in [0, 1].
        drift_later: the same for each later opportunity, in [0, 1].
        prefix_min: operations worked before the first opportunity.
        prefix_max: operations worked before the last one; `None` stands for `operations - 1`.
        filler_min, filler_max: bounds of the number of filler words, both included.
        filler_kinds: how many of the words of `FILLERS` are used.

    Raises:
        ConfigError: a value is outside its range.

    Example: a prompt has 3 + 2 x 12 tokens with the one that begins the sequence, a clean response 2 x 12 + 1.
        >>> task = ChainTask(operations=12)
        >>> task.prompt_tokens, task.clean_response_tokens, task.longest_response_tokens
        (27, 25, 111)
        >>> ChainTask(operations=3).dataset(1, seed=0)[0]
        {'prompt': ', x9 , +1 , +8 = 4', 'answer': '5', 'trace': 'x9 6 +1 7 +8 5 <eos>'}
    """

    operations: int = 12
    modulus: int = 10
    drift_first: float = 0.8
    drift_later: float = 0.05
    prefix_min: int = 0
    prefix_max: int | None = None
    filler_min: int = 40
    filler_max: int = 85
    filler_kinds: int = 24

    def __post_init__(self) -> None:
        for name in ("operations", "modulus", "prefix_min", "filler_min", "filler_max", "filler_kinds"):
            _require_whole(name, getattr(self, name))
        if self.prefix_max is not None:
            _require_whole("prefix_max", self.prefix_max)
        if self.operations < 1:
            raise ConfigError(f"operations must be at least 1, got {self.operations}")
        if not 2 <= self.modulus <= len(DIGITS):
            raise ConfigError(f"modulus must lie in [2, {len(DIGITS)}], one digit for each value, got {self.modulus}")
        for name in ("drift_first", "drift_later"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a probability and must lie in [0, 1], got {getattr(self, name)!r}")
        if not 0 <= self.prefix_min <= self.last_prefix < self.operations:
            raise ConfigError(
                "the drift needs 0 <= prefix_min <= prefix_max < operations, "
                f"got prefix_min {self.prefix_min}, prefix_max {self.last_prefix}, operations {self.operations}"
            )
        if not 0 <= self.filler_min <= self.filler_max:
            raise ConfigError(
                f"the fillers need 0 <= filler_min <= filler_max, got {self.filler_min} and {self.filler_max}"
            )
        if not 1 <= self.filler_kinds <= len(FILLERS):
            raise ConfigError(f"filler_kinds must lie in [1, {len(FILLERS)}], got {self.filler_kinds}")

    @property
    def last_prefix(self) -> int:
        """Operations worked before the last opportunity to drift."""
        return self.operations - 1 if self.prefix_max is None else self.prefix_max

    @property
    def prompt_tokens(self) -> int:
        """Tokens of every prompt: the beginning, two for each operation, `=` and the start digit."""
        return 2 * self.operations + 3

    @property
    def clean_response_tokens(self) -> int:
        """Tokens of every response in style A, the end included."""
        return 2 * self.operations + 1

    @property
    def longest_response_tokens(self) -> int:
        """Tokens of the longest response of either style, the end included: a cap for generation."""
        return max(self.clean_response_tokens, 2 * self.last_prefix + 1 + self.filler_max + 3)

    @property
    def drifting_share(self) -> float:
        """Expected share of `mixed_traces` that drift: 1 minus the probability of passing every opportunity."""
        return 1 - (1 - self.drift_first) * (1 - self.drift_later) ** (self.last_prefix - self.prefix_min)

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
        generator = _as_generator(seed)
        problems: list[Problem] = []
        while len(problems) < count:
            problems.extend(problem for problem in self._draw_block(generator) if problem.split == split)
        return problems[:count]

    def mixed_traces(self, problems: list[Problem], seed: int | torch.Generator) -> list[str]:
        """A response to each problem, of style A or B: what the student's cold start ends with.

        Every trace begins in style A. Before the operation at `prefix_min` it switches to style B with probability
        `drift_first`, before each later one up to `prefix_max` with `drift_later`.

        Args:
            problems: what to answer.
            seed: a whole number, or a CPU generator, which is advanced.
        """
        generator = _as_generator(seed)
        count, opportunities = len(problems), self.last_prefix - self.prefix_min + 1
        chances = torch.tensor([self.drift_first, *[self.drift_later] * (opportunities - 1)], dtype=torch.float64)
        switches = (torch.rand(count, opportunities, generator=generator, dtype=torch.float64) < chances).tolist()
        lengths = torch.randint(self.filler_min, self.filler_max + 1, (count,), generator=generator).tolist()
        kinds = torch.randint(self.filler_kinds, (count, self.filler_max), generator=generator).tolist()
        return [
            problem.drifting_trace(self.prefix_min + row.index(True), [FILLERS[kind] for kind in row_kinds[:length]])
            if any(row)
            else problem.trace
            for problem, row, length, row_kinds in zip(problems, switches, lengths, kinds, strict=True)
        ]

    def dataset(self, count: int, seed: int | torch.Generator, split: str = "train") -> Dataset:
        """The same problems as `problems` as a dataset with the columns `prompt`, `answer` and `trace` (style A)."""
        problems = self.problems(count, seed, split)
        return Dataset.from_dict(
            {
                "prompt": [problem.prompt for problem in problems],
                "answer": [problem.answer for problem in problems],
                "trace": [problem.trace for problem in problems],
            }
        )

    def _draw_block(self, generator: torch.Generator) -> list[Problem]:
        starts = torch.randint(self.modulus, (BLOCK,), generator=generator).tolist()
        chains = torch.randint(len(OPERATIONS), (BLOCK, self.operations), generator=generator).tolist()
        return [
            Problem(start, tuple(OPERATIONS[kind] for kind in chain), self.modulus)
            for start, chain in zip(starts, chains, strict=True)
        ]


def _as_generator(seed: int | torch.Generator) -> torch.Generator:
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


def _require_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a whole number, got {value!r}")
