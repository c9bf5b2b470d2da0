"""The report of runs: one HTML page that holds all it needs, and asks nobody for anything.

    shown        the runs of a report, in groups
    html         the page and its pieces; everything from a run's files is escaped there
    charts       what plotly draws
    header, learning, clients, costs, settings    the sections

To add a section, write a function and give it a line in SECTIONS.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from fedsim.datasets import Dataset
from fedsim.errors import InputError, RunFolderError
from fedsim.files import publish
from fedsim.reporting import clients, costs, html, learning, settings
from fedsim.reporting.header import footer, header, title
from fedsim.reporting.html import page
from fedsim.reporting.shown import Shown
from fedsim.results.runs import Given
from fedsim.targets import Target, targets
from fedsim.views import View, views

__all__ = ["SECTIONS", "home", "report", "write"]

Section = Callable[[Shown], str | None]
"""From the runs to HTML; None where they have nothing for it."""


def report(
    runs: Given | Iterable[Given],
    path: str | os.PathLike[str] | None = None,
    *,
    target: Mapping[str, float] | None = None,
    dataset: Dataset | None = None,
) -> Path:
    """Writes a page with plots of runs: of one, or of several side by side. It works offline.

    Damaged part files are left out, with a `FedsimWarning` for each; the page names them too.

    Args:
        runs: runs, their folders, or patterns such as "results/*"; they may still be going.
        path: the file; None for report.html in the run's folder, or in the folder that all runs are in.
        target: what the runs were to reach, such as {"test_accuracy": 0.97}; the page says in which round they did.
        dataset: of runs that had one of their own; shows which labels their clients have.

    Returns:
        The file.

    Raises:
        InputError: there is no run, one cannot be read, or the file cannot be written.
    """
    return write(views(runs), None if path is None else Path(path), targets(target or {}), dataset)


def write(runs: Sequence[View], path: Path | None, goals: Sequence[Target], dataset: Dataset | None = None) -> Path:
    """See `report`."""
    path = home(runs) if path is None else path
    shown = Shown(runs, goals, dataset)
    content = {name: made for name, section in SECTIONS.items() if (made := section(shown))}
    text = page(f"{title(shown)} · fedsim", header(shown), content, footer())
    try:
        _check_replaceable(path)
        publish(path.resolve(), text.encode("utf-8", "replace"))  # what a file names may be no text
    except (OSError, RuntimeError) as error:  # the second: links in a circle
        reason = getattr(error, "strerror", None) or error
        raise RunFolderError(f"cannot write {path}: {reason}; name another file") from None
    return path


def _check_replaceable(path: Path) -> None:
    """Lets pass what a report may replace: an HTML page, or nothing.

    Raises:
        RunFolderError: it is something else.
        OSError: it cannot be read.
    """
    if path.is_dir():
        raise RunFolderError(f"{path} is a folder; name a file, for example {path / 'report.html'}")
    if path.exists() and not (path.is_file() and _is_page(path)):
        raise RunFolderError(f"{path} is there and no HTML page, so it is not replaced; name another file")


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(html.START)).lower() in (b"", html.START.lower().encode())


def home(runs: Sequence[View]) -> Path:
    """Where the report of runs goes that nobody named a file for.

    Raises:
        InputError: a run has no folder.
    """
    folders = [run.path for run in runs if run.path is not None]
    if len(folders) < len(runs):
        raise InputError("a run that was not written has no folder for its report: name a file")
    if len(folders) == 1:
        return folders[0] / "report.html"
    parents = {folder.absolute().parent: folder.parent for folder in folders}
    return (next(iter(parents.values())) if len(parents) == 1 else Path()) / "report.html"


SECTIONS: dict[str, Section] = {
    "Accuracy and loss": learning.curves,
    "Rounds to target": learning.targets,
    "Fairness": learning.fairness,
    "Participation": clients.participation,
    "The clients' training": clients.distributions,
    "Who has which labels": clients.partition,
    "Where the time went": costs.time,
    "Payload": costs.payload,
    "Failures and retries": costs.mishaps,
    "Configuration": settings.configuration,
    "Environment": settings.environment,
}
