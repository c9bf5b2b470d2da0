"""`fedsim verify` and `fedsim replay`: the cost first, then what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.cli.options import AnywayOption, DebugOption, ResultsOption, RunArgument, parsed, set_option
from fedsim.cli.terminal import console
from fedsim.errors import ConfigError, counted
from fedsim.run_folder import path_of

if TYPE_CHECKING:
    from fedsim.rerun import Rerun


def verify(
    run: RunArgument,
    rounds: Annotated[
        str | None,
        typer.Option(metavar="ROUNDS", help="A round, a range such as 2..5, or all; without it, the last round."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        set_option(
            "Where to compute (without it serial, or on two actors if the run was that; on a GPU as it was)",
            "placement.KEY=VALUE",
        ),
    ] = None,
    results: ResultsOption = Path("results"),
    anyway: AnywayOption = False,
    debug: DebugOption = False,
) -> None:
    """Computes rounds of a run again under another placement, and compares every hash."""
    placement = _placement(changes)
    from fedsim.rerun import plan_verify
    from fedsim.verification import recompute

    rerun = plan_verify(path_of(run, results), rounds=rounds, placement=placement, anyway=anyway)
    _say_cost(rerun)
    for round, difference in recompute(rerun, debug=debug):
        outcome = "different" if difference else "equal"
        print(f"round {round.record.round}/{rerun.last}  {outcome}  {round.record.round_s:.2f} s", flush=True)
    if difference:
        console.print(f"{rerun.run.path}: {difference}")
        raise typer.Exit(1)
    console.print(f"{rerun.run.path}: equal, every client's update and the weights of every round")


def replay(
    run: RunArgument,
    round: Annotated[int, typer.Option(help="A round of the run, or the one in which it failed.")],
    client: Annotated[int, typer.Option(help="A client of the round's cohort.")],
    results: ResultsOption = Path("results"),
    anyway: AnywayOption = False,
    debug: DebugOption = False,  # read by `main`
) -> None:
    """Trains one client of one round again in this process, and compares it with the recorded row."""
    from fedsim.rerun import plan_replay
    from fedsim.verification import retrain

    rerun = plan_replay(path_of(run, results), round=round, client=client, anyway=anyway)
    _say_cost(rerun)
    answer = retrain(rerun)
    made = answer.client
    console.print(
        f"{counted(made.num_steps or 0, 'step')}, train_loss {made.train_loss}, update_sha256 {made.update_sha256}"
    )
    for difference in answer.differences:
        console.print(f"{rerun.run.path}: {difference}")
    if answer.differences:
        raise typer.Exit(1)
    compared = "equal to the recorded row" if answer.is_recorded else "the run has no row of it to compare with"
    console.print(f"{rerun.run.path}: {compared}")


def _placement(changes: list[str] | None) -> dict[str, Any] | None:
    values = parsed(changes)
    for key in values:
        if not key.startswith("placement."):
            raise ConfigError(
                f"--set {key}: a run is verified with its own configuration, only its placement may be another, "
                "for example --set placement.mode=serial"
            )
    return {key.removeprefix("placement."): value for key, value in values.items()} or None


def _say_cost(rerun: Rerun) -> None:
    console.print(rerun.cost)
    for unlike in rerun.unlike:
        console.print(f"nevertheless: {unlike}")
