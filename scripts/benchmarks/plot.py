"""The figure, made from the Parquet files alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.section import medians
from benchmarks.systems import Measured
from benchmarks.tasks import BOUND, Task

COLORS = {"fedsim": "#1b6ca8", "plain loop": "#9a9a9a", "original program": "#5c5c5c", "Flower": "#e3a008"}


def write(folder: Path, tasks: Mapping[str, Task]) -> None:
    """Draws what the folder has: speed of each task, the scale series, memory over a long run."""
    measured = {name: found for name in tasks if (found := report.load(folder, name))}
    speeds = {name: found for name, found in measured.items() if tasks[name].kind == "speed"}
    panels = [("speed", speeds)] if speeds else []
    for kind in ("scale", "memory"):
        panels += [(kind, {name: measured[name]}) for name in measured if tasks[name].kind == kind]
    if not panels:
        return
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 4 * rows), layout="constrained")
    for axes, (kind, shown) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        axes.spines[["top", "right"]].set_visible(False)
        PANELS[kind](axes, shown, tasks)
    with mpl.rc_context({"svg.hashsalt": "fedsim", "svg.fonttype": "none"}):  # equal data, equal file
        figure.savefig(folder / report.FIGURE, metadata={"Date": None})


def _speed(axes: Axes, found: Mapping[str, Measured], tasks: Mapping[str, Task]) -> None:
    """Speed over that of the plain loop, and the bound as a line."""
    for place, measured in enumerate(found.values()):
        seconds = medians(measured.rounds, "round_s")
        systems = [system for system in COLORS if system in seconds]
        width = 0.8 / len(systems)
        for number, system in enumerate(systems):
            left = place - 0.4 + number * width
            height = seconds["plain loop"] / seconds[system]
            axes.bar(left, height, width, align="edge", color=COLORS[system])
            axes.text(left + width / 2, height, f"{height:.2g}", ha="center", va="bottom", fontsize=7)
        if BOUND in seconds:
            axes.hlines(seconds["plain loop"] / seconds[BOUND], place - 0.4, place + 0.4, "black", "dotted")
    axes.set_xticks(range(len(found)), [name.replace("_", " ") for name in found])
    axes.set_title("times as fast as the plain loop, a warm round")
    names = [axes.bar(0, 0, color=color, label=system) for system, color in COLORS.items()]
    names.append(axes.plot([], [], "k:", label=BOUND)[0])
    axes.legend(handles=names, fontsize=7, frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _scale(axes: Axes, found: Mapping[str, Measured], tasks: Mapping[str, Task]) -> None:
    """Seconds a round and memory, over what grows."""
    ((name, measured),) = found.items()
    seconds = medians(measured.rounds, "round_s")
    axes.plot(list(seconds), list(seconds.values()), "o-", color=COLORS["fedsim"])
    axes.set_ylim(0, 1.25 * max(seconds.values()))
    axes.set_ylabel("seconds a round", color=COLORS["fedsim"])
    axes.tick_params("x", labelsize=8)
    memory = axes.twinx()
    memory.spines["top"].set_visible(False)
    peaks = report.peaks(measured.memory)["together"] / 1e6
    memory.plot(list(peaks.index), peaks, "s--", color=COLORS["Flower"])
    memory.set_ylim(0, 1.25 * peaks.max())
    memory.set_ylabel("peak memory, driver and actors (MB)", color=COLORS["Flower"])
    axes.set_title(tasks[name].title.partition(" (")[0])


def _memory(axes: Axes, found: Mapping[str, Measured], tasks: Mapping[str, Task]) -> None:
    """Memory over the rounds."""
    ((name, measured),) = found.items()
    memory = measured.memory.loc[measured.memory["round"] >= 0]
    for role, color in (("driver", COLORS["plain loop"]), ("actors", COLORS["fedsim"])):
        axes.plot(memory["round"], memory[role] / 1e6, color=color, label=role)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("round")
    axes.set_ylabel("memory (MB, PSS)")
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(tasks[name].title)


PANELS = {"speed": _speed, "scale": _scale, "memory": _memory}
