"""How evenly the weights serve the clients: the spread of their accuracies, each client counting once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple


class Fairness(NamedTuple):
    """Of the accuracies of a round's clients, fractions; all None where there are none."""

    mean: float | None
    worst_decile: float | None
    """Mean of the worst tenth of the clients, ceil(K / 10) of K."""
    variance: float | None
    """Of these K, not an estimate for others."""


def fairness(accuracies: Iterable[float | None]) -> Fairness:
    """The measures that q-FFL reports; clients that were not tested are left out.

    Reference:
        Li et al., "Fair Resource Allocation in Federated Learning", ICLR 2020.
        https://arxiv.org/abs/1905.10497

    Example:
        >>> fairness([1.0, 0.5, None, 0.75])
        Fairness(mean=0.75, worst_decile=0.5, variance=0.041666666666666664)
    """
    known = sorted(accuracy for accuracy in accuracies if accuracy is not None)
    if not known:
        return Fairness(None, None, None)
    mean = _mean(known)
    return Fairness(mean, _mean(known[: math.ceil(len(known) / 10)]), _mean([(value - mean) ** 2 for value in known]))


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
