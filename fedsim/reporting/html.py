"""The pieces of a report's page, as HTML. Whatever comes from a run's files is escaped here, and only here."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

START = "<!DOCTYPE html>"

Chart = Mapping[str, Any]
"""What plotly draws: `data` and `layout`."""


def escape(value: object) -> str:
    """A value as text of the page."""
    return html.escape(str(value))


def paragraph(text: str, kind: str = "") -> str:
    """Words."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """A table that scrolls inside its own box; the first column names the rows, numbers stand right."""
    found = [list(row) for row in rows]
    head = "".join(
        f'<th scope="col"{_class(_kind([row[place] for row in found]))}>{_breakable(name)}</th>'
        for place, name in enumerate(headers)
    )
    body = "".join(
        f'<tr><th scope="row"{_class(_kind([first]))}>{escape(first)}</th>'
        + "".join(f"<td{_class(_kind([value]))}>{escape(_shown(value))}</td>" for value in rest)
        + "</tr>"
        for first, *rest in found
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption or headers[0])}">'
        f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _breakable(name: str) -> str:
    """A heading that may go on in a new line after each part of a key."""
    return escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _kind(values: Sequence[object]) -> str:
    """How cells are set: numbers to the right, and what is long may be broken anywhere."""
    if values and all(isinstance(value, int | float) for value in values):
        return "number"
    return "long" if len(values) == 1 and len(str(values[0])) > 32 else ""


def _shown(value: object) -> str:
    return number(value, 4) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def number(value: float, digits: int = 3) -> str:
    """A number for a person: so many digits, and all before the point; nothing for one that is none."""
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}" if isinstance(value, int) else "" if math.isnan(value) else str(value)
    digits = max(digits, len(str(int(abs(value)))))
    return f"{float(f'{value:.{digits}g}'):,.12g}"


def figure(title: str, chart: Chart, summary: str, height: int = 300) -> str:
    """A chart with its title, and in words what it shows: for those who cannot see it, and to read at a glance."""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<div class="chart" role="img" aria-label="{escape(f"{title}. {summary}")}" style="height:{height}px"></div>'
        f'<script type="application/json">{data(chart)}</script>'
        f"<p>{escape(summary)}</p></figure>"
    )


def charts(figures: Sequence[str]) -> str:
    """Charts side by side where there is room."""
    return f'<div class="charts">{"".join(figures)}</div>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """What the lines or areas of the charts below are: pairs of a `line_key` or `area_key` and a name."""
    items = "".join(f"<li>{key}<span>{escape(name)}</span></li>" for key, name in entries)
    return f'<ul class="legend">{items}</ul>'


def line_key(color: str, dash: str) -> str:
    """A piece of a line."""
    gaps = {"solid": "none", "dash": "7 5", "dot": "2 4", "dashdot": "7 4 2 4"}[dash]
    return (
        '<svg width="34" height="10" aria-hidden="true"><line x1="1" y1="5" x2="33" y2="5" '
        f'stroke="{color}" stroke-width="3" stroke-dasharray="{gaps}"/></svg>'
    )


def area_key(color: str, pattern: str, opacity: float = 1.0) -> str:
    """A piece of an area or bar, with its number's hatching."""
    lines = {
        "": "",
        "/": "M0 14L14 0M10 14L24 0M-10 14L4 0",
        ".": "M3 4h2M10 4h2M17 4h2M3 10h2M10 10h2M17 10h2",
        "x": "M0 14L14 0M10 14L24 0M0 0L14 14M10 0L24 14",
    }[pattern]
    return (
        f'<svg width="24" height="14" aria-hidden="true"><rect width="24" height="14" fill="{color}" '
        f'fill-opacity="{opacity}"/><path d="{lines}" stroke="#fff" stroke-width="1.5"/></svg>'
    )


def data(value: object) -> str:
    """JSON that no string in it can end: a script's content ends at the first `</script`, wherever that stands."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page(title: str, header: str, sections: Mapping[str, str], footer: str) -> str:
    """The whole page. It asks nobody for anything: its policy lets it run these two scripts, and load nothing."""
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), _part("page.js")]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" for code in scripts
    )
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
    anchors = {name: f"s{number}" for number, name in enumerate(sections)}
    links = "".join(f'<li><a href="#{anchors[name]}">{escape(name)}</a></li>' for name in sections)
    body = "".join(
        f'<section aria-labelledby="{anchors[name]}"><h2 id="{anchors[name]}">{escape(name)}</h2>{content}</section>'
        for name, content in sections.items()
    )
    return f"""{START}
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_part("page.css")}</style>
</head>
<body>
<header>{header}<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main>{body}</main>
<footer>{footer}</footer>
{"".join(f"<script>{code}</script>" for code in scripts)}
</body>
</html>
"""


def _part(name: str) -> str:
    return files("fedsim.reporting").joinpath(name).read_text(encoding="utf-8")


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
