"""The page: what was measured as Markdown, made from the Parquet files alone.

`TASK.parquet` has a row a round (columns: `systems.ROUND_COLUMNS`, and whose), `TASK_memory.parquet` a row a look at
the memory, or a row a process where each counts; what else is to be known is in the `attrs` of the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from benchmarks import actors, elsewhere
from benchmarks.elsewhere import table
from benchmarks.processes import OURS, ROLES
from benchmarks.section import Check, Section, cells, medians, per_run, spreads
from benchmarks.systems import ROUND_COLUMNS, Measured
from benchmarks.tasks import BOUND, PLAIN_SUM, Task

FIGURE = "benchmarks.svg"


def save(folder: Path, name: str, measured: Measured) -> None:
    """Writes what was measured of one task."""
    folder.mkdir(parents=True, exist_ok=True)
    measured.rounds.attrs = measured.facts
    measured.rounds.to_parquet(folder / f"{name}.parquet", index=False)
    measured.memory.to_parquet(folder / f"{name}_memory.parquet", index=False)


def load(folder: Path, name: str) -> Measured | None:
    """What was measured of one task; None where it was not."""
    path, memory = folder / f"{name}.parquet", folder / f"{name}_memory.parquet"
    if not path.exists():
        return None
    rounds = pd.read_parquet(path)
    columns = [*rounds.columns, *(column for column in ROUND_COLUMNS if column not in rounds)]
    sampled = pd.read_parquet(memory) if memory.exists() else pd.DataFrame(columns=["system", *ROLES])
    return Measured(rounds.reindex(columns=columns), sampled, rounds.attrs)


def write(folder: Path, tasks: Mapping[str, Task]) -> None:
    """Writes README.md anew from all tasks that the folder has."""
    checks: list[Check] = []
    sections = []
    for name, task in tasks.items():
        if measured := load(folder, name):
            section = Section([f"## {task.title}", ""])
            SECTIONS[task.kind](section, name, task, measured)
            _method(section, task, measured)
            checks += section.checks
            sections += [*section.lines, ""]
    figure = [f"![Speed, scale and memory]({FIGURE})", ""] if (folder / FIGURE).exists() else []
    rows = [(check.what, check.measured, check.target, check.verdict) for check in checks]
    made_by = "Made by `scripts/benchmark.py` from the Parquet files beside this page: a row a round."
    head = ["# Benchmarks", "", made_by, "", *figure, *table(("what", "measured", "target", ""), rows), ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("\n".join([*head, *sections, *elsewhere.section()]) + "\n", encoding="utf-8")


def peaks(memory: pd.DataFrame) -> pd.DataFrame:
    """Of each system, the most bytes that its driver, its actors, both together, and Ray's own processes had."""
    of_all = memory.assign(together=memory[list(OURS)].sum(axis=1))
    return of_all.groupby("system", sort=False)[[*ROLES, "together"]].max()


