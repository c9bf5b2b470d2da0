"""The loop of federated averaging, as an iterator of rounds. `recording` goes through it with a folder on disk."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.actors import FitResult, Pool
from fedsim.config import Config
from fedsim.datasets import Dataset
from fedsim.errors import DivergedError, RunFailedError, counted
from fedsim.experiment import Experiment, prepare
from fedsim.fairness import fairness
from fedsim.launch import connect, open_pool
from fedsim.metrics import ClientRecord, ClientStatus, RoundRecord
from fedsim.numerics import numerics
from fedsim.server_state import check_state, copied, own_memory
from fedsim.strategies import State, Strategy, weighted_mean
from fedsim.training import Evaluation
from fedsim.weights import Weights, cosines, l2_norm, read_only_tensor


@dataclass(frozen=True)
class Start:
    """Where the loop goes on: what the server holds after a round, which is all that the later rounds depend on."""

    round: int
    weights: Weights
    state: State


@dataclass(frozen=True)
class Round:
    """A finished round: its record, and the weights and the server's state after it."""

    record: RoundRecord
    weights: Weights
    state: State


def federated_averaging(x: Experiment, pool: Pool, start: Start | None = None) -> Iterator[Round]:
    """The rounds of an experiment: sample, fit, aggregate, evaluate. Round 0 evaluates the initial weights.

    Args:
        x: the experiment.
        pool: where its clients are.
        start: goes on after this round instead of with round 0: the later rounds are the same, to the bit.

    Raises:
        ClientError: a client's own code raised.
        RunFailedError: a round cannot be finished.

    Reference:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
        Algorithm 1. https://arxiv.org/abs/1602.05629
    """
    if start is None:
        initial = _round_0(x, pool)
        yield initial
        start = Start(0, initial.weights, initial.state)
    weights, state = start.weights, start.state
    for round in range(start.round + 1, x.config.rounds + 1):
        clock = _Clock()
        cohort = x.sample(round)
        with clock.part("fit_s"):
            results = pool.fit(round, weights, cohort)
        with clock.part("aggregate_s"), numerics(x.config.placement.threads):
            step = _aggregate(x, round, weights, state, results)
            weights, state = step.weights, step.state
        evaluation = None
        if round % x.config.evaluation.every == 0 or round == x.config.rounds:
            with clock.part("evaluate_s"):
                evaluation = pool.evaluate(round, weights, then=x.sample(round + 1) if round < x.config.rounds else ())
        yield Round(_record(round, clock, weights, evaluation, step), weights, state)
        if step.update_l2_norm is None:  # after its rows are written: they say what happened
            raise _without_update(x, round, results)


def _round_0(x: Experiment, pool: Pool) -> Round:
    clock = _Clock()
    weights = x.initial_weights
    with numerics(x.config.placement.threads):
        state = check_state(x.strategy.init(own_memory(weights.flat)), "round 0: the strategy's init")
    with clock.part("evaluate_s"):
        evaluation = pool.evaluate(0, weights)
    return Round(_record(0, clock, weights, evaluation), weights, state)


def _without_update(x: Experiment, round: int, results: Sequence[FitResult]) -> RunFailedError:
    rejected, lost = [r for r in results if r.update], [r for r in results if not r.update]
    causes = []
    if rejected:
        none = f"not one of {len(rejected)} updates is finite" if len(rejected) > 1 else "the only update is not finite"
        causes.append(f"{none}; training diverged (training.lr = {x.config.training.lr})")
    if lost:
        were = "was" if len(lost) == 1 else "were"
        causes.append(f"{counted(len(lost), 'client')} {were} lost after all retries ({lost[0].error})")
    said = f"round {round}: nothing to average: {', and '.join(causes)}"
    return RunFailedError(said) if lost else DivergedError(said)


def rounds(
    config: Config,
    *,
    model: Callable[..., nn.Module] | None = None,
    strategy: Strategy | None = None,
    dataset: Dataset | None = None,
) -> Iterator[RoundRecord]:
    """Runs an experiment round by round, with nothing on disk; leaving the iteration early cleans up.

    Args:
        config: the configuration.
        model: own model factory, called with (input_shape, num_classes) or with nothing, returning an `nn.Module`.
        strategy: own server algorithm.
        dataset: own data set.

    Yields:
        The record of each round, from round 0, the evaluation of the initial weights.

    Raises:
        InputError: the configuration, the data or the machine does not allow it; before anything starts.
        RunFailedError: see `federated_averaging`.

    Example:
        >>> config = Config().override({"data.dataset": "synthetic", "placement.mode": "serial", "rounds": 2})
        >>> [record.round for record in rounds(config)]
        [0, 1, 2]
    """
    experiment = prepare(config, model=model, strategy=strategy, dataset=dataset)
    with connect(experiment) as plan, open_pool(experiment, plan) as pool:
        for round in federated_averaging(experiment, pool):
            yield round.record


@dataclass(frozen=True)
class _Step:
    """What the server made of a round's answers."""

    weights: Weights
    state: State
    update_l2_norm: float | None
    """None where there was nothing to average."""
    clients: tuple[ClientRecord, ...]
    num_retries: int


