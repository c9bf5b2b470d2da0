"""Measures fedsim against other ways to do the same work, and writes what it saw to results/published/benchmarks/.

Each task of `TASKS` gives one workload to several systems. They take turns (fedsim, other, fedsim, other, ...), every
run in a fresh process with nothing else running, so that a slow minute of the machine hits all of them. Of a run the
median over its warm rounds counts, of a system the median over its runs. Run it on an idle machine:

    python scripts/benchmark.py
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import psutil

import fedsim
from fedsim import environment

SCRIPTS = Path(__file__).resolve().parent
PUBLISHED = SCRIPTS.parent / "results" / "published" / "benchmarks"

System = Callable[[int, int], pd.DataFrame]
"""Runs the workload once, (rounds, seed) -> one row a round: round, round_s, test_accuracy, processes, ... ."""


@dataclass(frozen=True)
class Task:
    """One workload, for several systems. `fedsim` is compared with each of the others."""

    title: str
    preset: str
    systems: dict[str, System]
    target: float
    """At most this: seconds of fedsim's round over seconds of the other's."""


def fedsim_run(preset: str) -> System:
    """Fedsim from its command line, as anyone starts it."""

    def measure(rounds: int, seed: int) -> pd.DataFrame:
        with tempfile.TemporaryDirectory() as results:
            changes = ["--set", f"rounds={rounds}", "--set", f"seed={seed}", "--address", "local"]
            _python("-m", "fedsim", "run", preset, *changes, "--results", results, "--name", "run", "--quiet")
            frame = pd.read_parquet(f"{results}/run/rounds.parquet")
            clients = pd.read_parquet(f"{results}/run/clients.parquet")
        frame = frame.loc[frame["round"] > 0]  # round 0 only evaluates
        columns = ["round", "round_s", "fit_s", "aggregate_s", "evaluate_s", "test_accuracy"]
        return frame[columns].assign(processes=clients["pid"].nunique())

    return measure


def plain_loop(*arguments: str) -> System:
    """The loop of baselines/plain_loop.py, on one thread."""

    def measure(rounds: int, seed: int) -> pd.DataFrame:
        script = str(SCRIPTS / "baselines" / "plain_loop.py")
        lines = _python(script, *arguments, "--threads=1", f"--rounds={rounds}", f"--seed={seed}", "--json")
        return pd.DataFrame([json.loads(line) for line in lines.splitlines()]).assign(processes=1)

    return measure


def measure(task: Task, repetitions: int, rounds: int, warm_up: int) -> pd.DataFrame:
    """Lets the systems take turns; one row a round, and in `attrs` what else is to be known."""
    load_average = os.getloadavg()[0]
    frames = []
    for repetition in range(1, repetitions + 1):
        for name, system in task.systems.items():
            frame = system(rounds, repetition)
            frame.insert(0, "system", name)
            frame.insert(1, "repetition", repetition)
            frame.insert(3, "warm", frame["round"] > warm_up)
            frames.append(frame)
            median = frame.loc[frame["warm"], "round_s"].median()
            print(f"{task.preset} {repetition}/{repetitions} {name}: {median:.3f} s a round", flush=True)
    frame = pd.concat(frames, ignore_index=True)
    machine = environment.machine()
    frame.attrs = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "git_commit": environment.git_commit(),
        "versions": environment.versions(),
        "machine": {key: machine[key] for key in ("processor", "num_cpus", "memory_bytes")},
        "load_average": load_average,
        "actor_pss_bytes": json.loads(_python(__file__, "--measure-memory", task.preset)),
    }
    return frame


def actor_pss(preset: str) -> list[int]:
    """Memory of each actor after the last round: its proportional set size, shared pages divided by their users."""
    pss: list[int] = []
    for record in fedsim.rounds(fedsim.preset(preset).override({"placement.address": "local"})):
        pids = {client.pid for client in record.clients}
        pss = [psutil.Process(pid).memory_full_info().pss for pid in pids] if psutil.LINUX else []
    return pss


def section(task: Task, frame: pd.DataFrame) -> str:
    """What was measured, as Markdown; made from the Parquet file alone."""
    facts, warm = frame.attrs, frame.loc[frame["warm"]]
    runs = warm.groupby(["system", "repetition"])["round_s"].median()
    last = frame.groupby(["system", "repetition"])["test_accuracy"].last()
    lines = [
        f"## {task.title}",
        "",
        "| system | round, median (s) | min to max of the runs (s) | each run (s) | test accuracy after round "
        f"{frame['round'].max()} | training processes |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for name in task.systems:
        each = ", ".join(f"{seconds:.3f}" for seconds in runs[name])
        processes = "/".join(map(str, sorted(frame.loc[frame["system"] == name, "processes"].unique())))
        lines.append(
            f"| {name} | {runs[name].median():.3f} | {runs[name].min():.3f} to {runs[name].max():.3f} | {each} "
            f"| {last[name].median():.4f} ({last[name].min():.4f} to {last[name].max():.4f}) | {processes} |"
        )
    lines.append("")
    for name in list(task.systems)[1:]:
        ratio = runs["fedsim"].median() / runs[name].median()
        lines.append(f"- fedsim / {name}: **{ratio:.2f}** of the time (target: at most {task.target})")
    if facts["actor_pss_bytes"]:
        megabytes = [size / 1e6 for size in facts["actor_pss_bytes"]]
        lines.append(f"- memory of an actor (PSS): {min(megabytes):.0f} to {max(megabytes):.0f} MB")
    machine, versions = facts["machine"], ", ".join(f"{name} {v}" for name, v in facts["versions"].items())
    lines += [
        f"- method: medians of {frame['repetition'].max()} alternated runs, of each the median of its "
        f"{warm['round'].nunique()} warm rounds; evaluation included; run r of every system has seed r",
        f"- {machine['processor']}, {machine['num_cpus']} logical CPUs, {machine['memory_bytes'] / 1e9:.0f} GB; "
        f"load average before it began: {facts['load_average']:.1f}",
        f"- {versions}",
        f"- {facts['date']}, commit {facts['git_commit']}, `{facts['command']}`",
    ]
    return "\n".join(lines) + "\n"


def write(name: str, frame: pd.DataFrame, output: Path) -> str:
    """Writes a task's rounds, and README.md anew from all tasks that the folder has; returns this task's section."""
    output.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(output / f"{name}.parquet", index=False)
    found = {name: output / f"{name}.parquet" for name in TASKS if (output / f"{name}.parquet").exists()}
    sections = {name: section(TASKS[name], pd.read_parquet(path)) for name, path in found.items()}
    head = "# Benchmarks\n\nMade by `scripts/benchmark.py` from the Parquet files beside this page: one row a round.\n"
    (output / "README.md").write_text("\n".join([head, *sections.values()]))
    return sections[name]


def _python(*arguments: str) -> str:
    """What a fresh Python prints; a Ray that the shell knows of is none of its business."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables).stdout


TASKS: dict[str, Task] = {
    "mnist_round": Task(
        "A warm round of preset `mnist`: 10 clients, each its own Ray actor, against a plain loop on one thread",
        preset="mnist",
        systems={"fedsim": fedsim_run("mnist"), "plain loop": plain_loop()},
        target=0.75,
    ),
}


def main() -> None:
    """Reads the arguments and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; all, if none is named")
    parser.add_argument("--repetitions", type=int, default=5, help="runs of each system (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of a run (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=1, help="first rounds left out (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=PUBLISHED, metavar="DIR")
    parser.add_argument("--measure-memory", metavar="PRESET", help="only prints the memory of each actor, in bytes")
    args = parser.parse_args()
    if args.measure_memory:
        print(json.dumps(actor_pss(args.measure_memory)))
        return
    if unknown := set(args.tasks) - set(TASKS):
        parser.error(f"no task {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    if not 0 <= args.warm_up < args.rounds:
        parser.error("--rounds must be more than --warm-up: no warm round would be left")
    for name in args.tasks or TASKS:
        print(write(name, measure(TASKS[name], args.repetitions, args.rounds, args.warm_up), args.output))


if __name__ == "__main__":
    main()
