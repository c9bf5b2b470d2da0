"""What a run made of a fault."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

import fedsim
from fedsim.metrics import CLIENT_COLUMNS, ROUND_COLUMNS, Column
from fedsim.results import Run

EQUAL = "equal bits"


@dataclass(frozen=True)
class Outcome:
    """One injected fault, and how it ended.

    Attributes:
        fault: which kind.
        point: where it was injected, for a person.
        outcome: `EQUAL`; "refused: " and fedsim's own message; else what went wrong.
        run_s: seconds of the whole run that it was a part of, resumes included.
    """

    fault: str
    point: str
    outcome: str
    run_s: float

    @property
    def is_survived(self) -> bool:
        """Whether the promise was kept: the same results, or a refusal that says why."""
        return self.outcome == EQUAL or self.outcome.startswith("refused: ")


def compared(run: Run, reference: Run) -> str:
    """`EQUAL` if the result columns of two runs are, to the bit; else where they part."""
    frames: tuple[tuple[pd.DataFrame, pd.DataFrame, tuple[Column, ...]], ...] = (
        (run.rounds, reference.rounds, ROUND_COLUMNS),
        (run.clients, reference.clients, CLIENT_COLUMNS),
    )
    for frame, expected, columns in frames:
        names = [column.name for column in columns if not column.is_observation and column.name != "run"]
        if len(frame) != len(expected):
            return f"{len(frame)} rows instead of {len(expected)}"
        for name in names:
            same = (frame[name] == expected[name]) | (frame[name].isna() & expected[name].isna())
            if not same.all():
                row = frame[~same].iloc[0]
                return f"round {row['round']}: {name} is {row[name]} instead of {expected[~same].iloc[0][name]}"
    weights, others = run.weights(), reference.weights()
    if weights.keys() != others.keys() or any(not weights[name].equal(others[name]) for name in weights):
        return "the final weights differ"
    return EQUAL


def reference_of(config: fedsim.Config) -> Run:
    """The undisturbed run: in this process, without Ray and without a folder."""
    serial = {"placement.mode": "serial", "placement.actors": "auto", "placement.num_cpus": "auto"}
    return fedsim.run(config.override(serial), results=None)


class Stopwatch:
    """Seconds since it was made, or until it was stopped."""

    seconds: float


@contextlib.contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Times what is done inside."""
    watch, start = Stopwatch(), time.perf_counter()
    try:
        yield watch
    finally:
        watch.seconds = time.perf_counter() - start
