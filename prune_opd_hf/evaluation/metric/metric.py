r"""Mathematical answers by avg@k, pass@k and maj@k with intervals: the package's grading and statistics as an `evaluate` module.

It is loaded from its file, copied by `evaluate` to its cache, and therefore imports the package by its full name. `evaluate`
reads the imports line by line: one import a line.
"""

from collections.abc import Iterable, Sequence

import datasets
import evaluate

from prune_opd_hf.errors import InputError
from prune_opd_hf.evaluation.grading import GradingPool, score_verdicts
from prune_opd_hf.records.statistics import METHOD

_DESCRIPTION = r"""
Grades the last \boxed{} of each response against the gold answer with math-verify and reports, over problems with k samples
each: avg@k (mean share of right samples), pass@k (unbiased, arXiv 2107.03374) and maj@k (majority vote over parsed answers,
ties shared), each with a 95% interval over problems, and the shares of samples without a readable answer, with a timed out
comparison and with a crashed one.
"""

_KWARGS_DESCRIPTION = r"""
Args:
    predictions: for each problem a response, or a list of k responses.
    references: for each problem the gold answer.
    truncated: for each problem whether its response was truncated at the length limit, or a list of k such flags; optional.
    pass_ks: the k of pass@k; by default the powers of 4 up to the number of samples, and that number.
    workers: grading processes; by default one for each core, at most 8.
    cpu_seconds: limit for one comparison.
Returns:
    under the name of each metric its value, under "<name>_low" and "<name>_high" its interval, "interval_method", "problems",
    "samples", "no_answer_share", "timed_out_share", "crashed_share", and "truncated_share" where `truncated` was given.
Examples:
    >>> import evaluate
    >>> from prune_opd_hf.evaluation.metric import METRIC_PATH
    >>> metric = evaluate.load(METRIC_PATH)
    >>> result = metric.compute(predictions=[[r"\boxed{4}", r"\boxed{5}"], [r"\boxed{9}", r"\boxed{9.0}"]], references=["4", "9"])
    >>> result["avg@2"], result["pass@2"], result["maj@2"]
    (0.75, 1.0, 0.75)
"""

_CITATION = "Math-Verify, Hynek Kydlicek, https://github.com/huggingface/Math-Verify"


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MathAnswers(evaluate.Metric):
    """avg@k, pass@k and maj@k of mathematical answers."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": datasets.List(text), "references": text}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(
        self,
        predictions: Sequence[str] | Sequence[Sequence[str]],
        references: Sequence[str],
        truncated: Sequence[bool] | Sequence[Sequence[bool]] | None = None,
        pass_ks: Sequence[int] | None = None,
        workers: int | None = None,
        cpu_seconds: float = 10.0,
    ) -> dict[str, float | int | str]:
        rows = [[row] if isinstance(row, str) else list(row) for row in predictions]
        golds = [gold for gold, row in zip(references, rows, strict=True) for _ in row]
        with GradingPool(workers, cpu_seconds=cpu_seconds) as pool:
            verdicts = iter(pool.grade([response for row in rows for response in row], golds))
        scores = score_verdicts([[next(verdicts) for _ in row] for row in rows], pass_ks)
        del scores["problem_scores"]
        result: dict[str, float | int | str] = {
            "interval_method": METHOD,
            "problems": len(rows),
            "samples": len(rows[0]),
        }
        for name, estimate in scores.pop("metrics").items():
            result |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        result |= scores
        if truncated is not None:
            flags = [list(row) if isinstance(row, Iterable) else [row] for row in truncated]
            if list(map(len, flags)) != list(map(len, rows)):
                raise InputError(
                    f"truncated needs one flag for each response, got {sum(map(len, flags))} for {len(golds)} responses"
                )
            result["truncated_share"] = sum(bool(flag) for row in flags for flag in row) / len(golds)
        return result
