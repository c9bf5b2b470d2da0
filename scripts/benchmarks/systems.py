"""The systems: each does a workload once, in a fresh process, and says what it saw."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from pyarrow import parquet

import fedsim.datasets
from benchmarks import processes, products
from fedsim.presets import preset

SCRIPTS = Path(__file__).resolve().parents[1]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
AVAILABLE_S = 0.1
"""Between two looks at the memory that the whole machine has left."""
TRAIN_EXAMPLES, TEST_EXAMPLES = 60_000, 10_000


@dataclass(frozen=True)
class Workload:
    """Federated averaging on MNIST with SGD at 0.1, evaluated on the whole test set after each round."""

    model: str
    clients: int
    per_round: int
    batch_size: int
    epochs: int
    examples_per_client: int | None = None
    """None deals the training set out evenly; else each client draws as many, with replacement."""
    mode: str = "packed"
    """Placement of fedsim."""

    @property
    def fitted(self) -> int:
        """Examples processed in a round's training."""
        return self.per_round * self.epochs * (self.examples_per_client or TRAIN_EXAMPLES // self.clients)

    @property
    def changes(self) -> dict[str, Any]:
        """The keys of fedsim's configuration that make it."""
        changes: dict[str, Any] = {
            "model.name": self.model,
            "clients.count": self.clients,
            "clients.per_round": self.per_round,
            "training.local_epochs": self.epochs,
            "training.batch_size": self.batch_size,
            "training.lr": 0.1,
            "placement.mode": self.mode,
            "evaluation.every": 1,
        }
        if self.examples_per_client:
            changes["data.partition.name"] = "sampled"
            changes["data.partition.examples_per_client"] = self.examples_per_client
        return changes


@dataclass(frozen=True)
class Measured:
    """What one run of a system gave."""

    rounds: pd.DataFrame
    """A row a round; see `ROUND_COLUMNS`."""
    memory: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row a sample, where it was asked for: `at`, and bytes of each of `processes.ROLES`; `placed` gives a row a
    process: `role` and `bytes`."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else is to be known: versions, single products."""


System = Callable[[int, int, float | None], Measured]
"""(rounds, seed, seconds between two looks at the memory, or None) -> what was seen."""

ROUND_COLUMNS = {
    "round": "from 1",
    "round_s": "training, aggregation, evaluation",
    "fit_s": "training, with what it takes to hand the work out and to gather it",
    "busiest_s": "of fit_s, the training alone of the actor that trained longest",
    "aggregate_s": "the server's step",
    "evaluate_s": "the test set",
    "between_s": "from the end of the round to the start of the next: writing the records",
    "test_accuracy": "after the round",
    "examples": "processed in training",
    "processes": "that trained",
    "start_s": "of the run: from the start of the process to the start of round 0",
    "process_s": "of the run: from the start of the process to its end",
    "file_bytes": "of the run: the files of its rows, over its rounds; there are more of them the longer it takes",
    "value_bytes": "of the run: the values in these files, over its rounds",
    "checkpoint_bytes": "of the run: its last checkpoint",
    "weights_sha256": "after the round",
    "up_s": "of the run: from when the driver begins to start its actors until all have loaded data and model",
    "used_bytes": "of the run: the most memory that the whole machine used more than before",
}


def fedsim_run(workload: Workload) -> System:
    """Fedsim from its command line, as anyone starts it."""

    def measure(rounds: int, seed: int, sample_s: float | None) -> Measured:
        with tempfile.TemporaryDirectory() as results:
            options = _run_options({**workload.changes, "rounds": rounds, "seed": seed}, results)
            done = processes.run(_python("-m", "fedsim", "run", "mnist", *options), sample_s=sample_s)
            return read_run(Path(results, "run"), done, workload.epochs)

    return measure


def placed(experiment: str, **placement: str | int) -> System:
    """A preset of fedsim with another placement; and when its actors are up, and what memory each process has."""
    epochs = preset(experiment).training.local_epochs

    def measure(rounds: int, seed: int, sample_s: float | None) -> Measured:
        changes = {f"placement.{key}": value for key, value in placement.items()} | {"rounds": rounds, "seed": seed}
        with tempfile.TemporaryDirectory() as folder:
            seen = Path(folder, "seen.json")
            script, options = str(SCRIPTS / "benchmarks" / "watched.py"), _run_options(changes, folder)
            free = psutil.virtual_memory().available
            command = _python(script, str(seen), "run", experiment, *options)
            done = processes.run(command, sample_s=AVAILABLE_S, look=processes.available)
            measured = read_run(Path(folder, "run"), replace(done, memory=[]), epochs)
            watched = json.loads(seen.read_text())
        least = min(sample["available"] for sample in done.memory)
        frame = measured.rounds.assign(up_s=watched["up_s"], used_bytes=free - least)
        return Measured(frame, pd.DataFrame(watched["processes"], columns=["role", "bytes"]))

    return measure


def read_run(folder: Path, done: processes.Finished, epochs: int) -> Measured:
    """What the folder of a finished run of fedsim says."""
    frame = pd.read_parquet(folder / "rounds.parquet").sort_values("round", ignore_index=True)
    clients = pd.read_parquet(folder / "clients.parquet")
    starts = frame["started_at"].map(pd.Timestamp.timestamp)
    # A client that shares a computation has the seconds of the whole stack.
    clients["own_s"] = clients["fit_s"] / clients["stack_size"].fillna(1)
    busiest = clients.groupby(["round", "actor"])["own_s"].sum().groupby("round").max()
    tables = [folder / f"{kind}.parquet" for kind in ("rounds", "clients")]
    checkpoint = list((folder / "checkpoint").glob(f"{frame['round'].max():06d}.*"))
    rounds = frame.assign(
        busiest_s=frame["round"].map(busiest),
        between_s=starts.shift(-1) - starts - frame["round_s"],
        examples=frame["num_examples"] * epochs,
        processes=clients["pid"].nunique(),
        start_s=starts[0] - done.started,
        process_s=done.seconds,
        file_bytes=sum(part.stat().st_size for table in tables for part in table.iterdir()) / len(frame),
        value_bytes=sum(parquet.read_table(table).nbytes for table in tables) / len(frame),
        checkpoint_bytes=sum(path.stat().st_size for path in checkpoint),
    )
    memory = pd.DataFrame(done.memory, columns=["at", *processes.ROLES])
    memory["round"] = np.searchsorted(starts, memory["at"], side="right") - 1
    memory.loc[memory["at"] > starts.iloc[-1] + frame["round_s"].iloc[-1], "round"] = -1  # as before round 0
    rounds = rounds.loc[rounds["round"] > 0].reindex(columns=list(ROUND_COLUMNS))  # round 0 only evaluates
    return Measured(rounds.reset_index(drop=True), memory)


def plain_loop(workload: Workload) -> System:
    """The loop of baselines/plain_loop.py, on one thread."""

    def measure(rounds: int, seed: int, sample_s: float | None) -> Measured:
        options = [*_options(workload, rounds, seed), "--threads=1", "--json"]
        done = processes.run(_baseline("plain_loop.py", *options), sample_s=sample_s)
        return _of_lines(done, processes_=1, examples=workload.fitted)

    return measure


def original(workload: Workload) -> System:
    """The program fedsim began as; its workload cannot be changed."""
    line = re.compile(r"round (\d+): test accuracy ([\d.]+) \(([\d.]+) s\)")

    def measure(rounds: int, seed: int, sample_s: float | None) -> Measured:
        done = processes.run(_baseline("original.py", f"--rounds={rounds}", f"--seed={seed}"), sample_s=sample_s)
        keys = ("round", "test_accuracy", "round_s")
        found = [dict(zip(keys, map(float, values), strict=True)) for values in line.findall(done.stdout)]
        lines = "\n".join(map(json.dumps, found))
        return _of_lines(replace(done, stdout=lines), processes_=1, examples=workload.fitted)

    return measure


def flower(workload: Workload, python: Path) -> System:
    """Flower, by the Python of its own environment, with as many clients at a time as there are cores."""

    def measure(rounds: int, seed: int, sample_s: float | None) -> Measured:
        with tempfile.TemporaryDirectory() as folder:
            data = fedsim.datasets.load("mnist")
            for name in ("train_images", "train_labels", "test_images", "test_labels"):
                np.save(f"{folder}/{name}.npy", getattr(data, name))
            options = [*_options(workload, rounds, seed), f"--data={folder}", f"--cores={CORES}"]
            script = str(SCRIPTS / "baselines" / "flower_fedavg.py")
            done = processes.run([str(python), script, *options], sample_s=sample_s, variables={"PYTHONPATH": ""})
        return _of_lines(done, processes_=CORES, examples=workload.fitted)

    return measure


def matrix_products(workload: Workload) -> System:
    """No system, but the bound: what the products of a round take, with all cores busy with different clients."""

    def measure(rounds: int, seed: int, sample_s: float | None) -> Measured:
        script = str(SCRIPTS / "benchmarks" / "products.py")
        done = processes.run(_python(script, workload.model, f"--batch-size={workload.batch_size}", f"--cores={CORES}"))
        measured = pd.DataFrame([json.loads(line) for line in done.stdout.splitlines()])
        once = measured.groupby("phase")["seconds"].sum()
        fit_s = workload.fitted / workload.batch_size * once["fit"] / CORES
        evaluate_s = TEST_EXAMPLES / products.EVALUATION_CHUNK * once["evaluate"] / CORES
        seconds = {"round_s": fit_s + evaluate_s, "fit_s": fit_s, "evaluate_s": evaluate_s}
        frame = pd.DataFrame([{"round": rounds, **seconds, "examples": workload.fitted}])  # the last is a warm one
        return Measured(frame.reindex(columns=list(ROUND_COLUMNS)), facts={"products": measured.to_dict("records")})

    return measure


def plain_start(rounds: int, seed: int, sample_s: float | None) -> Measured:
    """What starting up takes at least, written down plainly."""
    done = processes.run(_baseline("plain_start.py", f"--actors={CORES}"), sample_s=sample_s)
    frame = pd.DataFrame({"round": [rounds], "start_s": [float(done.stdout) - done.started]})
    return Measured(frame.assign(process_s=done.seconds).reindex(columns=list(ROUND_COLUMNS)))


def _of_lines(done: processes.Finished, *, processes_: int, examples: int) -> Measured:
    """Of a program that prints a line of JSON a round; what is no round of training, is a fact."""
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    frame = pd.DataFrame([line for line in lines if line["round"] > 0])
    frame = frame.assign(processes=processes_, examples=examples, process_s=done.seconds)
    facts = {key: value for line in lines if line["round"] == 0 for key, value in line.items() if key != "round"}
    memory = pd.DataFrame(done.memory, columns=["at", *processes.ROLES])
    return Measured(frame.reindex(columns=list(ROUND_COLUMNS)), memory, facts)


def _run_options(changes: dict[str, Any], results: str) -> list[str]:
    settings = [f"--set={key}={value}" for key, value in changes.items()]
    return [*settings, "--address", "local", "--results", results, "--name", "run", "--quiet"]


def _options(workload: Workload, rounds: int, seed: int) -> list[str]:
    return [
        f"--model={workload.model}",
        f"--clients={workload.clients}",
        f"--per-round={workload.per_round}",
        f"--epochs={workload.epochs}",
        f"--batch-size={workload.batch_size}",
        f"--rounds={rounds}",
        f"--seed={seed}",
    ]


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _baseline(name: str, *arguments: str) -> list[str]:
    return _python(str(SCRIPTS / "baselines" / name), *arguments)
