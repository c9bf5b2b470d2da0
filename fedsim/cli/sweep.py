"""`fedsim sweep`: a line a run, then how to read them all."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.cli.options import (
    AddressOption,
    AnywayOption,
    DebugOption,
    ExperimentArgument,
    QuietOption,
    ResultsOption,
    SetOption,
    StopAtOption,
    configuration,
    parsed,
    parsed_targets,
    value_of,
)
from fedsim.cli.terminal import console, fail, record
from fedsim.errors import ConfigError, DivergedError, counted, first_line

if TYPE_CHECKING:
    from fedsim.config import Config
    from fedsim.recording import Recording


def sweep(
    experiment_name: ExperimentArgument,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=A,B,...", help="The values of a key; can be repeated: then every combination is run."
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="SEEDS", help="A range such as 0..4, or 0,1,7; without it, the experiment's.")
    ] = None,
    changes: SetOption = None,
    name: Annotated[
        str | None, typer.Option(help="The folder of the runs in --results; without it, the experiment's and -sweep.")
    ] = None,
    results: ResultsOption = Path("results"),
    address: AddressOption = None,
    stop_at: StopAtOption = None,
    anyway: AnywayOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Runs every combination of some values and seeds on one warm pool of actors; the same command again goes on."""
    config = configuration(experiment_name, changes, address)
    values, chosen = _grid(grid), _seeds(seeds)
    _check_given_once(changes, values, seeds)
    goals = parsed_targets(stop_at)
    from fedsim import launch
    from fedsim.grid import folder_of, members

    folder = folder_of(results, name, config)
    found = members(config, values, chosen, folder, goals, own={})
    to_run = [member.config for member in found if member.state in ("new", "stopped")]
    done = len(found) - len(to_run)
    if not quiet:
        finished = f", of which {done} {'is' if done == 1 else 'are'} finished" if done else ""
        console.print(f"{folder}: {counted(len(found), 'run')}{finished}")
    diverged = sum(member.state == "diverged" for member in found)
    try:
        with contextlib.ExitStack() as stack:
            if to_run and all(_asks_as(to_run[0], config) for config in to_run):  # one Ray serves them all
                stack.enter_context(launch.early_ray(to_run[0], debug=debug))
            from fedsim.compatibility import NOTHING
            from fedsim.sweeps import recordings

            for recording in stack.enter_context(
                contextlib.closing(recordings(found, goals, NOTHING, anyway=anyway, debug=debug))
            ):
                started = time.perf_counter()
                try:
                    record(recording, quiet=quiet or not console.is_terminal)
                except DivergedError as error:
                    diverged += 1
                    line = f"{recording.name}: {first_line(error)}"
                else:
                    line = _outcome(recording)
                done += 1
                if not quiet:
                    print(f"{done}/{len(found)} {line} ({time.perf_counter() - started:.1f} s)", flush=True)
    except KeyboardInterrupt:
        fail(f"interrupted: {done} of {counted(len(found), 'run')} done in {folder}; the same command goes on", 130)
    said = f", of which {diverged} diverged" if diverged else ""
    console.print(f"{folder}: {counted(len(found), 'run')}{said}")
    console.print(f"import fedsim; fedsim.load_runs({str(folder)!r}).rounds")


def _asks_as(one: Config, other: Config) -> bool:
    """Whether two runs ask the same of Ray."""
    return (one.placement, one.clients) == (other.placement, other.clients)


def _outcome(recording: Recording) -> str:
    accuracy = recording.last.test_accuracy if recording.last else None
    shown = "" if accuracy is None else f"test accuracy {accuracy:.4f} "
    return f"{recording.name}: {shown}after {counted(recording.done or 0, 'round')}"


def _grid(given: list[str] | None) -> dict[str, list[Any]]:
    grid: dict[str, list[Any]] = {}
    for text in given or []:
        key, equals, values = text.partition("=")
        if not equals or not key.strip() or not values.strip(", "):
            raise ConfigError(f"--grid {text}: write it as key=a,b,c, for example --grid training.lr=0.03,0.1,0.3")
        if key.strip() in grid:
            raise ConfigError(f"--grid {text}: {key.strip()} is there twice; give all its values at once")
        grid[key.strip()] = [value_of(value.strip()) for value in values.split(",")]
    return grid


def _check_given_once(changes: list[str] | None, grid: dict[str, list[Any]], seeds: str | None) -> None:
    """A value of --set that every run of the sweep replaces was meant for something: it is not dropped unsaid."""
    replacing = {key: f"--grid {key}" for key in grid} | ({} if seeds is None else {"seed": "--seeds"})
    for key in parsed(changes):
        if key in replacing:
            raise ConfigError(f"{key} is in --set and in {replacing[key]}: leave out one of the two")


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if bounds := re.fullmatch(r"\s*(\d{1,19})\s*\.\.\s*(\d{1,19})\s*", text):
        first, last = int(bounds[1]), int(bounds[2])
        if first <= last < first + 100_000:
            return list(range(first, last + 1))
    elif re.fullmatch(r"\s*\d{1,19}\s*(,\s*\d{1,19}\s*)*", text):
        return [int(part) for part in text.split(",")]
    raise ConfigError(f"--seeds {text}: write a range such as 0..4, or a list such as 0,1,7")
