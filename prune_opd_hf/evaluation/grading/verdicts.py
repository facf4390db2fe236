"""Verdicts on responses, who may give them, and the scores of a benchmark that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from prune_opd_hf.errors import ConfigError
from prune_opd_hf.records.statistics import estimate_mean, score_problems
from prune_opd_hf.tasks.chain import extract_answer

STATUSES = ("graded", "no_answer", "timed_out", "crashed")


@dataclass(frozen=True)
class Verdict:
    """What became of one response.

    Attributes:
        correct: whether its answer equals the gold.
        answer: one string for all answers of the same value, the same for all correct ones; None where there is none. Votes
            are counted on it.
        extracted: the answer as it was written, where one was found.
        status: "graded"; "no_answer": none was found, or it could not be read; "timed_out": the comparison was stopped;
            "crashed": it died. Only graded answers can be correct.

    Raises:
        ConfigError: an unknown status, or one that contradicts the rest.
    """

    correct: bool
    answer: str | None
    status: str
    extracted: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ConfigError(f"status must be one of {', '.join(STATUSES)}, got {self.status!r}")
        if (self.status == "graded") != (self.answer is not None) or (self.correct and self.status != "graded"):
            raise ConfigError(
                f"a verdict has an answer if and only if it is graded, and only then can be right: {self}"
            )


@runtime_checkable
class Grader(Protocol):
    """What evaluation asks of a grader: its name with its settings, for reports, and verdicts."""

    @property
    def name(self) -> str: ...

    def grade(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """One verdict for each response against its gold, in order."""


class ChainGrader:
    """The embedded task: exact match on the digit before the end; a response without an end has no answer.

    Example: responses are decoded with their special tokens.
        >>> [verdict.correct for verdict in ChainGrader().grade(["+3 7 <eos>", "+3 8 <eos>", "+3 7"], ["7", "7", "7"])]
        [True, False, False]
    """

    name = "exact match on the digit before the end"

    def grade(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        answers = [extract_answer(response) for response in responses]
        return [
            Verdict(answer == gold, answer, "no_answer" if answer is None else "graded", answer)
            for answer, gold in zip(answers, golds, strict=True)
        ]


def score_verdicts(verdicts: Sequence[Sequence[Verdict]], pass_ks: Sequence[int] | None = None) -> dict[str, Any]:
    """Score the verdicts of each problem's samples.

    Returns:
        fields of a `BenchmarkResult`: metrics, problem_scores, no_answer_share, timed_out_share, crashed_share.
    """
    problem_scores = score_problems(
        [[verdict.correct for verdict in row] for row in verdicts],
        [[verdict.answer for verdict in row] for row in verdicts],
        pass_ks,
    )
    statuses = [verdict.status for row in verdicts for verdict in row]
    shares = {f"{status}_share": statuses.count(status) / len(statuses) for status in STATUSES[1:]}
    metrics = {name: estimate_mean(scores) for name, scores in problem_scores.items()}
    return {"metrics": metrics, "problem_scores": problem_scores, **shares}
