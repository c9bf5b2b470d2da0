"""A run from start to end, with its folder on disk."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from fedsim import environment, launch, models
from fedsim.actors import Pool, PoolInfo
from fedsim.config import Config
from fedsim.datasets import Dataset
from fedsim.errors import ClientError, DivergedError, InputError, RunFailedError
from fedsim.experiment import Experiment, prepare
from fedsim.homes import Home, NewRun
from fedsim.launch import Launch
from fedsim.metrics import RoundRecord
from fedsim.results import Run, RunWriter
from fedsim.run_folder import check_name, name_of, target
from fedsim.simulation import Round, federated_averaging
from fedsim.strategies import Strategy
from fedsim.targets import Target, targets
from fedsim.weights import Weights


def run(
    config: Config,
    *,
    results: str | os.PathLike[str] | None = "results",
    name: str | None = None,
    overwrite: bool = False,
    stop_at: Mapping[str, float] | None = None,
    model: Callable[..., nn.Module] | None = None,
    strategy: Strategy | None = None,
    dataset: Dataset | None = None,
) -> Run:
    """Runs an experiment to its end and writes it down.

    Uses a Ray that is already initialised and leaves it running; otherwise it starts one and stops it.

    Args:
        config: the configuration.
        results: the folder that gets the run's folder; None for nothing on disk.
        name: the run's name; None calls it after the configuration, with the next free number.
        overwrite: replaces a run of that name.
        stop_at: ends the run with the first round in which a column of rounds.parquet is there, an accuracy at least or
            a loss at most, such as {"test_accuracy": 0.97}; its rounds are those of the same run without,
            but that the last one is tested, whatever `evaluation.every` says.
        model: own model factory, called with (input_shape, num_classes) or with nothing, returning an `nn.Module`.
        strategy: own server algorithm.
        dataset: own data set.

    Returns:
        The finished run.

    Raises:
        InputError: the configuration, the data, the name or the machine does not allow it; nothing was written.
        RunFailedError: the run could not be finished; its finished rounds stay readable.

    Example:
        >>> config = Config().override({"data.dataset": "synthetic", "placement.mode": "serial", "rounds": 1})
        >>> run(config, results=None).rounds["round"].tolist()
        [0, 1]
    """
    with Recording.of(
        config,
        results=results,
        name=name,
        overwrite=overwrite,
        stop_at=targets(stop_at or {}),
        model=model,
        strategy=strategy,
        dataset=dataset,
    ) as recording:
        for _ in recording:
            pass
    return recording.run


class Recording:
    """A run that writes itself down while it is iterated; `run` holds it afterwards.

    Everything is checked when it is made. When it is entered, Ray is connected, the plan made and the actors started;
    only then the folder begins. When it is left, the folder is complete, whatever the reason.

    Args:
        experiment: what is run.
        home: where it is written; None for nothing on disk.
        name: what a run without a home is called.
        stop_at: the run is over when one of these is reached.
        debug: shows what the actors print.
        launch: how it gets its hosts; where several runs follow one another, a `Warm` keeps them.
        on_plan: called with the recording once its plan is made, before its actors start: they may take a while.
    """

    def __init__(
        self,
        experiment: Experiment,
        home: Home | None,
        *,
        name: str = "run",
        stop_at: Sequence[Target] = (),
        debug: bool = False,
        launch: Launch = launch,
        on_plan: Callable[[Recording], object] = lambda recording: None,
    ) -> None:
        self.experiment = experiment
        self.start = home.start if home else None
        self.last: RoundRecord | None = None
        self.stop_at = stop_at
        self._home, self._name, self._debug, self._launch, self._on_plan = home, name, debug, launch, on_plan
        self._records: list[RoundRecord] = []
        self._info: dict[str, Any] = {}
        self._weights: Weights | None = self.start.weights if self.start else None
        self._writer: RunWriter | None = None

    @classmethod
    def of(
        cls,
        config: Config,
        *,
        results: str | os.PathLike[str] | None = "results",
        name: str | None = None,
        overwrite: bool = False,
        stop_at: Sequence[Target] = (),
        debug: bool = False,
        launch: Launch = launch,
        model: Callable[..., nn.Module] | None = None,
        strategy: Strategy | None = None,
        dataset: Dataset | None = None,
        on_plan: Callable[[Recording], object] = lambda recording: None,
    ) -> Self:
        """The recording of a new run; arguments and errors as of `run`, the others as of the class."""
        for goal in stop_at:
            goal.check(config)
        called = check_name(name if name is not None else config.name)
        make = partial(target, Path(results), name, config.name, overwrite) if results is not None else None
        folder = make() if make else None  # refuses a name before anything is loaded
        x = prepare(config, model=model, strategy=strategy, dataset=dataset)
        home = NewRun(make, folder, x.config, overwrite, is_named=name is not None) if make and folder else None
        return cls(x, home, name=called, stop_at=stop_at, debug=debug, launch=launch, on_plan=on_plan)

    @property
    def folder(self) -> Path | None:
        """The run's folder; None for a run that is not written."""
        return self._home.folder if self._home else None

    @property
    def name(self) -> str:
        """The run's name."""
        return name_of(self._home.folder) if self._home else self._name

    @property
    def done(self) -> int | None:
        """The last finished round, also of an earlier part of the run; None where there is none yet."""
        if self.last is not None:
            return self.last.round
        return self.start.round if self.start else None

    def __enter__(self) -> Self:
        x = self.experiment
        with contextlib.ExitStack() as stack:
            self.plan = stack.enter_context(self._launch.connect(x, debug=self._debug))
            self._on_plan(self)
            self._pool = stack.enter_context(self._launch.open_pool(x, self.plan))
            self._info = _info(self, self._pool.info)
            if self._home:
                self._writer = stack.enter_context(self._home.open(self._info))
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._advise(error)
        try:
            self._cleanup.__exit__(kind, error, where)
        except RunFailedError as own_error:
            self._advise(own_error)
            raise

    def _advise(self, error: BaseException | None) -> None:
        """Says with an error what the user can do about it."""
        if self.folder is None or not isinstance(error, RunFailedError):
            return
        if isinstance(error, DivergedError):
            return  # it would diverge again
        if not isinstance(error, ClientError):
            error.add_note(f"{how_to_resume(self.folder, self.experiment.own)} goes on with the run")
        elif error.client_id >= 0:
            error.add_note(_how_to_replay(self.folder, error, self.experiment.own))

    def __iter__(self) -> Iterator[RoundRecord]:
        x, writer = self.experiment, self._writer
        if self._home and self._home.is_over:
            return
        for round in federated_averaging(x, self._pool, self.start):
            if is_over := any(target.is_reached(vars(round.record)) for target in self.stop_at):
                round = _tested(self._pool, round)
            self.last, self._weights = round.record, round.weights
            if writer:
                tensors = partial(x.layout.unflatten, round.weights)
                writer.write(round.record, tensors, round.state, is_over=is_over)
            else:
                self._records.append(round.record)
            yield round.record
            if is_over:
                return

    @property
    def run(self) -> Run:
        """The run, once it has been iterated."""
        x = self.experiment
        if self._weights is None:
            raise InputError("the run has not started: iterate it first")
        return Run(
            self.name,
            self.folder,
            self._home.config if self._home else x.config,
            _info=self._info,
            _records=tuple(self._records),
            _tensors=x.layout.unflatten(self._weights),
            _model=lambda: models.build(x.spec.model, x.spec.input_shape, x.spec.num_classes, x.spec.seed),
        )


