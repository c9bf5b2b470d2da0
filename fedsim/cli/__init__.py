"""The command line. Thin: it reads arguments, calls the package, and prints for a person.

Torch and ray are imported inside the commands, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import tomli_w
import typer
from rich.table import Table

from fedsim import __version__
from fedsim.cli import compare, report, resume, sweep, verification
from fedsim.cli.options import (
    AddressOption,
    DebugOption,
    ExperimentArgument,
    QuietOption,
    ResultsOption,
    SetOption,
    StopAtOption,
    configuration,
    keys_help,
    parsed_targets,
)
from fedsim.cli.terminal import (
    console,
    fail,
    folding,
    interrupted,
    interrupts,
    record,
    say_outcome,
    say_start,
)
from fedsim.errors import FedsimError, FedsimWarning, RunFolderError, counted, first_line
from fedsim.presets import PRESETS, preset

if TYPE_CHECKING:
    from fedsim.experiment import Experiment
    from fedsim.placement import Plan

app = typer.Typer(
    help="Simulates federated learning with Ray, and writes every round to Parquet.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Gets data sets, and shows what is cached.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@app.command(epilog=keys_help())
def run(
    experiment_name: ExperimentArgument = "mnist",
    changes: SetOption = None,
    name: Annotated[str | None, typer.Option(help="The run's name; without it, the experiment's.")] = None,
    results: ResultsOption = Path("results"),
    address: AddressOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replaces a run of that name.")] = False,
    stop_at: StopAtOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Runs an experiment and writes its rounds to Parquet."""
    from fedsim import launch, run_folder

    config = configuration(experiment_name, changes, address)
    targets = parsed_targets(stop_at)
    started, recording = time.perf_counter(), None
    folder = run_folder.target(results, name, config.name, overwrite)  # refuses a name before anything is started
    if name is None and folder.name != config.name and not quiet:
        print(f"{results / config.name} is there already, so this run is {folder.name}", flush=True)
    try:
        with launch.early_ray(config, debug=debug):
            from fedsim.recording import Recording

            on_plan = (lambda recording: None) if quiet else say_start
            recording = Recording.of(
                config,
                results=results,
                name=name,
                overwrite=overwrite,
                stop_at=targets,
                debug=debug,
                on_plan=on_plan,
            )
            record(recording, quiet=quiet)
    except KeyboardInterrupt:
        fail(interrupted(recording), 130)
    say_outcome(recording, time.perf_counter() - started)


@app.command(epilog=keys_help())
def plan(
    experiment_name: ExperimentArgument = "mnist",
    changes: SetOption = None,
    address: AddressOption = None,
    debug: DebugOption = False,  # read by `main`
) -> None:
    """Says what `run` would do, and refuses what does not fit; trains nothing."""
    from fedsim.experiment import prepare
    from fedsim.launch import preview

    x = prepare(configuration(experiment_name, changes, address))
    made = preview(x)
    clients, rounds = f"{x.config.clients.count:,}", counted(x.config.rounds, "round")
    smallest, largest = x.partition.num_examples.min(), x.partition.num_examples.max()
    sizes = f"{smallest:,}" if smallest == largest else f"{smallest:,} to {largest:,}"
    rows = {
        "data": f"{x.dataset.name}: {len(x.dataset.train_labels):,} training examples, {sizes} a client",
        "model": f"{x.config.model.name}: {x.layout.num_values:,} values, {x.model_bytes / 1e6:.1f} MB",
        "clients": f"{clients}, of which {x.cohort_size:,} a round, in {rounds}",
        **_plan_rows(made, _engine(x, made)),
    }
    table = Table(box=None, show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    console.print(table)


app.command()(resume.resume)
app.command()(sweep.sweep)
app.command()(compare.compare)
app.command()(verification.verify)
app.command()(verification.replay)
app.command()(report.report)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(metavar="PRESET", help="Prints this one as TOML.")] = None,
) -> None:
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
def runs(
    context: typer.Context,
    results: ResultsOption = Path("results"),
    debug: DebugOption = False,  # read by `main`
) -> None:
    """Lists the runs of a results folder, with their status and last accuracy, and its sweeps."""
    source = context.get_parameter_source("results")
    if source and source.name == "COMMANDLINE" and not results.is_dir():  # the default comes with the first run
        raise RunFolderError(f"{results} is not a folder; name another with --results")
    from fedsim.results import load_run
    from fedsim.run_folder import find_runs, is_run, read_info

    table = folding("run", "status", "rounds", "test accuracy", "started")
    for folder in find_runs(results):
        try:
            found = load_run(folder)
            rounds, info = found.rounds, found.info
        except (FedsimError, OSError, ValueError) as error:  # one damaged run must not hide the others
            table.add_row(folder.name, f"unreadable: {first_line(error)}")
            continue
        accuracy = rounds["test_accuracy"].dropna()
        table.add_row(
            found.name,
            info["status"],
            f"{max(0, len(rounds) - 1)}/{found.config.rounds}",
            f"{accuracy.iloc[-1]:.4f}" if len(accuracy) else "",
            str(info.get("started_at") or ""),
        )
    for folder in sorted(results.glob("*/")):
        if not is_run(folder) and (inside := find_runs(folder)):
            finished = sum((read_info(run) or {}).get("status") == "finished" for run in inside)
            table.add_row(f"{folder.name}/", f"{finished} of {counted(len(inside), 'run')} finished")
    console.print(table if table.row_count else f"no runs in {results}")


