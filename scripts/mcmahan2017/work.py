"""One run of the reproduction, in a process of its own."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

import pandas as pd

import fedsim
from fedsim.errors import DivergedError, InputError, NewerVersionError
from fedsim.targets import Target
from mcmahan2017.dead import DEAD, is_dead
from mcmahan2017.search import Task


@dataclass(frozen=True)
class Finished:
    """A run that has come to its end."""

    row: dict[str, Any]
    """Of runs.parquet."""
    curve: pd.DataFrame
    """Of curves.parquet: the run's test accuracy by round."""


def end_with_parent() -> None:
    """Ends this process once its parent is gone, even killed with -9: nobody is left to take what it computes.

    Its run goes on from the last checkpoint in a later call.
    """
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work(task: Task, runs: Path, until: float, *, on_gpu: bool = False) -> Finished | None:
    """Makes a run, or goes on with it.

    Args:
        task: the run.
        runs: the folder of all runs; an interrupted one goes on in a later call.
        until: `time.time()` at which it is interrupted.
        on_gpu: it computes there, if it is made from the start.

    Returns:
        What came of it; None if it was interrupted.
    """
    left_s = until - time.time()
    if left_s <= 0:
        return None
    folder = runs / task.cell.name / f"lr{task.rate:g}-seed{task.seed}"
    signal.signal(signal.SIGALRM, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, left_s)
    try:
        run, status = _run(task, folder, on_gpu)
    except KeyboardInterrupt:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return _finished(task, run, status)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(task: Task, folder: Path, on_gpu: bool) -> tuple[fedsim.Run, str]:
    """The run at its end, and its status."""
    config = task.cell.config(task.rate, task.seed, task.rounds).override({"placement.num_gpus": int(on_gpu)})
    stop_at = {"test_accuracy": task.cell.target}
    try:
        try:
            if is_dead(run := fedsim.load_run(folder)):
                return run, DEAD
            run = fedsim.resume(folder)
        except NewerVersionError:
            raise
        except InputError:  # it is not there, or was made by another version or machine: then from the start
            run = fedsim.run(config, results=folder.parent, name=folder.name, overwrite=True, stop_at=stop_at)
    except DivergedError:  # its rate is too high: an answer like another
        run = fedsim.load_run(folder)
    return run, run.status


def _finished(task: Task, run: fedsim.Run, status: str) -> Finished:
    rounds = run.rounds
    accuracy = rounds["test_accuracy"]
    crossing = Target("test_accuracy", task.cell.target).crossing(rounds["round"].tolist(), accuracy.tolist())
    key = {"cell": task.cell.name, "lr": task.rate, "seed": task.seed}
    row = {
        **key,
        "phase": task.phase,
        "max_rounds": task.rounds,
        "rounds": int(rounds["round"].max()),
        "rounds_to_target": crossing if crossing is not None else float("nan"),
        "best_accuracy": accuracy.max(),
        "status": status,
        "seconds": rounds["round_s"].sum(),
        "weights_sha256": rounds["weights_sha256"].iloc[-1],
        **signature(run.info),
    }
    return Finished(row, rounds[["round", "test_accuracy"]].astype({"test_accuracy": "float32"}).assign(**key))


def signature(info: dict[str, Any]) -> dict[str, str]:
    """When, by which code and on what a run was made; `info` is what its run.json says."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "git_commit": info["git_commit"],
        "machine": _by_round(info, _machine),
        "versions": _by_round(info, _versions),
        "numerics_fingerprint": _by_round(info, lambda part: str(part["numerics_fingerprint"])),
    }


def _by_round(info: dict[str, Any], text: Callable[[dict[str, Any]], str]) -> str:
    """What is said of each part of a run, by its first round: of several, where `fedsim resume --anyway` went on."""
    said, last = text(info), text(info)
    for part in info.get("resumes", []):
        if text(part) != last:
            last = text(part)
            said += f"; from round {part['from_round']} on {last}"
    return said


def _machine(part: dict[str, Any]) -> str:
    gpu = "" if part["device"] == "cpu" else f", {part['device']}"
    return f"{part['machine']['num_cpus']} cores, {part['machine']['processor']}{gpu}"


def _versions(part: dict[str, Any]) -> str:
    return ", ".join(f"{package} {part['versions'][package]}" for package in ("python", "torch", "fedsim"))
