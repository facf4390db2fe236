"""How the rollouts of a run are pruned: by drift, all at one length, at random lengths, or not at all.

The config chooses one object; whoever generates, weighs or counts asks it and no setting again. What pruning by drift is worth
shows only beside runs that sample as many tokens without looking at drift. "fixed" is the published control ("OPD cut at 4K").
"random" draws a length for each response, distributed as drift stops are: after a minimum, each further token is the last with
one probability (geometric), and nothing is longer than the cap.

A further way is a subclass of `Pruning` in `PRUNING`. It knows lengths; it does not know models or the trainer.
"""

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from scipy.optimize import brentq
from torch import Tensor

from prune_opd_hf.algorithm.budget import ResponseBudget
from prune_opd_hf.algorithm.drift import DriftConfig, events_to_exhaustion
from prune_opd_hf.errors import ConfigError
from prune_opd_hf.records.rollouts import Rollouts

if TYPE_CHECKING:
    from prune_opd_hf.training.config import PruneOPDConfig

CALIBRATION_EXPONENT = 0.5
"""With `match="kept"` the mean length moves by this power of wanted / kept after each step: half-way, since steps are noisy."""

Lengths = Int[Tensor, " batch"]
Rows = Bool[Tensor, " batch"]
MATCHES = ("cut", "kept")


