"""Whether rounds of a run have the same bits when they are computed here and now, and what the run needs for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fedsim import environment
from fedsim.config import Config
from fedsim.datasets import Dataset
from fedsim.errors import InputError
from fedsim.experiment import Experiment
from fedsim.own import called
from fedsim.strategies import STRATEGIES, Strategy


@dataclass(frozen=True)
class Own:
    """The parts of a run that came from Python instead of its configuration."""

    model: Callable[..., nn.Module] | None = None
    strategy: Strategy | None = None
    dataset: Dataset | None = None

    @property
    def names(self) -> dict[str, str]:
        """Which -> what it is called now: what a part counts with may change."""
        return {part: called(given) for part, given in vars(self).items() if given is not None}


NOTHING = Own()
"""What most runs have of their own."""


def check_own(path: Path | None, had: Mapping[str, str], own: Own) -> None:
    """Compares the parts that are given again with those that the run had, by their kinds.

    Args:
        path: the run's folder, for the message.
        had: kind -> what it was called, from run.json.
        own: what is given.

    Raises:
        InputError: one is missing, or too many.
    """
    missing = [part for part, given in vars(own).items() if part in had and given is None]
    if missing:
        named = ", ".join(f"{part} ({had[part]})" for part in missing)
        raise InputError(
            f"{path} has parts from Python, which must be given again: {named}; call fedsim.verify, fedsim.replay "
            f"or fedsim.resume with {', '.join(f'{part}=...' for part in missing)}"
        )
    extra = [f"{part}=" for part, given in vars(own).items() if part not in had and given is not None]
    if extra:
        raise InputError(f"{path} has no part of its own for {', '.join(extra)}: leave it out")


def with_engine_of(info: Mapping[str, Any], config: Config) -> Config:
    """A configuration with the engine that ran: what "auto" was for the run, it might choose otherwise here."""
    engine = info.get("engine")
    return config.override({"training.engine": engine}) if engine in ("loop", "stacked") else config


def compared(info: Mapping[str, Any], x: Experiment) -> dict[str, tuple[Any, Any]]:
    """What the bits depend on beside the configuration: name -> in the run, here."""
    versions = environment.versions()
    was = info.get("versions") or {}
    return {"data (sha256)": (str(info["data"].get("sha256"))[:12], x.dataset.sha256()[:12])} | {
        package: (was.get(package), versions.get(package)) for package in {**was, **versions}
    }


def compared_strategy(info: Mapping[str, Any], x: Experiment) -> dict[str, tuple[Any, Any]]:
    """The strategy that came from Python, as in `compared`, where it was made with other values or one is fedsim's.

    Otherwise two of the user's are taken for the same: one may have been renamed or moved since.
    """
    was, now = info["own"].get("strategy", ""), x.own.get("strategy", "")
    name, _, values = was.partition("(")
    new_name, _, new_values = now.partition("(")
    fedsims = {f"{make.__module__}.{make.__qualname__}" for make in STRATEGIES.values()}
    is_unknown = name == f"{Strategy.__module__}.{Strategy.__qualname__}"  # all that an earlier fedsim wrote down
    is_of_fedsim = not is_unknown and not fedsims.isdisjoint({name, new_name})
    # the values are compared where both have them: an earlier fedsim wrote none
    is_other = (is_of_fedsim and name != new_name) or (values and new_values and values != new_values)
    return {"strategy": (was or None, now or None)} if is_other else {}


def check_same(path: Path | None, pairs: Mapping[str, tuple[Any, Any]], anyway: bool) -> list[str]:
    """Says what differs between the run and here.

    Args:
        path: the run's folder, for the message.
        pairs: name -> in the run, here.
        anyway: whether the user goes on nevertheless.

    Raises:
        InputError: something does, and the user did not say to go on anyway.
    """
    unlike = [f"{what} {was} in the run, {now} here" for what, (was, now) in pairs.items() if was != now]
    if unlike and not anyway:
        raise InputError(
            f"{path} need not give the same bits here: {'; '.join(unlike)}.\n"
            "Go on nevertheless with --anyway (from Python: anyway=True)"
        )
    return unlike
