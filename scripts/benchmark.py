"""Measures fedsim against other ways to do the same work, and writes what it saw to results/published/benchmarks/.

The systems of a task take turns (fedsim, other, another, fedsim, ...), every run in a fresh process with nothing else
running, so that a slow minute of the machine hits all of them. Of a run the median over its warm rounds counts, of a
system the median over its runs. Memory is looked at in a run of its own, which no time is taken of; where that of each
process counts, at the end of each run. Run it on an idle machine; all tasks take about an hour on two cores:

    python -m venv ~/.cache/fedsim/flower              # Flower, in an environment of its own
    ~/.cache/fedsim/flower/bin/pip install "flwr[simulation]==1.42.0" torch
    python scripts/benchmark.py
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import platformdirs

from benchmarks import plot, report
from benchmarks.processes import OURS
from benchmarks.systems import Measured, System
from benchmarks.tasks import BOUND, Task, make_tasks
from fedsim import environment

PUBLISHED = Path(__file__).resolve().parents[1] / "results" / "published" / "benchmarks"
FLOWER_PYTHON = platformdirs.user_cache_path("fedsim") / "flower" / "bin" / "python"
SAMPLE_S = 0.25
SHOWN = {"start": "start_s", "actors": "up_s"}
"""Seconds of which column are printed while a task of this kind is measured; of others those of a round."""


def measure(task: Task, repetitions: int | None = None, rounds: int | None = None) -> Measured:
    """Lets the systems take turns; one row a round, one row a look at the memory, and `facts` for the report.

    Args:
        task: what to measure.
        repetitions: runs of each system; None for the task's own number.
        rounds: of each run; None for the task's own number.
    """
    repetitions, rounds = repetitions or task.repetitions, rounds or task.rounds
    timed, sampled, facts = [], [], environment_facts()
    if task.kind == "memory":  # one long run, and only its memory counts
        repetitions = 0
    for repetition in range(1, repetitions + 1):
        for name, system in task.systems.items():
            measured = _run(name, system, rounds, repetition, None)
            frame = measured.rounds
            frame.insert(0, "system", name)
            frame.insert(1, "repetition", repetition)
            frame.insert(3, "warm", frame["round"] > task.warm_up)
            timed.append(frame)
            facts |= {f"{key} of {name}": value for key, value in measured.facts.items()}
            if task.kind in ("actors", "hundreds"):
                sampled.append(measured.memory.assign(system=name, repetition=repetition))
            seconds = frame.loc[frame["warm"], SHOWN.get(task.kind, "round_s")].median()
            print(f"  {repetition}/{repetitions} {name}: {seconds:.4f} s", flush=True)
    for name, system in task.systems.items():
        if task.kind in ("speed", "scale", "memory") and name != BOUND:
            memory = _run(name, system, rounds, 1, SAMPLE_S).memory
            memory.insert(0, "system", name)
            sampled.append(memory)
            print(f"  memory of {name}: {memory[list(OURS)].sum(axis=1).max() / 1e6:.0f} MB", flush=True)
    empty = pd.DataFrame(columns=["system"])
    return Measured(
        pd.concat(timed, ignore_index=True) if timed else empty,
        pd.concat(sampled, ignore_index=True) if sampled else empty,
        {**facts, "warm_up": task.warm_up, "rounds": rounds},
    )


def _run(name: str, system: System, rounds: int, seed: int, sample_s: float | None) -> Measured:
    try:
        return system(rounds, seed, sample_s)
    except Exception as error:
        error.add_note(f"while measuring {name}")
        raise


git_commit = functools.cache(environment.git_commit)
"""As it was before the first task's files changed the tree."""


def environment_facts() -> dict[str, Any]:
    """When, where and with what this is measured."""
    machine = environment.machine()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "scripts/benchmark.py", *map(_public, sys.argv[1:])]),
        "git_commit": git_commit(),
        "versions": environment.versions(),
        "machine": {key: machine[key] for key in ("processor", "num_cpus", "memory_bytes")},
        "load_average": os.getloadavg()[0],
    }


def _public(argument: str) -> str:
    """An argument without this machine's paths, which are nobody else's."""
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}PATH" if Path(value).is_absolute() else argument


def publish(folder: Path, tasks: Mapping[str, Task]) -> None:
    """Makes the figure and the page anew from the Parquet files that the folder has."""
    plot.write(folder, tasks)
    report.write(folder, tasks)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the arguments, measures, and writes after each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(make_tasks(None))
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(names)}; all, if none is named")
    parser.add_argument(
        "--repetitions", type=int, help="runs of each system (default: the task's own number, 5 mostly)"
    )
    parser.add_argument("--rounds", type=int, help="rounds of a run, for a trial (default: the task's own number)")
    parser.add_argument("--output", type=Path, default=PUBLISHED, metavar="DIR")
    parser.add_argument("--flower-python", type=Path, default=FLOWER_PYTHON, metavar="PATH")
    parser.add_argument("--without-flower", action="store_true")
    parser.add_argument("--report", action="store_true", help="only makes the page and the figure anew")
    args = parser.parse_args(arguments)

    if unknown := set(args.tasks) - set(names):
        parser.error(f"no task {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    tasks = make_tasks(None if args.without_flower else args.flower_python)
    chosen = [] if args.report else args.tasks or names
    for name in chosen:
        if args.rounds is not None and args.rounds <= tasks[name].warm_up:
            parser.error(f"--rounds must be more than {tasks[name].warm_up}: no warm round of {name} would be left")
        if "Flower" in tasks[name].systems and not args.flower_python.exists():
            parser.error(
                f"no Flower at {args.flower_python}: make its environment as --help says, name its Python with "
                "--flower-python, or leave it out --without-flower"
            )
    for name in chosen:
        print(f"{name}: {tasks[name].title}", flush=True)
        report.save(args.output, name, measure(tasks[name], args.repetitions, args.rounds))
        publish(args.output, tasks)
    publish(args.output, tasks)
    print(args.output / "README.md")


if __name__ == "__main__":
    main()
