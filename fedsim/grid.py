"""The runs of a sweep: every combination of some values with every seed, checked, and what is there of each.

Without torch, so that a sweep is refused at once, and Ray can start while torch is imported.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedsim.config import RUN_NAME, Config
from fedsim.config.changes import computed
from fedsim.config.changes import text as said
from fedsim.errors import ConfigError, RunFolderError, has_diverged
from fedsim.resolution import resolve
from fedsim.run_folder import check_name, check_usable, is_live, is_run, read_run

if TYPE_CHECKING:
    from fedsim.targets import Target  # brings pyarrow

_REPLACED = {"model": "model.", "strategy": "strategy.", "dataset": "data.dataset"}
"""Part from Python -> how the keys begin that it takes the place of."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    folder: Path
    config: Config
    """Whole and resolved."""
    state: Literal["new", "stopped", "diverged", "finished"]


def folder_of(results: Path, name: str | None, config: Config) -> Path:
    """The folder of a sweep.

    Raises:
        RunFolderError: it is a run's.
    """
    folder = results / check_name(name if name is not None else f"{config.name[:94]}-sweep")
    if is_run(folder):
        raise RunFolderError(f"{folder} is a run, so it cannot hold the runs of a sweep; choose another --name")
    return folder


def members(
    config: Config,
    grid: Mapping[str, Sequence[Any]],
    seeds: Sequence[int] | None,
    folder: Path,
    stop_at: Sequence[Target],
    own: Mapping[str, str],
) -> list[Member]:
    """The runs of a sweep, all checked against the tables and against what is in its folder.

    Args:
        config: what all have in common.
        grid: dotted key -> its values.
        seeds: None for the configuration's own.
        folder: of the sweep, see `folder_of`.
        stop_at: ends a run.
        own: parts that come from Python: which -> what it is called, see `own`.

    Raises:
        ConfigError: a key or value is wrong, or there is nothing to choose from.
        RunFolderError: a folder holds another run.
    """
    if not isinstance(grid, Mapping):
        raise ConfigError(f"the grid is {grid!r}: give a dictionary of keys and their values")
    axes = {str(key): _listed(values, f"the grid has {key}") for key, values in grid.items()}
    for key, values in axes.items():
        if key in ("seed", "name"):
            raise ConfigError(f"{key} cannot be in the grid: " + {"seed": "give seeds", "name": "runs are named"}[key])
        if not values:
            raise ConfigError(f"the grid has no values for {key}: give at least one")
        for part, replaced in _REPLACED.items():
            if part in own and key.startswith(replaced) and key != "strategy.weighting":
                raise ConfigError(f"{key} is nothing to a sweep with a {part} of its own: leave out one of the two")
    chosen = _listed(seeds, "seeds") if seeds is not None else [config.seed]
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
            resolved = resolve(config.override({**changes, "seed": seed}), own_strategy="strategy" in own)
            if not RUN_NAME.fullmatch(name):
                raise ConfigError(f"a run would be called {name}, which is no name for a run: sweep over fewer keys")
            for goal in stop_at:
                goal.check(resolved)
            found[name] = _member(folder / name, resolved, stop_at, own)
    return list(found.values())


def _listed(values: Any, named: str) -> list[Any]:
    """Values as Python has them, where numpy gave them.

    Raises:
        ConfigError: they are not several.
    """
    plain = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(plain, str | Mapping) or not isinstance(plain, Iterable):
        raise ConfigError(f"{named} = {values!r}: give a list of values")
    return [value.tolist() if hasattr(value, "tolist") else value for value in plain]


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
    text = said(value)
    if isinstance(value, float):
        short = f"{value:g}"
        text = (short if float(short) == value else repr(value)).replace("e+", "e")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def _targets(given: Iterable[Any]) -> str:
    """Targets as one text, whatever their order."""
    return ", ".join(sorted(set(map(str, given))))


def _member(folder: Path, config: Config, stop_at: Sequence[Target], own: Mapping[str, str]) -> Member:
    """A run as it is there.

    Raises:
        RunFolderError: the folder is no run, or holds another one.
    """
    if not (folder.exists() or folder.is_symlink()):
        check_usable(folder.parent)
        return Member(folder, config, "new")
    info, there, damage = read_run(folder)
    if damage:
        raise RunFolderError(f"{damage}; remove that folder, and the sweep makes the run again")
    was, now = computed(there), computed(config)
    was["stop_at"], now["stop_at"] = _targets(info.get("stop_at", [])), _targets(stop_at)
    was |= {f"own {part}": name for part, name in info["own"].items()}
    now |= {f"own {part}": called for part, called in own.items()}
    was_there = not was["stop_at"] and _targets(info.get("stopped_by", [])) == now["stop_at"] != ""
    if was["rounds"] > now["rounds"] or was_there:
        # it went on beyond what the sweep asks for, or after a target had ended it; its targets ended with that
        now |= {"rounds": was["rounds"]} | ({} if was["stop_at"] else {"stop_at": ""})
    for key in dict.fromkeys([*now, *was]):
        if was.get(key) != now.get(key):
            raise RunFolderError(
                f"{folder} is there with {key} = {said(was.get(key)) or 'none'}, not {said(now.get(key)) or 'none'}: "
                "give this sweep another --name"
            )
    has_records = all((folder / f"{kind}.parquet").is_dir() for kind in ("rounds", "clients"))
    if info["status"] == "finished" and has_records and (folder / "checkpoint").is_dir():
        return Member(folder, config, "finished")
    if has_diverged(info) and has_records:
        return Member(folder, config, "diverged")
    if is_live(folder):
        raise RunFolderError(f"{folder} is being written by a running fedsim; wait until that ends")
    return Member(folder, config, "stopped")