@data_app.command()
def fetch(name: Annotated[str, typer.Argument(metavar="DATASET", help="mnist, fashion_mnist")] = "mnist") -> None:
    """Gets a data set once, and checks it."""
    from fedsim import datasets

    console.print(f"{name}: {datasets.fetch(name)}")


@data_app.command()
def status() -> None:
    """Shows which data sets are cached, and whether they are whole."""
    from fedsim import datasets

    table = folding("data set", "state", "size", "folder")
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
    interrupts.clear()
    warnings.showwarning = _show_warning
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(arguments, prog_name="fedsim")
    except (FedsimError, OSError) as error:
        code = error.exit_code if isinstance(error, FedsimError) else 1
        said = "\n".join([str(error), *getattr(error, "__notes__", [])])
        fail(traceback.format_exc() if "--debug" in arguments else said, code)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **named: Any) -> None:
    """Those of fedsim as it says other things; a place in the code tells a person nothing."""
    if issubclass(category, FedsimWarning):
        sys.stderr.write(f"fedsim: {message}\n")
    else:
        _showwarning(message, category, *where, **named)


_showwarning = warnings.showwarning
PATIENCE_S = 5.0
"""After a signal, until the next one counts: the end takes less, unless something hangs."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ends the command. Not again while it ends: who presses on would break off what the run still has to write."""
    now = time.monotonic()
    if not interrupts or now - interrupts[-1] > PATIENCE_S:
        interrupts.append(now)
        raise KeyboardInterrupt


def _engine(x: Experiment, made: Plan) -> str:
    if x.spec.engine == "stacked":
        return f"stacked: up to {made.stack_size:,} clients in one computation" if made.stack_size > 1 else "stacked"
    return f"loop: {x.obstacle}" if x.obstacle else "loop: as asked for"


def _plan_rows(made: Plan, engine: str) -> dict[str, str]:
    on_gpu = " on a GPU" if made.num_gpus and not made.num_actors else ""
    rows = {"engine": engine, "placement": made.mode + on_gpu}
    if made.num_actors:
        share = f"{made.num_cpus:g} CPU" + (f" and {made.num_gpus:g} GPU" if made.num_gpus else "")
        started = ("forked" if made.start == "fork" else "plain") + ", each" * (made.num_actors > 1)
        rows["actors"] = f"{made.num_actors:,} {started} with {share} and {counted(made.threads, 'thread')}"
        rows["start-up"] = f"about {made.start_s:.0f} s"
    rows["memory"] = f"about {made.memory_bytes / 1e9:.1f} GB" + ("" if made.num_actors else " of updates in a round")
    rows["because"] = "; ".join(made.reasons)
    return rows
