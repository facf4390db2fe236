"""Exact-match accuracy of a model on the embedded task, by plain `generate`."""

from dataclasses import dataclass

from scipy.stats import binomtest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prune_opd_hf.errors import InputError
from prune_opd_hf.tasks.chain import Problem
from prune_opd_hf.tasks.grading import is_correct, is_drifting


@dataclass(frozen=True)
class Accuracy:
    """What one pass over the problems gave.

    Attributes:
        problems: how many problems were tried, once each.
        correct: how many responses were right.
        drifting: how many responses went over to style B.

    Example: the interval is Wilson's, so it stays inside [0, 1] and is not empty at the ends.
        >>> accuracy = Accuracy(problems=512, correct=512, drifting=0)
        >>> accuracy.share, [round(bound, 4) for bound in accuracy.interval]
        (1.0, [0.9926, 1.0])
    """

    problems: int
    correct: int
    drifting: int

    @property
    def share(self) -> float:
        """Share of right responses."""
        return self.correct / self.problems

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% confidence interval of the share of right responses."""
        bounds = binomtest(self.correct, self.problems).proportion_ci(method="wilson")
        return float(bounds.low), float(bounds.high)

    @property
    def drifting_share(self) -> float:
        """Share of responses in style B."""
        return self.drifting / self.problems


def measure_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    *,
    max_new_tokens: int,
    do_sample: bool = True,
    batch_size: int = 128,
) -> Accuracy:
    """One response to each problem, graded. Sampling is at temperature 1 from the whole distribution.

    It uses the global random state: call `torch.manual_seed` before it to repeat a figure.

    Args:
        model, tokenizer: of the embedded task.
        problems: at least one.
        max_new_tokens: cap on the response; `ChainTask.longest_response_tokens` cuts nothing that was trained on.
        do_sample: sample, or decode greedily.
        batch_size: problems in each `generate` call.

    Raises:
        InputError: no problems.
    """
    if not problems:
        raise InputError("measure_accuracy needs at least one problem, got none")
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}
    correct = drifting = 0
    for first in range(0, len(problems), batch_size):
        batch = problems[first : first + batch_size]
        prompts = tokenizer([problem.prompt for problem in batch], padding=True, return_tensors="pt").to(model.device)
        sequences = model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=do_sample, **sampling)
        responses = tokenizer.batch_decode(sequences[:, prompts.input_ids.shape[1] :])
        for problem, response in zip(batch, responses, strict=True):
            correct += is_correct(response, problem.answer)
            drifting += is_drifting(response)
    return Accuracy(problems=len(problems), correct=correct, drifting=drifting)
