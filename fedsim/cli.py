"""The command line. Thin: it reads arguments, calls the package, and prints for a person.

Torch and ray are imported inside the commands, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import signal
import sys
import time
import tomllib
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import tomli_w
import typer
from rich.console import Console
from rich.table import Table

from fedsim import __version__
from fedsim.config import Config, keys
from fedsim.errors import ConfigError, FedsimError
from fedsim.presets import PRESETS, experiment, preset

if TYPE_CHECKING:
    from fedsim.metrics import RoundRecord
    from fedsim.placement import Plan
    from fedsim.recording import Recording

app = typer.Typer(
    help="Simulates federated learning with Ray, and writes every round to Parquet.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Gets data sets, and shows what is cached.", no_args_is_help=True)
app.add_typer(data_app, name="data")

# Paths are printed as they are, and tables in full where no terminal sets a width.
_WIDTH = None if sys.stdout.isatty() else 200
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, width=_WIDTH)


def _keys_help() -> str:
    lines = [f"{key.name} = {key.default!r}: {key.description}" for key in keys()]
    return "\b\nKeys for --set and for a TOML file, with their defaults:\n" + "\n".join(f"  {line}" for line in lines)


ExperimentArgument = Annotated[
    str, typer.Argument(metavar="EXPERIMENT", help=f"A preset ({', '.join(PRESETS)}) or a TOML file.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Changes a key; can be repeated.")
]
AddressOption = Annotated[str | None, typer.Option(help="Where Ray is: local (a private one), auto, or HOST:PORT.")]
ResultsOption = Annotated[Path, typer.Option(metavar="DIR", help="The folder that holds the runs' folders.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Shows tracebacks and what the actors print.")]


@app.command(epilog=_keys_help())
def run(
    experiment_name: ExperimentArgument = "mnist",
    changes: SetOption = None,
    name: Annotated[str | None, typer.Option(help="The run's name; without it, the experiment's.")] = None,
    results: ResultsOption = Path("results"),
    address: AddressOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replaces a run of that name.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Prints no progress, only the outcome.")] = False,
    debug: DebugOption = False,
) -> None:
    """Runs an experiment and writes its rounds to Parquet."""
    from fedsim import launch, run_folder

    config = _configuration(experiment_name, changes, address)
    started = time.perf_counter()
    run_folder.target(results, name, config.name, overwrite)  # refuses a name before anything is started
    record: RoundRecord | None = None
    try:
        with launch.early_ray(config, debug=debug):
            from fedsim.recording import Recording

            recording = Recording(config, results=results, name=name, overwrite=overwrite, debug=debug)
            if _interrupts:
                raise KeyboardInterrupt
            with recording:
                for finished in recording if quiet else _with_progress(recording):
                    record = finished
                    if _interrupts:
                        raise KeyboardInterrupt
    except KeyboardInterrupt:
        done = f"{recording.folder} holds the rounds up to {record.round}" if record else "no round was finished"
        _fail(f"interrupted: {done}", 130)
    assert record is not None  # round 0 is always there
    accuracy = f"test accuracy {record.test_accuracy:.4f}"  # the last round is always evaluated
    seconds = time.perf_counter() - started
    console.print(f"{recording.folder}: {accuracy} after {_rounds(record.round)} ({seconds:.1f} s)")
    console.print(f"import pandas as pd; pd.read_parquet({f'{recording.folder}/rounds.parquet'!r})")


@app.command(epilog=_keys_help())
def plan(
    experiment_name: ExperimentArgument = "mnist",
    changes: SetOption = None,
    address: AddressOption = None,
    debug: DebugOption = False,  # read by `main`
) -> None:
    """Says what `run` would do, and refuses what does not fit; trains nothing."""
    from fedsim.experiment import prepare
    from fedsim.launch import preview

    x = prepare(_configuration(experiment_name, changes, address))
    sizes = x.partition.num_examples
    rows = {
        "data": f"{x.dataset.name}: {len(x.dataset.train_labels):,} training examples, "
        f"{sizes.min():,} to {sizes.max():,} a client",
        "model": f"{x.config.model.name}: {x.layout.num_values:,} values, {x.model_bytes / 1e6:.1f} MB",
        "clients": f"{x.config.clients.count:,}, of which {x.cohort_size:,} in each of {_rounds(x.config.rounds)}",
        **_plan_rows(preview(x)),
    }
    table = Table(box=None, show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    console.print(table)


@app.command()
def presets(name: Annotated[str | None, typer.Argument(help="Prints this preset as TOML.")] = None) -> None:
    """Lists the presets, or prints one as TOML."""
    if name is not None:
        values = preset(name).to_dict()
        del values["placement"]["address"]  # a file that says it would outweigh RAY_ADDRESS
        console.print(tomli_w.dumps(values), end="")
        return
    table = Table(box=None, show_header=False)
    for preset_name, (description, _) in PRESETS.items():
        table.add_row(preset_name, description)
    console.print(table)


@app.command()
def runs(results: ResultsOption = Path("results")) -> None:
    """Lists the runs of a results folder, with their status and last accuracy."""
    from fedsim.results import find_runs, load_run

    table = Table("run", "status", "rounds", "test accuracy", "started", box=None)
    for folder in find_runs(results):
        try:
            found = load_run(folder)
            rounds, info = found.rounds, found.info
        except (FedsimError, OSError, ValueError) as error:  # one damaged run must not hide the others
            table.add_row(folder.name, f"unreadable: {str(error).splitlines()[0]}")
            continue
        accuracy = rounds["test_accuracy"].dropna()
        table.add_row(
            found.name,
            info["status"],
            f"{max(0, len(rounds) - 1)}/{found.config.rounds}",
            f"{accuracy.iloc[-1]:.4f}" if len(accuracy) else "",
            info["started_at"],
        )
    console.print(table if table.row_count else f"no runs in {results}")


@data_app.command()
def fetch(name: Annotated[str, typer.Argument(help="mnist, fashion_mnist")] = "mnist") -> None:
    """Gets a data set once, and checks it."""
    from fedsim import datasets

    console.print(f"{name}: {datasets.fetch(name)}")


@data_app.command()
def status() -> None:
    """Shows which data sets are cached, and whether they are whole."""
    from fedsim import datasets

    table = Table("data set", "state", "size", "folder", box=None)
    for entry in datasets.status():
        size = f"{entry.size_bytes / 1e6:.1f} MB" if entry.size_bytes else ""
        table.add_row(entry.name, entry.state, size, str(entry.folder or ""))
    console.print(table)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Prints the version.")] = False) -> None:
    if version:
        console.print(f"fedsim {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and exits with 0, 1 (failed), 2 (wrong input) or 130 (interrupted)."""
    _interrupts.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(arguments, prog_name="fedsim")
    except (FedsimError, OSError) as error:
        code = error.exit_code if isinstance(error, FedsimError) else 1
        _fail(traceback.format_exc() if "--debug" in arguments else str(error), code)


