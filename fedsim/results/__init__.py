"""A run's folder: written while the run goes on, readable at any moment, never half-written."""

from fedsim.results.run import Run, Runs, find_runs, load_run, load_runs, path_of
from fedsim.results.writer import RunWriter

__all__ = ["Run", "RunWriter", "Runs", "find_runs", "load_run", "load_runs", "path_of"]
