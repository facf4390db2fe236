"""From verdicts to the numbers of a report: metrics with intervals, scores of problems, and what could not be graded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prune_opd_hf.evaluation.grading import Verdict
from prune_opd_hf.records.statistics import Estimate, estimate_mean, score_problems


@dataclass(frozen=True)
class Scores:
    """What the verdicts on one benchmark amount to.

    Attributes:
        metrics: "avg@k", "pass@k", "maj@k", each with its interval.
        problem_scores: under the same names, the score of each problem.
        no_answer_share, timed_out_share, crashed_share: of all samples.
    """

    metrics: Mapping[str, Estimate]
    problem_scores: Mapping[str, tuple[float, ...]]
    no_answer_share: float
    timed_out_share: float
    crashed_share: float


def score_verdicts(verdicts: Sequence[Sequence[Verdict]], pass_ks: Sequence[int] | None = None) -> Scores:
    """Score the verdicts of each problem's samples.

    Args:
        verdicts: for each problem one verdict a sample, the same number for all problems.
        pass_ks: the k of pass@k; see `score_problems`.

    Raises:
        InputError: no problem, no sample, or problems with different numbers of samples.

    Example: one problem right once in two samples, one never answered.
        >>> right, wrong = Verdict(True, "4", "graded"), Verdict(False, "5", "graded")
        >>> scores = score_verdicts([[right, wrong], [Verdict(False, None, "no_answer")] * 2])
        >>> scores.metrics["avg@2"].value, scores.no_answer_share
        (0.25, 0.5)
    """
    problem_scores = score_problems(
        [[verdict.correct for verdict in row] for row in verdicts],
        [[verdict.answer for verdict in row] for row in verdicts],
        pass_ks,
    )
    statuses = [verdict.status for row in verdicts for verdict in row]
    return Scores(
        metrics={name: estimate_mean(scores) for name, scores in problem_scores.items()},
        problem_scores=problem_scores,
        **{
            f"{status}_share": statuses.count(status) / len(statuses)
            for status in ("no_answer", "timed_out", "crashed")
        },
    )
