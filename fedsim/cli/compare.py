"""`fedsim compare`: what runs came to, side by side; of two runs, where they part and in what they differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fedsim.cli.options import DebugOption, ResultsOption, RunsArgument, parsed_targets
from fedsim.cli.terminal import console, folding
from fedsim.errors import InputError, RunFolderError, counted
from fedsim.run_folder import paths_of

if TYPE_CHECKING:
    import pandas as pd

    from fedsim.results import Run, Runs
    from fedsim.targets import Target

TargetOption = Annotated[
    list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Adds what it took to get there: test_accuracy=0.97.")
]


def compare(
    runs: RunsArgument,
    target: TargetOption = None,
    results: ResultsOption = Path("results"),
    debug: DebugOption = False,  # read by `main`
) -> None:
    """Compares runs: accuracy, what it took to a target, means over seeds; of two, where they part."""
    folders = paths_of(runs, results)
    from fedsim import summaries
    from fedsim.results import load_runs

    goals = parsed_targets(target)
    if len(goals) > 1:
        raise InputError(f"give one --target, not {len(goals)}: {', '.join(map(str, goals))}")
    goal = goals[0] if goals else None
    found = load_runs(folders)
    frame = found.summary({goal.column: goal.value} if goal else None)
    _say_runs(frame)
    if said := summaries.left_out(frame):
        console.print(said)
    if goal is not None:
        _say_unreached(goal, found, frame)
    if said := summaries.uneven(frame):
        console.print(said)
    if len(frame) > frame["group"].nunique():
        _say_groups(summaries.over_seeds(frame), "mean over seeds [95 % confidence]")
    if len(differences := summaries.paired(frame)):
        _say_groups(differences, f"difference to {differences['than'].iloc[0]}, by seed [95 % confidence]")
    if len(found) == 2:
        _say_parting(found, frame["run"].tolist())


class Shown(NamedTuple):
    """How a measure is shown."""

    title: str
    format: str
    scale: float = 1.0

    def text(self, value: float) -> str:
        """A value; "-" where there is none."""
        return "-" if math.isnan(value) else self.format.format(value * self.scale)


_SHOWN = {
    "final_accuracy": Shown("final", "{:.4f}"),
    "best_accuracy": Shown("best", "{:.4f}"),
    "rounds_to_target": Shown("rounds to target", "{:.1f}"),
    "seconds_to_target": Shown("seconds to it", "{:.1f}"),
    "bytes_to_target": Shown("MB to it", "{:.1f}", 1e-6),
}


def _say_runs(frame: pd.DataFrame) -> None:
    """A row a run."""
    measures = [name for name in _SHOWN if name in frame]
    table = folding("run", "status", "rounds", "seconds", *(_SHOWN[name].title for name in measures))
    for row in frame.to_dict("records"):
        cells = [_SHOWN[name].text(row[name]) for name in measures]
        table.add_row(row["run"], row["status"], str(row["rounds"]), f"{row['seconds']:.1f}", *cells)
    console.print(table)


def _say_unreached(goal: Target, runs: Runs, frame: pd.DataFrame) -> None:
    """Why nobody came to the target, and who could not have."""
    without, unknown = [], []
    for name, run, is_there in zip(frame["run"], runs, frame["rounds_to_target"].notna(), strict=True):
        rounds, damage = run.read("rounds")
        if damage and not is_there:
            unknown.append(name)
        elif rounds[goal.column].isna().all():
            without.append(name)
    if without:
        console.print(f"{goal.column} was not recorded by {', '.join(without)}")
    if unknown:
        console.print(f"whether {goal} was reached is not known of {', '.join(unknown)}, as rows are missing")
    elif len(without) < len(runs) and frame["rounds_to_target"].isna().all():
        console.print(f"no run has reached {goal}")


def _say_groups(frame: pd.DataFrame, title: str) -> None:
    """A row a group, a column a measure: its mean and interval, and of how many runs it is."""
    measures = [name for name in _SHOWN if name in set(frame["measure"])]
    table = folding(title, *(_SHOWN[name].title for name in measures))
    for label, rows in frame.groupby("group", sort=False):
        by_measure = {row["measure"]: row for row in rows.to_dict("records")}
        table.add_row(str(label), *(_interval(by_measure.get(name), _SHOWN[name]) for name in measures))
    console.print()
    console.print(table)


def _interval(row: Mapping[Any, Any] | None, shown: Shown) -> str:
    if row is None or not row["number"]:
        return "-"
    bounds = "" if math.isnan(row["low"]) else f" [{shown.text(row['low'])}, {shown.text(row['high'])}]"
    of = f" ({row['number']} of {row['of']})" if row.get("of", row["number"]) > row["number"] else ""
    return shown.text(row["mean"]) + bounds + of


def _say_parting(runs: Runs, names: Sequence[str]) -> None:
    """Where two runs part, and in what their configurations and environments differ."""
    from fedsim.comparison import parting, shown
    from fedsim.config.changes import text

    one, other = runs
    console.print()
    try:
        difference = parting(one, other)
    except RunFolderError as error:
        console.print(f"whether they part cannot be said: {error}")
        return
    if difference is None:
        rounds = [set(run.rounds["round"]) for run in runs]
        both = len(rounds[0] & rounds[1])
        where = "" if rounds[0] == rounds[1] else f" in the {counted(both, 'round')} that both have"
        console.print(f"all results are equal, to the bit{where}" if both else "there is no round that both have")
    else:
        was, now = shown(difference.recorded), shown(difference.computed)
        console.print(f"they part in {difference.where}: {difference.column} is {was} and {now}")
    table = folding("different in", *names)
    for key, values in _unlike(one, other):
        table.add_row(key, *map(text, values))
    if table.row_count:
        console.print(table)


_KEPT = (
    "versions",
    "machine",
    "git_commit",
    "engine",
    "data",
    "model",
    "own",
    "stop_at",
    "device",
    "numerics_fingerprint",
    "placement",
)
"""Of run.json, what may explain a difference."""


def _unlike(one: Run, other: Run) -> Iterable[tuple[str, tuple[Any, Any]]]:
    """Keys of the configuration and of run.json that are not the same, with both values."""
    from fedsim.config.changes import flat

    told = [dict(flat({key: run.info.get(key) for key in _KEPT})) for run in (one, other)]
    unlike: dict[str, tuple[str, Any, Any]] = {}  # the plan says again what of it was configured
    for values in ([dict(flat(run.config.to_dict())) for run in (one, other)], told):
        for key in dict.fromkeys([*values[0], *values[1]]):
            pair = values[0].get(key, "-"), values[1].get(key, "-")
            if pair[0] != pair[1] and not key.startswith("placement.reasons"):
                unlike[repr((key, pair))] = (key, *pair)
    return [(key, (was, now)) for key, was, now in unlike.values()]
