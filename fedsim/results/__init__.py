"""A run's folder: written while the run goes on, readable at any moment, never half-written."""

from fedsim.results.folder import begin, go_on
from fedsim.results.parts import Whole, find_whole, read
from fedsim.results.run import Run, load_run
from fedsim.results.runs import Runs, load_runs
from fedsim.results.writer import RunWriter

__all__ = [
    "Run",
    "RunWriter",
    "Runs",
    "Whole",
    "begin",
    "find_whole",
    "go_on",
    "load_run",
    "load_runs",
    "read",
]
