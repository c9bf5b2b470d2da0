"""Breaks runs on purpose, and looks whether they end with the same results; writes results/published/reliability/.

Each fault is injected at points drawn from a seed. A run has survived it if its result columns and final weights are
those of an undisturbed run, to the bit, or if fedsim refused to go on in words that name the file or key. All faults
take about half an hour on two cores; those of a cluster need root on Linux, for nodes in network namespaces:

    python scripts/reliability.py                   # all, and what it costs
    python scripts/reliability.py actors drivers    # these; the page keeps what was found of the others
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from benchmarks.elsewhere import table
from faults import actors, clusters, costs, drivers, folders
from faults.outcome import EQUAL, Outcome
from fedsim import environment

PUBLISHED = Path(__file__).resolve().parents[1] / "results" / "published" / "reliability"

Fault = Callable[[int, Path], list[Outcome]]
"""From a seed and an empty folder to what came of it; its docstring's first line says what is done."""

FAULTS: dict[str, Fault] = {
    "actors": actors.one_in_twenty,
    "actors_per_client": actors.each_its_own,
    "hanging": actors.hanging,
    "memory": actors.out_of_memory,
    "drivers": drivers.killed,
    "raylets": drivers.raylet_killed,
    "signals": drivers.signalled,
    "folders": folders.damaged,
    "disk": folders.full_disk,
    "nodes": clusters.killed,
    "node_replaced": clusters.replaced,
    "node_cut_off": clusters.cut_off,
    "node_hung": clusters.hung,
}
COSTS: dict[str, Callable[[Path], pd.DataFrame]] = {
    "durable": costs.durable,
    "written": costs.written,
    "lost_actor": costs.lost_actor,
    "two_nodes": costs.two_nodes,
}
"""What safety and losses cost; a row a turn, with a `ratio`."""


def inject(name: str, seed: int) -> pd.DataFrame:
    """One row an injected fault: columns of `Outcome`, and when, on what and from which seed it was injected."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = FAULTS[name](seed, Path(folder))
    frame = pd.DataFrame([{**asdict(outcome), "is_survived": outcome.is_survived} for outcome in outcomes])
    return _signed(name, frame).assign(seed=seed)


def _signed(name: str, frame: pd.DataFrame) -> pd.DataFrame:
    """With what was done, and when, where and with what."""
    machine, versions = environment.machine(), environment.versions()
    frame.insert(0, "name", name)
    return frame.assign(
        date=datetime.now(UTC).date().isoformat(),
        git_commit=git_commit(),
        machine=f"{machine['num_cpus']} cores, {machine['processor']}",
        versions=", ".join(f"{package} {versions[package]}" for package in ("python", "ray", "torch", "fedsim")),
    )


git_commit = functools.cache(environment.git_commit)
"""As it was before the first files changed the tree."""


def publish(folder: Path, file: str, new: pd.DataFrame, order: list[str]) -> None:
    """Writes a Parquet file, new rows in the place of older ones of the same names, and README.md anew."""
    path = folder / file
    kept = pd.read_parquet(path) if path.exists() else new.iloc[:0]
    frames = [frame for frame in (kept[~kept["name"].isin(set(new["name"]))], new) if len(frame)]
    merged = pd.concat(frames, ignore_index=True)
    merged = merged.sort_values("name", key=lambda names: names.map(order.index), kind="stable")
    folder.mkdir(parents=True, exist_ok=True)
    merged.to_parquet(path, index=False)
    (folder / "README.md").write_text(_page(folder), encoding="utf-8")


def _page(folder: Path) -> str:
    lines = ["# Reliability", "", "Made by `scripts/reliability.py` from the Parquet files beside this page.", ""]
    if (folder / "faults.parquet").exists():
        lines += _faults(pd.read_parquet(folder / "faults.parquet"))
    if (folder / "costs.parquet").exists():
        lines += _costs(pd.read_parquet(folder / "costs.parquet"))
    return "\n".join(lines) + "\n"


def _faults(faults: pd.DataFrame) -> list[str]:
    rows = []
    for name, found in faults.groupby("name", sort=False):
        equal, survived = (found["outcome"] == EQUAL).sum(), found["is_survived"].sum()
        counts = len(found), equal, survived - equal, len(found) - survived
        rows.append((f"{_what(FAULTS[str(name)])} (`{name}`)", *map(str, counts), found["date"].iloc[0]))
    return [
        f"**{faults['is_survived'].sum():,} of {len(faults):,} injected faults survived**: the result columns and "
        "final weights are those of the undisturbed run, to the bit, or a refusal names what is wrong. Each has a row "
        "in `faults.parquet`, with its point and outcome.",
        "",
        *table(("fault", "injected", "equal bits", "refused", "not survived", "date"), rows),
        *_where(faults),
    ]


def _costs(measured: pd.DataFrame) -> list[str]:
    rows = []
    for name, found in measured.groupby("name", sort=False):
        turns = ", ".join(f"{ratio:.3f}" for ratio in found["ratio"])
        what = f"{_what(COSTS[str(name)])} (`{name}`)"
        rows.append((what, f"{found['ratio'].median():.3f}", turns, found["date"].iloc[0]))
    return ["## What it costs", "", *table(("measured", "median", "turns", "date"), rows), *_where(measured)]


def _what(function: Callable[..., object]) -> str:
    return str(function.__doc__).splitlines()[0].rstrip(".")


def _where(frame: pd.DataFrame) -> list[str]:
    last = frame.iloc[-1]
    commits = ", ".join(frame["git_commit"].unique())
    return ["", f"{last['machine']}; {last['versions']}; code at {commits}.", ""]


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the arguments, injects, and writes after each fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*FAULTS, *COSTS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all, if none is named")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=PUBLISHED, metavar="DIR")
    args = parser.parse_args(arguments)
    if unknown := set(args.names) - set(names):
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    git_commit()
    is_good = True
    for name in args.names or names:
        print(f"{name}: {_what(FAULTS.get(name) or COSTS[name])}", flush=True)
        if name in COSTS:
            with tempfile.TemporaryDirectory() as folder:
                publish(args.output, "costs.parquet", _signed(name, COSTS[name](Path(folder))), list(COSTS))
            continue
        found = inject(name, args.seed)
        publish(args.output, "faults.parquet", found, list(FAULTS))
        bad = found[~found["is_survived"]]
        print(f"  {len(found) - len(bad)} of {len(found)} survived, {found['run_s'].max():.0f} s", flush=True)
        for row in bad.itertuples():
            print(f"  NOT: {row.point}: {row.outcome}", flush=True)
        is_good &= bad.empty
    print(args.output / "README.md")
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
