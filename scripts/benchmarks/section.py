"""A task's section of the page: tables, points, checks, and the medians that they show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from benchmarks.elsewhere import table


@dataclass(frozen=True)
class Check:
    """One thing to be reached, and what was."""

    what: str
    measured: str
    target: str
    is_reached: bool

    @property
    def verdict(self) -> str:
        """In one word or two."""
        return "reached" if self.is_reached else "**not reached**"


@dataclass
class Section:
    """A task's part of the page, and what is to be reached in it."""

    lines: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def table(self, corner: str, columns: Mapping[str, Mapping[str, str]]) -> None:
        """A table with a row for each key of the first column; what a later column lacks stays empty."""
        first, *_ = columns.values()
        rows = [(key, *(column.get(key, "") for column in columns.values())) for key in first]
        self.lines += [*table((corner, *columns), rows), ""]

    def say(self, line: str, check: Check | None = None) -> None:
        """A point of the list, with what was to be reached."""
        self.lines.append(f"- {line}" + (f" (target: {check.target}; {check.verdict})" if check else ""))
        self.checks += [check] if check else []

    def state(self, check: Check) -> None:
        """A point of the list that is nothing but a check."""
        self.say(f"{check.what}: **{check.measured}**", check)


def per_run(rounds: pd.DataFrame, column: str) -> pd.Series:
    """Of each run, the median over its warm rounds; indexed by system and repetition."""
    return rounds.loc[rounds["warm"].astype(bool)].groupby(["system", "repetition"], sort=False)[column].median()


def medians(rounds: pd.DataFrame, column: str) -> dict[str, float]:
    """Of each system, the median over its runs, in the order of the systems."""
    return per_run(rounds, column).groupby("system", sort=False).median().to_dict()


def cells(values: Mapping[str, float] | pd.Series, form: str) -> dict[str, str]:
    """Text of each value; of a missing one none."""
    return {key: "" if pd.isna(value) else form.format(value) for key, value in values.items()}


def spreads(runs: pd.Series, form: str) -> dict[str, str]:
    """Smallest to largest of each system's runs."""
    of = runs.dropna().groupby("system", sort=False)
    least, most = cells(of.min(), form), cells(of.max(), form)
    return {system: f"{least[system]} to {most[system]}" for system in least}
