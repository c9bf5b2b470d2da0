"""What may be another when a run goes on: how far, where, and how carefully; never what a round gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedsim.config import Config, PlacementConfig
from fedsim.errors import ConfigError

MAY_CHANGE = "rounds, placement.* but placement.threads, failures.*, checkpoint.*"


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A run's configuration for its next rounds.

    Args:
        config: the run's own, as it was read from its folder.
        changes: dotted keys.

    Raises:
        ConfigError: a key that the results depend on, with another value than the run's; or see `Config.override`.
    """
    values = config.to_dict()
    if config.placement.address == PlacementConfig().address:
        del values["placement"]["address"]  # written down it would outweigh RAY_ADDRESS, which may have been meant
    new = Config.from_dict(values).override(changes)
    was, now = dict(flat(config.to_dict())), dict(flat(new.to_dict()))
    for key in [*now, *was]:
        if was.get(key) != now.get(key) and not _may_change(key):
            given = f"{key} = {now.get(key)!r}" if key in now else f"no {key}"
            had = f"{was[key]!r}" if key in was else "none"
            raise ConfigError(
                f"{given}, but the run has {had}, and its results depend on it: start a new run for that; "
                f"a run that goes on may change {MAY_CHANGE}"
            )
    return new


def _may_change(key: str) -> bool:
    return key.partition(".")[0] in ("rounds", "placement", "failures", "checkpoint") and key != "placement.threads"


def computed(config: Config) -> dict[str, Any]:
    """The keys in which two runs must agree to be one, dotted, with their values.

    What a run is called, and where and how carefully it was computed, is nothing to it.
    """
    values = dict(flat(config.to_dict()))
    return {key: value for key, value in values.items() if key != "name" and (key == "rounds" or not _may_change(key))}


def elsewhere(was: Config, now: Config) -> dict[str, Any]:
    """The changes with which a run goes on where and how carefully another configuration says, dotted keys."""
    had, has = (dict(flat(config.to_dict())) for config in (was, now))
    return {key: value for key, value in has.items() if key != "rounds" and _may_change(key) and had.get(key) != value}


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values, of a configuration as nested dictionaries."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def text(value: Any) -> str:
    """A value as a configuration file has it; a string without its quotes, a list without its brackets."""
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
