"""The response budget: one cap on the length of the next step's rollouts, steered by how long students stay reliable.

Pure state machine over lengths; it knows neither models nor trainers. Source: REFERENCE formulas of Prune-OPD
(arXiv 2605.07804), section 2:

    boundary = max(minimum, M - margin);  hit = share of sequences with E >= boundary
    hit >= hit_ratio: M = min(M + step, maximum), misses = 0
    else: misses += 1; when misses == patience: M = max(M - step, minimum), misses = 0

Departures
1. A response that ended by itself before the boundary with its reliability intact says nothing about a longer cap. The
   reference counts it as a miss and shrinks M although compatibility is perfect. Here such sequences are left out of the
   share by default (`natural_ends="ignore"`), and the length is held when none is left to judge.
2. The state can be saved and restored; the reference forgets it at a checkpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from prune_opd_hf.errors import ConfigError, InputError

NATURAL_ENDS = ("ignore", "miss")


class ResponseBudget:
    """Cap on the response length of the next step's rollouts.

    Args:
        initial, minimum, maximum: the cap at the start and its bounds, in tokens.
        step: tokens added after a hit and taken after `patience` misses in a row.
        hit_ratio: share of sequences that must reach the boundary, in [0, 1].
        margin: the boundary lies this many tokens below the cap.
        patience: misses in a row before the cap shrinks.
        natural_ends: "ignore" leaves sequences that ended by EOS before the boundary, reliable to the end, out of the
            share; "miss" counts them as the reference does.

    Raises:
        ConfigError: a value is outside its range.

    Example: half of the batch reaches 400 - 100 tokens, so the next step may be longer.
        >>> import torch
        >>> budget = ResponseBudget(initial=400, minimum=100, maximum=1000)
        >>> metrics = budget.update(torch.tensor([320, 20]), torch.tensor([False, False]))
        >>> budget.length, metrics["budget/hit_share"]
        (500, 0.5)
    """

    def __init__(
        self,
        initial: int,
        minimum: int,
        maximum: int,
        step: int = 100,
        hit_ratio: float = 0.1,
        margin: int = 100,
        patience: int = 3,
        natural_ends: str = "ignore",
    ) -> None:
        whole = {"initial": initial, "minimum": minimum, "maximum": maximum}
        whole |= {"step": step, "margin": margin, "patience": patience}
        for name, value in whole.items():
            if not _is_whole(value):
                raise ConfigError(f"{name} must be a whole number, got {value!r}")
        if not 1 <= minimum <= initial <= maximum:
            raise ConfigError(
                "the response budget needs 1 <= minimum <= initial <= maximum, "
                f"got minimum {minimum}, initial {initial}, maximum {maximum}"
            )
        if step < 1:
            raise ConfigError(f"step must be at least 1 token, got {step}")
        if not _is_share(hit_ratio):
            raise ConfigError(f"hit_ratio must lie in [0, 1], got {hit_ratio!r}")
        if margin < 0:
            raise ConfigError(f"margin must be at least 0 tokens, got {margin}")
        if patience < 1:
            raise ConfigError(f"patience must be at least 1, got {patience}")
        if natural_ends not in NATURAL_ENDS:
            raise ConfigError(f"natural_ends must be one of {', '.join(NATURAL_ENDS)}, got {natural_ends!r}")
        self.minimum = minimum
        self.maximum = maximum
        self.step = step
        self.hit_ratio = hit_ratio
        self.margin = margin
        self.patience = patience
        self.natural_ends = natural_ends
        self._length = initial
        self._misses = 0

    @property
    def length(self) -> int:
        """The cap for the next rollouts, in tokens."""
        return self._length

    @property
    def boundary(self) -> int:
        """Effective length from which a sequence counts as a hit, in tokens."""
        return max(self.minimum, self._length - self.margin)

    def update(
        self,
        effective_lengths: Int[Tensor, " batch"] | Sequence[int],
        ended_naturally: Bool[Tensor, " batch"] | Sequence[bool],
    ) -> dict[str, float]:
        """Judge one step's sequences and set the next cap. In a distributed run, pass the sequences of all processes.

        Args:
            effective_lengths: E of each sequence, in tokens.
            ended_naturally: whether it ended by itself (EOS) while still reliable.

        Returns:
            `budget/length` (the cap for the next step), `budget/hit_share` (NaN when no sequence could be judged),
            `budget/judged_share` (the share of sequences that entered it) and `budget/misses`.

        Raises:
            InputError: the two differ in length or are empty.
        """
        lengths = torch.as_tensor(effective_lengths).reshape(-1)
        natural = torch.as_tensor(ended_naturally).reshape(-1).bool()
        if lengths.numel() == 0 or lengths.shape != natural.shape:
            raise InputError(
                "budget.update needs one effective length and one flag for each of at least one sequence, "
                f"got {lengths.numel()} lengths and {natural.numel()} flags"
            )
        reached = lengths >= self.boundary
        judged = reached | ~natural if self.natural_ends == "ignore" else torch.ones_like(reached)
        judged_count = int(judged.sum())
        hit_share = int((reached & judged).sum()) / judged_count if judged_count else float("nan")
        if judged_count:
            self._move(hit_share >= self.hit_ratio)
        return {
            "budget/length": float(self._length),
            "budget/hit_share": hit_share,
            "budget/judged_share": judged_count / lengths.numel(),
            "budget/misses": float(self._misses),
        }

    def _move(self, hit: bool) -> None:
        if hit:
            self._length = min(self._length + self.step, self.maximum)
            self._misses = 0
            return
        self._misses += 1
        if self._misses == self.patience:
            self._length = max(self._length - self.step, self.minimum)
            self._misses = 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the cap and the misses in a row."""
        return {"length": self._length, "misses": self._misses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ConfigError: the saved cap is outside this budget's bounds, so the settings were changed in between; or this is
                no state of a budget.
        """
        given: Mapping[str, Any] = state if isinstance(state, Mapping) else {}
        length: Any = given.get("length")
        misses: Any = given.get("misses")
        fits = _is_whole(length) and _is_whole(misses) and 0 <= misses < self.patience
        if not (fits and self.minimum <= length <= self.maximum):
            shown = (
                f"length {length}, misses {misses}" if _is_small(length) and _is_small(misses) else "no whole numbers"
            )
            raise ConfigError(
                f"the saved budget ({shown}) does not fit these settings (length {self.minimum} to {self.maximum}, "
                f"patience {self.patience}): resume with the settings of the saved run"
            )
        self._length, self._misses = length, misses


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_small(value: Any) -> bool:
    return _is_whole(value) and abs(value) < 2**63


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
