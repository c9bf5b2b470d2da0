"""Breaks runs on purpose, and looks whether they end with the same results; writes results/published/reliability/.

Each fault is injected at points drawn from a seed. A run has survived it if its result columns and final weights are
those of an undisturbed run, to the bit, or if fedsim refused to go on in words that name the file or key. All faults
take about half an hour on two cores; those of a cluster need root on Linux, for nodes in network namespaces:

    python scripts/reliability.py                   # all
    python scripts/reliability.py actors drivers    # these; the page keeps what was found of the others
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from faults import actors, drivers, folders
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
}


def inject(name: str, seed: int) -> pd.DataFrame:
    """One row an injected fault: columns of `Outcome`, and when, on what and from which seed it was injected."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = FAULTS[name](seed, Path(folder))
    frame = pd.DataFrame([{**asdict(outcome), "is_survived": outcome.is_survived} for outcome in outcomes])
    machine, versions = environment.machine(), environment.versions()
    frame.insert(0, "name", name)
    return frame.assign(
        seed=seed,
        date=datetime.now(UTC).date().isoformat(),
        git_commit=environment.git_commit(),
        machine=f"{machine['num_cpus']} cores, {machine['processor']}",
        versions=", ".join(f"{package} {versions[package]}" for package in ("python", "ray", "torch", "fedsim")),
    )


def publish(folder: Path, new: pd.DataFrame) -> None:
    """Writes faults.parquet and README.md: new rows in the place of older ones of the same names."""
    path = folder / "faults.parquet"
    kept = pd.read_parquet(path) if path.exists() else new.iloc[:0]
    frames = [frame for frame in (kept[~kept["name"].isin(set(new["name"]))], new) if len(frame)]
    faults = pd.concat(frames, ignore_index=True)
    faults = faults.sort_values("name", key=lambda names: names.map(list(FAULTS).index), kind="stable")
    folder.mkdir(parents=True, exist_ok=True)
    faults.to_parquet(path, index=False)
    (folder / "README.md").write_text(_page(faults), encoding="utf-8")


def _page(faults: pd.DataFrame) -> str:
    lines = [
        "# Reliability",
        "",
        "Made by `scripts/reliability.py` from `faults.parquet` beside this page: a row an injected fault.",
        "",
        f"**{faults['is_survived'].sum():,} of {len(faults):,} faults survived**: the same result columns and final "
        "weights as the undisturbed run, to the bit, or a refusal that names what is wrong.",
        "",
        "| fault | injected | equal bits | refused | not survived | date |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, rows in faults.groupby("name", sort=False):
        what = str(FAULTS[str(name)].__doc__).splitlines()[0].rstrip(".")
        equal, survived = (rows["outcome"] == EQUAL).sum(), rows["is_survived"].sum()
        counts = f"{len(rows)} | {equal} | {survived - equal} | {len(rows) - survived}"
        lines.append(f"| {what} (`{name}`) | {counts} | {rows['date'].iloc[0]} |")
    last = faults.iloc[-1]
    lines += ["", f"{last['machine']}; {last['versions']}; code at {last['git_commit']}."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the arguments, injects, and writes after each fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; all, if none is named")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=PUBLISHED, metavar="DIR")
    args = parser.parse_args(arguments)
    if unknown := set(args.faults) - set(FAULTS):
        parser.error(f"no fault {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    is_good = True
    for name in args.faults or FAULTS:
        print(f"{name}: {FAULTS[name].__doc__}", flush=True)
        found = inject(name, args.seed)
        publish(args.output, found)
        bad = found[~found["is_survived"]]
        print(f"  {len(found) - len(bad)} of {len(found)} survived, {found['run_s'].max():.0f} s", flush=True)
        for row in bad.itertuples():
            print(f"  NOT: {row.point}: {row.outcome}", flush=True)
        is_good &= bad.empty
    print(args.output / "README.md")
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
