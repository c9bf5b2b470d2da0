"""`fedsim resume`: where the run goes on, then what `fedsim run` prints."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fedsim.cli.options import (
    AddressOption,
    AnywayOption,
    DebugOption,
    QuietOption,
    ResultsOption,
    RunArgument,
    parsed,
    set_option,
)
from fedsim.cli.terminal import console, fail, interrupted, record, say_outcome, say_start
from fedsim.errors import counted

if TYPE_CHECKING:
    from fedsim.run_folder import Stopped


def resume(
    run: RunArgument,
    changes: Annotated[list[str] | None, set_option("Changes rounds, placement.*, failures.* or checkpoint.*")] = None,
    results: ResultsOption = Path("results"),
    address: AddressOption = None,
    quiet: QuietOption = False,
    anyway: AnywayOption = False,
    debug: DebugOption = False,
) -> None:
    """Goes on with an interrupted run, exactly; --set rounds=N extends a finished one."""
    from fedsim import launch, run_folder

    started, recording = time.perf_counter(), None
    values = parsed(changes) | ({} if address is None else {"placement.address": address})
    folder = run_folder.path_of(run, results)
    before = run_folder.read_info(folder)
    try:
        with run_folder.stopped(folder, values) as stopped, contextlib.ExitStack() as stack:
            may_go_on = stopped.info["status"] != "finished" or "rounds" in values
            if may_go_on and not stopped.info["own"]:  # own parts cannot be given here: refused below
                stack.enter_context(launch.early_ray(stopped.config, debug=debug))
            from fedsim.recording import Recording
            from fedsim.resumption import plan_resume

            resumption = plan_resume(stopped, anyway=anyway)
            if resumption is None:
                console.print(f"{folder}: finished{_after(stopped)}; --set rounds=N goes on to round N")
                return
            if not quiet:
                first, last = resumption.next_round, stopped.config.rounds
                is_over = first > last or resumption.is_over
                what = "has all its rounds" if is_over else f"goes on with round {first}/{last}"
                console.print(f"{folder}: {what}")
            for unlike in resumption.unlike:
                console.print(f"nevertheless: {unlike}")
            on_plan = (lambda recording: None) if quiet else say_start
            recording = Recording(
                resumption.experiment, resumption, stop_at=resumption.stop_at, debug=debug, on_plan=on_plan
            )
            record(recording, quiet=quiet)
    except KeyboardInterrupt:
        is_as_before = run_folder.read_info(folder) == before  # run.json is the first that changes
        fail(f"interrupted: nothing was changed in {folder}" if is_as_before else interrupted(recording), 130)
    assert recording is not None
    say_outcome(recording, time.perf_counter() - started)


def _after(stopped: Stopped) -> str:
    if targets := stopped.info.get("stop_at"):
        return f" with {', '.join(targets)}, or all {counted(stopped.config.rounds, 'round')}"
    return f" after {counted(stopped.config.rounds, 'round')}"
