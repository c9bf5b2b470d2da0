"""Going on with a run that stopped, or further with one that finished: the results of a run that never stopped.

`plan_resume` checks everything and changes nothing; what it gives is the `Home` of a `Recording`, which puts the folder
right when all actors are up.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fedsim.compatibility import NOTHING, Own, check_own, check_same, compared, compared_strategy, with_engine_of
from fedsim.config import Config
from fedsim.datasets import Dataset
from fedsim.errors import ConfigError, FedsimWarning, RunFolderError
from fedsim.experiment import Experiment, prepare
from fedsim.recording import Recording
from fedsim.results import Run, RunWriter, Whole, find_whole, go_on, load_run
from fedsim.results.writer import now
from fedsim.run_folder import Stopped, stopped
from fedsim.simulation import Start
from fedsim.starts import is_saved, newest
from fedsim.strategies import Strategy
from fedsim.targets import Target

_OF_A_PART = ("versions", "machine", "git_commit", "placement", "device", "numerics_fingerprint", "num_forked")


def resume(
    path: str | os.PathLike[str],
    *,
    changes: Mapping[str, Any] | None = None,
    model: Callable[..., nn.Module] | None = None,
    strategy: Strategy | None = None,
    dataset: Dataset | None = None,
    anyway: bool = False,
) -> Run:
    """Goes on with a run: its results and weights are those of a run that was never interrupted, to the bit.

    Starts from the newest checkpoint that is whole, else from round 0; what was written after it is computed again.

    Args:
        path: the run's folder.
        changes: dotted keys; `rounds`, to go further, and where and how carefully it runs, see `config.changes`.
        model: the run's own model, where it had one.
        strategy: the run's own strategy, where it had one.
        dataset: the run's own data set, where it had one.
        anyway: goes on although data, package versions or arithmetic are not those of the run.

    Returns:
        The finished run; a run that was finished already is returned as it is.

    Raises:
        InputError: no run, one that is being written, a key that may not change, or a run whose bits cannot be
            expected here; nothing was written.
        RunFailedError: as `run`.

    Example:
        >>> resume("results/mnist", changes={"rounds": 20})  # doctest: +SKIP
    """
    with stopped(Path(path), changes or {}) as found:
        resumption = plan_resume(found, Own(model, strategy, dataset), anyway=anyway)
        if resumption is None:
            return load_run(path, model=model)
        with Recording(resumption.experiment, resumption, stop_at=resumption.stop_at) as recording:
            for _ in recording:
                pass
    return recording.run


@dataclass(frozen=True, eq=False)
class Resumption:
    """A run that can go on: the `Home` of its recording."""

    stopped: Stopped
    experiment: Experiment
    whole: Whole
    start: Start | None
    unlike: list[str]
    """What is not as in the run, where the user goes on anyway."""
    anyway: bool

    @property
    def folder(self) -> Path:
        """See `Home`."""
        return self.stopped.folder

    @property
    def config(self) -> Config:
        """See `Home`."""
        return self.stopped.config

    @property
    def stop_at(self) -> list[Target]:
        """What ends the run early. Not what has ended it, if more rounds are asked for."""
        goes_further = self.stopped.info["status"] == "finished" and "rounds" in self.stopped.changes
        return [] if goes_further else [Target.parse(text) for text in self.stopped.info.get("stop_at", [])]

    @property
    def is_over(self) -> bool:
        """See `Home`."""
        row = self.whole.rounds[self.start.round].measures if self.start else {}
        return bool(row) and any(target.is_reached(row) for target in self.stop_at)

    @property
    def next_round(self) -> int:
        """The first round that is computed."""
        return self.start.round + 1 if self.start else 0

    def open(self, info: dict[str, Any]) -> RunWriter:
        """Puts the run's folder right; see `Home`."""
        before = self.stopped.info
        arithmetic = {
            "numerics fingerprint": (before.get("numerics_fingerprint"), info["numerics_fingerprint"]),
            "device": (before.get("device"), info["device"]),
        }
        unlike = self.unlike + check_same(self.folder, arithmetic, self.anyway)
        part = {"at": now(), "from_round": self.next_round, **{key: info[key] for key in _OF_A_PART}}
        resumes = [*before.get("resumes", []), part | ({"unlike": unlike} if unlike else {})]
        again = {"resumes": resumes, "stop_at": info["stop_at"]}
        if not info["stop_at"] and self.whole.rounds:  # it goes further, and its targets end with that
            row, goals = self.whole.rounds[-1].measures, map(Target.parse, before.get("stop_at", []))
            again |= {"stopped_by": before["stop_at"]} if any(goal.is_reached(row) for goal in goals) else {}
        round = self.start.round if self.start else None
        return go_on(
            self.folder, self.stopped.held, self.config, before | again, self.whole, round, is_over=self.is_over
        )


def plan_resume(stopped: Stopped, own: Own = NOTHING, *, anyway: bool = False) -> Resumption | None:
    """What `resume` will do; None for a run that is finished and whole, with which there is nothing to do.

    Args:
        stopped: the run.
        own: the parts of it that came from Python.
        anyway: see `resume`.

    Raises:
        InputError: see `resume`.
    """
    folder, info, config = stopped.folder, stopped.info, stopped.config
    whole = find_whole(folder)
    if others := sorted(whole.names - {info["name"]}):
        raise RunFolderError(f"{folder / 'run.json'} calls the run {info['name']}, its rows {others[0]}: it is damaged")
    if config.rounds < whole.last:
        raise ConfigError(f"rounds = {config.rounds}, but {folder} has done {whole.last} already: give at least that")
    is_at_end = whole.last == config.rounds or (info.get("stop_at") and "rounds" not in stopped.changes)
    is_done = info["status"] == "finished" and is_at_end and not whole.damage
    if is_done and is_saved(folder, whole.last, whole):
        return None
    check_own(folder, info["own"], own)
    x = prepare(with_engine_of(info, config), model=own.model, strategy=own.strategy, dataset=own.dataset)
    pairs = compared(info, x) | compared_strategy(info, x) | {"engine": (info.get("engine"), x.spec.engine)}
    if whole.rounds:
        pairs["initial weights"] = (whole.rounds[0].weights_sha256[:12], x.initial_weights.sha256()[:12])
    unlike = check_same(folder, pairs, anyway)
    start, damage = newest(folder, whole, x)
    resumption = Resumption(stopped, x, whole, start, unlike, anyway)
    for problem in [*damage, *([whole.damage] if whole.damage else [])]:
        warnings.warn(f"{problem}; going on with round {resumption.next_round}", FedsimWarning, stacklevel=3)
    return resumption
