"""Drivers that are killed or told to stop at drawn moments, and runs that are resumed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

import fedsim
from faults.outcome import EQUAL, Outcome, compared, reference_of, stopwatch

SMALL = fedsim.Config().override(
    {
        "data.dataset": "synthetic",
        "data.partition.name": "quantity",
        "rounds": 2000,
        "clients.count": 8,
        "clients.per_round": 4,
        "strategy.name": "fedadam",
        "placement.mode": "packed",
        "placement.actors": 2,
        "checkpoint.every_s": 0.2,
    }
)
SERIAL = {"placement.mode": "serial", "placement.actors": "auto"}
LEFT_S = 130.0
"""Ray's own agents may outlive a killed driver by up to two minutes."""


def _command(*arguments: str, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fedsim", *arguments, "--results", str(folder), "--quiet"]
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)


def _start(config: fedsim.Config, folder: Path) -> subprocess.Popen[bytes]:
    """Begins the run, or goes on with it."""
    if (folder / "run" / "run.json").exists():
        return _command("resume", "run", folder=folder)
    (folder / "config.toml").write_text(config.to_toml())
    return _command("run", str(folder / "config.toml"), "--name", "run", folder=folder)


def kill(driver: subprocess.Popen[bytes]) -> str:
    """Kills the driver with SIGKILL."""
    driver.kill()
    return "kill -9"


def kill_raylet(driver: subprocess.Popen[bytes]) -> str:
    """Kills the driver's raylet, with which the driver ends; the driver, if it has none yet."""
    raylets = [child for child in _children(driver) if child.name() == "raylet"]
    for raylet in raylets:
        raylet.kill()
    if not raylets:
        return kill(driver)
    try:
        driver.wait(120)
    except subprocess.TimeoutExpired:
        driver.kill()
    return "kill -9 of its raylet"


def stop(number: signal.Signals) -> Callable[[subprocess.Popen[bytes]], str]:
    """A polite signal, after which the driver ends by itself."""

    def stopped(driver: subprocess.Popen[bytes]) -> str:
        driver.send_signal(number)
        driver.wait(60)
        return number.name

    return stopped


def _disturbed(
    fault: str,
    config: fedsim.Config,
    moments: Sequence[float],
    harm: Callable[[subprocess.Popen[bytes]], str],
    folder: Path,
    watched: set[psutil.Process],
) -> list[Outcome]:
    """A run that comes to harm at each of these moments, seconds after its start or its last resume."""
    points: list[str] = []
    with stopwatch() as watch:
        for moment in moments:
            driver = _start(config, folder)
            time.sleep(moment)
            watched.update(_children(driver))
            done = harm(driver) if driver.poll() is None else f"ended with {driver.returncode} before"
            driver.wait()
            points.append(f"{done} after {moment:.2f} s, with {_num_rounds(folder)} rounds on disk")
        last = _start(config, folder)
        code = last.wait()
    run = fedsim.load_run(folder / "run")
    outcome = compared(run, reference_of(config)) if code == 0 else f"resume ended with {code}"
    if outcome == EQUAL and run.status != "finished":
        outcome = f"the run is {run.status}"
    return [Outcome(fault, point, outcome, watch.seconds) for point in points]


def _num_rounds(folder: Path) -> int:
    parts = sorted((folder / "run" / "rounds.parquet").glob("part-0*.parquet"))
    return int(parts[-1].stem.split("-")[2]) if parts else 0


def _children(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _left(watched: set[psutil.Process]) -> list[str]:
    """Processes of the runs that are still there after the time that Ray's own agents may take."""
    _, alive = psutil.wait_procs(list(watched), timeout=LEFT_S)
    return [process.name() for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def killed(seed: int, folder: Path) -> list[Outcome]:
    """The driver is killed at 20 drawn moments, five in each of four runs, and resumed each time."""
    return _chains("driver killed", seed, folder, 4, 5, kill)


def raylet_killed(seed: int, folder: Path) -> list[Outcome]:
    """Ray's own node process is killed: the driver ends with it."""
    return _chains("raylet killed", seed + 1, folder, 1, 3, kill_raylet)


def signalled(seed: int, folder: Path) -> list[Outcome]:
    """SIGTERM and Ctrl-C."""
    outcomes = []
    for i, number in enumerate((signal.SIGTERM, signal.SIGINT)):
        outcomes += _chains(f"{number.name} to the driver", seed + 2 + i, folder / number.name, 1, 4, stop(number))
    return outcomes


def _chains(
    fault: str,
    seed: int,
    folder: Path,
    num_runs: int,
    num_harms: int,
    harm: Callable[[subprocess.Popen[bytes]], str],
) -> list[Outcome]:
    """Runs of which each comes to harm several times; the moments reach from the command to past the first rounds."""
    rng, outcomes, watched = np.random.default_rng(seed), [], set[psutil.Process]()
    for number in range(num_runs):
        own = folder / str(number)
        own.mkdir(parents=True)
        moments = [float(moment) for moment in rng.uniform(0.5, 6.0, num_harms)]
        outcomes += _disturbed(fault, SMALL, moments, harm, own, watched)
    if left := _left(watched):
        outcomes = [replace(outcome, outcome=f"left behind: {left}") for outcome in outcomes]
    return outcomes
