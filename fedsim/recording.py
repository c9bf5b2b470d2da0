"""A run from start to end, with its folder on disk."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from fedsim import checkpoint, environment, models
from fedsim.config import Config
from fedsim.datasets import Dataset
from fedsim.errors import ClientError, InputError, RunExistsError, RunFolderError
from fedsim.experiment import Experiment, prepare
from fedsim.launch import connect, open_pool
from fedsim.metrics import RoundRecord
from fedsim.placement import Plan
from fedsim.results import Run, RunWriter
from fedsim.run_folder import check_name, target
from fedsim.simulation import Round, Start, federated_averaging
from fedsim.strategies import Strategy


def run(
    config: Config,
    *,
    results: str | os.PathLike[str] | None = "results",
    name: str | None = None,
    overwrite: bool = False,
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
    with Recording(
        config, results=results, name=name, overwrite=overwrite, model=model, strategy=strategy, dataset=dataset
    ) as recording:
        for _ in recording:
            pass
    return recording.run


class Recording:
    """A run that writes itself down while it is iterated; `run` holds it afterwards. Arguments as of `run`.

    Everything is checked when it is made, and nothing is written before it is entered: then Ray is connected, the
    plan is made, and the run's folder begins.
    """

    def __init__(
        self,
        config: Config,
        *,
        results: str | os.PathLike[str] | None = "results",
        name: str | None = None,
        overwrite: bool = False,
        debug: bool = False,
        model: Callable[..., nn.Module] | None = None,
        strategy: Strategy | None = None,
        dataset: Dataset | None = None,
    ) -> None:
        self._target = partial(target, Path(results), name, config.name, overwrite) if results is not None else None
        self.folder = self._target() if self._target else None
        self.name = self.folder.name if self.folder else check_name(name or config.name)
        self.experiment = prepare(config, model=model, strategy=strategy, dataset=dataset)
        self._is_named, self._overwrite, self._debug = name is not None, overwrite, debug
        self._records: list[RoundRecord] = []
        self._last: Round | None = None
        self._writer: RunWriter | None = None

    def __enter__(self) -> Self:
        x = self.experiment
        with contextlib.ExitStack() as stack:
            self.plan = stack.enter_context(connect(x, debug=self._debug))
            if self.folder is not None:
                self._writer = stack.enter_context(self._new_writer(_info(x, self.plan)))
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if isinstance(error, ClientError) and error.client_id >= 0 and self.folder is not None:
            error.add_note(_how_to_replay(self.folder, error, self.experiment.own))
        self._cleanup.__exit__(kind, error, where)

    def _new_writer(self, info: dict[str, Any]) -> RunWriter:
        """Makes the run's folder; a name that another run takes in this moment is refused if it was asked for."""
        assert self._target is not None
        while True:
            self.folder = self._target()
            self.name = self.folder.name
            try:
                return RunWriter(self.folder, self.experiment.config, info, overwrite=self._overwrite)
            except RunExistsError:
                if self._is_named:
                    raise

    def __iter__(self) -> Iterator[RoundRecord]:
        x, writer = self.experiment, self._writer
        with open_pool(x, self.plan) as pool:
            if writer:
                writer.update(
                    device=pool.info.device,
                    numerics_fingerprint=pool.info.fingerprint,
                    num_forked=pool.info.num_forked,
                )
            for round in federated_averaging(x, pool):
                self._last = round
                if writer:
                    writer.write(round.record, partial(x.layout.unflatten, round.weights), round.state)
                else:
                    self._records.append(round.record)
                yield round.record

    @property
    def run(self) -> Run:
        """The run, once it has been iterated."""
        x = self.experiment
        if self._last is None:
            raise InputError("the run has not started: iterate it first")
        return Run(
            self.name,
            self.folder,
            x.config,
            _records=tuple(self._records),
            _tensors=x.layout.unflatten(self._last.weights),
            _model=lambda: models.build(x.spec.model, x.spec.input_shape, x.spec.num_classes, x.spec.seed),
        )


def restore(folder: Path, round: int, x: Experiment) -> Start:
    """What the server held after a round that has a checkpoint: where `federated_averaging` can go on.

    Args:
        folder: the run's folder.
        round: one of `checkpoint.rounds`.
        x: the run's experiment, whose model gives the weights their layout.

    Raises:
        RunFolderError: the checkpoint is damaged, or of another model.
    """
    tensors, state = checkpoint.load(folder / "checkpoint", round)
    shapes = {entry.name: entry.shape for entry in x.layout.floats + x.layout.integers}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        raise RunFolderError(
            f"the checkpoint of round {round} in {folder} is of another model: its tensors are not those of this one"
        )
    return Start(round, x.layout.of_named(tensors), state)


def _how_to_replay(folder: Path, error: ClientError, own: dict[str, str]) -> str:
    call = f"fedsim replay {shlex.quote(str(folder))} --round {error.round} --client {error.client_id}"
    if own:
        parts = "".join(f", {part}=..." for part in own)
        call = f"fedsim.replay({str(folder)!r}, round={error.round}, client={error.client_id}{parts})"
    return f"{call} re-trains it in this process"


def _info(x: Experiment, plan: Plan) -> dict[str, Any]:
    """What run.json says of a run before it starts."""
    return {
        "versions": environment.versions(),
        "machine": environment.machine(),
        "git_commit": environment.git_commit(),
        "engine": x.spec.engine,
        "placement": asdict(plan),
        "data": {
            "name": x.dataset.name,
            "sha256": x.dataset.sha256(),
            "input_shape": x.dataset.input_shape,
            "num_classes": x.dataset.num_classes,
        },
        "model": {"num_values": x.layout.num_values, "num_bytes": x.model_bytes},
        "own": x.own,
    }
