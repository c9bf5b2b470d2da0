"""What the clients did and are: who took part, how their training went, which labels they have."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import pandas as pd

from fedsim.errors import InputError, counted
from fedsim.palette import COLORS
from fedsim.reporting import charts, html
from fedsim.reporting.charts import Line
from fedsim.reporting.shown import Shown
from fedsim.views import View, labels, quantiles

DISTRIBUTIONS = {
    "train_loss": ("Training loss", "nats"),
    "update_l2_norm": ("Length of the update", "L2 norm"),
    "cosine_to_mean": ("Agreement with the mean update", "cosine"),
    "accuracy_after": ("Accuracy on its own data, after its training", "fraction"),
}
STATUSES = {
    "completed": (COLORS[0], ""),
    "rejected": (COLORS[1], "/"),
    "failed": (COLORS[3], "x"),
    "dropped": (COLORS[4], "."),
}
MOST_CLIENTS = 200
"""That are drawn one by one."""


def participation(shown: Shown) -> str | None:
    """How often each client was sampled, and what became of it."""
    runs = [run for run in shown.first if len(run.clients)]
    if not runs:
        return None

    def what(run: View) -> Hashable:
        rows = run.clients[["round", "client_id", "status"]]
        return run.config.clients.count, rows.to_csv(index=False)

    pieces = [_participation(shown, alike) for alike in _alike(runs, what)]
    return shown.note() + html.charts(pieces)


def _participation(shown: Shown, alike: Sequence[View]) -> str:
    run = alike[0]
    count, rounds = run.config.clients.count, run.last
    by = run.clients.groupby(["client_id", "status"]).size().unstack(fill_value=0).reindex(range(count), fill_value=0)
    times = by.sum(axis=1)
    there = {status: look for status, look in STATUSES.items() if status in by}
    title = shown.titled(alike, "Rounds of each client")
    said = f"A client was sampled in {times.min():,} to {times.max():,} of {rounds:,} rounds, half of them "
    said += f"in {times.median():g} or more; {(times == 0).sum():,} of {count:,} never were."
    if times.min() == times.max():
        who = f"Each of the {count:,} clients" if count > 1 else "The only client"
        said = f"{who} was sampled in {times.min():,} of {rounds:,} rounds."
        if list(there) == ["completed"]:
            return html.paragraph(shown.titled(alike, said))
    if count > MOST_CLIENTS:
        number = times.value_counts().sort_index().astype(float)
        drawn = charts.bars({"clients": (number, COLORS[0], "")}, "rounds that a client was sampled in", "clients")
        return html.figure(title, drawn, said, 260)
    drawn = charts.bars({name: (by[name], *look) for name, look in there.items()}, "client", "rounds")
    keys = html.legend((html.area_key(*look), name) for name, look in there.items()) if len(there) > 1 else ""
    return f"<div>{html.figure(title, drawn, said, 260)}{keys}</div>"


def distributions(shown: Shown) -> str | None:
    """How the clients' numbers are distributed, by round, all runs of a group together."""
    figures = [figure for column in DISTRIBUTIONS if (figure := _distribution(shown, column))]
    if not figures:
        return None
    is_one = len(shown.groups) == 1
    color = COLORS[0] if is_one else "#3e4c59"
    keys = [(html.line_key(color, "solid"), "median client")]
    keys.append((html.area_key(color, "", 0.31 if is_one else 0.17), "25 to 75 % of the completed clients"))
    keys += [(html.area_key(color, "", 0.17), "5 to 95 %")] if is_one else []
    return shown.legend() + html.legend(keys) + html.charts(figures)


def _distribution(shown: Shown, column: str) -> str | None:
    title, unit = DISTRIBUTIONS[column]
    lines, said = [], []
    for group in shown.groups:
        frame = charts.thin(quantiles(group.runs, column))
        if frame.empty:
            continue
        bands = [("25 to 75 %", frame[0.25], frame[0.75])]
        if not group.letter:
            bands.insert(0, ("5 to 95 %", frame[0.05], frame[0.95]))
        lines.append(Line(group.letter or "median client", frame[0.5], bands, group.color, group.dash))
        last = frame.iloc[-1]
        half = f"half of the clients between {last[0.25]:.3g} and {last[0.75]:.3g}"
        said.append(f"{group.prefix}median {last[0.5]:.3g} in round {frame.index[-1]}, {half}.")
    if not lines:
        return None
    chart = charts.lines(lines, unit, can_diverge=column in ("train_loss", "update_l2_norm"))
    return html.figure(title, chart, " ".join(said).replace("median", "Median", shown.is_one))


def partition(shown: Shown) -> str | None:
    """Which labels each client has."""

    def what(run: View) -> Hashable:
        return str(run.config.data.model_dump()), run.config.clients.count, run.config.seed, str(run.info.get("own"))

    return shown.note() + html.charts([_partition(shown, alike) for alike in _alike(shown.first, what)])


def _partition(shown: Shown, alike: Sequence[View]) -> str:
    run = alike[0]
    try:
        counts = labels(run, shown.dataset if "dataset" in run.info.get("own", {}) else None)
    except InputError as error:
        return html.paragraph(f"Labels are not shown: {error}{'' if str(error).endswith('.') else '.'}")
    sizes, kinds = counts.sum(axis=1), (counts > 0).sum(axis=1)
    smallest, largest = sizes.min(), sizes.max()
    has = counted(smallest, "example") if smallest == largest else f"{smallest:,} to {largest:,} examples"
    said = f"A client has {has}, the median client {kinds.median():g} of {counts.shape[1]} labels."
    if len(counts) > MOST_CLIENTS:
        said += f" Shown: {MOST_CLIENTS} of {len(counts):,} clients, evenly spaced."
        counts = counts.iloc[np.linspace(0, len(counts) - 1, MOST_CLIENTS).astype(int)]
    split = run.config.data.partition
    arguments = "".join(f", {name} = {value}" for name, value in split.arguments.items())
    chart = charts.heat(pd.DataFrame(counts.T), "client", "label", "examples")
    return html.figure(shown.titled(alike, f"Labels of each client ({split.name}{arguments})"), chart, said, 340)


def _alike(runs: Sequence[View], what: Callable[[View], Hashable]) -> list[list[View]]:
    """Runs together that would be shown alike."""
    found: dict[Hashable, list[View]] = {}
    for run in runs:
        found.setdefault(what(run), []).append(run)
    return list(found.values())
