"""Many runs, one after another on the same actors: every combination of some values, with every seed.

The runs lie in one folder, each as `run` would have made it, to the bit. Nothing else is kept of a sweep: the same
sweep again looks at the runs that are there, and does what is missing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fedsim.compatibility import Own
from fedsim.config import RUN_NAME, Config
from fedsim.config.changes import computed
from fedsim.datasets import Dataset
from fedsim.errors import ConfigError, DivergedError, RunFolderError
from fedsim.experiment import Experiment, called, prepare
from fedsim.homes import NewRun
from fedsim.launch import Warm
from fedsim.recording import Recording
from fedsim.resolution import resolve
from fedsim.results import Runs, load_run
from fedsim.resumption import plan_resume
from fedsim.run_folder import check_name, read_info, read_run, stopped, target
from fedsim.strategies import Strategy
from fedsim.targets import Target, targets


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    folder: Path
    config: Config
    """Whole and resolved."""
    state: Literal["new", "stopped", "finished"]


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
    found = members(config, grid or {}, seeds, folder_of(Path(results), name, config), goals, own)
    with contextlib.closing(recordings(found, goals, own)) as unfinished:
        for recording in unfinished:
            with contextlib.suppress(DivergedError), recording:
                for _ in recording:
                    pass
    return Runs(load_run(member.folder, model=model) for member in found)


def folder_of(results: Path, name: str | None, config: Config) -> Path:
    """The folder of a sweep.

    Raises:
        RunFolderError: it is a run's.
    """
    folder = results / check_name(name if name is not None else f"{config.name[:94]}-sweep")
    if read_info(folder) is not None:
        raise RunFolderError(f"{folder} is a run, so it cannot hold the runs of a sweep; choose another --name")
    return folder


def members(
    config: Config,
    grid: Mapping[str, Sequence[Any]],
    seeds: Sequence[int] | None,
    folder: Path,
    stop_at: Sequence[Target],
    own: Own,
) -> list[Member]:
    """The runs of a sweep, all checked against the tables and against what is in its folder.

    Raises:
        ConfigError: a key or value is wrong, or there is nothing to choose from.
        RunFolderError: a folder holds another run.
    """
    for key, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise ConfigError(f"the grid has {key} = {values!r}: give a list of values")
    axes = {key: [_plain(value) for value in values] for key, values in grid.items()}
    for key, values in axes.items():
        if key in ("seed", "name"):
            raise ConfigError(f"{key} cannot be in the grid: " + {"seed": "give seeds", "name": "runs are named"}[key])
        if not values:
            raise ConfigError(f"the grid has no values for {key}: give at least one")
    chosen = [_plain(seed) for seed in seeds] if seeds is not None else [config.seed]
    if not chosen:
        raise ConfigError("there are no seeds: give at least one")
    short = _short_names(axes)
    found: dict[str, Member] = {}
    for point in itertools.product(*axes.values()):
        changes = dict(zip(axes, point, strict=True))
        for seed in chosen:
            named = [f"{short[key]}-{_text(value)}" for key, value in changes.items()]
            name = "_".join([*named, f"seed-{seed}"])
            if name in found:
                raise ConfigError(f"two runs would be called {name}: give each value once")
            if not RUN_NAME.fullmatch(name):
                raise ConfigError(f"a run would be called {name}, which is no name for a run: sweep over fewer keys")
            resolved = resolve(config.override({**changes, "seed": seed}), own_strategy=own.strategy is not None)
            for goal in stop_at:
                goal.check(resolved)
            found[name] = _member(folder / name, resolved, stop_at, own)
    return list(found.values())


def _plain(value: Any) -> Any:
    """A value as Python has it, where numpy gave it."""
    return value.item() if hasattr(value, "item") else value


def _short_names(keys: Mapping[str, Any]) -> dict[str, str]:
    """The last word of each key, or as many as tell them apart."""
    short: dict[str, str] = {}
    for key in keys:
        words = key.split(".")
        number = 1
        while any(other != key and other.split(".")[-number:] == words[-number:] for other in keys):
            number += 1
        short[key] = ".".join(words[-number:])
    return short


def _text(value: Any) -> str:
    """A value in a name: what is not allowed there is left out."""
    text = f"{value:g}".replace("e+", "e") if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def _member(folder: Path, config: Config, stop_at: Sequence[Target], own: Own) -> Member:
    """A run as it is there.

    Raises:
        RunFolderError: the folder is no run, or holds another one.
    """
    if not folder.exists():
        return Member(folder, config, "new")
    info, there, damage = read_run(folder)
    if damage:
        raise RunFolderError(f"{damage}; remove that folder, and the sweep makes the run again")
    was, now = computed(there), computed(config)
    was["stop_at"] = ", ".join(info.get("stop_at", []))
    now["stop_at"] = ", ".join(map(str, stop_at))
    was |= {f"own {part}": name for part, name in info["own"].items()}
    now |= {f"own {part}": called(given) for part, given in vars(own).items() if given is not None}
    for key in dict.fromkeys([*now, *was]):
        if was.get(key) != now.get(key):
            raise RunFolderError(
                f"{folder} is there with {key} = {was.get(key)!r}, not {now.get(key)!r}: give this sweep another --name"
            )
    is_over = info["status"] == "finished" or str(info["error"]).startswith(f"{DivergedError.__name__}:")
    return Member(folder, config, "finished" if is_over else "stopped")


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
