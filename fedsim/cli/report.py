"""`fedsim report`: a page with plots of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsim.cli.options import DebugOption, ResultsOption, RunsArgument, parsed_targets
from fedsim.cli.terminal import console
from fedsim.run_folder import paths_of


def report(
    runs: RunsArgument,
    results: ResultsOption = Path("results"),
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page; without it report.html, in the run's folder or that of all runs."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=VALUE",
            help="Says when each run came to it, for example test_accuracy=0.97; can be repeated.",
        ),
    ] = None,
    debug: DebugOption = False,  # read by `main`
) -> None:
    """Writes one HTML page with plots of runs; it works offline."""
    goals = parsed_targets(target)
    folders = paths_of(runs, results)
    from fedsim.reporting import write
    from fedsim.results import load_runs
    from fedsim.views import views

    path = write(views(load_runs(folders)), output, goals)
    console.print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, for a browser, also offline")