def _speed(section: Section, name: str, task: Task, measured: Measured) -> None:
    frame, peak = measured.rounds, peaks(measured.memory)
    round_s, fit_s = medians(frame, "round_s"), medians(frame, "fit_s")
    last = frame.groupby(["system", "repetition"], sort=False)["test_accuracy"].last()
    section.table(
        "system",
        {
            "round, median (s)": cells(round_s, "{:.3f}"),
            "min to max of the runs (s)": spreads(per_run(frame, "round_s"), "{:.3f}"),
            "samples/s while training": cells(_rates(frame), "{:,.0f}"),
            f"test accuracy after round {frame['round'].max():.0f}": cells(last.groupby("system").median(), "{:.4f}"),
            "min to max": spreads(last, "{:.4f}"),
            "whole process, with start and end (s)": cells(medians(frame, "process_s"), "{:.1f}"),
            "peak memory, without Ray's own (MB)": cells(peak["together"] / 1e6, "{:,.0f}"),
            "training processes": cells(medians(frame, "processes"), "{:.0f}"),
        },
    )
    for system, seconds in round_s.items():
        if system not in ("fedsim", BOUND):
            times, least = seconds / round_s["fedsim"], task.times_as_fast.get(system)
            what = f"{name}: times as fast as the {system}"
            check = Check(what, f"{times:.2f}", f"at least {least:g}", times >= least) if least else None
            section.say(f"fedsim is **{times:.2f}** times as fast as {system}", check)
    if BOUND in round_s:
        section.say(
            f"share of the bound (the round's matrix products, measured in the same run on all cores at once): "
            f"**{round_s[BOUND] / round_s['fedsim']:.0%}** of the round, {fit_s[BOUND] / fit_s['fedsim']:.0%} of its "
            "training"
        )
    _overhead(section, name, task, frame)
    if "fedsim" in peak.index:
        of = peak.loc["fedsim"] / 1e6
        most = task.limits.get("memory_mb")
        what = f"{name}: memory of driver and actors"
        together = float(of["together"])
        check = Check(what, f"{together:,.0f} MB", f"under {most:,.0f} MB", together < most) if most else None
        section.say(
            f"peak memory of fedsim (PSS): driver {of['driver']:,.0f} MB, actors {of['actors']:,.0f} MB, Ray's own "
            f"{of['ray']:,.0f} MB; driver and actors together **{together:,.0f} MB**",
            check,
        )


def _overhead(section: Section, name: str, task: Task, frame: pd.DataFrame) -> None:
    """Where a round of fedsim is neither training nor evaluating."""
    ours = frame.loc[frame["system"] == "fedsim"]
    if ours["busiest_s"].isna().all():  # published before there was such a column
        return

    def milliseconds(values: pd.Series) -> float:
        return 1e3 * medians(ours.assign(values=values), "values")["fedsim"]

    outside = milliseconds(ours["round_s"] - ours["fit_s"] - ours["evaluate_s"])
    rest = milliseconds(ours["round_s"] - ours[["fit_s", "aggregate_s", "evaluate_s"]].sum(axis=1))
    written = 1e3 * ours["between_s"].mean()
    most = task.limits.get("overhead_ms")
    what = f"{name}: round outside of fit and evaluate"
    section.say(
        f"of a round of fedsim outside of fit and evaluate: aggregation {milliseconds(ours['aggregate_s']):.1f} ms, "
        f"sampling and record {rest:.1f} ms; together **{outside:.1f} ms**",
        Check(what, f"{outside:.1f} ms", f"at most {most:g} ms", outside <= most) if most else None,
    )
    section.say(
        f"besides: {milliseconds(ours['fit_s'] - ours['busiest_s']):.1f} ms of fit in which the busiest actor does not "
        f"train (put, hand out, gather), and {written:.1f} ms, mean, from a round's end to the next one's start (rows "
        "and checkpoints written)"
    )


def _start(section: Section, name: str, task: Task, measured: Measured) -> None:
    start_s = medians(measured.rounds, "start_s")
    spread = spreads(per_run(measured.rounds, "start_s"), "{:.2f}")
    section.table("system", {"start, median (s)": cells(start_s, "{:.2f}"), "min to max (s)": spread})
    section.say(f"{PLAIN_SUM}: import ray and torch, `ray.init`, an actor a core that imports torch")
    ratio, most = start_s["fedsim"] / start_s[PLAIN_SUM], task.limits["ratio"]
    section.state(Check(f"start-up over the {PLAIN_SUM}", f"{ratio:.2f}", f"at most {most:g}", ratio <= most))


