"""fedsim's command line, which also says when its actors were up, and how much memory each process has at the end.

Writes a file of JSON: `up_s`, the seconds from when the driver begins to start the actors until all have loaded data
and model; `processes`, role and bytes (PSS) of each, read after the last round while all actors are there.

    python scripts/benchmarks/watched.py FILE run mnist --set placement.start=plain
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import each_pss
from fedsim import cli, launch  # not torch, which the command line imports while Ray starts

if TYPE_CHECKING:
    from fedsim.actors import Pool
    from fedsim.experiment import Experiment
    from fedsim.placement import Plan


def main(file: str, *arguments: str) -> None:
    """Runs a command of fedsim."""
    open_pool = launch.open_pool

    @contextlib.contextmanager
    def watched(x: Experiment, plan: Plan) -> Iterator[Pool]:
        start = time.perf_counter()
        with open_pool(x, plan) as pool:
            up_s = time.perf_counter() - start
            yield pool
            Path(file).write_text(json.dumps({"up_s": up_s, "processes": each_pss(psutil.Process())}))

    launch.open_pool = watched  # before the modules that import it by name
    cli.main(list(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
