"""What it takes to compute rounds of a run again: checked, and its cost told, before anything starts."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedsim import checkpoint
from fedsim.comparison import Recorded
from fedsim.compatibility import NOTHING, Own, check_own, check_same, compared, with_engine_of
from fedsim.config import Config
from fedsim.errors import InputError, RunFolderError
from fedsim.experiment import Experiment, prepare
from fedsim.results import Run, load_run
from fedsim.simulation import Start
from fedsim.starts import restore


@dataclass(frozen=True, eq=False)
class Rerun:
    """Rounds of a run that are to be computed again: all is checked, nothing has started."""

    run: Run
    experiment: Experiment
    recorded: Recorded
    start: Start | None
    """From a checkpoint; None is round 0."""
    last: int
    """The last round to be computed again."""
    client: int | None
    """To be trained in the round after; None for a verification."""
    unlike: list[str]
    """What is not as in the run, where the user goes on anyway."""
    anyway: bool

    def check(self, pairs: Mapping[str, tuple[Any, Any]]) -> None:
        """Compares what is known only later: name -> in the run, here.

        Raises:
            InputError: they differ, and the user did not say to go on anyway.
        """
        self.unlike.extend(check_same(self.run.path, pairs, self.anyway))

    @property
    def is_in_stacks(self) -> bool:
        """Whether a client's bits depend on those that it trains with."""
        return _is_in_stacks(self.run)

    @property
    def rounds(self) -> range:
        """The rounds to be computed again."""
        return range(self.start.round + 1 if self.start else 1, self.last + 1)

    @property
    def cost(self) -> str:
        """What will be done, and about how long it will take: for the user, before it is done."""
        again = f"{_named(self.rounds)} again" if self.rounds else ""
        origin = f"from the checkpoint of round {self.start.round}" if self.start else "from round 0"
        if self.client is None:
            what = f"computes {again} {origin}, {_layout(self.experiment.config.placement.model_dump())}"
            what += f" where the run was {_layout(self.run.info.get('placement', {}))}"
        else:
            where = "where it was" if self.is_in_stacks else "in this process"
            what = f"trains client {self.client} of round {self.last + 1} {where}, "
            what += f"after {again} {origin}" if again else origin
        return f"{self.run.path}: {what}; about {self._seconds:.1f} s at the pace of the run"

    @property
    def _seconds(self) -> float:
        rounds = sum(row["round_s"] for r, row in self.recorded.rounds.items() if r in self.rounds)
        client = self.recorded.clients(self.last + 1).get(self.client) if self.client is not None else None
        return float(rounds) + (client["fit_s"] if client else 0.0)


def plan_verify(
    path: str | os.PathLike[str],
    *,
    rounds: int | str | None = None,
    placement: Mapping[str, Any] | None = None,
    own: Own = NOTHING,
    anyway: bool = False,
) -> Rerun:
    """What `verify` will do: arguments and errors are its own."""
    run = load_run(path)
    recorded = Recorded(run)
    first, last = _chosen(rounds, recorded, run)
    config = _placed(run, _other_placement(run) if placement is None else {"mode": "packed", **placement})
    return _plan(run, recorded, config, first, last, None, own, anyway)


def plan_replay(
    path: str | os.PathLike[str], *, round: int, client: int, own: Own = NOTHING, anyway: bool = False
) -> Rerun:
    """What `replay` will do: arguments and errors are its own."""
    run = load_run(path)
    recorded = Recorded(run)
    last = max(recorded.last, 0)
    if recorded.rounds.get(last, {}).get("num_completed") or last == 0:  # then the run may have failed in the next one
        last = min(last + 1, run.config.rounds)
    if not 1 <= round <= last:
        raise InputError(f"round {round} cannot be replayed: {run.path} has {_named(range(1, last + 1))}")
    rerun = _plan(run, recorded, _placed(run, _nearby_placement(run)), round, round - 1, client, own, anyway)
    cohort = rerun.experiment.sample(round)
    if client not in cohort:
        some = ", ".join(map(str, cohort[:20])) + (f", ... ({len(cohort)} clients)" if len(cohort) > 20 else "")
        raise InputError(f"client {client} had no part in round {round} of {run.path}; its cohort: {some}")
    return rerun


