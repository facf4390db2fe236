"""Token labels of the embedded task: what a person who knows the problem would call clean, wrong, or drift."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.tasks import Problem
from prune_opd_hf.tasks.chain import DIGITS, END, HESITATION, apply_operation

CLEAN, WRONG, DRIFT, PADDING = 0, 1, 2, -1


def chain_labels(problem: Problem, words: Sequence[str]) -> list[int]:
    """One label for each word of a response.

    From the first hesitation on everything is DRIFT. Before it, a word is CLEAN where it is the operation that comes next, or
    the value that follows from what the response itself wrote last, or the end after the last value; WRONG otherwise. A slip
    is thus one wrong word, and what follows from it is clean.

    Example: 4 + 3 = 7, but the response says 8; 8 x 7 = 56.
        >>> problem = Problem(start=4, operations=("+3", "x7"))
        >>> chain_labels(problem, "+3 8 x7 6 <eos>".split()), chain_labels(problem, "+3 7 HMM wait ANS 9 <eos>".split())
        ([0, 1, 0, 0, 0], [0, 0, 2, 2, 2, 2, 2])
    """
    labels: list[int] = []
    value: int | None = problem.start
    for place, word in enumerate(words):
        if word == HESITATION:
            return labels + [DRIFT] * (len(words) - place)
        step, is_value = divmod(place, 2)
        if step >= len(problem.operations):
            right = word == END and place == 2 * len(problem.operations)
        elif is_value:
            expected = None if value is None else apply_operation(value, problem.operations[step])
            right = expected is not None and word == DIGITS[expected]
            value = int(word) if word in DIGITS else None
        else:
            right = word == problem.operations[step]
        labels.append(CLEAN if right else WRONG)
    return labels


def label_rollouts(
    rollouts: Rollouts, problems: Sequence[Problem], vocabulary: Sequence[str]
) -> Int[Tensor, "batch time"]:
    """Labels of every response token; PADDING past a row's end.

    Args:
        rollouts: of the embedded task.
        problems: one for each row.
        vocabulary: the words by id.
    """
    labels = torch.full(rollouts.response_ids.shape, PADDING)
    for row, (problem, length) in enumerate(zip(problems, rollouts.lengths.tolist(), strict=True)):
        words = [vocabulary[index] for index in rollouts.response_ids[row, :length].tolist()]
        labels[row, :length] = torch.tensor(chain_labels(problem, words))
    return labels
