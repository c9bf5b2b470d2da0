"""What was run, and on what: config.toml and run.json as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedsim.config import Config
from fedsim.config.changes import flat, text
from fedsim.reporting import html
from fedsim.reporting.shown import Shown

_NOT_HERE = ("name", "status", "error", "fedsim_run", "num_dropped")
"""Entries of run.json that are said elsewhere."""


def configuration(shown: Shown) -> str | None:
    """Every key: of one run with its default, of several what differs first."""
    found = {run.name: dict(flat(run.config.to_dict())) for run in shown.runs}
    if not shown.is_one:
        return _compared(found)
    ((_, values),) = found.items()
    defaults = dict(flat(Config().to_dict()))
    rows = [
        [key, text(value), "" if key not in defaults or defaults[key] == value else text(defaults[key])]
        for key, value in values.items()
    ]
    return html.table(["key", "value", "default, where it is another"], rows)


def environment(shown: Shown) -> str | None:
    """Versions, machine, placement, times and hashes."""
    found = {run.name: {key: value for key, value in _entries(run.info) if key not in _NOT_HERE} for run in shown.runs}
    if not any(found.values()):
        return None
    if shown.is_one:
        ((_, values),) = found.items()
        return html.table(["entry of run.json", "value"], [[key, text(value)] for key, value in values.items()])
    return _compared(found)


def _entries(info: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of run.json, dotted; of each time that the run went on its round, when, and what was another."""
    parts = [
        f"round {part.get('from_round')} ({', '.join(map(str, [part.get('at'), *(part.get('unlike') or [])]))})"
        for part in info.get("resumes", [])
        if isinstance(part, dict)
    ]
    yield from flat({**info, "resumes": parts} if parts else info)


def _compared(found: Mapping[str, Mapping[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for values in found.values() for key in values))
    texts = {name: {key: text(values[key]) if key in values else "" for key in keys} for name, values in found.items()}
    one = next(iter(texts.values()))
    differing = [key for key in keys if any(values[key] != one[key] for values in texts.values())]
    same = [[key, one[key]] for key in keys if key not in differing]
    made = ""
    if differing:
        rows = [[name, *(values[key] for key in differing)] for name, values in texts.items()]
        made = html.table(["run", *differing], rows, "What differs")
    return made + (html.table(["key", "value"], same, "What all share") if same else "")
