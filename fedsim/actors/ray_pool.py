"""The Ray pool: every client in an actor, pinned to its share of the machine."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray

from fedsim.actors import Assignment, FitResult, PoolInfo
from fedsim.actors.calls import Answer, Call, Work
from fedsim.actors.connection import is_on_one_machine, live_node_ids
from fedsim.actors.crew import Crew
from fedsim.actors.host import Loaded
from fedsim.actors.private import fork_obstacle, free_before_start
from fedsim.actors.slab import Slab
from fedsim.client import FitTask, HostInfo, evaluation_chunks, total
from fedsim.datasets import Dataset
from fedsim.errors import FedsimWarning, PlanError, RunFailedError, counted
from fedsim.placement import Plan
from fedsim.training import Evaluation
from fedsim.weights import Weights


class RayPool:
    """A `Pool` of Ray actors, started here and stopped by `close`.

    Args:
        plan: how many actors, and the share of the machine that each is pinned to.
        assignment: what they do. Its data set is put into the object store once: the actors of a node read one copy.

    Raises:
        PlanError: the actors do not compute the same bits.
        RunFailedError: the actors cannot be started.
    """

    def __init__(self, plan: Plan, assignment: Assignment) -> None:
        self._begun: tuple[tuple[int, Weights, list[int]], Work] | None = None
        self._is_private = free_before_start() is not None
        self._nodes = live_node_ids()
        self._slab: Slab | None = None
        self._crew: Crew | None = None
        self._dataset: tuple[Dataset, Any] | None = None
        try:
            self._take(assignment)
            self.info = self._open(plan)
        except BaseException:
            self.close()
            raise

    def reload(self, plan: Plan, assignment: Assignment) -> None:
        """Has the same actors do something else; arguments and errors as of the class.

        Args:
            plan: for as many actors, each of the same share of the machine.
            assignment: what they do from now on.
        """
        if self._begun is not None:  # a round that nobody asks for any more: nothing of it must come later
            _, work = self._begun
            self._begun = None
            try:
                self._running.finish(work)
            except RunFailedError:
                self._running.abandon(work)
        self._take(assignment)
        self._plan = plan
        self.info = self._loaded(self._running.reload(self._arguments(plan), assignment.failures))

    def _take(self, assignment: Assignment) -> None:
        """Puts what all actors need where they reach it."""
        self._assignment = assignment
        self._chunks = evaluation_chunks(assignment.dataset)
        self._num_examples = assignment.partition.num_examples
        self._weights: tuple[Weights, Any] | None = None
        self._drop_slab()
        self._slab = Slab.create(assignment.cohort_size, assignment.weights) if is_on_one_machine() else None
        if self._dataset is None or self._dataset[0] is not assignment.dataset:
            self._dataset = assignment.dataset, ray.put(assignment.dataset)
        self._partition = ray.put(assignment.partition)

    def fit(self, round: int, weights: Weights, cohort: Sequence[int]) -> list[FitResult]:
        """See `Pool.fit`."""
        answers = self._running.finish(self._begin_fit(round, weights, cohort))
        return sorted((self._result(answer) for answer in answers), key=lambda result: result.client_id)

    def evaluate(self, round: int, weights: Weights, then: Sequence[int] = ()) -> Evaluation:
        """See `Pool.evaluate`."""
        self._use_new_nodes()
        arrays, actors = self._put(weights), list(self._running.actors)
        used = min(self._plan.total_cpus, len(actors), len(self._chunks))
        work = self._running.begin(
            Call(actors[i], "evaluate", (arrays, round), tuple(self._chunks[i::used])) for i in range(used)
        )
        if then:  # an actor answers in order: this waits in its queue
            self._begun = (round + 1, weights, list(then)), self._begin_fit(round + 1, weights, then)
        by_chunk = {answer.piece: answer.value for answer in self._running.finish(work)}
        return total([by_chunk[chunk] for chunk in self._chunks])

    def close(self) -> None:
        """See `Pool.close`."""
        self._weights = None
        if self._crew:
            self._crew.close()
        self._drop_slab()

    @property
    def _running(self) -> Crew:
        assert self._crew, "the pool is open"
        return self._crew

    def _open(self, plan: Plan, fingerprint: str = "") -> PoolInfo:
        """Starts the actors of a plan."""
        self._plan = plan
        self._crew = Crew(
            self._assignment.failures,
            self._arguments(plan),
            is_near=is_on_one_machine(),
            is_private=self._is_private,
            fingerprint=fingerprint,
        )
        info = self._loaded(self._crew.start(plan))
        self._crew.fingerprint = info.fingerprint
        if plan.start == "fork" and info.num_forked < plan.num_actors:
            warnings.warn(_not_forked(plan.num_actors - info.num_forked), FedsimWarning, stacklevel=2)
        return info

    def _arguments(self, plan: Plan) -> tuple[Any, ...]:
        """Of `HostActor.load`."""
        assert self._dataset is not None
        spec = replace(self._assignment.spec, stack_size=plan.stack_size)
        address = self._slab.address if self._slab else None
        return ray.put(spec), plan.num_gpus, self._dataset[1], self._partition, address

    def _loaded(self, loaded: list[Loaded]) -> PoolInfo:
        """What is known of actors that are ready; without the slab, where one does not reach it."""
        if not all(each.has_slab for each in loaded):
            self._drop_slab()
        return _common_info([each.host for each in loaded], sum(each.is_forked for each in loaded))

    def _use_new_nodes(self) -> None:
        """Starts actors on nodes that have joined, also for lost ones; all anew where each gets another share."""
        if self._is_private:
            return
        before, self._nodes = self._nodes, live_node_ids()
        plan = None if self._nodes <= before else self._assignment.replan()
        if plan is None or (self._slab is None and _share(plan) == _share(self._plan)):
            self._plan = plan or self._plan
            self._running.start_missing(self._plan)
        elif plan.num_actors > len(self._running.actors) or _share(plan) > _share(self._plan):
            self._running.close()
            self._drop_slab()  # it reaches one machine only
            self._weights = None
            self._open(plan, self.info.fingerprint)

    def _put(self, weights: Weights) -> Any:
        """Hands the weights out once; the evaluation of a round and the next round's training share them."""
        if self._weights is None or self._weights[0] is not weights:
            flat, integers = weights.arrays()
            if self._slab:
                assert self._begun is None, "the actors train from the weights that are there"
                self._slab.weights[:] = flat
            self._weights = weights, (None, integers) if self._slab else ray.put((flat, integers))
        return self._weights[1]

    def _result(self, answer: Answer) -> FitResult:
        """What became of a client; its update as a whole, also where it is in the slab: there until the next round."""
        (task, row), update = answer.piece, answer.value
        if update is not None and self._slab is not None and not len(update.update):
            update = replace(update, update=self._slab.updates[row])
        return FitResult(
            client_id=task.client_id,
            num_examples=int(self._num_examples[task.client_id]),
            update=update,
            actor=answer.call.actor,
            attempts=answer.call.losses.total + (update is not None),
            error=answer.error,
        )

    def _drop_slab(self) -> None:
        if self._slab:
            self._slab.close()
            self._slab = None

    def _assign(self, cohort: Sequence[int]) -> dict[int, list[int]]:
        """Actor -> clients. Each has its own actor, or they are dealt out by examples, longest first."""
        load = dict.fromkeys(self._running.actors, 0)
        assigned: dict[int, list[int]] = {}
        for client_id in sorted(cohort, key=lambda c: (-self._num_examples[c], c)):
            if self._plan.mode == "actor-per-client" and client_id in load:
                actor = client_id
            else:  # also where a client's own actor is gone with its node
                actor = min(load, key=lambda a: (load[a], a))
            load[actor] += int(self._num_examples[client_id])
            assigned.setdefault(actor, []).append(client_id)
        return assigned

    def _begin_fit(self, round: int, weights: Weights, cohort: Sequence[int]) -> Work:
        """The work of a round: what has been begun of it, or begun now."""
        if self._begun is not None:
            (begun_round, begun_weights, begun_cohort), work = self._begun
            self._begun = None
            if (begun_round, begun_cohort) == (round, list(cohort)) and begun_weights is weights:
                return work
            self._running.abandon(work)  # of another round after all: its updates must not come in between
        arrays, rows = self._put(weights), {client_id: row for row, client_id in enumerate(sorted(cohort))}
        return self._running.begin(
            Call(actor, "fit", (arrays,), tuple((FitTask(round, c), rows[c]) for c in clients))
            for actor, clients in self._assign(cohort).items()
        )


def _share(plan: Plan) -> tuple[float, float]:
    return plan.num_cpus, plan.num_gpus


def _not_forked(number: int) -> str:
    reason = fork_obstacle() or "Ray started them with other settings"
    instead = "it started as a plain one, with" if number == 1 else "they started as plain ones, each with"
    return f"{counted(number, 'actor')} could not be forked ({reason}): {instead} more memory"


def _common_info(infos: list[HostInfo], num_forked: int) -> PoolInfo:
    fingerprints = {f"{info.fingerprint} on {info.device}": info.node for info in infos}
    if len(fingerprints) > 1:
        named = ", ".join(f"{node}: {fingerprint}" for fingerprint, node in fingerprints.items())
        raise PlanError(
            f"the actors do not compute the same bits ({named}): other processors, GPUs or packages; use equal nodes"
        )
    return PoolInfo(infos[0].device, infos[0].fingerprint, num_forked)
