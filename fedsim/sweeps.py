"""Many runs, one after another on the same actors: every combination of some values, with every seed.

The runs lie in one folder, each as `run` would have made it, to the bit. Nothing else is kept of a sweep: the same
sweep again looks at the runs that are there, and does what is missing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fedsim.compatibility import Own
from fedsim.config import Config
from fedsim.config.changes import elsewhere
from fedsim.datasets import Dataset
from fedsim.errors import DivergedError, RunExistsError, RunFolderError
from fedsim.experiment import Experiment, prepare
from fedsim.grid import Member, folder_of, members
from fedsim.homes import NewRun
from fedsim.launch import Warm, check
from fedsim.recording import Recording
from fedsim.resolution import address
from fedsim.results import Runs, load_run
from fedsim.resumption import plan_resume
from fedsim.run_folder import read_run, stopped
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
    anyway: bool = False,
) -> Runs:
    """Runs an experiment with every combination of some values and every seed; goes on with a sweep that is there.

    A run that is there is taken for the same if all keys are, its data, its initial weights, and the names of own parts
    with the numbers and strings that they were made with. Their code is not compared.

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
        anyway: goes on with stopped runs although package versions or arithmetic are not those of the run.

    Returns:
        The runs, in the order of the grid; those that failed as their training diverged too.

    Raises:
        InputError: a key or value is wrong, or a folder holds another run; nothing was started.
        RunFailedError: a run could not be finished; the same sweep again goes on.

    Example:
        >>> sweep(Config(), {"training.lr": [0.03, 0.1]}, range(5), stop_at={"test_accuracy": 0.97})  # doctest: +SKIP
    """
    goals, own = targets(stop_at or {}), Own(model, strategy, dataset)
    found = members(config, grid or {}, seeds, folder_of(Path(results), name, config), goals, own.names)
    _check_own(found, own)
    with contextlib.closing(recordings(found, goals, own, anyway=anyway)) as unfinished:
        for recording in unfinished:
            with contextlib.suppress(DivergedError), recording:
                for _ in recording:
                    pass
    return Runs(load_run(member.folder, model=model) for member in found)


def recordings(
    found: Sequence[Member], stop_at: Sequence[Target], own: Own, *, anyway: bool = False, debug: bool = False
) -> Generator[Recording]:
    """The recordings of the runs that are not finished, each to be gone through before the next is asked for.

    They share their actors, as long as these fit, and the data set. To be closed, also when it is left early.

    Raises:
        InputError: a run cannot be made, of the data or the machine; before the first begins.
        RunFailedError: as `run`.
    """
    names, x = own.names, _checked(found, own)
    with contextlib.closing(Warm()) as warm:
        for member in found:
            if member.state == "new":
                x = replace(_prepare(member.config, own, x), own=names)
                folder = member.folder
                home = NewRun(partial(_not_there, folder), folder, x.config, overwrite=False, is_named=True)
                yield Recording(x, home, stop_at=stop_at, debug=debug, launch=warm)
            elif member.state == "stopped":
                with stopped(member.folder, _changes(member)) as there:
                    resumption = plan_resume(there, own, anyway=anyway)
                    if resumption is not None:
                        goals = resumption.stop_at
                        yield Recording(resumption.experiment, resumption, stop_at=goals, debug=debug, launch=warm)


def _check_own(found: Sequence[Member], own: Own) -> None:
    """Compares own data and models with those of the runs that are there: their names need not tell them apart.

    Raises:
        RunFolderError: they are others.
    """
    if own.model is None and own.dataset is None:
        return
    x: Experiment | None = None
    for member in found:
        if member.state == "new":
            continue
        x = _prepare(member.config, own, x)
        info = read_run(member.folder)[0]
        was = info["data"]["sha256"], info.get("model", {}).get("initial_weights_sha256")
        now = x.dataset.sha256(), x.initial_weights.sha256()
        if was[0] != now[0] or was[1] not in (None, now[1]):  # None: of an earlier fedsim
            what = "data" if was[0] != now[0] else "initial weights"
            raise RunFolderError(f"{member.folder} is there with other {what}: give this sweep another --name")


def _checked(found: Sequence[Member], own: Own) -> Experiment | None:
    """Lets pass runs that can be made, one of each kind: a mistake in the last should not cost all the others' hours.

    Returns:
        An experiment that has the data set.
    """
    x: Experiment | None = None
    kinds = []
    for member in found:
        config = member.config
        kind = config.data, config.clients, config.model, config.placement, config.training.engine
        if member.state == "new" and kind not in kinds:
            kinds.append(kind)
            x = _prepare(config, own, x)
            check(x)
    return x


def _prepare(config: Config, own: Own, after: Experiment | None) -> Experiment:
    return prepare(config, model=own.model, strategy=own.strategy, dataset=own.dataset, after=after)


def _not_there(folder: Path) -> Path:
    """The folder of a new run.

    Raises:
        RunExistsError: it has come up since the sweep began.
    """
    if folder.exists() or folder.is_symlink():
        raise RunExistsError(f"{folder} has come up meanwhile: wait for whoever makes it, then the same sweep goes on")
    return folder


def _changes(member: Member) -> dict[str, Any]:
    """What is said now of where and how carefully a stopped run goes on."""
    changes = elsewhere(read_run(member.folder)[1], member.config)
    if "placement.address" in changes:
        changes["placement.address"] = address(member.config)
    return changes
