"""What plotly is to draw, as plain dictionaries: lines with bands, stacked bars, heat maps."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from fedsim.palette import NEUTRAL

MOST_POINTS = 1000
"""Of a line: more could not be seen, and would only make the file larger."""
MOST_BARS = 200
MOST_TIMES = 50
"""What the highest value of a line is of that of the middle one; where it is more, the axis ends below it."""
GRID = "#e6eaee"

Chart = dict[str, Any]


class Line(NamedTuple):
    """A line over rounds with bands about it, the widest first."""

    name: str
    middle: pd.Series[float]
    bands: Sequence[tuple[str, pd.Series[float], pd.Series[float]]]
    """What each is called, its lower and its upper end."""
    color: str
    dash: str = "solid"
    whole_until: float = math.inf
    """The last round in which all runs are there; the line is thin after it."""


def lines(drawn: Sequence[Line], y: str, *, levels: Sequence[float] = (), can_diverge: bool = False) -> Chart:
    """Lines with their bands.

    Args:
        drawn: the lines.
        y: title of the axis of values: their unit.
        levels: values that are marked by a thin line.
        can_diverge: one line may be so far above most that they would be flat; the axis then ends below it.
    """
    traces: list[Chart] = []
    for line in drawn:
        for name, low, high in line.bands:
            is_there = low.notna() & high.notna()
            if is_there.any():
                traces.append(_band(f"{name}, {line.name}", low[is_there], high[is_there], line.color))
    for line in drawn:
        middle = line.middle.dropna()
        place = middle.index.searchsorted(line.whole_until, side="right")
        some = f"{line.name}, not all runs"
        for name, part, width in ((line.name, middle[:place], 2), (some, middle[max(0, place - 1) :], 0.8)):
            if width == 2 or len(part) > 1:
                traces.append(
                    {
                        **_points(part),
                        "type": "scatter",
                        "mode": "lines+markers" if len(middle) <= 60 else "lines",
                        "name": text(name),
                        "line": {"color": line.color, "dash": line.dash, "width": width},
                        "marker": {"size": 2 * width},
                        "hovertemplate": f"%{{y:.4g}}<extra>{text(name)}</extra>",
                    }
                )
    layout = _layout("round", y)
    places = [place for line in drawn for place in line.middle.index]
    pad = 0.015 * max(1, max(places) - min(places))
    layout["xaxis"] |= {"range": [min(places) - pad, max(places) + pad], **_whole(places)}
    if can_diverge and (cut := _cut([line.middle for line in drawn], levels)) is not None:
        layout["yaxis"] |= {"range": [0, cut], "title": {"text": f"{text(y)}, cut at {cut:.3g}", "standoff": 8}}
    layout["shapes"] = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level}
        | {"line": {"color": NEUTRAL, "width": 1, "dash": "dot"}}
        for level in levels
    ]
    return {"data": traces, "layout": layout | {"hovermode": "x"}}


def _cut(drawn: Sequence[pd.Series[float]], levels: Sequence[float]) -> float | None:
    """Where an axis of values ends, so that runs that diverged do not press all others flat; None for all is shown."""
    highest = [high for line in drawn if math.isfinite(high := float(line.replace(math.inf, math.nan).max()))]
    most = MOST_TIMES * statistics.median_low(highest) if highest else math.inf
    if max(highest, default=0.0) <= most:
        return None
    return 1.1 * max([*levels, *(high for high in highest if high <= most)])


def _band(name: str, low: pd.Series[float], high: pd.Series[float], color: str) -> Chart:
    """The area between two lines: out along one and back along the other."""
    above, below = _points(high), _points(low)
    fill = f"rgba({int(color[1:3], 16)},{int(color[3:5], 16)},{int(color[5:7], 16)},0.17)"
    return {
        "type": "scatter",
        "mode": "lines",
        "x": above["x"] + below["x"][::-1],
        "y": above["y"] + below["y"][::-1],
        "fill": "toself",
        "fillcolor": fill,
        "line": {"width": 0, "color": fill},
        "hoverinfo": "skip",
        "name": text(name),
    }


Stack = Mapping[str, tuple["pd.Series[float]", str, str]]
"""What is stacked, from below: name -> values by place, colour, hatching."""


def bars(parts: Stack, x: str, y: str, *, width: float = 1) -> Chart:
    """Stacked bars over numbered places.

    Args:
        parts: what is stacked.
        x: title of the axis of places.
        y: title of the axis of values, with the unit.
        width: of a bar, in places.
    """
    few = max((len(values) for values, _, _ in parts.values()), default=0) <= 60
    traces = [
        {**_bar(name, color, pattern), **_points(values), "width": (0.9 if few else 1.0) * width}
        | {"hovertemplate": f"%{{y:.3g}}<extra>{text(name)}</extra>"}
        for name, (values, color, pattern) in parts.items()
    ]
    layout = _layout(x, y) | {"barmode": "stack", "hovermode": "x"}
    layout["xaxis"] |= _whole([place for values, _, _ in parts.values() for place in values.index])
    layout["yaxis"]["rangemode"] = "tozero"
    return {"data": traces, "layout": layout}


def named_bars(parts: Stack, x: str) -> Chart:
    """Stacked bars that lie, one below the other, so that their places can have names.

    Args:
        parts: what is stacked; its places are names.
        x: title of the axis of values, with the unit.
    """
    names = list(dict.fromkeys(str(name) for values, _, _ in parts.values() for name in values.index))
    traces = [
        {**_bar(name, color, pattern), "orientation": "h", "x": _rounded(values), "y": list(range(len(values)))}
        | {"hovertemplate": f"%{{x:.3g}}<extra>{text(name)}</extra>"}
        for name, (values, color, pattern) in parts.items()
    ]
    layout = _layout(x, "") | {"barmode": "stack", "bargap": 0.25}
    shown = [name if len(name) <= 26 else f"{name[:12]}…{name[-13:]}" for name in names]
    layout["yaxis"] |= {"tickvals": list(range(len(names))), "ticktext": list(map(text, shown))}
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    layout["xaxis"] |= {"showgrid": True, "gridcolor": GRID, "rangemode": "tozero"}
    return {"data": traces, "layout": layout}


def _bar(name: str, color: str, pattern: str) -> Chart:
    hatching = {"shape": pattern, "fillmode": "overlay", "fgcolor": "#fff", "size": 7, "solidity": 0.25}
    return {"type": "bar", "name": text(name), "marker": {"color": color, "pattern": hatching, "line": {"width": 0}}}


def heat(values: pd.DataFrame, x: str, y: str, unit: str) -> Chart:
    """A map of whole numbers, rows upwards."""
    trace = {
        "type": "heatmap",
        "x": values.columns.tolist(),
        "y": values.index.tolist(),
        "z": values.astype(int).to_numpy().tolist(),
        "colorscale": [[0, "#f4f8fb"], [0.25, "#b5d4e9"], [0.5, "#6baed6"], [0.75, "#2474b7"], [1, "#08306b"]],
        "zmin": 0,  # white is none
        "zmax": int(values.to_numpy().max()),
        "colorbar": {"thickness": 10, "outlinewidth": 0, "title": {"text": text(unit), "side": "right"}},
        "hovertemplate": f"{text(x)} %{{x}}, {text(y)} %{{y}}: %{{z:,}} {text(unit)}<extra></extra>",
    }
    layout = _layout(x, y)
    layout["xaxis"] |= _whole(range(values.shape[1]))
    layout["yaxis"] |= {"showgrid": False} | ({"dtick": 1} if len(values) <= 20 else {})
    return {"data": [trace], "layout": layout}


def text(value: str) -> str:
    """A string that plotly shows as it is: it would take tags in it for markup."""
    return html.escape(value, quote=False)


def thin(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame by round with at most `MOST_POINTS` rows and some: every so many, the first and the last."""
    step = -(-len(frame) // MOST_POINTS)
    if step <= 1:
        return frame
    return frame.iloc[sorted({*range(0, len(frame), step), len(frame) - 1})]


def _whole(places: Sequence[float]) -> Chart:
    """Ticks at whole numbers, also where there are few."""
    return {"dtick": 1} if max(places) - min(places) <= 10 else {}


def _points(values: pd.Series[float]) -> dict[str, list[Any]]:
    return {"x": values.index.tolist(), "y": _rounded(values)}


def _rounded(values: pd.Series[float]) -> list[float | None]:
    """Five digits: more cannot be seen."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.astype(float).tolist()]


def _layout(x: str, y: str) -> Chart:
    axis = {"automargin": True, "zeroline": False, "linecolor": "#9aa5b1", "ticks": "outside", "tickcolor": "#9aa5b1"}
    return {
        "xaxis": {**axis, "title": {"text": text(x), "standoff": 8}, "showgrid": False, "showline": True},
        "yaxis": {**axis, "title": {"text": text(y), "standoff": 8}, "gridcolor": GRID, "ticks": ""},
        "margin": {"l": 20, "r": 12, "t": 10, "b": 20},
        "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif", "size": 12}
        | {"color": "#3e4c59"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
    }
