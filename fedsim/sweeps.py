"""Many runs, one after another on the same actors: every combination of some values, with every seed.

The runs lie in one folder, each as `run` would have made it, to the bit. Nothing else is kept of a sweep: the same
sweep again looks at the runs that are there, and does what is missing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fedsim.compatibility import Own
from fedsim.config import Config
from fedsim.datasets import Dataset
from fedsim.errors import DivergedError
from fedsim.experiment import Experiment, called, prepare
from fedsim.grid import Member, folder_of, members
from fedsim.homes import NewRun
from fedsim.launch import Warm
from fedsim.recording import Recording
from fedsim.results import Runs, load_run
from fedsim.resumption import plan_resume
from fedsim.run_folder import stopped, target
from fedsim.strategies import Strategy
from fedsim.targets import Target, targets


def sweep(
    config: Config,
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] | None = None,
    *,
    results: str | os.PathLike[str] = "results",
    name: str | None = None,
    stop_at: Mapping[str, float] | None = None,
    model: Callable[..., nn.Module] | None = None,
    strategy: Strategy | None = None,
    dataset: Dataset | None = None,
) -> Runs:
    """Runs an experiment with every combination of some values and every seed; goes on with a sweep that is there.

    Args:
        config: what all runs have in common.
        grid: dotted key -> its values.
        seeds: None for the configuration's own.
        results: the folder that gets the sweep's folder, in which each run has its own.
        name: of the sweep's folder; None for the configuration's name and "-sweep".
        stop_at: see `run`.
        model: see `run`.
        strategy: see `run`.
        dataset: see `run`.

    Returns:
        The runs, in the order of the grid; those that failed as their training diverged too.

    Raises:
        InputError: a key or value is wrong, or a folder holds another run; nothing was started.
        RunFailedError: a run could not be finished; the same sweep again goes on.

    Example:
        >>> sweep(Config(), {"training.lr": [0.03, 0.1]}, range(5), stop_at={"test_accuracy": 0.97})  # doctest: +SKIP
    """
    goals, own = targets(stop_at or {}), Own(model, strategy, dataset)
    names = {part: called(given) for part, given in vars(own).items() if given is not None}
    found = members(config, grid or {}, seeds, folder_of(Path(results), name, config), goals, names)
    with contextlib.closing(recordings(found, goals, own)) as unfinished:
        for recording in unfinished:
            with contextlib.suppress(DivergedError), recording:
                for _ in recording:
                    pass
    return Runs(load_run(member.folder, model=model) for member in found)


def recordings(
    found: Sequence[Member], stop_at: Sequence[Target], own: Own, *, debug: bool = False
) -> Generator[Recording]:
    """The recordings of the runs that are not finished, each to be gone through before the next is asked for.

    They share their actors, as long as these fit, and the data set. To be closed, also when it is left early.
    """
    x: Experiment | None = None
    with contextlib.closing(Warm()) as warm:
        for member in found:
            if member.state == "new":
                x = prepare(member.config, model=own.model, strategy=own.strategy, dataset=own.dataset, after=x)
                folder = member.folder
                make = partial(target, folder.parent, folder.name, folder.name, overwrite=False)
                home = NewRun(make, make(), x.config, overwrite=False, is_named=True)
                yield Recording(x, home, stop_at=stop_at, debug=debug, launch=warm)
            elif member.state == "stopped":
                with stopped(member.folder, {}) as there:
                    resumption = plan_resume(there, own)
                    if resumption is not None:
                        goals = resumption.stop_at
                        yield Recording(resumption.experiment, resumption, stop_at=goals, debug=debug, launch=warm)
