"""Controls for drift pruning: cutting every response at one length, or at random lengths of a given mean.

What pruning by drift is worth shows only beside runs that sample as many tokens without looking at drift. "fixed" is the
published control ("OPD cut at 4K"): every response ends at one length. "random" draws a length for each response, spread as
drift stops are: after a minimum, each further token is the last with one probability (geometric), and nothing is longer than
the cap. Both end a row inside the generation loop, where it leaves the batch.

It knows numbers and Transformers' stopping criteria; it does not know the trainer.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from scipy.optimize import brentq
from torch import Tensor
from transformers import StoppingCriteria

from prune_opd_hf.errors import ConfigError, FileFormatError
from prune_opd_hf.records.rollouts import Rollouts
from prune_opd_hf.records.training_summary import TrainingSummary

CALIBRATION_EXPONENT = 0.5
"""With `match="kept"` the mean cut moves by this power of wanted / kept after each step: half-way, since steps are noisy."""


class CutPlan:
    """Where each response of a step is cut, when drift does not decide it.

    Args:
        kind: "fixed" or "random".
        mean: mean length of the cuts, in response tokens. "fixed" cuts at the nearest whole number.
        minimum: no random cut is shorter.
        maximum: no cut is longer (the run's longest response).
        seed: of the random lengths; the same seed, step and process draw the same ones, whatever happened before.
        match: "cut" keeps the mean of the cuts at `mean`; rows that end by themselves earlier keep fewer tokens. "kept"
            moves the cuts after each step so that the mean of the tokens kept comes to `mean`.

    Raises:
        ConfigError: a mean outside minimum to maximum.

    Example:
        >>> CutPlan("fixed", mean=40, minimum=1, maximum=112, seed=0).lengths(3, step=0, process=0)
        tensor([40, 40, 40])
        >>> lengths = CutPlan("random", mean=40, minimum=8, maximum=112, seed=0).lengths(20_000, step=0, process=0)
        >>> int(lengths.min()), int(lengths.max()), round(float(lengths.float().mean()))
        (8, 112, 40)
    """

    def __init__(self, kind: str, *, mean: float, minimum: int, maximum: int, seed: int, match: str = "cut") -> None:
        if not minimum <= mean <= maximum:
            raise ConfigError(
                f"pruning_length must lie between the shortest cut ({minimum}) and max_completion_length ({maximum}), "
                f"got {mean:g}"
            )
        self.kind, self.wanted, self.minimum, self.maximum = kind, float(mean), minimum, maximum
        self.seed, self.match = seed, match
        self.mean = float(mean)  # of the next cuts; moves only with match="kept"

    @property
    def longest(self) -> int:
        """No response of the next step gets longer, in tokens."""
        return max(1, round(self.mean)) if self.kind == "fixed" else self.maximum

    def lengths(self, rows: int, *, step: int, process: int) -> Int[Tensor, " rows"]:
        """The cut of each row of one process, in response tokens."""
        if self.kind == "fixed":
            return torch.full((rows,), self.longest)
        stop = stop_probability(self.mean, self.minimum, self.maximum)
        random = np.random.default_rng(np.random.SeedSequence([self.seed, step, process, sum(b"cuts")]))
        if stop == 0:
            return torch.full((rows,), self.maximum)
        drawn = self.minimum - 1 + random.geometric(stop, size=rows)
        return torch.from_numpy(np.minimum(drawn, self.maximum))

    def update(self, kept_mean: float) -> None:
        """Tell how many tokens the responses of all processes kept in a step, on average."""
        if self.match == "kept" and kept_mean > 0:
            moved = self.mean * (self.wanted / kept_mean) ** CALIBRATION_EXPONENT
            self.mean = min(max(moved, float(self.minimum)), float(self.maximum))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ConfigError: the saved mean is outside these settings' bounds.
        """
        mean = state.get("mean")
        if not isinstance(mean, float) or not self.minimum <= mean <= self.maximum:
            raise ConfigError(
                f"the saved cuts (mean {mean!r}) do not fit these settings ({self.minimum} to {self.maximum}): resume with "
                "the settings of the saved run"
            )
        self.mean = mean


def stop_probability(mean: float, minimum: int, maximum: int) -> float:
    """The probability s of ending at each token from `minimum` on, so that the clipped geometric length has this mean.

    With n = maximum - minimum + 1: E[min(minimum - 1 + G, maximum)] = minimum - 1 + (1 - (1 - s)^n) / s.

    Example: between 1 and 2 tokens, half of the rows must end at the first for a mean of 1.5.
        >>> round(stop_probability(1.5, 1, 2), 6)
        0.5
    """
    span = maximum - minimum + 1
    target = mean - (minimum - 1)

    def excess(stop: float) -> float:
        return (1.0 if stop == 1 else -math.expm1(span * math.log1p(-stop)) / stop) - target

    least = 1e-12  # below it nobody would notice
    if target >= span or excess(least) <= 0:
        return 0.0
    if target <= 1:
        return 1.0
    return float(brentq(excess, least, 1.0, xtol=1e-15))


def measured_length(path: str | os.PathLike) -> float:
    """Mean kept length of a run, from what it left: its training summary (the file or its folder), or stored rollouts.

    Raises:
        FileFormatError: neither of the two.
    """
    source = Path(path)
    if source.suffix == ".safetensors" and source.is_file():
        return float(Rollouts.load(source).lengths.float().mean())
    summary = TrainingSummary.load(source)
    if summary.rollouts == 0:
        raise FileFormatError(f"the run of {source} has no rollouts, so no mean length")
    return summary.kept_tokens / summary.rollouts


class RowLimits(StoppingCriteria):
    """Ends each row at its own number of response tokens.

    Args:
        limits: response tokens of each row.
        prompt_columns: columns of the prompts, padding included.
    """

    def __init__(self, limits: Int[Tensor, " batch"], prompt_columns: int) -> None:
        self.limits, self.prompt_columns = limits, prompt_columns

    def __call__(self, input_ids: torch.LongTensor, scores: Any = None, **kwargs: Any) -> Bool[Tensor, " batch"]:
        """Which rows of `input_ids`, shape (batch, total), have reached their limit."""
        self.limits = self.limits.to(input_ids.device)
        return self.limits <= input_ids.shape[1] - self.prompt_columns


def stop_reasons(rollouts: Rollouts, limits: Int[Tensor, " batch"], eos_token_ids: list[int]) -> tuple[str, ...]:
    """Why each row ended, where `RowLimits` took part: a row at its limit without an end token was cut ("length")."""
    last = rollouts.response_ids.gather(1, (rollouts.lengths - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    by_itself = torch.isin(last, torch.tensor(eos_token_ids, dtype=torch.long, device=last.device))
    cut = (rollouts.lengths >= limits.to(last.device)) & ~by_itself
    return tuple(
        "length" if is_cut else reason for is_cut, reason in zip(cut.tolist(), rollouts.stop_reason, strict=True)
    )
