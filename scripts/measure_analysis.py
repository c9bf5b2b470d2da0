"""Measures what sweeps and reading runs take; writes results/published/analysis/.

    python scripts/measure_analysis.py                # about ten minutes on two cores
    python scripts/measure_analysis.py sweep report   # these; the page keeps what was measured of the others

Targets: a sweep of 20 short runs at least 4 times as fast as 20 separate ones, with the same bits; the report of 1,000
rounds of 100 clients in 10 s and 8 MB; 100 runs of 100 rounds loaded in 5 s; the paper's first speed-up in under a
minute a run.
"""

from __future__ import annotations

import argparse
import inspect
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pandas as pd

import fedsim
from benchmarks.elsewhere import table
from fedsim import environment
from fedsim.metrics import ClientRecord, RoundRecord
from fedsim.results import parts

PUBLISHED = Path(__file__).resolve().parents[1] / "results" / "published" / "analysis"
FEDSIM = (sys.executable, "-m", "fedsim")
SHORT = ("2nn-iid", "--set", "rounds=10", "--quiet")
"""100 clients, 10 a round, 2nn, batch 10."""
RATES, SEEDS = ("0.05", "0.1", "0.15", "0.2"), range(5)


class Measured(NamedTuple):
    """A row of the page."""

    what: str
    value: float
    unit: str = ""
    at_least: float = math.nan
    at_most: float = math.nan
    """Targets; NaN where there is none."""


def sweep(folder: Path) -> Iterator[Measured]:
    """20 runs of 10 rounds of 2nn-iid: 20 times `fedsim run` over one `fedsim sweep`."""
    started = time.perf_counter()
    grid = ("--grid", f"training.lr={','.join(RATES)}", "--seeds", f"0..{len(SEEDS) - 1}")
    subprocess.run([*FEDSIM, "sweep", *SHORT, *grid, "--results", folder, "--name", "swept"], check=True)
    swept_s = time.perf_counter() - started
    started = time.perf_counter()
    for rate in RATES:
        for seed in SEEDS:
            changes = ("--set", f"training.lr={rate}", "--set", f"seed={seed}", "--name", f"lr-{rate}_seed-{seed}")
            command = [*FEDSIM, "run", *SHORT, *changes, "--results", folder / "separate"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    separate_s = time.perf_counter() - started
    columns = ["run", "round", "weights_sha256"]
    one, other = (fedsim.load_runs(f"{folder}/{name}/*").rounds[columns] for name in ("swept", "separate"))
    if not one.equals(other):
        raise SystemExit("the runs of the sweep are not those by themselves: their hashes differ")
    yield Measured("20 separate runs", separate_s, "s")
    yield Measured("one sweep", swept_s, "s")
    yield Measured("times as fast, equal bits", separate_s / swept_s, at_least=4)


def report(folder: Path) -> Iterator[Measured]:
    """`fedsim report` of a run of 1,000 rounds with all of 100 clients in each; its rows are made up."""
    run = _made_up(folder, rounds=1000, clients=100, rounds_a_part=10)
    started = time.perf_counter()
    subprocess.run([*FEDSIM, "report", run], check=True, stdout=subprocess.DEVNULL)
    yield Measured("with the start of Python", time.perf_counter() - started, "s", at_most=10)
    yield Measured("the page", (run / "report.html").stat().st_size / 1e6, "MB", at_most=8)


def load(folder: Path) -> Iterator[Measured]:
    """`load_runs` of 100 runs of 100 rounds, 10 of 100 clients in each: their rounds and clients as frames.

    Rounds of 0.2 s, as those of `2nn-iid` on two cores, are five to a part, those of a second or more are parts by
    themselves.
    """
    for rounds_a_part in (5, 1):
        results = folder / str(rounds_a_part)
        first = _made_up(results, rounds=100, clients=10, rounds_a_part=rounds_a_part)
        for number in range(1, 100):
            shutil.copytree(first, results / f"run-{number}")
        started = time.perf_counter()
        runs = fedsim.load_runs(f"{results}/*")
        assert len(runs.rounds) == 100 * 101
        yield Measured(f"rounds, in parts of {rounds_a_part}", time.perf_counter() - started, "s", at_most=5)
        started = time.perf_counter()
        assert len(runs.clients) == 100 * 100 * 10
        yield Measured(f"clients, in parts of {rounds_a_part}", time.perf_counter() - started, "s")


def paper(folder: Path) -> Iterator[Measured]:
    """`fedsim run 2nn-iid --set training.lr=0.1` to 97 %, where the paper needs 87 rounds: five seeds, one by one."""
    seconds = []
    for seed in range(1, 6):
        changes = ("--set", "training.lr=0.1", "--set", f"seed={seed}", "--set", "rounds=130", "--name", f"seed-{seed}")
        command = [*FEDSIM, "run", "2nn-iid", *changes, "--stop-at", "test_accuracy=0.97", "--results", folder]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    rounds = fedsim.load_runs(f"{folder}/*").summary({"test_accuracy": 0.97})["rounds_to_target"]
    yield Measured("rounds, median", rounds.median(skipna=False), at_most=70)
    yield Measured("rounds, most", rounds.max(skipna=False), at_most=90)
    yield Measured("the longest run, with its start", max(seconds), "s", at_most=60)


def _made_up(results: Path, *, rounds: int, clients: int, rounds_a_part: int) -> Path:
    """A finished run whose rows nobody has computed."""
    changes = {"rounds": 0, "data.dataset": "synthetic", "placement.mode": "serial", "clients.count": 100}
    run = fedsim.run(fedsim.Config().override(changes), results=results, name="run-0").path
    assert run is not None
    for first in range(1, rounds + 1, rounds_a_part):
        made = [_round(number, clients) for number in range(first, first + rounds_a_part)]
        of_clients = [client.row("run-0") for record in made for client in record.clients]
        parts.write_rows(run, "clients", first, first + rounds_a_part - 1, of_clients)
        parts.write_rows(run, "rounds", first, first + rounds_a_part - 1, [record.row("run-0") for record in made])
    return run


def _round(number: int, clients: int) -> RoundRecord:
    rows = tuple(
        ClientRecord(
            round=number,
            client_id=client,
            status="completed",
            num_examples=600,
            num_steps=60,
            train_loss=2.3 / number + client / 1000,
            loss_before=None,
            accuracy_before=None,
            loss_after=None,
            accuracy_after=None,
            update_l2_norm=1.0 / (1 + client),
            cosine_to_mean=client / 100,
            update_sha256=f"{number * 1000 + client:064x}",
            fit_s=0.01,
            stack_size=5,
            attempts=1,
            actor=client % 2,
            pid=1,
            node="node",
            error=None,
        )
        for client in range(clients)
    )
    return RoundRecord(
        round=number,
        started_at=datetime.now(UTC),
        num_sampled=clients,
        num_completed=clients,
        num_examples=600 * clients,
        train_loss=2.3 / number,
        test_loss=2.3 / number,
        test_accuracy=1 - 0.9 / number,
        update_l2_norm=1.0,
        bytes_down=1000,
        bytes_up=1000,
        weights_sha256=f"{number:064x}",
        round_s=0.2,
        fit_s=0.1,
        aggregate_s=0.01,
        evaluate_s=0.05,
        clients=rows,
    )


MEASURES: dict[str, Callable[[Path], Iterator[Measured]]] = {
    "paper": paper,
    "sweep": sweep,
    "report": report,
    "load": load,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the arguments, measures, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASURES)}; all, if none is named")
    parser.add_argument("--output", type=Path, default=PUBLISHED, metavar="DIR")
    args = parser.parse_args(arguments)
    if unknown := set(args.names) - set(MEASURES):
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(MEASURES)}")
    machine, versions = environment.machine(), environment.versions()
    signed = {
        "date": datetime.now(UTC).date().isoformat(),
        "git_commit": environment.git_commit(),
        "machine": f"{machine['num_cpus']} cores, {machine['processor']}",
        "versions": ", ".join(f"{package} {versions[package]}" for package in ("python", "ray", "torch", "fedsim")),
    }
    for name in args.names or MEASURES:
        with tempfile.TemporaryDirectory() as folder:
            rows = list(MEASURES[name](Path(folder)))
        for row in rows:
            print(f"{name}: {row.what}: {row.value:.2f} {row.unit}", flush=True)
        _publish(args.output, pd.DataFrame(rows).assign(name=name, **signed))


