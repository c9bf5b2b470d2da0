"""Plots of runs for notebooks, on matplotlib: each takes runs or their folders, and returns the Axes it drew on.

    ax = fedsim.plot.accuracy("results/*", target=0.97)
    ax.figure.savefig("accuracy.png")

A run may still be going: what is there is drawn. Damaged part files are left out, with a `FedsimWarning` for each.
`ax=` draws into a figure of your own, which keeps its size: make it as high as a long legend below the axes needs.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

import pandas as pd

from fedsim.datasets import Dataset
from fedsim.groups import groups, one_a_seed
from fedsim.palette import COLORS, NEUTRAL, look
from fedsim.results.runs import Given
from fedsim.summaries import by_number, curve, over_seeds, summary
from fedsim.targets import Target
from fedsim.views import PARTS, View, check_measured, labels, measure, quantiles, seconds, thinned, view, views

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["accuracy", "clients", "partition", "timing"]

_LINES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
_HATCHES = {"fit": "", "aggregate": "///", "evaluate": "...", "rest": "xx"}
_FEW = 40
"""Points of a line that are marked one by one."""
_MOST_BARS = 100


def accuracy(runs: Given | Iterable[Given], *, target: float | None = None, ax: Axes | None = None) -> Axes:
    """Test accuracy by round, a line for each group of runs that differ in their seed only.

    The line is the mean over the seeds, thin where some of them have ended; the band is its confidence interval (see
    `statistics`). Of several runs of one seed, the longest counts.

    Args:
        runs: runs, their folders, or patterns such as "results/*".
        target: an accuracy; the legend says in which round each group came to it, as in McMahan et al. 2017.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: there is no run, one cannot be read, or the target cannot be reached.
    """
    shown = views(runs)
    goal = None if target is None else Target("test_accuracy", target)
    found, is_given, ax = groups(shown), ax is not None, _axes(ax)
    ends = [f": {reached}" for reached in _reached(shown, goal)] if goal else [""] * len(found)
    for place, ((name, members), end) in enumerate(zip(found.items(), ends, strict=True)):
        members = one_a_seed(members)
        frame = curve(members, "test_accuracy").astype(float)
        color, dash = look(place)
        marker, seeds = "o" if len(frame) <= _FEW else "", f" ({len(members)} seeds)" if len(members) > 1 else ""
        of_all, of_some = by_number(frame)
        ax.plot(
            of_all.index,
            of_all["mean"],
            _LINES[dash],
            color=color,
            marker=marker,
            markersize=3,
            label=f"{name}{seeds}{end}",
        )
        if len(of_some):
            ax.plot(of_some.index, of_some["mean"], _LINES[dash], color=color, linewidth=0.6)
        ax.fill_between(frame.index, frame["low"], frame["high"], color=color, alpha=0.18, linewidth=0)
    if goal:
        ax.axhline(goal.value, color=NEUTRAL, linewidth=1, linestyle=(0, (1, 2)))
    _dress(ax, "round", "test accuracy (fraction)", shown[0].name if len(shown) == 1 else "")
    if len(shown) > 1 or goal:
        _legend_below(ax, grows=not is_given)
    return ax


def partition(run: Given, *, dataset: Dataset | None = None, ax: Axes | None = None) -> Axes:
    """Which labels each client has, as a heat map of its training examples.

    Args:
        run: a run or its folder.
        dataset: the data set, where the run had one of its own.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: it is no run, or its data set is not here.
    """
    shown = view(run)
    counts, ax = labels(shown, dataset), _axes(ax)
    image = ax.imshow(counts.to_numpy().T, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest", origin="lower")
    ax.figure.colorbar(image, ax=ax, label="training examples").outline.set_visible(False)
    split = shown.config.data.partition
    arguments = "".join(f", {name}={value}" for name, value in split.arguments.items())
    _dress(ax, "client", "label", f"{shown.name}: {split.name}{arguments}")
    ax.grid(False)
    ax.locator_params(axis="both", integer=True)
    if counts.shape[1] <= 20:
        ax.set_yticks(range(counts.shape[1]))
    return ax


def clients(run: Given, column: str = "train_loss", *, ax: Axes | None = None) -> Axes:
    """How a column of clients.parquet is distributed over the completed clients, by round.

    Args:
        run: a run or its folder.
        column: a number, such as train_loss, update_l2_norm, cosine_to_mean or fit_s.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: it is no run, there is no such column, or it is empty.
    """
    shown, known = view(run), measure(column)
    check_measured(shown, column)
    frame, ax = quantiles([shown], column), _axes(ax)
    for low, high, alpha, name in ((0.05, 0.95, 0.15, "5 to 95 %"), (0.25, 0.75, 0.3, "25 to 75 %")):
        ax.fill_between(
            frame.index, frame[low], frame[high], color=COLORS[0], alpha=alpha, linewidth=0, label=f"{name} of clients"
        )
    marker = "o" if len(frame) <= _FEW else ""
    ax.plot(frame.index, frame[0.5], color=COLORS[0], marker=marker, markersize=3, label="median client")
    unit = f" ({known.unit})" if known.unit else ""
    _dress(ax, "round", f"{column}{unit}", shown.name)
    ax.legend(frameon=False, fontsize="small", loc="best")
    return ax


def timing(run: Given, *, ax: Axes | None = None) -> Axes:
    """Where the time of each round went, stacked; of many rounds, the means of equally many.

    Args:
        run: a run or its folder.
        ax: where to draw; None makes a figure.

    Raises:
        InputError: it is no run.
    """
    shown = view(run)
    whole = seconds(shown)
    frame, width = thinned(whole, _MOST_BARS)
    is_given, ax, total = ax is not None, _axes(ax), whole.to_numpy().sum()
    below = pd.Series(0.0, frame.index)
    for color, (part, name) in zip(COLORS, PARTS.items(), strict=False):
        share = f", {100 * whole[part].sum() / total:.0f} %" if total > 0 else ""
        ax.bar(
            frame.index + (width - 1) / 2,
            frame[part],
            0.9 * width,
            bottom=below,
            color=color,
            hatch=_HATCHES[part],
            edgecolor="white",
            linewidth=0,
            label=f"{name}{share}",
        )
        below = below + frame[part]
    _dress(ax, "round" if width == 1 else f"round (means of {width})", "time of a round (s)", shown.name)
    ax.set_ylim(bottom=0)
    _legend_below(ax, columns=2, grows=not is_given)
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7, 4), layout="constrained")[1]


def _dress(ax: Axes, x: str, y: str, title: str) -> None:
    """The same quiet look for all, whatever the caller's settings."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, loc="left", fontsize="medium", parse_math=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#E3E7EA", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _legend_below(ax: Axes, columns: int = 1, *, grows: bool) -> None:
    """Where it hides nothing, however long the names are.

    Args:
        ax: with what is drawn.
        columns: of the legend.
        grows: whether the figure, one of our own, gets the legend's height on top, so that the axes keep theirs.
    """
    from matplotlib.figure import Figure
    from matplotlib.transforms import ScaledTranslation

    figure, (handles, names) = ax.figure, ax.get_legend_handles_labels()
    gap = 3.2 * float(ax.xaxis.label.get_fontsize()) / 72  # inches, for the ticks and the name of the axis below them
    legend = ax.legend(
        handles,
        [textwrap.fill(name, 88 if grows else 64) for name in names],
        frameon=False,
        fontsize="small",
        loc="upper left",
        bbox_to_anchor=(-0.02, 0),
        bbox_transform=ax.transAxes + ScaledTranslation(0, -gap, figure.dpi_scale_trans),
        ncols=columns,
    )
    if grows and isinstance(figure, Figure):
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + legend.get_window_extent().height / figure.dpi)


def _reached(shown: list[View], goal: Target) -> list[str]:
    """For each group, in which round it came to the target, in words."""
    found = over_seeds(summary(shown, goal))
    said = []
    for row in found[found["measure"] == "rounds_to_target"].to_dict("records"):
        some = f" in {row['number']} of {row['of']} runs" if row["number"] < row["of"] else ""
        said.append(
            f"{goal.value:g} in {row['mean']:.1f} rounds{some}" if row["number"] else f"{goal.value:g} not reached"
        )
    return said