class Pruning(ABC):
    """One way of pruning rollouts, and what it has learned so far.

    Attributes:
        truncates: whether drift stops rows while they are generated.
        weighs_by_reliability: whether the loss weighs tokens by reliability, unless the config says.
        needs_length: whether the config must name a mean length, `pruning_length`.
        cap: the longest response of the next step, in tokens.
    """

    truncates: ClassVar[bool] = False
    weighs_by_reliability: ClassVar[bool] = False
    needs_length: ClassVar[bool] = False

    cap: int

    @classmethod
    @abstractmethod
    def from_config(cls, args: "PruneOPDConfig") -> "Pruning":
        """As the config says; settings that do not fit are a `ConfigError`."""

    def row_limits(self, rows: int, *, step: int, process: int) -> Lengths:
        """The longest response of each row of one process in one step, in tokens."""
        return torch.full((rows,), self.cap)

    def check_every(self, chosen: int, rows: int, block_tokens: int) -> int:
        """Tokens between two teacher passes: those that the config has chosen. Where drift stops no row the teacher need not look
        before the end, and a pass over all rows together takes the `block_tokens` that suit it."""
        return chosen if self.truncates else max(chosen, min(self.cap, block_tokens // rows))

    def stopped(self, rollouts: Rollouts, cap: int) -> Rows:
        """Rows that pruning ended before they met the cap of their step or ended otherwise."""
        return torch.zeros(len(rollouts), dtype=torch.bool)

    def describe(self, config: DriftConfig) -> str:
        """What it does to rollouts with these drift settings, in one line."""
        return f"no response has more than {self.cap} tokens"

    def obstacle(self, config: DriftConfig, check_every: int, vocab_size: int) -> str | None:
        """Why it can do nothing with these settings, and what to set; None where it can."""
        return None

    def update(self, lengths: Lengths, effective_lengths: Lengths, ended_naturally: Rows) -> dict[str, float]:
        """Learn from the rollouts of one step, over all processes, how long the next ones may be. Returns metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; one that does not fit the settings is a `ConfigError`."""
        if state:
            raise ConfigError("the saved run was pruned in another way: resume with the settings of the saved run")


class NoPruning(Pruning):
    """Plain on-policy distillation: every response may reach the longest length."""

    def __init__(self, longest: int) -> None:
        self.cap = longest

    @classmethod
    def from_config(cls, args: "PruneOPDConfig") -> "Pruning":
        return cls(args.max_completion_length)


class DriftPruning(Pruning):
    """Prune-OPD: drift stops rows and weighs tokens, and the response budget sets the cap of each step."""

    truncates = True
    weighs_by_reliability = True

    def __init__(self, budget: ResponseBudget) -> None:
        self.budget = budget

    @classmethod
    def from_config(cls, args: "PruneOPDConfig") -> "Pruning":
        return cls(args.make_budget())

    @property
    def cap(self) -> int:  # type: ignore[override]
        return self.budget.length

    def describe(self, config: DriftConfig) -> str:
        budget, events = self.budget, events_to_exhaustion(config.weight_drop)
        stops = "drift stops no row" if events is None else f"a row stops at drift event {events}"
        return (
            f"{stops}, not before token {max(1, config.min_length)}; the cap begins at {budget.length} tokens and moves between "
            f"{budget.minimum} and {budget.maximum}"
        )

    def obstacle(self, config: DriftConfig, check_every: int, vocab_size: int) -> str | None:
        events, longest = events_to_exhaustion(config.weight_drop), self.budget.maximum
        # two sets of k among so many tokens share at least this much of k, which may hold next to none of the probability
        least = max(0.0, 2 - vocab_size / config.top_k)
        certain = {"overlap": least, "weighted_overlap": float(least == 1)}.get(config.metric, 0.0)
        if events is None:
            return "drift_weight_drop is 0"
        if events >= longest:
            return f"it takes {events} drift events, and no response has more than {longest} tokens: raise drift_weight_drop"
        if config.min_length >= longest:
            return f"drift_min_length is {config.min_length}, and no response has more than {longest} tokens: lower it"
        if certain >= config.threshold:
            return (
                f"two sets of {config.top_k} among {vocab_size} tokens share {certain:.2f} at least, and the threshold is "
                f"{config.threshold:g}: lower drift_top_k"
            )
        if check_every >= longest:
            return f"the teacher looks every {check_every} tokens, and no response has more than {longest}: lower check_every"
        return None

    def stopped(self, rollouts: Rollouts, cap: int) -> Rows:
        return torch.tensor([reason == "drift" for reason in rollouts.stop_reason])

    def update(self, lengths: Lengths, effective_lengths: Lengths, ended_naturally: Rows) -> dict[str, float]:
        return self.budget.update(effective_lengths, ended_naturally)

    def state_dict(self) -> dict[str, Any]:
        return self.budget.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.budget.load_state_dict(state)


class LengthPruning(Pruning):
    """Truncation that does not look at drift; the mean of its lengths is kept, or moved so that the tokens kept have it.

    Args:
        mean: of the truncation lengths, in response tokens.
        minimum, maximum: bounds of a truncation length; `maximum` is the run's longest response.
        match: "cut" keeps the mean of the truncation lengths; rows that end by themselves earlier keep fewer tokens. "kept"
            moves it after each step so that the mean of the tokens kept comes to `mean`.
    """

    needs_length = True

    def __init__(self, mean: float, *, minimum: int, maximum: int, match: str = "cut") -> None:
        if not minimum <= mean <= maximum:
            raise ConfigError(
                f"pruning_length must lie between the shortest truncation length ({minimum}; with pruning='random' it is "
                f"drift_min_length) and max_completion_length ({maximum}), got {mean:g}"
            )
        self.minimum, self.maximum, self.match, self.cap = minimum, maximum, match, maximum
        self.wanted = self.mean = float(mean)  # of the next truncation lengths; it moves only with match="kept"

    def stopped(self, rollouts: Rollouts, cap: int) -> Rows:
        ends = zip(rollouts.stop_reason, rollouts.lengths.tolist(), strict=True)
        return torch.tensor([reason == "length" and length < cap for reason, length in ends])

    def update(self, lengths: Lengths, effective_lengths: Lengths, ended_naturally: Rows) -> dict[str, float]:
        kept_mean = int(lengths.sum()) / len(lengths)
        if self.match == "kept" and kept_mean > 0:
            moved = self.mean * (self.wanted / kept_mean) ** CALIBRATION_EXPONENT
            self.mean = min(max(moved, float(self.minimum)), float(self.maximum))
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mean = state.get("mean")
        if not isinstance(mean, float) or not self.minimum <= mean <= self.maximum:
            raise ConfigError(
                f"the saved mean length {mean!r} does not fit these settings ({self.minimum} to {self.maximum}): resume with "
                "the settings of the saved run"
            )
        self.mean = mean


class FixedLength(LengthPruning):
    """Every response is truncated at one length, the whole number nearest to the mean."""

    @classmethod
    def from_config(cls, args: "PruneOPDConfig") -> "Pruning":
        assert args.pruning_length is not None  # check_length_settings has refused it
        return cls(args.pruning_length, minimum=1, maximum=args.max_completion_length, match=args.pruning_match)

    def describe(self, config: DriftConfig) -> str:
        return f"every response ends at {max(1, round(self.mean))} tokens at the latest"

    def row_limits(self, rows: int, *, step: int, process: int) -> Lengths:
        return torch.full((rows,), max(1, round(self.mean)))


class RandomLength(LengthPruning):
    """Each response is truncated at a length of its own, drawn from a clipped geometric distribution.

    The same seed, step and process draw the same lengths, whatever happened before.
    """

    def __init__(self, mean: float, *, minimum: int, maximum: int, seed: int, match: str = "cut") -> None:
        super().__init__(mean, minimum=minimum, maximum=maximum, match=match)
        self.seed = seed

    @classmethod
    def from_config(cls, args: "PruneOPDConfig") -> "Pruning":
        assert args.pruning_length is not None  # as above
        return cls(
            args.pruning_length,
            minimum=args.drift_min_length or 1,
            maximum=args.max_completion_length,
            seed=args.seed,
            match=args.pruning_match,
        )

    def describe(self, config: DriftConfig) -> str:
        return f"each response ends at a length drawn from {self.minimum} to {self.maximum}, {self.mean:g} on average"

    def row_limits(self, rows: int, *, step: int, process: int) -> Lengths:
        stop = stop_probability(self.mean, self.minimum, self.maximum)
        if stop == 0:
            return torch.full((rows,), self.maximum)
        random = np.random.default_rng(np.random.SeedSequence([self.seed, step, process, sum(b"cuts")]))
        drawn = self.minimum - 1 + random.geometric(stop, size=rows)
        return torch.from_numpy(np.minimum(drawn, self.maximum))


PRUNING: dict[str, type[Pruning]] = {
    "drift": DriftPruning,
    "fixed": FixedLength,
    "random": RandomLength,
    "none": NoPruning,
}
"""Ways of pruning by the name that the config gives them."""


def check_length_settings(args: "PruneOPDConfig") -> None:
    """Refuse a mean length where the way of pruning needs none, and none or one out of bounds where it needs one."""
    way, is_given = PRUNING[args.pruning], args.pruning_length is not None
    if way.needs_length and not is_given:
        raise ConfigError(f"pruning='{args.pruning}' needs pruning_length, the mean truncation length in tokens")
    if is_given and not way.needs_length:
        ways = " or ".join(name for name, other in PRUNING.items() if other.needs_length)
        raise ConfigError(f"pruning_length is for pruning = {ways}; pruning is '{args.pruning}'")
    way.from_config(args)


def stop_probability(mean: float, minimum: int, maximum: int) -> float:
    """The probability s of ending at each token from `minimum` on, so that the clipped geometric length has this mean.

    With n = maximum - minimum + 1: E[min(minimum - 1 + G, maximum)] = minimum - 1 + (1 - (1 - s)^n) / s.
    """
    span = maximum - minimum + 1
    target = mean - (minimum - 1)

    def excess(stop: float) -> float:
        return (1.0 if stop == 1 else -math.expm1(span * math.log1p(-stop)) / stop) - target

    least = 1e-12  # below it the difference could not be observed
    if target >= span or excess(least) <= 0:
        return 0.0
    if target <= 1:
        return 1.0
    return float(brentq(excess, least, 1.0, xtol=1e-15))
