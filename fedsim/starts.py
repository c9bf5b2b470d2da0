"""Where the loop can go on: what the server held after a round, from the checkpoint of that round."""

from __future__ import annotations

from pathlib import Path

from fedsim import checkpoint
from fedsim.errors import InputError, RunFolderError
from fedsim.experiment import Experiment
from fedsim.results import Whole
from fedsim.simulation import Start


def restore(folder: Path, round: int, x: Experiment, weights_sha256: str | None = None) -> Start:
    """What the server held after a round that has a checkpoint: where `federated_averaging` can go on.

    Args:
        folder: the run's folder.
        round: one of `checkpoint.rounds`.
        x: the run's experiment, whose model gives the weights their layout.
        weights_sha256: what the round's record says; None for no comparison.

    Raises:
        RunFolderError: the checkpoint is damaged.
        InputError: it is of another model.
    """
    tensors, state = checkpoint.load(folder / "checkpoint", round, weights_sha256)
    shapes = {entry.name: entry.shape for entry in x.layout.floats + x.layout.integers}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        raise InputError(
            f"the checkpoint of round {round} in {folder} is of another model: its tensors are not those of this one"
        )
    start = Start(round, x.layout.of_named(tensors), state)
    if weights_sha256 is not None and start.weights.sha256() != weights_sha256:
        manifest = folder / "checkpoint" / f"{round:06d}.json"
        raise RunFolderError(f"the checkpoint {manifest} does not hold the weights of that round's row")
    return start


def newest(folder: Path, whole: Whole, x: Experiment) -> tuple[Start | None, list[str]]:
    """The newest checkpoint that a run can go on from, and what is wrong with newer ones.

    None is round 0. A checkpoint whose rows are not whole is passed over, and so is that of a round in which no
    client completed: the run is to end in that round again. Where a run is made shorter, its last round has to be
    evaluated, which only happens as it is computed.
    """
    damage: list[str] = []
    ends = set(whole.parts.values())
    for round in reversed(checkpoint.rounds(folder / "checkpoint")):
        if round not in ends or whole.rounds[round].is_lost:
            continue
        if round == x.config.rounds and not whole.rounds[round].is_evaluated:
            continue
        try:
            return restore(folder, round, x, whole.rounds[round].weights_sha256), damage
        except RunFolderError as error:
            damage.append(str(error))
    return None, damage


def is_saved(folder: Path, round: int, whole: Whole) -> bool:
    """Whether a round has a checkpoint that is whole; needs no model."""
    try:
        checkpoint.load(folder / "checkpoint", round, whole.rounds[round].weights_sha256)
    except RunFolderError:
        return False
    return True
