"""Actors that die, hang, or are killed for memory, at drawn (round, client) points."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from ray import cloudpickle

import fedsim
from faults.outcome import Outcome, compared, reference_of, stopwatch
from fedsim.actors import host
from fedsim.actors.host import Arrays, HostActor
from fedsim.client import ClientUpdate, FitTask

MEMORY_BYTES = 2_500_000_000
"""What the run may take beyond what the machine has in use, until Ray kills actors; `_eat` takes more."""
WAYS = ("killed before it trains", "killed while it trains", "killed before it answers", "exits", "hangs")


@dataclass(frozen=True)
class Point:
    """Where an actor comes to harm, once."""

    round: int
    client_id: int
    way: str
    """One of `WAYS`."""

    def __str__(self) -> str:
        return f"round {self.round}, client {self.client_id}: its actor {self.way}"


class HarmedActor(HostActor):
    """Comes to harm at the points of a round and client, the first time that it gets there."""

    points: dict[tuple[int, int], Point]
    markers: Path
    """A folder that remembers which points have been."""

    def fit(self, arrays: Arrays, pieces: Sequence[tuple[FitTask, int]]) -> list[ClientUpdate]:
        """As the actor that it is, if it gets that far."""
        due = [point for task, _ in pieces if (point := self.points.get((task.round, task.client_id)))]
        due = [point for point in due if not self._marker(point).exists()][:1]  # one harm at a time
        for point in due:
            self._marker(point).touch()
            if point.way == "exits":
                os._exit(1)
            elif point.way == "hangs":
                time.sleep(3600)
            elif point.way == "eats memory":
                _eat()
            elif point.way == "killed before it trains":
                _kill()
            elif point.way == "killed while it trains":
                threading.Timer(0.0005 * (point.client_id % 4), _kill).start()
        updates = super().fit(arrays, pieces)
        if due:
            _kill()
        return updates

    def _marker(self, point: Point) -> Path:
        return self.markers / f"{point.round}-{point.client_id}"


def _eat() -> None:
    """Until Ray's memory monitor kills this process; it would have to look away for long to let it take this much."""
    eaten = []
    for _ in range(100):
        eaten.append(np.ones(5_000_000))
        time.sleep(0.02)
    raise MemoryError("Ray's memory monitor did not kill the actor")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_with(config: fedsim.Config, points: Sequence[Point], folder: Path, **own: Any) -> tuple[fedsim.Run, int]:
    """A run whose actors come to harm at these points; and at how many of them one did."""
    with tempfile.TemporaryDirectory() as markers:
        HarmedActor.points = {(point.round, point.client_id): point for point in points}
        HarmedActor.markers = Path(markers)
        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import scripts
        original, host.HostActor = host.HostActor, HarmedActor  # type: ignore[misc]
        try:
            run = fedsim.run(config, results=folder, **own)
        finally:
            host.HostActor = original  # type: ignore[misc]
            cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        return run, len(list(Path(markers).iterdir()))


def drawn(config: fedsim.Config, share: float, seed: int, ways: Sequence[str]) -> list[Point]:
    """Points at which a share of all fits of a run comes to harm."""
    from fedsim.experiment import prepare

    rng, x = np.random.default_rng(seed), prepare(config)
    fits = [(round, client) for round in range(1, config.rounds + 1) for client in x.sample(round)]
    chosen = rng.choice(len(fits), max(1, round(share * len(fits))), replace=False)
    return [Point(fits[i][0], fits[i][1], str(rng.choice(list(ways)))) for i in sorted(chosen)]


def _outcomes(fault: str, config: fedsim.Config, points: Sequence[Point], folder: Path) -> list[Outcome]:
    with stopwatch() as watch:
        run, num_harmed = run_with(config, points, folder)
    outcome = compared(run, reference_of(config))
    if num_harmed != len(points):
        outcome = f"{num_harmed} of {len(points)} points were reached"
    return [Outcome(fault, str(point), outcome, watch.seconds) for point in points]


SMALL = fedsim.Config().override(
    {
        "data.dataset": "synthetic",
        "data.partition.name": "quantity",  # unequal shards
        "clients.count": 8,
        "clients.per_round": 4,
        "training.local_epochs": 1,
        "placement.mode": "packed",
        "placement.actors": 2,
        "strategy.name": "fedadam",
        "failures.max_retries": 5,
    }
)


def one_in_twenty(seed: int, folder: Path) -> list[Outcome]:
    """1,000 rounds in which 5 % of the fits lose their actor."""
    config = SMALL.override({"rounds": 1000})
    return _outcomes("actor lost, 1 fit in 20", config, drawn(config, 0.05, seed, WAYS[:-1]), folder)


def each_its_own(seed: int, folder: Path) -> list[Outcome]:
    """Each client in an actor of its own, plain ones."""
    changes = {"rounds": 20, "placement.mode": "actor-per-client", "placement.actors": "auto"}
    config = SMALL.override({**changes, "placement.start": "plain"})
    return _outcomes("actor lost, one a client", config, drawn(config, 0.1, seed, WAYS[:-1]), folder)


def hanging(seed: int, folder: Path) -> list[Outcome]:
    """Actors that hang, with failures.timeout_s = 1."""
    config = SMALL.override({"rounds": 20, "failures.timeout_s": 1.0})
    return _outcomes("actor hangs", config, drawn(config, 0.1, seed, ["hangs"]), folder)


def out_of_memory(seed: int, folder: Path) -> list[Outcome]:
    """Ray's memory monitor kills an actor that eats memory."""
    memory = psutil.virtual_memory()
    settings = {
        "RAY_memory_usage_threshold": f"{(memory.total - memory.available + MEMORY_BYTES) / memory.total:.4f}",
        "RAY_memory_monitor_refresh_ms": "50",
    }
    config = SMALL.override({"rounds": 10, "placement.start": "plain"})
    os.environ.update(settings)
    try:
        return _outcomes("actor killed for memory", config, drawn(config, 0.05, seed, ["eats memory"]), folder)
    finally:
        for name in settings:
            del os.environ[name]
