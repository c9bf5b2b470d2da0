"""What several seeds say together: means with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.95
"""Of every confidence interval."""


class Interval(NamedTuple):
    """A mean, and where the mean of all seeds is with a confidence of `LEVEL`."""

    mean: float
    low: float
    """NaN, as `high`, of fewer than two values."""
    high: float
    number: int
    """Of values."""

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def interval(values: Sequence[float], within: tuple[float, float] = (-math.inf, math.inf)) -> Interval:
    """The mean of independent values, with Student's t interval.

    For differences of pairs it is the paired interval. It assumes that the values are about normal: with three seeds
    it is wide, and should be.

    Args:
        values: the values.
        within: what a value can be at all; the interval ends there.
    """
    number = len(values)
    if not number:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / number
    if number == 1:
        return Interval(mean, math.nan, math.nan, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (number - 1))
    half = _quantile(number - 1) * deviation / math.sqrt(number)
    return Interval(mean, max(mean - half, within[0]), min(mean + half, within[1]), number)


def _quantile(degrees: int) -> float:
    from scipy.special import stdtrit  # not scipy.stats, which takes a second to import

    return float(stdtrit(degrees, (1 + LEVEL) / 2))