def _publish(folder: Path, new: pd.DataFrame) -> None:
    path = folder / "analysis.parquet"
    frames = [new]
    if path.exists():
        kept = pd.read_parquet(path)
        frames.insert(0, kept[~kept["name"].isin(set(new["name"]))])
    frame = pd.concat([each for each in frames if len(each)], ignore_index=True)
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path, index=False)
    lines = ["# What sweeps and reading runs take", "", "Made by `scripts/measure_analysis.py`.", ""]
    for name, rows in frame.groupby("name", sort=False):
        shown = [
            (row.what, f"{row.value:.2f} {row.unit}".strip(), _target(row.value, row.at_least, row.at_most), row.date)
            for row in rows.itertuples()
        ]
        lines += [inspect.cleandoc(str(MEASURES[str(name)].__doc__)), ""]
        lines += [*table(("measured", "value", "target", "date"), shown), ""]
    signed = (", ".join(frame[column].unique()) for column in ("machine", "versions", "git_commit"))
    lines += ["{}; {}; code at {}.".format(*signed)]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _target(value: float, at_least: float, at_most: float) -> str:
    if math.isnan(at_least) and math.isnan(at_most):
        return ""
    is_reached = not (value < at_least or value > at_most or math.isnan(value))
    wanted = f"at most {at_most:g}" if math.isnan(at_least) else f"at least {at_least:g}"
    return f"{wanted}{'' if is_reached else ': **not reached**'}"


if __name__ == "__main__":
    main()
