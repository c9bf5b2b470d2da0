"""The plots of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mcmahan2017.plan import Plan
from mcmahan2017.store import Store

if TYPE_CHECKING:
    from mcmahan2017.page import Outcome

RATIOS = "ratios.svg"
CURVES = "curves.svg"
_START, _END = 0.07, 2.3
"""Of the axis of ratios."""
_COLORS = {0.0: "#d55e00", 0.1: "#0072b2", 0.2: "#009e73", 0.5: "#cc79a7", 1.0: "#5c5c5c"}


def write(plan: Plan, store: Store, outcomes: Sequence[Outcome]) -> None:
    """Draws both."""
    figures = {RATIOS: _ratios(plan, outcomes), CURVES: _curves(plan, store, outcomes)}
    with mpl.rc_context({"svg.hashsalt": "fedsim", "svg.fonttype": "none"}):  # equal data, equal file
        for name, figure in figures.items():
            figure.savefig(store.folder / name, metadata={"Date": None})


def _ratios(plan: Plan, outcomes: Sequence[Outcome]) -> Figure:
    """A point a cell with a verdict, its interval, and the band."""
    judged = (each for each in outcomes if each.verdict in ("inside", "outside"))
    shown = sorted(judged, key=lambda each: each.cell.name)
    figure = Figure(figsize=(8, 1.4 + 0.26 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, each in enumerate(shown):
        low, high = plan.band(each.cell)
        axes.fill_betweenx([place - 0.4, place + 0.4], low, high, color="#dfe9f2", linewidth=0)
        color = "#0072b2" if each.verdict == "inside" else "#d55e00"
        if each.rounds is None:  # beyond the cap, or never
            axes.plot(_END, place, ">", color=color, markersize=7)
            said = f"{each.num_reached} of {len(plan.verdict_seeds)} seeds "
            axes.text(_END * 0.95, place, said, ha="right", va="center", fontsize=7, color=color)
            continue
        ends = [bound / each.cell.published for bound in (each.rounds.low, each.rounds.high)]
        axes.plot([max(ends[0], _START), ends[1]], [place, place], color=color, linewidth=1)
        axes.plot(each.ratio, place, "o" if each.verdict == "inside" else "s", color=color, markersize=5)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="dotted")
    axes.set_xscale("log")
    axes.set_xlim(_START, _END * 1.1)
    axes.set_xticks([0.1, 0.25, 0.5, 0.8, 1, 1.25, 2], ["0.1", "0.25", "0.5", "0.8", "1", "1.25", "2"])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(shown)), [each.cell.name.replace("-", " ") for each in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(
        "rounds to the target over the paper's\n(shaded: the band; square: outside; arrow: not all seeds came to it)"
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _curves(plan: Plan, store: Store, outcomes: Sequence[Outcome]) -> Figure:
    """The best test accuracy so far by round: Table 1 as far as it was run, all seeds of the verdict."""
    panels: dict[tuple[str, str, int], list[Outcome]] = {}
    for each in sorted(outcomes, key=_place):
        if each.cell.table == 1 and len(_curves_of(plan, store, each)):
            panels.setdefault(_kind(each), []).append(each)
    rows = max(1, -(-len(panels) // 2))
    figure = Figure(figsize=(9, 3.5 * rows), layout="constrained")
    all_axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    for axes, ((model, partition, batch_size), shown) in zip(all_axes, panels.items(), strict=False):
        for each in shown:
            _draw(axes, plan, store, each)
        target = shown[0].cell.target
        axes.axhline(target, color="black", linewidth=0.8, linestyle="dotted")
        axes.set_ylim(0.8 if model == "2nn" else 0.94, target + 0.01 if model == "2nn" else 0.995)
        axes.set_xscale("log")
        data = "IID" if partition == "iid" else "non-IID"
        axes.set_title(f"{model.upper()}, {data}, B = {batch_size or 'inf'}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.supxlabel("round (dotted: the target; crosses: the paper, there)", fontsize=9)
    figure.supylabel("best test accuracy so far", fontsize=9)
    return figure


def _kind(each: Outcome) -> tuple[str, str, int]:
    return each.cell.model, each.cell.partition, each.cell.batch_size


def _place(each: Outcome) -> tuple[str, bool, str, float]:
    model, partition, batch_size = _kind(each)
    return model, batch_size == 0, partition, each.cell.per_round


def _curves_of(plan: Plan, store: Store, each: Outcome) -> pd.DataFrame:
    """Of the verdict's seeds."""
    rows = store.curves[(store.curves["cell"] == each.cell.name) & (store.curves["lr"] == each.rate)]
    return rows[rows["seed"].isin(plan.verdict_seeds)]


def _draw(axes: Axes, plan: Plan, store: Store, each: Outcome) -> None:
    color = _COLORS[each.cell.per_round]
    for number, (_, curve) in enumerate(_curves_of(plan, store, each).groupby("seed")):
        label = f"C = {each.cell.per_round:g}" if number == 0 else None
        axes.plot(curve["round"], curve["test_accuracy"].cummax(), color=color, linewidth=1, label=label)
    if each.cell.published:
        axes.plot(each.cell.published, each.cell.target, "x", color=color)