def _plan(
    run: Run, recorded: Recorded, config: Config, first: int, last: int, client: int | None, own: Own, anyway: bool
) -> Rerun:
    """Checks that the run can be repeated here, and finds the nearest start before its round `first`."""
    assert run.path is not None
    info = run.info
    check_own(run.path, info["own"], own)
    if not math.isnan(recorded.rounds.get(recorded.last, {}).get("test_accuracy", math.nan)):
        # a target may have made it the last one, which is tested; where it is tested anyway, this is nothing to it
        config = config.override({"rounds": max(recorded.last, 1)})
    x = prepare(config, model=own.model, strategy=own.strategy, dataset=own.dataset)
    threads = (run.config.placement.threads, config.placement.threads)
    unlike = check_same(run.path, compared(info, x) | {"placement.threads": threads}, anyway)
    saved = [round for round in checkpoint.rounds(run.path / "checkpoint") if round < first]
    start = None
    if saved:
        row = recorded.rounds.get(saved[-1], {})
        try:
            start = restore(run.path, saved[-1], x, row.get("weights_sha256", "no row"))
        except RunFolderError as error:
            manifest = run.path / "checkpoint" / f"{saved[-1]:06d}.json"
            raise RunFolderError(f"{error}; remove {manifest} to start before it") from None
    return Rerun(run, x, recorded, start, last, client, unlike, anyway)


def _chosen(rounds: int | str | None, recorded: Recorded, run: Run) -> tuple[int, int]:
    """The first and last round that the user asks for."""
    last = recorded.last
    if last < 1:
        raise InputError(f"{run.path} has no finished round to verify yet")
    if rounds is None or rounds == "all":
        return (1 if rounds else last), last
    parts = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(rounds))
    first, end = (int(parts[1]), int(parts[2] or parts[1])) if parts else (0, 0)
    if not 1 <= first <= end <= last:
        raise InputError(
            f"rounds = {rounds}: {run.path} has {_named(range(1, last + 1))}; "
            "write a round such as 1, a range such as 1..2, or all"
        )
    return first, end


def _other_placement(run: Run) -> Mapping[str, Any]:
    """A placement that the run did not have; on a GPU, where the promise is for the same plan only, its own."""
    placed = run.info.get("placement") or {}
    if not _is_on_gpu_again(run):
        return {"mode": "packed", "actors": 2} if placed.get("mode") == "serial" else {"mode": "serial"}
    own = {**run.config.placement.model_dump(), "mode": placed["mode"], "num_gpus": placed["num_gpus"]}
    if placed["mode"] != "actor-per-client":
        own["stack_size"] = placed["stack_size"]
    if placed["mode"] == "packed":
        own["actors"] = placed["num_actors"]
    return own


def _nearby_placement(run: Run) -> Mapping[str, Any]:
    """This process; but for stacks on a GPU, where a client's bits depend on its neighbours."""
    if _is_in_stacks(run):
        return _other_placement(run)
    if _is_on_gpu_again(run):
        return {"mode": "serial", "num_gpus": 1, "stack_size": 1}
    return {"mode": "serial", "num_gpus": 0}


def _is_in_stacks(run: Run) -> bool:
    return _is_on_gpu_again(run) and (run.info.get("placement") or {}).get("stack_size", 1) > 1


def _is_on_gpu_again(run: Run) -> bool:
    """Whether it was on a GPU and can be here; where it cannot, its arithmetic will not be that of the run."""
    return str(run.info.get("device")).startswith("cuda") and torch.cuda.device_count() > 0


def _placed(run: Run, placement: Mapping[str, Any]) -> Config:
    """The run's configuration with another placement, but its threads and its engine, which are part of the bits."""
    values = run.config.to_dict()
    values["placement"] = {"threads": run.config.placement.threads, **placement}
    return with_engine_of(run.info, Config.from_dict(values))


def _layout(placement: Mapping[str, Any]) -> str:
    actors = placement.get("num_actors", placement.get("actors"))
    number = f" with {actors} actor{'s' * (actors != 1)}" if actors and actors != "auto" else ""
    return f"{placement.get('mode')}{number}"


def _named(rounds: range) -> str:
    if not rounds:
        return "no round but 0"
    return f"rounds {rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else f"round {rounds[0]}"
