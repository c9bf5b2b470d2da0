"""Which run of a cell comes next: a pure function of the plan and of what has been run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mcmahan2017.plan import Cell, Plan, rate_at, step_of


@dataclass(frozen=True)
class Task:
    """A run that is to be made."""

    cell: Cell
    phase: Literal["search", "verdict"]
    rate: float
    seed: int
    rounds: int
    """At most."""

    @property
    def key(self) -> tuple[str, float, int]:
        """What tells runs apart."""
        return self.cell.name, self.rate, self.seed


@dataclass(frozen=True)
class Done:
    """What came of a run."""

    rate: float
    seed: int
    rounds_to_target: float
    """NaN if the target was not reached in the rounds it had."""
    best_accuracy: float

    @property
    def merit(self) -> tuple[bool, float]:
        """Greater is better: a run that gets there in fewer rounds, or else comes nearer."""
        is_there = not math.isnan(self.rounds_to_target)
        return is_there, -self.rounds_to_target if is_there else self.best_accuracy


def next_tasks(plan: Plan, cell: Cell, done: Sequence[Done]) -> list[Task]:
    """The runs of a cell that can be made now, side by side; none when the cell is complete.

    Args:
        plan: the plan.
        cell: the cell.
        done: all its runs so far.
    """
    best, step = _search(plan, cell, done)
    if step is not None:
        rounds = plan.max_rounds(cell)
        if best and not math.isnan(best.rounds_to_target):  # a run that needs more is beaten
            rounds = min(rounds, math.ceil(best.rounds_to_target))
        return [Task(cell, "search", rate_at(step), plan.search_seed, rounds)]
    assert best is not None
    seeds = {run.seed for run in done if run.rate == best.rate}
    return [
        Task(cell, "verdict", best.rate, seed, plan.max_rounds(cell))
        for seed in plan.verdict_seeds
        if seed not in seeds
    ]


def chosen_rate(plan: Plan, cell: Cell, done: Sequence[Done]) -> float | None:
    """The rate of the verdict; None while the search goes on."""
    best, step = _search(plan, cell, done)
    return best.rate if best and step is None else None


def _search(plan: Plan, cell: Cell, done: Sequence[Done]) -> tuple[Done | None, int | None]:
    """The best run of the search so far, and the next rate to try as a step of the grid: None when it is over."""
    searched = [run for run in done if run.seed == plan.search_seed]
    best = max(searched, key=lambda run: run.merit, default=None)
    tried, middle = {step_of(run.rate) for run in searched}, step_of(cell.rate)
    first = [step for step in (middle, middle + 1, middle - 1) if step not in tried]
    if best is None or first:
        return best, first[0]
    at = step_of(best.rate)
    beside = [step for step in (at + 1, at - 1) if step not in tried]
    return best, beside[0] if beside and len(tried) < plan.max_rates else None
