"""What a run is to reach, such as a test accuracy of 0.97, and in which round it did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsim.config import Config
from fedsim.errors import InputError
from fedsim.metrics import ROUND_COLUMNS, is_of_clients_evaluation

_ENDINGS = ("loss", "accuracy", "accuracy_before_mean", "accuracy_after_mean", "worst_decile")
MEASURES = tuple(c.name for c in ROUND_COLUMNS if c.name.endswith(_ENDINGS))
"""Columns of rounds.parquet that can be a target."""


@dataclass(frozen=True)
class Target:
    """A value of a column of rounds.parquet: an accuracy is to be at least that, a loss at most.

    Raises:
        InputError: the column is none of these, or the value is not a finite number.
    """

    column: str
    value: float

    def __post_init__(self) -> None:
        if hasattr(self.value, "item"):  # numpy's, such as the best of a run's column
            object.__setattr__(self, "value", self.value.item())
        if self.column not in MEASURES:
            raise InputError(f"{self.column!r} cannot be a target; there are {', '.join(MEASURES)}")
        if not isinstance(self.value, int | float) or isinstance(self.value, bool):
            raise InputError(f"{self.column} = {self.value!r} cannot be reached: give a number")
        if not math.isfinite(self.value) or (self.is_accuracy and not 0 < self.value <= 1):
            allowed = "a fraction, above 0 and at most 1" if self.is_accuracy else "a finite number"
            raise InputError(f"{self.column} = {self.value:g} cannot be reached: give {allowed}")
        object.__setattr__(self, "value", float(self.value))  # 1 and 1.0 are one target, and have one text

    @staticmethod
    def parse(text: str) -> Target:
        """A target as the command line takes it: test_accuracy=0.97.

        Raises:
            InputError: it is not one.
        """
        column, _, value = text.partition("=")
        try:
            return Target(column.strip(), float(value))
        except ValueError:
            raise InputError(f"{text!r} is no target: write it as test_accuracy=0.97") from None

    def __str__(self) -> str:
        return f"{self.column}={self.value!r}"  # to the last digit: an interrupted run must stop at the same round

    @property
    def is_accuracy(self) -> bool:
        """Whether more is better."""
        return "accuracy" in self.column

    def check(self, config: Config) -> None:
        """Lets pass what a run of this configuration measures.

        Raises:
            InputError: it never has the column.
        """
        if is_of_clients_evaluation(self.column) and not config.evaluation.clients:
            raise InputError(f"{self} is never reached without evaluation.clients=true: set that, or another target")

    def is_reached(self, row: Mapping[str, Any]) -> bool:
        """Whether a round is there, by its row; not where it was not evaluated."""
        value = row[self.column]
        return value is not None and (value >= self.value if self.is_accuracy else value <= self.value)

    def crossing(self, at: Sequence[float], values: Sequence[float]) -> float | None:
        """Where a curve comes to the target: the curve of the best value so far, linear between its points.

        Args:
            at: ascending places of the points: rounds, or the seconds or bytes until their ends.
            values: of the column; NaN where a round was not evaluated, which makes it no point.

        Returns:
            A place between two points, as in the paper; None if the target is not reached.

        Reference:
            McMahan et al. 2017, section 3: the number of rounds of Tables 1 and 2.
        """
        before: tuple[float, float] | None = None
        for place, value in zip(at, values, strict=True):
            if math.isnan(value):
                continue
            best = value if before is None else (max if self.is_accuracy else min)(before[1], value)
            if best >= self.value if self.is_accuracy else best <= self.value:
                if before is None or math.isinf(before[1]):
                    return float(place)
                share = (self.value - before[1]) / (best - before[1])
                return float(before[0] + share * (place - before[0]))
            before = float(place), best
        return None


def targets(given: Mapping[str, float]) -> list[Target]:
    """Targets as Python code gives them: {"test_accuracy": 0.97}.

    Raises:
        InputError: one is none.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"{given!r} is no target: give a column and its value, such as {{'test_accuracy': 0.97}}")
    return [Target(column, value) for column, value in given.items()]
