"""Who scores tokens: what a drift monitor and a loss may ask of a teacher, wherever it runs.

This module knows tensors only. `local.py` is a model of this process, `adapter.py` the model below a PEFT adapter. A teacher
that answers over a network implements the same protocol and says in `capabilities` what it cannot do; what needs more is
refused at set-up, by `require`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prune_opd_hf.errors import ConfigError


class TeacherContext(NamedTuple):
    """What the teacher of one row is given.

    Attributes:
        prompt_ids: what it reads in place of the student's prompt; None where it reads that.
        teacher: the name of the row's teacher, where there are several (`several.py`).
    """

    prompt_ids: Sequence[int] | None = None
    teacher: str | None = None


@dataclass(frozen=True)
class TeacherScores:
    """What one model says about a block of tokens. All log-probabilities are float32, over the full vocabulary, at
    temperature 1; positions that were not asked for hold 0.

    Attributes:
        topk_ids, topk_log_probs: T_t and log q on it, most likely first.
        candidate_log_probs: log q on the candidates that were given; None where none were, or where the teacher cannot.
        token_log_probs: log q of the tokens themselves.
    """

    topk_ids: Int[Tensor, "rows time k"]
    topk_log_probs: Float[Tensor, "rows time k"]
    candidate_log_probs: Float[Tensor, "rows time candidates"] | None
    token_log_probs: Float[Tensor, "rows time"]

    def to(self, device: torch.device) -> "TeacherScores":
        """The same scores on another device."""
        return _joined([self], lambda one: one[0].to(device))

    @staticmethod
    def cat(parts: "Sequence[TeacherScores]") -> "TeacherScores":
        """The scores of spans that follow one another, as one."""
        return _joined(parts, lambda spans: torch.cat(spans, dim=1))

    @staticmethod
    def scatter(parts: "Sequence[TeacherScores]", rows: Sequence[int]) -> "TeacherScores":
        """Scores of different rows as one: row i of all parts, one after the other, becomes row `rows[i]`. Candidates only where
        all parts scored them."""
        order = torch.tensor(rows).argsort().to(parts[0].topk_ids.device)
        return _joined(parts, lambda values: torch.cat(values)[order])


def _joined(parts: Sequence[TeacherScores], join: Callable[[list[Tensor]], Tensor]) -> TeacherScores:
    """What `join` makes of each column of the parts; None where a part lacks it."""
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(TeacherScores)}
    missing = {name for name, values in columns.items() if any(value is None for value in values)}
    return TeacherScores(**{name: None if name in missing else join(values) for name, values in columns.items()})


@dataclass(frozen=True)
class TeacherCapabilities:
    """What a teacher can do.

    Attributes:
        scores_candidates: log q on any ids that one names; otherwise on its own top k and the sampled token only.
        gives_full_logits: its whole distribution, which losses over the full vocabulary compare: `head_parameters`,
            `hidden_states`, `logits` and `can_pack` as in `local.py`.
        is_incremental: scoring a growing sequence block by block costs what one pass over it costs.
        adds_rows: rows may join a batch that is under way (continuous batching).
        ragged_rows: rows may be of different lengths, and be scored apart from one another (`follow_rows`).
    """

    scores_candidates: bool = True
    gives_full_logits: bool = False
    is_incremental: bool = True
    adds_rows: bool = True
    ragged_rows: bool = True


@runtime_checkable
class Teacher(Protocol):
    """A frozen model that follows a batch of sequences and scores their new tokens block by block.

    Attributes:
        top_k: how many of its most likely tokens it returns for each position.
        batches: how many batches were started; a monitor sees by it that another one took the teacher over.
    """

    top_k: int
    batches: int

    @property
    def vocab_size(self) -> int:
        """Ids at or beyond it enter neither a top-k nor a normalisation."""

    @property
    def excluded_ids(self) -> tuple[int, ...]:
        """Ids below it that do not either."""

    @property
    def wall_seconds(self) -> float:
        """Time spent in `score` so far."""

    @property
    def capabilities(self) -> TeacherCapabilities:
        """What this teacher can do."""

    @property
    def context_length(self) -> int | None:
        """The longest sequence it reads, in tokens; None where there is no such limit."""

    @property
    def rotary_switch(self) -> int | None:
        """The length beyond which it reads positions otherwise (`models.compatibility.rotary_switch`), where that is known."""

    @property
    def block_tokens(self) -> int:
        """Tokens of one efficient pass over all rows, where the length of a block is free to choose."""

    def special_token_ids(self, name: str) -> tuple[int, ...]:
        """Its `eos_token_id`, `pad_token_id` or `bos_token_id`, as far as it knows any."""

    def restrict_vocabulary(self, size: int, excluded_ids: Iterable[int] = ()) -> None:
        """Let only the first `size` ids count from now on, and none of `excluded_ids`."""

    def start(
        self, prompt_ids: Int[Tensor, "rows prompt"], prompt_mask: Int[Tensor, "rows prompt"] | None = None
    ) -> None:
        """Begin a new batch with these left-padded prompts."""

    def add_rows(
        self, prompt_ids: Int[Tensor, "rows prompt"], prompt_mask: Int[Tensor, "rows prompt"] | None = None
    ) -> None:
        """Further rows, behind those that are followed."""

    def score(
        self,
        token_ids: Int[Tensor, "rows time"],
        candidate_ids: Int[Tensor, "rows time candidates"] | None = None,
        *,
        wanted: Bool[Tensor, "rows time"] | None = None,
    ) -> TeacherScores:
        """Score the next block of tokens of every row, and remember them: as `LocalTeacher.score`, with its errors, and a
        ServingError where the teacher cannot be asked."""

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Follow only these rows from now on, in this order."""

    def release(self) -> None:
        """Nothing is asked of this batch any more: give back what it holds."""

    def follow_rows(self) -> "RaggedScorer":
        """Begin a new batch, of rows that come at a pace of their own."""


@runtime_checkable
class RaggedScorer(Protocol):
    """Sequences of different lengths, each scored when it has new tokens."""

    def start_row(self, row: int, prompt_ids: Sequence[int]) -> None:
        """Follow a sequence from its prompt on, under this number; one that is followed under it is forgotten."""

    def drop_rows(self, rows: Sequence[int]) -> None:
        """Forget these rows."""

    def score(
        self,
        rows: Sequence[int],
        token_ids: Int[Tensor, "rows time"],
        candidate_ids: Int[Tensor, "rows time candidates"] | None = None,
        *,
        wanted: Bool[Tensor, "rows time"],
    ) -> TeacherScores:
        """Score the next tokens of these rows, and remember them. `wanted` is True on each row's tokens, which come first. Errors
        are those of `Teacher.score`."""


CAPABILITIES = {
    "scores_candidates": "scores any token ids that it is given",
    "gives_full_logits": "gives its whole distribution",
    "ragged_rows": "follows rows of different lengths",
}
"""What a capability means, in the words of a refusal."""


def unshared_ids(teacher: Teacher, rows: int) -> tuple[int, ...]:
    """The ids of a student with so many rows of logits that do not count, so that it must not sample them."""
    return (*teacher.excluded_ids, *range(teacher.vocab_size, rows))


def require(teacher: Teacher, capability: str, needed_by: str, remedy: str, *, role: str = "teacher") -> None:
    """Refuse a teacher without this capability, at set-up."""
    if not getattr(teacher.capabilities, capability):
        name = type(teacher).__name__ if role == "teacher" else "this one"
        raise ConfigError(f"{needed_by} needs a {role} that {CAPABILITIES[capability]}, and {name} does not: {remedy}")