_interrupts: list[int] = []  # signals so far: a library may swallow the exception while it is imported


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupts.append(number)
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"fedsim: {message}\n")
    sys.exit(code)


def _configuration(name: str, changes: list[str] | None, address: str | None) -> Config:
    values: dict[str, Any] = {}
    for change in changes or []:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {change}: write it as key=value, for example --set training.lr=0.05")
        values[key.strip()] = _value(text.strip())
    if address is not None:
        values["placement.address"] = address
    return experiment(name).override(values)


def _value(text: str) -> Any:
    """A value as TOML has it; what is not TOML is a string, so that quotes can be left out."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def _rounds(number: int) -> str:
    return "1 round" if number == 1 else f"{number} rounds"


def _plan_rows(made: Plan) -> dict[str, str]:
    rows = {"placement": made.mode}
    if made.num_actors:
        share = f"{made.num_cpus:g} CPU" + (f" and {made.num_gpus:g} GPU" if made.num_gpus else "")
        rows["actors"] = f"{made.num_actors:,}, each with {share} and {made.threads} thread(s)"
        rows["memory"] = f"about {made.memory_bytes / 1e9:.1f} GB"
        rows["start-up"] = f"about {made.start_s:.0f} s"
    rows["because"] = "; ".join(made.reasons)
    return rows


def _with_progress(recording: Recording) -> Iterator[RoundRecord]:
    """Goes through the rounds with a live bar on a terminal, with plain lines elsewhere."""
    return _bar(recording) if console.is_terminal else _lines(recording)


def _start_line(recording: Recording) -> str:
    made = recording.plan
    count = recording.experiment.config.clients.count
    if not made.num_actors:
        return f"{recording.name}: {count:,} clients in this process"
    actors = f"{made.num_actors:,} actor" + ("s" if made.num_actors > 1 else "")
    return f"{recording.name}: {count:,} clients on {actors} ({made.mode}), up in about {made.start_s:.0f} s"


def _lines(recording: Recording) -> Iterator[RoundRecord]:
    print(_start_line(recording), flush=True)
    for record in recording:
        accuracy = "" if record.test_accuracy is None else f"  test_accuracy {record.test_accuracy:.4f}"
        total = recording.experiment.config.rounds
        print(f"round {record.round}/{total}{accuracy}  {record.round_s:.2f} s", flush=True)
        yield record


def _bar(recording: Recording) -> Iterator[RoundRecord]:
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn(
            "round {task.completed:.0f}/{task.total:.0f}  {task.fields[accuracy]}  {task.fields[rate]}"
        ),
        progress.TimeRemainingColumn(),
    )
    console.print(_start_line(recording))
    with progress.Progress(*columns, console=console) as bar:
        total = recording.experiment.config.rounds
        task = bar.add_task(f"{recording.name}: starting", total=total, accuracy="", rate="")
        accuracy = ""
        for record in recording:
            if record.test_accuracy is not None:
                accuracy = f"test accuracy {record.test_accuracy:.4f}"
            rate = f"{1 / record.round_s:.2f} rounds/s" if record.round_s < 1 else f"{record.round_s:.2f} s/round"
            bar.update(task, description=recording.name, completed=record.round, accuracy=accuracy, rate=rate)
            yield record
