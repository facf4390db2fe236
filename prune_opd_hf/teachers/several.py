"""Several teachers as one: each row has its own, by name, and is scored by that one alone.

It knows teachers by the protocol; where each runs is its own affair.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from prune_opd_hf.errors import ConfigError, InputError, MonitorStateError, NonFiniteLogitsError
from prune_opd_hf.teachers.base import RaggedScorer, Teacher, TeacherCapabilities, TeacherScores


class SeveralTeachers:
    """A `Teacher` of rows whose teachers are named when they join.

    Args:
        teachers: by name, one perhaps under several; all score with the same `top_k`.

    Raises:
        ConfigError: there is none, or their `top_k` differ.
    """

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        if not teachers:
            raise ConfigError("several teachers need at least one")
        widths = {name: teacher.top_k for name, teacher in teachers.items()}
        if len({*widths.values()}) > 1:
            raise ConfigError(f"several teachers must have one top_k, got {widths}")
        self.teachers = dict(teachers)
        known: dict[int, str] = {}
        # A teacher follows one batch, so the rows of all its names go to it together, under the first.
        self._first_names = {name: known.setdefault(id(teacher), name) for name, teacher in teachers.items()}
        self.top_k = next(iter(widths.values()))
        self.batches = 0
        self._named: list[str] = []

    # ------------------------------------------------------------------ what all of them have in common

    @property
    def vocab_size(self) -> int:
        return min(teacher.vocab_size for teacher in self.teachers.values())

    @property
    def excluded_ids(self) -> tuple[int, ...]:
        return tuple(sorted({token for teacher in self.teachers.values() for token in teacher.excluded_ids}))

    @property
    def wall_seconds(self) -> float:
        return sum(self.teachers[name].wall_seconds for name in dict.fromkeys(self._first_names.values()))

    @property
    def capabilities(self) -> TeacherCapabilities:
        of_all = [asdict(teacher.capabilities) for teacher in self.teachers.values()]
        joins = {"adds_rows": False}  # in several batches, of which some may be empty
        return TeacherCapabilities(**{name: all(of[name] for of in of_all) for name in of_all[0]} | joins)

    @property
    def context_length(self) -> int | None:
        limits = [teacher.context_length for teacher in self.teachers.values()]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def rotary_switch(self) -> int | None:
        switches = [teacher.rotary_switch for teacher in self.teachers.values()]
        return min((switch for switch in switches if switch is not None), default=None)

    @property
    def block_tokens(self) -> int:
        return max(teacher.block_tokens for teacher in self.teachers.values())

    def can_pack(self) -> bool:
        return all(teacher.can_pack() for teacher in self.teachers.values())  # type: ignore[attr-defined]

    def special_token_ids(self, name: str) -> tuple[int, ...]:
        found = (token for teacher in self.teachers.values() for token in teacher.special_token_ids(name))
        return tuple(dict.fromkeys(found))

    def restrict_vocabulary(self, size: int, excluded_ids: Iterable[int] = ()) -> None:
        """As of every teacher; what one does not know counts for none."""
        excluded = {*self.excluded_ids, *excluded_ids}
        for teacher in self.teachers.values():
            teacher.restrict_vocabulary(min(size, self.vocab_size), excluded)

    # ------------------------------------------------------------------ rows

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor | None = None, *, names: Sequence[str] = ()) -> None:
        """Begin a new batch with these left-padded prompts, each for the teacher of this name."""
        mask = torch.ones_like(prompt_ids) if prompt_mask is None else prompt_mask
        self.check_names(names, len(prompt_ids))
        self._named = [self._first_names[name] for name in names]
        for name, rows in rows_by_name(self._named):
            width = int(mask[rows].sum(dim=-1).max())
            self.teachers[name].start(prompt_ids[rows, -width:], mask[rows, -width:])
        self.batches += 1

    def check_names(self, names: Sequence[str], rows: int) -> None:
        """Refuse a name that none of them has, and rows without one."""
        if len(names) != rows:
            raise InputError(
                f"{rows} rows have {len(names)} names of teachers: give the watch the contexts of its rows"
            )
        unknown = next((name for name in names if name not in self.teachers), None)
        if unknown is not None:
            raise InputError(f"there is no teacher {unknown!r}; there are {', '.join(self.teachers)}")

    def add_rows(self, prompt_ids: Tensor, prompt_mask: Tensor | None = None, *, names: Sequence[str] = ()) -> None:
        """Refused: see `capabilities`."""
        raise MonitorStateError(
            "rows cannot join a batch of several teachers: call start when all of its rows have left"
        )

    def score(
        self,
        token_ids: Int[Tensor, "rows time"],
        candidate_ids: Int[Tensor, "rows time candidates"] | None = None,
        *,
        wanted: Bool[Tensor, "rows time"] | None = None,
    ) -> TeacherScores:
        if not self._named:
            raise MonitorStateError(
                "the teachers have no prompts yet: call start(prompt_ids, prompt_mask, names=...) first"
            )
        wanted = torch.ones_like(token_ids, dtype=torch.bool) if wanted is None else wanted
        parts, order = [], []
        for name, rows in rows_by_name(self._named):
            candidates = None if candidate_ids is None else candidate_ids[rows]
            with naming_rows(rows):
                parts.append(self.teachers[name].score(token_ids[rows], candidates, wanted=wanted[rows]))
            order += rows.tolist()
        return TeacherScores.scatter(parts, order)

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        kept = rows.tolist()
        for name, own in rows_by_name(self._named):
            place = {row: number for number, row in enumerate(own.tolist())}
            left = [place[row] for row in kept if row in place]
            if left:
                self.teachers[name].keep_rows(torch.tensor(left))
        self._named = [self._named[row] for row in kept]

    def release(self) -> None:
        for teacher in self.teachers.values():
            teacher.release()

    def follow_rows(self) -> "SeveralRows":
        self.batches += 1
        return SeveralRows(self)


class SeveralRows:
    """A `RaggedScorer` over `SeveralTeachers`. Made by `SeveralTeachers.follow_rows`."""

    def __init__(self, teacher: SeveralTeachers) -> None:
        self._check_names = teacher.check_names
        self._scorers: dict[str, RaggedScorer] = {name: one.follow_rows() for name, one in teacher.teachers.items()}
        self._names: dict[int, str] = {}

    def start_row(self, row: int, prompt_ids: Sequence[int], *, names: Sequence[str] = ()) -> None:
        """Follow a sequence from its prompt on, by the teacher of this name."""
        self._check_names(names, 1)
        self.drop_rows([row])
        self._names[row] = names[0]
        self._scorers[names[0]].start_row(row, prompt_ids)

    def drop_rows(self, rows: Sequence[int]) -> None:
        for row in rows:
            name = self._names.pop(row, None)
            if name is not None:
                self._scorers[name].drop_rows([row])

    def score(
        self,
        rows: Sequence[int],
        token_ids: Int[Tensor, "rows time"],
        candidate_ids: Int[Tensor, "rows time candidates"] | None = None,
        *,
        wanted: Bool[Tensor, "rows time"],
    ) -> TeacherScores:
        parts, order = [], []
        for name, index in rows_by_name([self._names[row] for row in rows]):
            numbers = [rows[line] for line in index.tolist()]
            candidates = None if candidate_ids is None else candidate_ids[index]
            with naming_rows(index):
                parts.append(self._scorers[name].score(numbers, token_ids[index], candidates, wanted=wanted[index]))
            order += index.tolist()
        return TeacherScores.scatter(parts, order)


def rows_by_name(names: Sequence[str]) -> list[tuple[str, Tensor]]:
    """The rows of each name, in the order in which names come first."""
    return [
        (name, torch.tensor([row for row, other in enumerate(names) if other == name])) for name in dict.fromkeys(names)
    ]


@contextmanager
def naming_rows(rows: Tensor) -> Iterator[None]:
    """Give an error about a row of one teacher the number that the row has among all."""
    try:
        yield
    except NonFiniteLogitsError as error:
        if error.row is not None:
            error.row = int(rows[error.row])
        raise
