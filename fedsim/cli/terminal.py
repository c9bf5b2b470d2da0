"""What a person sees: the console, and a run's progress on it."""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.table import Table

from fedsim.errors import counted

if TYPE_CHECKING:
    from fedsim.metrics import RoundRecord
    from fedsim.recording import Recording

# Paths are printed as they are, and tables in full where no terminal sets a width.
_WIDTH = None if sys.stdout.isatty() else 200
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, width=_WIDTH)

interrupts: list[float] = []
"""When signals came that end the command: a library may swallow the exception while it is imported."""


def folding(*titles: str) -> Table:
    """A table whose cells break where the terminal is narrow: of a name that is cut off nobody can tell whose it is."""
    table = Table(box=None)
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def record(recording: Recording, *, quiet: bool) -> None:
    """Goes through a recording, with progress unless quiet.

    Raises:
        KeyboardInterrupt: also where a signal came, and a library swallowed it.
    """
    if interrupts:
        raise KeyboardInterrupt
    with contextlib.nullcontext() if quiet else _printed_log(), recording:
        for _ in recording if quiet else with_progress(recording):
            if interrupts:
                raise KeyboardInterrupt


@contextlib.contextmanager
def _printed_log() -> Iterator[None]:
    """Prints what fedsim has to say meanwhile, such as how many actors have started."""
    logger, handler = logging.getLogger("fedsim"), logging.StreamHandler(sys.stdout)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def interrupted(recording: Recording | None) -> str:
    """What a person needs to know of a run that was interrupted."""
    if recording is None or recording.done is None:
        return "interrupted: no round was finished"
    how = f"fedsim resume {shlex.quote(str(recording.folder))}"
    return f"interrupted: {recording.folder} holds the rounds up to {recording.done}; {how} goes on"


def say_outcome(recording: Recording, seconds: float) -> None:
    """A finished run's path and accuracy, and how to read it."""
    accuracy = recording.last.test_accuracy if recording.last else None
    if accuracy is None:  # of a run that was only to be ended, or that has stopped where it was not evaluated
        accuracy = recording.run.rounds["test_accuracy"].dropna().iloc[-1]
    rounds = counted(recording.done or 0, "round")
    console.print(f"{recording.folder}: test accuracy {accuracy:.4f} after {rounds} ({seconds:.1f} s)")
    if number := recording.run.info.get("num_dropped"):
        console.print(
            f"{counted(number, 'time')} a client was left out: without these losses the results would be others"
        )
    console.print(f"import pandas as pd; pd.read_parquet({f'{recording.folder}/rounds.parquet'!r})")


def fail(message: str, code: int) -> NoReturn:
    """Says why the command ends, and ends it."""
    sys.stderr.write(f"fedsim: {message}\n")
    if code == 130:  # a signal that comes in the very end would end Python with another code
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def say_start(recording: Recording) -> None:
    """What starts, and how long it will take."""
    print(_start_line(recording), flush=True)


def mishaps(record: RoundRecord) -> str:
    """What went wrong in a round, and how it was met; "" for nothing."""
    counts = {
        "started again": record.num_retries,
        "rejected": record.num_rejected,
        "left out": record.num_dropped,
    }
    return "".join(f"  {number} {what}" for what, number in counts.items() if number)


def with_progress(recording: Recording) -> Iterator[RoundRecord]:
    """Goes through the rounds with a live bar on a terminal, with plain lines elsewhere."""
    return _bar(recording) if console.is_terminal else _lines(recording)


def _start_line(recording: Recording) -> str:
    made = recording.plan
    clients = counted(recording.experiment.config.clients.count, "client")
    if not made.num_actors:
        return f"{recording.name}: {clients} in this process"
    actors = counted(made.num_actors, "actor")
    return f"{recording.name}: {clients} on {actors} ({made.mode}), up in about {made.start_s:.0f} s"


def _lines(recording: Recording) -> Iterator[RoundRecord]:
    for record in recording:
        accuracy = "" if record.test_accuracy is None else f"  test_accuracy {record.test_accuracy:.4f}"
        total = recording.experiment.config.rounds
        print(f"round {record.round}/{total}{accuracy}  {record.round_s:.2f} s{mishaps(record)}", flush=True)
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
    with progress.Progress(*columns, console=console) as bar:
        total = recording.experiment.config.rounds
        task = bar.add_task(
            f"{recording.name}: starting", total=total, completed=recording.done or 0, accuracy="", rate=""
        )
        accuracy = ""
        for record in recording:
            if record.test_accuracy is not None:
                accuracy = f"test accuracy {record.test_accuracy:.4f}"
            rate = f"{1 / record.round_s:.2f} rounds/s" if record.round_s < 1 else f"{record.round_s:.2f} s/round"
            if mishaps(record):
                console.print(f"round {record.round}:{mishaps(record)}")
            bar.update(task, description=recording.name, completed=record.round, accuracy=accuracy, rate=rate)
            yield record
