"""The actors of a pool and the calls to them: whatever dies, the work is done, or the run stops with the reason.

Any actor can do any piece of work, with the same outcome. So an answer counts whoever gave it, and after how many
losses; those of actors that have lost their work are not looked at.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import ray
from ray.exceptions import RayError, RayTaskError

from fedsim.actors import private
from fedsim.actors.calls import Answer, Call, Work
from fedsim.actors.connection import holds, is_full
from fedsim.actors.host import Handle, Loaded
from fedsim.actors.losses import LOST, cause_of, exhausted, own_error, said
from fedsim.config import FailuresConfig
from fedsim.errors import FedsimWarning, RunFailedError, counted
from fedsim.failures import Cause, decide
from fedsim.placement import Plan

_MANY = 32  # actors: so many take a tenth of a core when they have nothing to do
_LOOK_S = 2.0  # without an answer, until it is looked whether one can come
_START_S = 180.0  # of an actor, until Ray's having no room left means that it has none for it: one that starts has its
# share already, and importing torch takes a minute and more on a busy machine or from a network's disk
_SAY_S = 10.0  # between two words on how many have started
_DEAD_S = 100.0  # until Ray itself has found out that a node is dead: 14 s where it was killed, 64 where it was cut off

_logger = logging.getLogger(__name__)


class Crew:
    """Actors by number, each replaced when it dies while there is room for another one.

    Args:
        failures: how often work is tried.
        load: arguments of `HostActor.load`.
        is_near: whether all are processes of this machine.
        is_private: whether nobody else takes room on this Ray.
        fingerprint: what their arithmetic must be; "" accepts any.

    Attributes:
        actors: those that live or start, by number.
    """

    def __init__(
        self, failures: FailuresConfig, load: tuple[Any, ...], *, is_near: bool, is_private: bool, fingerprint: str
    ) -> None:
        self.actors: dict[int, Handle] = {}
        self.fingerprint = fingerprint
        self._load, self._is_near, self._is_private = load, is_near, is_private
        self._lost_nodes: dict[str, float] = {}  # and when; Ray may still take them for alive
        self._looked_at = self._said_at = time.monotonic()
        self._try_as(failures)

    def start(self, plan: Plan) -> list[Loaded]:
        """Starts the actors of a plan; returns what they said when they were ready.

        Raises:
            RunFailedError: one cannot be started.
        """
        self._plan = plan
        # Of those that share a core only some work at a time: all would take each other's caches. A GPU they fill.
        self._at_once = 2 * plan.total_cpus if self._is_near and not plan.num_gpus else plan.num_actors
        self._do_rest = self._is_near and plan.num_actors >= _MANY
        self._add(list(range(plan.num_actors)))
        return [handle.loaded for handle in self.actors.values() if handle.loaded]

    def start_missing(self, plan: Plan) -> None:
        """Starts actors that a plan has and the crew has not, as far as the nodes that live have room for them."""
        missing = [number for number in range(plan.num_actors) if number not in self.actors]
        if missing:
            self._plan = plan
            self._add(missing[: max(0, self._room() - len(self.actors))])

    def _add(self, numbers: list[int]) -> None:
        for number in numbers:
            self.actors[number] = self._new()
        self.finish(self.begin(Call(number, "load") for number in numbers))

    def reload(self, load: tuple[Any, ...], failures: FailuresConfig) -> list[Loaded]:
        """Has all actors load something else; returns what they said when they were ready.

        Raises:
            RunFailedError: one cannot.
        """
        self._load = load
        self._try_as(failures)
        self.finish(self.begin(Call(number, "load") for number in self.actors))
        return [handle.loaded for handle in self.actors.values() if handle.loaded]

    def _try_as(self, failures: FailuresConfig) -> None:
        self._failures = failures
        self._look_s = min(_LOOK_S, failures.timeout_s / 4) if failures.timeout_s else _LOOK_S

    def close(self) -> None:
        """Ends all actors."""
        for handle in self.actors.values():
            handle.kill()
        self.actors.clear()

    def begin(self, calls: Iterable[Call]) -> Work:
        """Makes as many calls as the actors have use for."""
        work = Work(later=deque(calls))
        self._make_more(work)
        return work

    def finish(self, work: Work) -> list[Answer]:
        """Takes the answers as they come; what is lost is done again.

        Raises:
            ClientError: a client's own code raised.
            RunFailedError: work was lost too often, or nobody is left to do it.
        """
        answers: list[Answer] = []
        while work.made:
            ready, _ = ray.wait(list(work.made), num_returns=1, timeout=self._look_s)
            for answer in ready:
                call = work.made.pop(answer)
                self._make_more(work)
                answers += self._take(work, call, answer)
            if time.monotonic() - self._looked_at >= self._look_s:
                self._look(work)
            self._make_held(work)
        return answers

    def abandon(self, work: Work) -> None:
        """Replaces the actors that are at this work, so that nothing comes of it any more."""
        numbers = {call.actor for call in work.made.values() if call.handle is self.actors.get(call.actor)}
        for number in numbers:
            self._replace(number)
        self.finish(self.begin(Call(number, "load") for number in sorted(numbers & self.actors.keys())))

    def discard(self, number: int, reason: str) -> None:
        """Does without an actor.

        Raises:
            RunFailedError: it was the last one.
        """
        self.actors.pop(number).end()
        if not self.actors:
            raise RunFailedError(f"no actor is left: {reason}")

    def _take(self, work: Work, call: Call, answer: ray.ObjectRef) -> list[Answer]:
        """The answers to a call; none if its work is being done again."""
        assert call.handle is not None
        try:
            if call.method == "load":
                self._welcome(call.actor, call.handle.take_load())
                return []
            values = ray.get(answer)
        except RayTaskError as error:  # the code in the actor raised: a bug, never retried
            raise own_error(error) from None
        except RayError as error:  # the actor, its worker or its node died, or what it answered was lost
            return self._lost(work, call, cause_of(error), said(error), last=call.handle.last == answer)
        return [Answer(piece, value, call) for piece, value in zip(call.pieces, values, strict=True)]

    def _welcome(self, number: int, loaded: Loaded) -> None:
        """Looks at an actor that has come up later; at those of the start, the pool looks."""
        if not self.fingerprint:
            return
        if loaded.host.fingerprint != self.fingerprint:
            reason = (
                f"node {loaded.host.node} is not used: it does not compute the bits of this run "
                f"(fingerprint {loaded.host.fingerprint}, not {self.fingerprint})"
            )
            warnings.warn(reason, FedsimWarning, stacklevel=2)
            self.discard(number, reason)
        elif self._plan.start == "fork" and not loaded.is_forked:
            reason = private.fork_obstacle() or "Ray started it with other settings"
            message = f"actor {number} could not be forked again ({reason}): it started as a plain one"
            warnings.warn(message, FedsimWarning, stacklevel=2)

    def _lost(self, work: Work, call: Call, cause: Cause, reason: str, *, last: bool = True) -> list[Answer]:
        """Decides what becomes of lost work, the `last` its actor was asked for or not; returns what was given up."""
        if call.handle is not self.actors.get(call.actor):  # it waited behind the call that noticed the death
            self._make_again(work, call, is_alone=False)
            return []
        call = replace(call, losses=call.losses.after(cause))
        on_exhausted: Literal["stop", "drop"] = self._failures.on_exhausted if call.method == "fit" else "stop"
        decision = decide(cause, call.losses, self._failures.max_retries, on_exhausted)
        if decision != "retry" and (len(call.pieces) > 1 or not last):  # what came next may have cut off its answer
            decision = "retry"  # each alone: nobody stops a run, or is left out, for what another has done
        if decision == "stop":
            raise RunFailedError(exhausted(call, cause, reason))
        self._replace(call.actor, cause)
        if call.method != "load" and call.actor in self.actors:
            work.made.update([self._submit(Call(call.actor, "load"))])  # before all else that is asked of it
        dropped: list[Answer] = []
        if decision == "drop":
            dropped = [Answer(piece, None, call, f"{LOST[cause]}: {reason}") for piece in call.pieces]
        else:  # at the last try alone: whose fault it is shows then
            self._make_again(work, call, is_alone=call.losses.of(cause) >= self._failures.max_retries)
        return dropped

    def _make_again(self, work: Work, call: Call, *, is_alone: bool) -> None:
        """Has a call made again: by the actor's successor, or dealt out to those that are left."""
        if call.method == "load":
            if call.actor in self.actors:
                work.made.update([self._submit(call)])
            return
        parts = {call.actor: call.pieces}
        if call.actor not in self.actors:
            parts = {actor: call.pieces[i :: len(self.actors)] for i, actor in enumerate(self.actors)}
        for actor, part in parts.items():
            for pieces in [(piece,) for piece in part] if is_alone else [part]:
                if pieces:
                    work.held.append(replace(call, actor=actor, pieces=pieces))

    def _make_held(self, work: Work) -> None:
        """Makes calls again, one at a time on each actor: its answer might not get out before the next one kills it."""
        for call in [call for call in work.held if call.actor not in self.actors]:  # gone since
            work.held.remove(call)
            self._make_again(work, call, is_alone=False)
        busy = {call.handle for call in work.made.values()}
        for call in list(work.held):
            handle = self.actors[call.actor]
            if handle not in busy:
                busy.add(handle)
                work.held.remove(call)
                work.made.update([self._submit(call)])

    def _make_more(self, work: Work) -> None:
        while work.later and len(work.made) < self._at_once:
            call = work.later.popleft()
            handle = self.actors.get(call.actor)
            if handle and (handle.loaded or call.method == "load"):
                work.made.update([self._submit(call)])
            else:  # lost since the work was dealt out
                self._make_again(work, call, is_alone=False)

    def _submit(self, call: Call) -> tuple[ray.ObjectRef, Call]:
        """Makes a call; its answer to come, and the call with the actor it was made on."""
        handle = self.actors[call.actor]
        is_load = call.method == "load"
        answer = handle.load(*self._load) if is_load else handle.call(call.method, *call.shared, call.pieces)
        return answer, replace(call, handle=handle)

    def _new(self) -> Handle:
        options = {"num_cpus": self._plan.num_cpus, "num_gpus": self._plan.num_gpus, "max_restarts": 0}
        if self._plan.actor_bytes:
            options["memory"] = self._plan.actor_bytes
        return Handle(options, rests=self._do_rest)

    def _replace(self, number: int, cause: Cause = "actor") -> None:
        """Another actor with the number of one that is lost; none if there is no room, or its whole node is lost.

        Ray takes some time to know that. Until then a new actor might wait for that node: the others do the work.
        """
        loaded = self.actors[number].loaded
        if cause == "node" and loaded:
            self._lost_nodes[loaded.node_id] = time.monotonic()
        is_last = len(self.actors) == 1
        if self._is_private or ((cause != "node" or is_last) and self._room() >= len(self.actors)):
            self.actors.pop(number).end()
            self.actors[number] = self._new()  # to be loaded
        else:
            self.discard(number, "the cluster has no room for another one; `fedsim resume` goes on when it has")

    def _room(self) -> int:
        """How many actors the nodes hold that live for all that is known."""
        old = time.monotonic() - _DEAD_S
        self._lost_nodes = {node_id: at for node_id, at in self._lost_nodes.items() if at > old}
        return holds(self._plan, without=self._lost_nodes)

    def _look(self, work: Work) -> None:
        """Looks for what no answer tells: actors that never start, and work that takes too long."""
        before, self._looked_at = self._looked_at, time.monotonic()
        now = self._looked_at
        if failure := private.failure():
            raise RunFailedError(failure)
        up = sum(handle.loaded is not None for handle in self.actors.values())
        if up < len(self.actors) and now - self._said_at >= _SAY_S:
            self._said_at = now
            _logger.info("%d of %s up", up, counted(len(self.actors), "actor"))
        waited_s = min(now - before, 2 * self._look_s)  # no more: whoever uses the pool may have looked away
        for answer, call in list(work.made.items()):
            handle, timeout_s = call.handle, self._failures.timeout_s * max(1, len(call.pieces))
            assert handle is not None
            if handle is not self.actors.get(call.actor):
                continue  # its loss is known
            handle.at, handle.at_s = answer, handle.at_s + waited_s if handle.at == answer else 0.0
            if ray.wait([answer], timeout=0)[0]:
                continue
            if handle.loaded is None:
                if handle.at_s > _START_S and not self._is_private and is_full(self._plan):
                    del work.made[answer]
                    self.discard(call.actor, "the cluster has no room for one")
                    self._make_again(work, call, is_alone=False)
            elif timeout_s and handle.at_s > timeout_s:
                del work.made[answer]
                self._lost(work, call, "timeout", f"no answer within {timeout_s:g} s")
