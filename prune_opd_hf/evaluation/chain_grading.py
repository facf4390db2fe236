"""Grading of the embedded task in the same terms as mathematical answers."""

from collections.abc import Sequence

from prune_opd_hf.evaluation.grading import Verdict
from prune_opd_hf.tasks.grading import extract_answer


class ChainGrader:
    """Exact match on the digit before the end; a response without an end has no answer.

    Example: responses are decoded with their special tokens.
        >>> [verdict.correct for verdict in ChainGrader().grade(["+3 7 <eos>", "+3 8 <eos>", "+3 7"], ["7", "7", "7"])]
        [True, False, False]
    """

    name = "exact match on the digit before the end"

    def grade(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """One verdict for each response against its gold, in order."""
        answers = [extract_answer(response) for response in responses]
        return [
            Verdict(answer == gold, answer, "no_answer" if answer is None else "graded")
            for answer, gold in zip(answers, golds, strict=True)
        ]
