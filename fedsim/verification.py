"""Rounds of a run computed again: under another placement (`verify`), or one client of a round (`replay`).

Each has two steps, so that the cost can be told before it is paid: `plan_verify` and `plan_replay` of `rerun` check
everything and start nothing, `recompute` and `retrain` do the work.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedsim.actors import Pool
from fedsim.comparison import Difference, client_differences, round_differences
from fedsim.compatibility import Own
from fedsim.datasets import Dataset
from fedsim.launch import connect, open_pool
from fedsim.metrics import ClientRecord
from fedsim.rerun import Rerun, plan_replay, plan_verify
from fedsim.simulation import Round, client_record, federated_averaging
from fedsim.strategies import Strategy


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`."""

    rounds: range
    """The rounds that were to be computed again, from the start on."""
    difference: Difference | None
    """The first one; None where all is equal."""

    @property
    def is_equal(self) -> bool:
        """Whether every client's update and every round's weights are the recorded ones."""
        return self.difference is None


@dataclass(frozen=True)
class Replay:
    """The outcome of `replay`."""

    client: ClientRecord
    """What the client does now; without `cosine_to_mean`, which needs the other clients of the round."""
    is_recorded: bool
    """Whether the run has a row to compare with: not of a round in which it failed."""
    differences: tuple[Difference, ...]
    """The first one on the way to the round, then those of the client's row."""


def verify(
    path: str | os.PathLike[str],
    *,
    rounds: int | str | None = None,
    placement: Mapping[str, Any] | None = None,
    model: Callable[..., nn.Module] | None = None,
    strategy: Strategy | None = None,
    dataset: Dataset | None = None,
    anyway: bool = False,
) -> Verification:
    """Computes rounds of a run again under another placement, and compares every result with the recorded one.

    Starts from the nearest checkpoint before the rounds, else from round 0, and stops at the first difference.

    Args:
        path: the run's folder; of a run still going, the rounds that are on disk.
        rounds: a round, a range such as "2..5", or "all"; None is the last round.
        placement: keys of the configuration's section; None is serial, or two actors for a run that was serial, or that
            of a run on a GPU, whose bits depend on it.
        model: the run's own model, where it had one.
        strategy: the run's own strategy, where it had one.
        dataset: the run's own data set, where it had one.
        anyway: goes on although data, package versions or arithmetic are not those of the run.

    Raises:
        InputError: a wrong path, round, key or part, or a run whose bits cannot be expected here.
        RunFailedError: a round cannot be finished.

    Example:
        >>> verify("results/mnist", rounds="2..5", placement={"mode": "packed", "actors": 3})  # doctest: +SKIP
        Verification(rounds=range(1, 6), difference=None)
    """
    own = Own(model, strategy, dataset)
    rerun = plan_verify(path, rounds=rounds, placement=placement, own=own, anyway=anyway)
    differences = [difference for _, difference in recompute(rerun)]
    return Verification(rerun.rounds, differences[-1] if differences else None)


def replay(
    path: str | os.PathLike[str],
    *,
    round: int,
    client: int,
    model: Callable[..., nn.Module] | None = None,
    strategy: Strategy | None = None,
    dataset: Dataset | None = None,
    anyway: bool = False,
) -> Replay:
    """Trains one client of one round again, in this process, so that a debugger can step through it.

    A client that trained in a stack on a GPU trains in that stack again, as its bits depend on it, and where it did.

    The rounds between the nearest checkpoint, else round 0, and the client's round are computed again before.

    Args:
        path: the run's folder.
        round: one of the run's rounds, or the one in which it failed.
        client: a client of the round's cohort.
        model: see `verify`.
        strategy: see `verify`.
        dataset: see `verify`.
        anyway: see `verify`.

    Raises:
        InputError: as `verify`.
        ClientError: the client's own code raised.

    Example:
        >>> replay("results/mnist", round=3, client=7).client.train_loss  # doctest: +SKIP
        0.3219
    """
    own = Own(model, strategy, dataset)
    return retrain(plan_replay(path, round=round, client=client, own=own, anyway=anyway))


def recompute(rerun: Rerun, *, debug: bool = False) -> Iterator[tuple[Round, Difference | None]]:
    """Computes the rounds again, each with its first difference; the one that has one is the last."""
    with _open(rerun, debug) as pool:
        for round in _rounds(rerun, pool):
            difference = next(round_differences(round.record, rerun.recorded), None)
            yield round, difference
            if difference:
                return


def retrain(rerun: Rerun) -> Replay:
    """Computes the rounds before again, then trains the client."""
    assert rerun.client is not None
    x, number = rerun.experiment, rerun.last + 1
    weights = rerun.start.weights if rerun.start else x.initial_weights
    differences: list[Difference] = []
    with _open(rerun) as pool:
        for round in _rounds(rerun, pool):
            weights = round.weights
            differences = differences or list(round_differences(round.record, rerun.recorded))[:1]
        trained = pool.fit(number, weights, x.sample(number) if rerun.is_in_stacks else [rerun.client])
    result = next(each for each in trained if each.client_id == rerun.client)
    client = client_record(number, result)
    row = rerun.recorded.clients(number).get(rerun.client)
    if row:
        differences += client_differences(client, row)
    return Replay(client, row is not None, tuple(differences))


def _rounds(rerun: Rerun, pool: Pool) -> Iterator[Round]:
    if rerun.start and not rerun.rounds:
        return
    for round in federated_averaging(rerun.experiment, pool, rerun.start):
        yield round
        if round.record.round == rerun.last:
            return


@contextlib.contextmanager
def _open(rerun: Rerun, debug: bool = False) -> Iterator[Pool]:
    """A pool whose arithmetic is that of the run."""
    x, info = rerun.experiment, rerun.run.info
    with connect(x, debug=debug) as plan, open_pool(x, plan) as pool:
        rerun.check(
            {
                "numerics fingerprint": (info.get("numerics_fingerprint"), pool.info.fingerprint),
                "device": (info.get("device"), pool.info.device),
            }
        )
        yield pool