def _aggregate(x: Experiment, round: int, weights: Weights, state: State, results: Sequence[FitResult]) -> _Step:
    """The strategy's step over the finite updates, in ascending client_id, and the record of each client."""
    completed = [result.update for result in results if result.update and result.update.is_finite]
    num_retries = sum(result.attempts - 1 for result in results)
    if not completed:
        return _Step(weights, state, None, tuple(client_record(round, result) for result in results), num_retries)
    # numpy's large arrays lie in large pages of memory: for 40 MB a quarter of torch's time
    updates = torch.from_numpy(np.stack([update.update for update in completed]))
    is_by_examples = x.config.strategy.weighting == "examples"
    counts = torch.tensor([update.num_examples if is_by_examples else 1 for update in completed])
    angles = cosines(updates, [update.update_l2_norm for update in completed], weighted_mean(updates, counts))
    try:  # with copies: what it changes in place is its own
        flat, state = x.strategy.aggregate(copied(state), own_memory(weights.flat), updates, counts)
    except Exception as error:
        error.add_note(f"This was the strategy's aggregate in round {round}, of {len(completed)} updates.")
        raise
    if not isinstance(flat, Tensor) or _kind(flat) != _kind(weights.flat):
        raise RunFailedError(
            f"round {round}: the strategy gave {_kind(flat)} where it must give weights {_kind(weights.flat)}"
        )
    flat = own_memory(flat)  # the strategy may keep what it gave, and write to it
    state = check_state(state, f"round {round}: the strategy's aggregate")
    update_l2_norm = l2_norm(flat.double() - weights.flat.double())
    if not math.isfinite(update_l2_norm):
        raise DivergedError(f"round {round}: the strategy gave weights that are not finite")
    cosine_to_mean = {update.client_id: angle for update, angle in zip(completed, angles, strict=True)}
    return _Step(
        Weights(flat, read_only_tensor(completed[0].integers).clone()),
        state,
        update_l2_norm,
        tuple(client_record(round, result, cosine_to_mean.get(result.client_id)) for result in results),
        num_retries,
    )


def _kind(value: Any) -> str:
    """A tensor's type and shape, what anything else is: for a message."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {tuple(value.shape)}" + ("" if value.layout == torch.strided else f" {value.layout}")


def client_record(round: int, result: FitResult, cosine_to_mean: float | None = None) -> ClientRecord:
    """The record of what became of a client's work."""
    update, error = result.update, result.error
    status: ClientStatus = "dropped"
    if update:
        status, error = ("completed", None) if update.is_finite else ("rejected", "the update is not finite")
    before, after = (update.before, update.after) if update else (None, None)
    return ClientRecord(
        round=round,
        client_id=result.client_id,
        status=status,
        num_examples=result.num_examples,
        num_steps=update.num_steps if update else None,
        train_loss=update.train_loss if update else None,
        loss_before=_finite_loss(before),
        accuracy_before=before.accuracy if before else None,
        loss_after=_finite_loss(after),
        accuracy_after=after.accuracy if after else None,
        update_l2_norm=update.update_l2_norm if update else None,
        cosine_to_mean=cosine_to_mean,
        update_sha256=update.update_sha256 if update else None,
        fit_s=update.fit_s if update else None,
        stack_size=update.stack_size if update else None,
        attempts=result.attempts,
        actor=result.actor,
        pid=update.pid if update else None,
        node=update.node if update else None,
        error=error,
    )


def _finite_loss(evaluation: Evaluation | None) -> float | None:
    return evaluation.loss if evaluation and math.isfinite(evaluation.loss) else None


def _record(
    round: int, clock: _Clock, weights: Weights, evaluation: Evaluation | None, step: _Step | None = None
) -> RoundRecord:
    clients = step.clients if step else ()
    completed = [client for client in clients if client.status == "completed"]
    num_examples = sum(client.num_examples for client in completed)
    losses = [client.num_examples * client.train_loss for client in completed if client.train_loss is not None]
    before = fairness(client.accuracy_before for client in completed)
    after = fairness(client.accuracy_after for client in completed)
    return RoundRecord(
        round=round,
        started_at=clock.started_at,
        num_sampled=len(clients),
        num_completed=len(completed),
        num_rejected=sum(client.status == "rejected" for client in clients),
        num_dropped=sum(client.status == "dropped" for client in clients),
        num_retries=step.num_retries if step else 0,
        num_examples=num_examples,
        train_loss=math.fsum(losses) / num_examples if completed else None,
        test_loss=evaluation.loss if evaluation else None,
        test_accuracy=evaluation.accuracy if evaluation else None,
        accuracy_before_mean=before.mean,
        accuracy_before_worst_decile=before.worst_decile,
        accuracy_before_variance=before.variance,
        accuracy_after_mean=after.mean,
        accuracy_after_worst_decile=after.worst_decile,
        accuracy_after_variance=after.variance,
        update_l2_norm=step.update_l2_norm if step else None,
        bytes_down=weights.num_bytes * len(clients),
        bytes_up=weights.num_bytes * len(completed),
        weights_sha256=weights.sha256(),
        clients=clients,
        round_s=clock.round_s,
        fit_s=clock.parts.get("fit_s"),
        aggregate_s=clock.parts.get("aggregate_s"),
        evaluate_s=clock.parts.get("evaluate_s"),
    )


class _Clock:
    """Times one round and its parts."""

    def __init__(self) -> None:
        self.started_at = datetime.now(UTC)
        self.start = time.perf_counter()
        self.parts: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what is done inside."""
        start = time.perf_counter()
        yield
        self.parts[name] = time.perf_counter() - start

    @property
    def round_s(self) -> float:
        """Seconds since the round began."""
        return time.perf_counter() - self.start
