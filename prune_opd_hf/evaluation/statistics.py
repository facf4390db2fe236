"""The statistics of repeated sampling: scores over problems and their intervals.

Pure functions of numbers; this module knows neither models nor grading.
"""

import math
from dataclasses import dataclass

from prune_opd_hf.errors import ConfigError


@dataclass(frozen=True)
class Estimate:
    """A score with its uncertainty.

    Attributes:
        value: the score, as a share in [0, 1].
        low, high: the 95% confidence interval; NaN is refused.
        method: how the interval was computed.

    Raises:
        ConfigError: not 0 <= low <= value <= high <= 1.

    Example:
        >>> print(Estimate(0.5, 0.412, 0.583, "bootstrap over problems"))
        50.0 [41.2, 58.3]
    """

    value: float
    low: float
    high: float
    method: str

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.low, self.value, self.high))) or not (
            0 <= self.low <= self.value <= self.high <= 1
        ):
            raise ConfigError(
                f"an estimate needs 0 <= low <= value <= high <= 1, got {self.low} <= {self.value} <= {self.high}"
            )

    def __str__(self) -> str:
        """In percent, with its interval."""
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"
