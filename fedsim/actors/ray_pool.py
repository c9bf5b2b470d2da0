"""The Ray pool: every client in an actor, pinned to its share of the machine."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError

from fedsim.actors import FitResult, PoolInfo
from fedsim.actors.connection import is_on_one_machine
from fedsim.actors.host import Handle, Loaded
from fedsim.actors.private import fork_failure, fork_obstacle
from fedsim.actors.slab import Slab
from fedsim.client import ClientSpec, ClientUpdate, FitTask, HostInfo, evaluation_chunks, total
from fedsim.datasets import Dataset
from fedsim.errors import FedsimError, FedsimWarning, RunFailedError
from fedsim.partition import Partition
from fedsim.placement import Plan
from fedsim.training import Evaluation
from fedsim.weights import Weights

_MANY = 32  # actors: so many take a tenth of a core when they have nothing to do
_LOOK_S = 2.0  # without an answer, until it is looked whether one can come

_ANSI_COLOR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class _Call:
    """A method call on one actor: kept until it is answered, so that it can be made again."""

    actor: int
    method: str
    arguments: tuple[Any, ...]
    attempt: int = 1
    handle: Handle | None = None
    """The actor that it was made on: another one may have taken its number since."""


@dataclass(frozen=True)
class _Work:
    """Calls that belong together."""

    made: dict[Any, _Call]
    """By their answers to come."""
    later: deque[_Call]
    """Not made yet: as many wait as there is nobody to work on."""


class RayPool:
    """A `Pool` of Ray actors, started here and stopped by `close`.

    Args:
        plan: how many actors, and the share of the machine that each is pinned to.
        spec: what the clients do.
        dataset: put into the object store once; the actors of a node read one copy.
        partition: likewise.
        max_retries: of a piece of work after its actor died.
        cohort_size: clients of a round.
        weights: of the size and type of those to come.

    Raises:
        RunFailedError: the actors cannot be started, or do not compute the same bits.
    """

    def __init__(
        self,
        plan: Plan,
        spec: ClientSpec,
        dataset: Dataset,
        partition: Partition,
        max_retries: int,
        cohort_size: int,
        weights: Weights,
    ) -> None:
        self._plan, self._max_retries = plan, max_retries
        self._chunks = evaluation_chunks(dataset)
        self._num_examples = partition.num_examples
        self._num_cpus = max(1, round(plan.num_actors * plan.num_cpus))  # of all actors together
        self._weights: tuple[Weights, Any] | None = None
        self._actors: list[Handle] = []
        self._begun: tuple[tuple[int, Weights, list[int]], _Work] | None = None
        is_near = is_on_one_machine()
        self._slab = Slab.create(cohort_size, weights) if is_near else None
        # Actors of which many share a core would, all at work, only take each other's caches; on a GPU they fill it.
        self._at_once = 2 * self._num_cpus if is_near and not plan.num_gpus else plan.num_actors
        self._do_rest = is_near and plan.num_actors >= _MANY
        try:
            self._actors = [self._start() for _ in range(plan.num_actors)]
            address = self._slab.address if self._slab else None
            self._load_arguments = (ray.put(spec), plan.num_gpus, ray.put(dataset), ray.put(partition), address)
            calls = [self._load(actor) for actor in range(plan.num_actors)]
            loaded = [cast(Loaded, answer) for _, answer in self._finish(self._begin(calls))]
            self.info = _common_info([each.host for each in loaded], sum(each.is_forked for each in loaded))
            if not all(each.has_slab for each in loaded):
                self._drop_slab()
            if plan.start == "fork" and self.info.num_forked < plan.num_actors:
                warnings.warn(_not_forked(plan.num_actors - self.info.num_forked), FedsimWarning, stacklevel=2)
        except BaseException:
            self.close()
            raise

    def fit(self, round: int, weights: Weights, cohort: Sequence[int]) -> list[FitResult]:
        """See `Pool.fit`."""
        rows = {client_id: row for row, client_id in enumerate(sorted(cohort))}
        results = [
            FitResult(self._with_values(update, rows[update.client_id]), call.actor, call.attempt)
            for call, updates in self._finish(self._begin_fit(round, weights, cohort))
            for update in updates
        ]
        return sorted(results, key=lambda result: result.update.client_id)

    def evaluate(self, round: int, weights: Weights, then: Sequence[int] = ()) -> Evaluation:
        """See `Pool.evaluate`."""
        arrays, used = self._put(weights), min(self._num_cpus, len(self._actors), len(self._chunks))
        work = self._begin(
            _Call(actor, "evaluate", (arrays, round, self._chunks[actor::used])) for actor in range(used)
        )
        if then:  # an actor answers in order: this waits in its queue
            self._begun = (round + 1, weights, list(then)), self._begin_fit(round + 1, weights, then)
        by_chunk = {
            chunk: evaluation
            for call, evaluations in self._finish(work)
            for chunk, evaluation in zip(call.arguments[2], evaluations, strict=True)
        }
        return total([by_chunk[chunk] for chunk in self._chunks])

    def close(self) -> None:
        """See `Pool.close`."""
        self._weights = None
        for actor in self._actors:
            actor.kill()
        self._actors = []
        self._drop_slab()

    def _start(self) -> Handle:
        options = {"num_cpus": self._plan.num_cpus, "num_gpus": self._plan.num_gpus, "max_restarts": 0}
        if self._plan.actor_bytes:
            options["memory"] = self._plan.actor_bytes
        return Handle(options, rests=self._do_rest)

    def _load(self, actor: int) -> _Call:
        return _Call(actor, "load", (*self._load_arguments, self._actors[actor].bell))

    def _put(self, weights: Weights) -> Any:
        """Hands the weights out once; the evaluation of a round and the next round's training share them."""
        if self._weights is None or self._weights[0] is not weights:
            flat, integers = weights.arrays()
            if self._slab:
                assert self._begun is None, "the actors train from the weights that are there"
                self._slab.weights[:] = flat
            self._weights = weights, (None, integers) if self._slab else ray.put((flat, integers))
        return self._weights[1]

    def _with_values(self, update: ClientUpdate, row: int) -> ClientUpdate:
        """The update as a whole, also where its values are in the slab: there until the next round."""
        if self._slab is None or len(update.update):
            return update
        return replace(update, update=self._slab.updates[row])

    def _drop_slab(self) -> None:
        if self._slab:
            self._slab.close()
            self._slab = None

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

    def _begin_fit(self, round: int, weights: Weights, cohort: Sequence[int]) -> _Work:
        """The work of a round: what has been begun of it, or begun now."""
        if self._begun is not None:
            (begun_round, begun_weights, begun_cohort), work = self._begun
            self._begun = None
            if (begun_round, begun_cohort) == (round, list(cohort)) and begun_weights is weights:
                return work
            with contextlib.suppress(FedsimError):
                self._finish(work)  # of another round after all: its updates must not come in between
        arrays, rows = self._put(weights), {client_id: row for row, client_id in enumerate(sorted(cohort))}
        return self._begin(
            _Call(actor, "fit", (arrays, [FitTask(round, c) for c in clients], [rows[c] for c in clients]))
            for actor, clients in self._assign(cohort).items()
        )

    def _begin(self, calls: Iterable[_Call]) -> _Work:
        """Makes as many calls as the actors have use for."""
        work = _Work({}, deque(calls))
        self._make_more(work)
        return work

    def _make_more(self, work: _Work) -> None:
        while work.later and len(work.made) < self._at_once:
            work.made.update([self._submit(work.later.popleft())])

    def _finish(self, work: _Work) -> list[tuple[_Call, Any]]:
        """Takes the answers as they come; a dead actor's work is done again."""
        answers = []
        while work.made:
            ready, _ = ray.wait(list(work.made), num_returns=1, timeout=_LOOK_S)
            if not ready:
                _check_start()
                continue
            call = work.made.pop(ready[0])
            self._make_more(work)
            try:
                answers.append((call, ray.get(ready[0])))
            except RayTaskError as error:  # the code in the actor raised: a bug, never retried
                raise _own_error(error) from None
            except RayError as error:  # the actor, its worker or its node died
                if call.handle is self._actors[call.actor]:  # else it waited behind the call that noticed the death
                    if call.attempt > self._max_retries:
                        raise RunFailedError(_exhausted(call, error)) from error
                    self._restart(call.actor, load=call.method != "load")
                    made = self._load(call.actor) if call.method == "load" else call
                    call = replace(made, attempt=call.attempt + 1)
                work.made.update([self._submit(call)])
        return answers

    def _submit(self, call: _Call) -> tuple[ray.ObjectRef, _Call]:
        """Makes a call; its answer to come, and the call with the actor it was made on."""
        handle = self._actors[call.actor]
        return handle.call(call.method, *call.arguments), replace(call, handle=handle)

    def _restart(self, actor: int, *, load: bool) -> None:
        self._actors[actor].kill()
        self._actors[actor] = self._start()
        if load:  # calls to one actor are answered in order: no need to wait
            self._submit(self._load(actor))


def _check_start() -> None:
    """Raises an error where actors that are to start never will."""
    failure = fork_failure()
    if failure:
        raise RunFailedError(
            f"actors cannot be forked any more ({failure}), and as many plain ones do not fit the machine; "
            "start again, or set placement.mode=packed"
        )


def _not_forked(number: int) -> str:
    reason = fork_obstacle() or "Ray started them with other settings"
    return f"{number:,} actors could not be forked ({reason}): they started as plain ones, each with more memory"


def _common_info(infos: list[HostInfo], num_forked: int) -> PoolInfo:
    fingerprints = {info.fingerprint: info.node for info in infos}
    if len(fingerprints) > 1:
        named = ", ".join(f"{node}: {fingerprint}" for fingerprint, node in fingerprints.items())
        raise RunFailedError(
            f"the actors do not compute the same bits ({named}): different processors or packages; use equal nodes"
        )
    return PoolInfo(infos[0].device, infos[0].fingerprint, num_forked)


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