def _scale(section: Section, name: str, task: Task, measured: Measured) -> None:
    frame, peak = measured.rounds, peaks(measured.memory)
    round_s, value_bytes = medians(frame, "round_s"), medians(frame, "value_bytes")
    file_kb = {key: size / 1e3 for key, size in medians(frame, "file_bytes").items()}
    checkpoints = {key: size / 1e6 for key, size in medians(frame, "checkpoint_bytes").items()}
    section.table(
        "",
        {
            "round, median (s)": cells(round_s, "{:.3f}"),
            "min to max of the runs (s)": spreads(per_run(frame, "round_s"), "{:.3f}"),
            "samples/s while training": cells(_rates(frame), "{:,.0f}"),
            "driver (MB)": cells(peak["driver"] / 1e6, "{:,.0f}"),
            "actors (MB)": cells(peak["actors"] / 1e6, "{:,.0f}"),
            "together (MB)": cells(peak["together"] / 1e6, "{:,.0f}"),
            "files of rows, a round (kB)": cells(file_kb, "{:,.1f}"),
            "values in them (kB)": cells({key: size / 1e3 for key, size in value_bytes.items()}, "{:,.1f}"),
            "a checkpoint (MB)": cells(checkpoints, "{:.2f}"),
            "start-up (s)": cells(medians(frame, "start_s"), "{:.1f}"),
        },
    )
    if (most := task.limits.get("ratio")) is not None:
        of = {"seconds a round": round_s, "memory": peak["together"].to_dict(), "values written": value_bytes}
        for what, values in of.items():
            first, *_, last = values
            ratio = values[last] / values[first]
            section.state(Check(f"{what}, {last} over {first}", f"{ratio:.2f}", f"at most {most:g}", ratio <= most))


def windows(num_rounds: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last round of the two windows compared: of 500 rounds, 100 to 200 and the last 100."""
    fifth = num_rounds // 5
    return (fifth, 2 * fifth), (num_rounds - fifth + 1, num_rounds)


def _memory(section: Section, name: str, task: Task, measured: Measured) -> None:
    memory, most = measured.memory, task.limits["drift"]
    early, late = windows(measured.facts["rounds"])
    means = [memory.loc[memory["round"].between(*window), list(OURS)].mean() / 1e6 for window in (early, late)]
    titles = [f"rounds {first} to {last}, mean (MB, PSS)" for first, last in (early, late)]
    section.table("", {title: cells(mean, "{:.1f}") for title, mean in zip(titles, means, strict=True)})
    for role in OURS:
        drift = float(means[1][role] / means[0][role] - 1)
        what = f"memory of the {role}, rounds {late[0]} to {late[1]} against {early[0]} to {early[1]}"
        section.state(Check(what, f"{drift:+.1%}", f"within {most:.0%}", abs(drift) <= most))


def _method(section: Section, task: Task, measured: Measured) -> None:
    facts, frame = measured.facts, measured.rounds
    if len(frame):
        warm = frame.loc[frame["warm"].astype(bool), "round"].nunique()
        is_start = task.kind in ("start", "actors")
        of_rounds = "" if is_start else f"of each the median of its {warm} warm rounds, evaluation included; "
        memory = "" if task.kind in ("actors", "hundreds") else "; memory from a run of its own"
        section.say(
            f"method: median of {frame['repetition'].max()} alternating runs, {of_rounds}run r of every system has "
            f"seed r{memory}"
        )
    machine = facts["machine"]
    section.say(
        f"{machine['processor']}, {machine['num_cpus']} logical CPUs, {machine['memory_bytes'] / 1e9:.0f} GB; load "
        f"average before it began: {facts['load_average']:.1f}"
    )
    section.say(_versions(facts["versions"]))
    if versions := facts.get("versions of Flower"):
        section.say(f"Flower: {_versions(versions)}")
    section.say(f"{facts['date']}, commit {facts['git_commit']}, `{facts['command']}`")


def _rates(frame: pd.DataFrame) -> dict[str, float]:
    return medians(frame.assign(rate=frame["examples"] / frame["fit_s"]), "rate")


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


SECTIONS = {
    "speed": _speed,
    "start": _start,
    "scale": _scale,
    "memory": _memory,
    "actors": actors.start,
    "hundreds": actors.hundreds,
}
