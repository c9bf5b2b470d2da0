"""The Ray pool: every client in an actor, pinned to its share of the machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError

from fedsim.actors import FitResult, PoolInfo
from fedsim.client import (
    ClientHost,
    ClientSpec,
    ClientUpdate,
    FitTask,
    HostInfo,
    evaluation_chunks,
    total,
)
from fedsim.datasets import Dataset
from fedsim.errors import FedsimError, RunFailedError
from fedsim.numerics import set_numerics
from fedsim.partition import Partition
from fedsim.placement import Plan
from fedsim.training import Evaluation
from fedsim.weights import Weights

_ANSI_COLOR = re.compile(r"\x1b\[[0-9;]*m")


class _HostActor:
    """A `ClientHost` inside a Ray actor, on the device Ray gave it.

    It has no constructor: what goes wrong in one looks like a dead actor, in a method like the bug that it is.
    """

    def load(self, spec: ClientSpec, num_gpus: float, dataset: Dataset, partition: Partition) -> HostInfo:
        set_numerics(spec.threads)
        self.host = ClientHost(spec, _assigned_device(num_gpus))
        return self.host.load(dataset, partition)

    def fit(self, arrays: tuple[Any, Any], tasks: list[FitTask]) -> list[ClientUpdate]:
        return self.host.fit(Weights.of_arrays(arrays), tasks)

    def evaluate(self, arrays: tuple[Any, Any], round: int, chunks: list[tuple[int, int]]) -> list[Evaluation]:
        return self.host.evaluate(round, Weights.of_arrays(arrays), chunks)


def _assigned_device(num_gpus: float) -> str:
    """The device from Ray's own accelerator ids: a CPU actor sees the machine's GPUs too, but must leave them alone."""
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        return "cpu"
    import torch

    if num_gpus < 1:  # Ray's fraction does not limit memory; this does
        torch.cuda.set_per_process_memory_fraction(num_gpus)
    return "cuda"


@dataclass(frozen=True)
class _Call:
    """A method call on one actor: kept until it is answered, so that it can be made again."""

    actor: int
    method: str
    arguments: tuple[Any, ...]
    attempt: int = 1


class RayPool:
    """A `Pool` of Ray actors, started here and stopped by `close`.

    Args:
        plan: how many actors, and the share of the machine that each is pinned to.
        spec: what the clients do.
        dataset: put into the object store once; the actors of a node read one copy.
        partition: likewise.
        max_retries: of a piece of work after its actor died.

    Raises:
        RunFailedError: the actors cannot be started, or do not compute the same bits.
    """

    def __init__(self, plan: Plan, spec: ClientSpec, dataset: Dataset, partition: Partition, max_retries: int) -> None:
        self._plan, self._max_retries = plan, max_retries
        self._chunks = evaluation_chunks(dataset)
        self._num_examples = partition.num_examples
        self._weights: tuple[Weights, ray.ObjectRef] | None = None
        self._actors: list[Any] = []
        try:
            self._actors = [self._start() for _ in range(plan.num_actors)]
            self._load_arguments = (ray.put(spec), plan.num_gpus, ray.put(dataset), ray.put(partition))
            answers = self._gather([_Call(actor, "load", self._load_arguments) for actor in range(plan.num_actors)])
            self.info = _common_info([cast(HostInfo, answer) for _, answer in answers])
        except BaseException:
            self.close()
            raise

    def fit(self, round: int, weights: Weights, cohort: Sequence[int]) -> list[FitResult]:
        """See `Pool.fit`."""
        ref = self._put(weights)
        calls = [
            _Call(actor, "fit", (ref, [FitTask(round, client_id) for client_id in clients]))
            for actor, clients in self._assign(cohort).items()
        ]
        results = [
            FitResult(update, call.actor, call.attempt) for call, updates in self._gather(calls) for update in updates
        ]
        return sorted(results, key=lambda result: result.update.client_id)

    def evaluate(self, round: int, weights: Weights) -> Evaluation:
        """See `Pool.evaluate`."""
        ref, num_actors = self._put(weights), len(self._actors)
        calls = [
            _Call(actor, "evaluate", (ref, round, self._chunks[actor::num_actors]))
            for actor in range(min(num_actors, len(self._chunks)))
        ]
        by_chunk = {
            chunk: evaluation
            for call, evaluations in self._gather(calls)
            for chunk, evaluation in zip(call.arguments[2], evaluations, strict=True)
        }
        return total([by_chunk[chunk] for chunk in self._chunks])

    def close(self) -> None:
        """See `Pool.close`."""
        self._weights = None
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _start(self) -> Any:
        options = {"num_cpus": self._plan.num_cpus, "num_gpus": self._plan.num_gpus, "max_restarts": 0}
        return ray.remote(**options)(_HostActor).remote()

    def _put(self, weights: Weights) -> ray.ObjectRef:
        """Puts the weights once; the evaluation of a round and the next round's training share them."""
        if self._weights is None or self._weights[0] is not weights:
            self._weights = (weights, ray.put(weights.arrays()))
        return self._weights[1]

    def _assign(self, cohort: Sequence[int]) -> dict[int, list[int]]:
        """Actor -> clients. Each has its own actor, or they are dealt out by examples, longest first."""
        if self._plan.mode == "actor-per-client":
            return {client_id: [client_id] for client_id in cohort}
        load = dict.fromkeys(range(len(self._actors)), 0)
        assigned: dict[int, list[int]] = {}
        for client_id in sorted(cohort, key=lambda c: (-self._num_examples[c], c)):
            actor = min(load, key=lambda a: (load[a], a))
            load[actor] += int(self._num_examples[client_id])
            assigned.setdefault(actor, []).append(client_id)
        return assigned

    def _gather(self, calls: Sequence[_Call]) -> list[tuple[_Call, Any]]:
        """Makes all calls at once and takes the answers as they come; a dead actor's work is done again."""
        answers = []
        pending = {self._submit(call): call for call in calls}
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1)
            call = pending.pop(ready[0])
            try:
                answers.append((call, ray.get(ready[0])))
            except RayTaskError as error:  # the code in the actor raised: a bug, never retried
                raise _own_error(error) from None
            except RayError as error:  # the actor, its worker or its node died
                if call.attempt > self._max_retries:
                    raise RunFailedError(_exhausted(call, error)) from error
                self._restart(call.actor, load=call.method != "load")
                again = replace(call, attempt=call.attempt + 1)
                pending[self._submit(again)] = again
        return answers

    def _submit(self, call: _Call) -> ray.ObjectRef:
        return getattr(self._actors[call.actor], call.method).remote(*call.arguments)

    def _restart(self, actor: int, *, load: bool) -> None:
        ray.kill(self._actors[actor])
        self._actors[actor] = self._start()
        if load:  # calls to one actor are answered in order: no need to wait
            self._submit(_Call(actor, "load", self._load_arguments))


def _common_info(infos: list[HostInfo]) -> PoolInfo:
    fingerprints = {info.fingerprint: info.node for info in infos}
    if len(fingerprints) > 1:
        named = ", ".join(f"{node}: {fingerprint}" for fingerprint, node in fingerprints.items())
        raise RunFailedError(
            f"the actors do not compute the same bits ({named}): different processors or packages; use equal nodes"
        )
    return PoolInfo(infos[0].device, infos[0].fingerprint)


def _own_error(error: RayTaskError) -> FedsimError:
    """The error that the code in the actor raised, as the driver raises it."""
    if isinstance(error.cause, FedsimError):
        return error.cause
    return RunFailedError(f"an actor failed:\n{_ANSI_COLOR.sub('', str(error))}")


def _exhausted(call: _Call, error: RayError) -> str:
    reason = _ANSI_COLOR.sub("", str(error)).strip().splitlines()[0]
    if call.method == "fit":
        clients = ", ".join(str(task.client_id) for task in call.arguments[1])
        what = f"client {clients} in round {call.arguments[1][0].round}"
    else:
        what = "the evaluation" if call.method == "evaluate" else "starting the actor"
    return f"{what}: actor {call.actor} died {call.attempt} times ({reason}); see failures.max_retries"
