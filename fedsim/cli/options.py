"""What several commands take: their arguments, and the configuration that these make."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.config import Config, keys
from fedsim.errors import ConfigError
from fedsim.presets import PRESETS, experiment

if TYPE_CHECKING:
    from fedsim.targets import Target

ExperimentArgument = Annotated[
    str, typer.Argument(metavar="EXPERIMENT", help=f"A preset ({', '.join(PRESETS)}) or a TOML file.")
]


def set_option(what: str, metavar: str = "KEY=VALUE") -> Any:
    """The option --set, of a command that can change this."""
    return typer.Option("--set", metavar=metavar, help=f"{what}; can be repeated.")


SetOption = Annotated[list[str] | None, set_option("Changes a key")]
AddressOption = Annotated[str | None, typer.Option(help="Where Ray is: local (a private one), auto, or HOST:PORT.")]
ResultsOption = Annotated[Path, typer.Option(metavar="DIR", help="The folder that holds the runs' folders.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Prints no progress, only the outcome.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Shows tracebacks and what the actors print.")]
StopAtOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="COLUMN=VALUE",
        help="Ends a run when a column of its rounds is there, for example test_accuracy=0.97; can be repeated.",
    ),
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name in --results.")]
RunsArgument = Annotated[
    list[str], typer.Argument(metavar="RUN...", help="Runs' folders, their names in --results, or a sweep's folder.")
]
AnywayOption = Annotated[
    bool,
    typer.Option("--anyway", help="Goes on although data, package versions or arithmetic are not those of the run."),
]


def keys_help() -> str:
    """The end of a command's help: every key of the configuration."""
    lines = [f"{key.name} = {json.dumps(key.default)}: {key.description}" for key in keys()]  # TOML writes them alike
    return "\b\nKeys for --set and for a TOML file, with their defaults:\n" + "\n".join(f"  {line}" for line in lines)


def configuration(name: str, changes: list[str] | None, address: str | None) -> Config:
    """The configuration that a command's arguments ask for."""
    values = parsed(changes)
    if address is not None:
        values["placement.address"] = address
    return experiment(name).override(values)


def parsed(changes: list[str] | None) -> dict[str, Any]:
    """The keys and values of --set.

    Raises:
        ConfigError: one is not key=value.
    """
    values: dict[str, Any] = {}
    for change in changes or []:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {change}: write it as key=value, for example --set training.lr=0.05")
        values[key.strip()] = value_of(text.strip())
    return values


def value_of(text: str) -> Any:
    """A value as TOML has it; what is not TOML is a string, so that quotes can be left out."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def parsed_targets(given: list[str] | None) -> list[Target]:
    """What --stop-at or --target say.

    Raises:
        InputError: one is no target.
    """
    if not given:
        return []
    from fedsim.targets import Target  # brings pyarrow, which a run imports while Ray starts

    return [Target.parse(text) for text in given]
