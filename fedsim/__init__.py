"""Federated learning simulated with Ray: each client an actor, each round a row of Parquet.

The public names are below; they are imported when first used, so that `import fedsim` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim import plot as plot
    from fedsim.config import Config as Config
    from fedsim.datasets import Dataset as Dataset
    from fedsim.errors import FedsimError as FedsimError
    from fedsim.presets import preset as preset
    from fedsim.recording import run as run
    from fedsim.reporting import report as report
    from fedsim.results import Run as Run
    from fedsim.results import load_run as load_run
    from fedsim.results import load_runs as load_runs
    from fedsim.resumption import resume as resume
    from fedsim.simulation import rounds as rounds
    from fedsim.strategies import Strategy as Strategy
    from fedsim.sweeps import sweep as sweep
    from fedsim.verification import replay as replay
    from fedsim.verification import verify as verify

__version__ = "0.1.0"

_HOME = {
    "run": "recording",
    "resume": "resumption",
    "rounds": "simulation",
    "sweep": "sweeps",
    "verify": "verification",
    "replay": "verification",
    "report": "reporting",
    "load_run": "results",
    "load_runs": "results",
    "preset": "presets",
    "Config": "config",
    "Dataset": "datasets",
    "Run": "results",
    "Strategy": "strategies",
    "FedsimError": "errors",
}

__all__ = ["__version__", "plot", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "plot":
        return importlib.import_module("fedsim.plot")
    if name in _HOME:
        return getattr(importlib.import_module(f"fedsim.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fedsim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
