"""What safety costs, and what a loss costs: seconds, measured in turns."""

from __future__ import annotations

import os
import statistics
import threading
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

import fedsim
from benchmarks import tasks
from faults.ray_nodes import ray_cluster
from fedsim.recording import Recording
from fedsim.results import RunWriter

T2 = fedsim.Config().override(tasks.T2.changes)
T3 = fedsim.Config().override(tasks.T3.changes)
ROUNDS, WARM_UP = 250, 3
"""Of a run of T2; those at its start that are not counted."""


def durable(folder: Path) -> pd.DataFrame:
    """T2 with all files as by default, over the same without a folder: seconds of the loop (at most 1.03)."""
    ways: dict[str, Callable[[int], float]] = {
        "with files": lambda turn: _loop_s(T2.override({"rounds": ROUNDS}), folder / str(turn)),
        "without": lambda turn: _loop_s(T2.override({"rounds": ROUNDS}), None),
    }
    return _in_turns(ways, turns=5)


def written(folder: Path) -> pd.DataFrame:
    """T2's loop with all files, over what is left of it without the seconds spent in its writer (at most 1.03)."""
    rows = []
    for turn in range(3):
        written_s: list[float] = []
        with unittest.mock.patch.object(RunWriter, "write", _timed(RunWriter.write, written_s)):
            loop_s = _loop_s(T2.override({"rounds": ROUNDS}), folder / str(turn))
        writer_s = sum(written_s[WARM_UP + 1 :])
        rows.append({"loop_s": loop_s, "writer_s": writer_s, "ratio": loop_s / (loop_s - writer_s)})
    return pd.DataFrame(rows)


def _timed(function: Callable[..., None], seconds: list[float]) -> Callable[..., None]:
    def timed(*arguments: Any, **named: Any) -> None:
        start = time.perf_counter()
        function(*arguments, **named)
        seconds.append(time.perf_counter() - start)

    return timed


def two_nodes(folder: Path) -> pd.DataFrame:
    """T3 on a cluster of two nodes with a core each, over one node with two: seconds of a round (at most 1.3)."""

    def median_s(*cpus: float) -> float:
        with ray_cluster(*cpus) as cluster:
            config = T3.override({"rounds": 15, "placement.address": cluster.address, "placement.actors": 2})
            rounds = fedsim.run(config, results=None).rounds
        return float(rounds["round_s"].iloc[WARM_UP + 1 :].median())

    return _in_turns({"two nodes": lambda turn: median_s(1, 1), "one node": lambda turn: median_s(2)}, 3)


def lost_actor(folder: Path) -> pd.DataFrame:
    """One of two actors killed in mid-round: its seconds, over two rounds and an actor's start (at most 1)."""
    config = T3.override({"training.local_epochs": 20, "rounds": 10, "placement.actors": 2, "evaluation.every": 100})
    normal_s: list[float] = []
    with Recording.of(config, results=None) as recording:
        for record in recording:
            if record.round > WARM_UP:
                normal_s.append(record.round_s)
            if record.round == 8:
                victim = psutil.Process(int(record.clients[0].pid or 0))
                threading.Timer(statistics.median(normal_s) / 2, victim.kill).start()
            if record.round == 9:
                disturbed_s = normal_s.pop()
                assert record.num_retries > 0, "the actor was killed between the rounds"
    start_s = _start_s(config)
    allowed_s = 2 * statistics.median(normal_s) + start_s
    row = {"disturbed_s": disturbed_s, "normal_s": statistics.median(normal_s)}
    return pd.DataFrame([row | {"start_s": start_s, "allowed_s": allowed_s, "ratio": disturbed_s / allowed_s}])


def _start_s(config: fedsim.Config) -> float:
    """Seconds until a lone actor is up, on a Ray that runs already."""
    from fedsim.experiment import prepare
    from fedsim.launch import connect, open_pool

    x = prepare(config.override({"placement.actors": 1}))
    with connect(x) as plan:
        start = time.perf_counter()
        with open_pool(x, plan):
            return time.perf_counter() - start


def _loop_s(config: fedsim.Config, folder: Path | None) -> float:
    start = 0.0
    with Recording.of(config, results=folder, name="run") as recording:
        for record in recording:
            if record.round == WARM_UP:
                start = time.perf_counter()
    return time.perf_counter() - start


def _in_turns(ways: dict[str, Callable[[int], float]], turns: int) -> pd.DataFrame:
    rows = []
    for turn in range(turns):
        order = list(ways.items())[:: 1 if turn % 2 == 0 else -1]
        seconds = {way: measure(turn) for way, measure in order}
        first, second = (seconds[way] for way in ways)
        print(f"  {turn + 1}/{turns} {seconds} ratio {first / second:.3f}", flush=True)
        rows.append({**seconds, "ratio": first / second, "load_average": os.getloadavg()[0]})
    return pd.DataFrame(rows)