def _tested(pool: Pool, round: Round) -> Round:
    """A round that has turned out to be the last, with its weights tested where they were not."""
    if round.record.test_accuracy is not None:
        return round
    start = time.perf_counter()
    evaluation = pool.evaluate(round.record.round, round.weights)
    evaluate_s = time.perf_counter() - start
    record = replace(
        round.record,
        test_loss=evaluation.loss,
        test_accuracy=evaluation.accuracy,
        round_s=round.record.round_s + evaluate_s,
        evaluate_s=evaluate_s,
    )
    return replace(round, record=record)


def how_to_resume(folder: Path, own: Mapping[str, str]) -> str:
    """The command that goes on with a run, to be pasted; the call, where the run has own parts."""
    if own:
        return f"fedsim.resume({str(folder)!r}, {', '.join(f'{part}=...' for part in own)})"
    return f"fedsim resume {shlex.quote(str(folder))}"


def _how_to_replay(folder: Path, error: ClientError, own: dict[str, str]) -> str:
    call = f"fedsim replay {shlex.quote(str(folder))} --round {error.round} --client {error.client_id}"
    if own:
        parts = "".join(f", {part}=..." for part in own)
        call = f"fedsim.replay({str(folder)!r}, round={error.round}, client={error.client_id}{parts})"
    return f"{call} re-trains it in this process"


def _info(recording: Recording, pool: PoolInfo) -> dict[str, Any]:
    """What run.json says of a run that is up and has not begun."""
    x = recording.experiment
    return {
        "versions": environment.versions(),
        "machine": environment.machine(),
        "git_commit": environment.git_commit(),
        "engine": x.spec.engine,
        "placement": asdict(recording.plan),
        "data": {
            "name": x.dataset.name,
            "sha256": x.dataset.sha256(),
            "input_shape": x.dataset.input_shape,
            "num_classes": x.dataset.num_classes,
        },
        "model": {
            "num_values": x.layout.num_values,
            "num_bytes": x.model_bytes,
            "initial_weights_sha256": x.initial_weights.sha256(),
        },
        "own": x.own,
        "stop_at": [str(target) for target in recording.stop_at],
        "device": pool.device,
        "numerics_fingerprint": pool.fingerprint,
        "num_forked": pool.num_forked,
    }
