"""What plotly is to draw, as plain dictionaries: lines with bands, stacked bars, heat maps."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from fedsim.palette import NEUTRAL

MOST_POINTS = 1000
"""Of a line: more could not be seen, and would only make the file larger."""
MOST_BARS = 200

Chart = dict[str, Any]


class Line(NamedTuple):
    """A line over rounds with bands about it, the widest first."""

    name: str
    middle: pd.Series[float]
    bands: Sequence[tuple[str, pd.Series[float], pd.Series[float]]]
    """What each is called, its lower and its upper end."""
    color: str
    dash: str = "solid"


def lines(drawn: Sequence[Line], y: str, *, levels: Sequence[float] = ()) -> Chart:
    """Lines with their bands.

    Args:
        drawn: the lines.
        y: title of the axis of values: their unit.
        levels: values that are marked by a thin line.
    """
    traces: list[Chart] = []
    for line in drawn:
        for name, low, high in line.bands:
            is_there = low.notna() & high.notna()
            if is_there.any():
                traces += _band(f"{name}, {line.name}", low[is_there], high[is_there], line.color)
    for line in drawn:
        middle = line.middle.dropna()
        traces.append(
            {
                **_points(middle),
                "type": "scatter",
                "mode": "lines+markers" if len(middle) <= 60 else "lines",
                "name": text(line.name),
                "line": {"color": line.color, "dash": line.dash, "width": 2},
                "marker": {"size": 4},
                "hovertemplate": f"%{{y:.4g}}<extra>{text(line.name)}</extra>",
            }
        )
    layout = _layout("round", y)
    places = [place for line in drawn for place in line.middle.index]
    pad = 0.015 * max(1, max(places) - min(places))
    layout["xaxis"]["range"] = [min(places) - pad, max(places) + pad]
    layout["shapes"] = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level}
        | {"line": {"color": NEUTRAL, "width": 1, "dash": "dot"}}
        for level in levels
    ]
    return {"data": traces, "layout": layout | {"hovermode": "x"}}


def _band(name: str, low: pd.Series[float], high: pd.Series[float], color: str) -> list[Chart]:
    """The area between two lines: out along one and back along the other."""
    above, below = _points(high), _points(low)
    fill = f"rgba({int(color[1:3], 16)},{int(color[3:5], 16)},{int(color[5:7], 16)},0.17)"
    outline = {"x": above["x"] + below["x"][::-1], "y": above["y"] + below["y"][::-1]}
    return [
        {
            **outline,
            "type": "scatter",
            "mode": "lines",
            "fill": "toself",
            "fillcolor": fill,
            "line": {"width": 0, "color": fill},
            "hoverinfo": "skip",
            "name": text(name),
        }
    ]


def bars(
    parts: Mapping[str, tuple[pd.Series[float], str, str]],
    x: str,
    y: str,
    *,
    is_sideways: bool = False,
    width: float = 1,
) -> Chart:
    """Stacked bars.

    Args:
        parts: what is stacked: name -> values by place, colour, hatching.
        x: title of the axis of places.
        y: title of the axis of values, with the unit.
        is_sideways: the bars lie, so that their places can have long names.
        width: of a bar, in places.
    """
    traces = []
    for name, (values, color, pattern) in parts.items():
        points = _points(values)
        traces.append(
            {
                "type": "bar",
                "name": text(name),
                "marker": {
                    "color": color,
                    "pattern": {
                        "shape": pattern,
                        "fillmode": "overlay",
                        "fgcolor": "#fff",
                        "size": 7,
                        "solidity": 0.25,
                    },
                },
                "hovertemplate": f"%{{{'x' if is_sideways else 'y'}:.3g}}<extra>{text(name)}</extra>",
                **({"x": points["y"], "y": points["x"], "orientation": "h"} if is_sideways else points),
                **({} if is_sideways else {"width": 0.9 * width}),
            }
        )
    layout = _layout(*((y, x) if is_sideways else (x, y))) | {"barmode": "stack", "bargap": 0.25}
    if is_sideways:
        layout["yaxis"] |= {"autorange": "reversed", "type": "category", "rangemode": "normal", "showgrid": False}
        layout["xaxis"] |= {"showgrid": True, "rangemode": "tozero"}
    else:
        layout["yaxis"]["rangemode"] = "tozero"
        layout["hovermode"] = "x"
    return {"data": traces, "layout": layout}


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


def _points(values: pd.Series[float]) -> dict[str, list[Any]]:
    places: Iterable[Any] = values.index.tolist()
    return {"x": [text(place) if isinstance(place, str) else place for place in places], "y": _rounded(values)}


def _rounded(values: pd.Series[float]) -> list[float | None]:
    """Five digits: more cannot be seen."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.astype(float).tolist()]


def _layout(x: str, y: str) -> Chart:
    axis = {"automargin": True, "zeroline": False, "linecolor": "#9aa5b1", "ticks": "outside", "tickcolor": "#9aa5b1"}
    return {
        "xaxis": {**axis, "title": {"text": text(x), "standoff": 8}, "showgrid": False, "showline": True},
        "yaxis": {**axis, "title": {"text": text(y), "standoff": 8}, "gridcolor": "#e6eaee", "ticks": ""},
        "margin": {"l": 20, "r": 12, "t": 10, "b": 20},
        "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif", "size": 12}
        | {"color": "#3e4c59"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
    }
