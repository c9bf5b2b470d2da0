"""A Ray actor from both ends: what runs inside, on the device that Ray gave it, and the driver's handle."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import ray

from fedsim.actors import bell
from fedsim.actors.slab import Slab, SlabAddress
from fedsim.client import ClientHost, ClientSpec, ClientUpdate, FitTask, HostInfo
from fedsim.datasets import Dataset
from fedsim.forkserver import is_forked
from fedsim.numerics import set_numerics
from fedsim.partition import Partition
from fedsim.training import Chunk, Evaluation
from fedsim.weights import Weights

Arrays = tuple[Any, np.ndarray]
"""Weights [D], or None where they are in the slab and the updates shall be, and integers [I]."""

IN_SLAB = np.empty(0, np.float32)
"""Stands for the values of an update that are in the slab."""


@dataclass(frozen=True)
class Loaded:
    """An actor that is ready, and which ways to the driver it has."""

    host: HostInfo
    node_id: str
    """Ray's own name of the actor's node."""
    is_forked: bool
    has_slab: bool
    has_bell: bool


class HostActor:
    """Becomes a Ray actor.

    It has no constructor: what goes wrong in one looks like a dead actor, in a method like the bug that it is.
    """

    slab: Slab | None = None
    bell: int | None = None

    def load(
        self,
        spec: ClientSpec,
        num_gpus: float,
        dataset: Dataset,
        partition: Partition,
        slab: SlabAddress | None,
        bell_address: str | None,
    ) -> Loaded:
        """Makes the host, after that of a run before where there is one."""
        set_numerics(spec.threads)
        if self.bell is not None:  # of a run before
            os.close(self.bell)
        self.slab = self.bell = None
        with contextlib.suppress(OSError, ValueError):
            self.slab = Slab(slab) if slab else None
        with contextlib.suppress(OSError):
            self.bell = bell.listen(bell_address) if bell_address else None
        self.host = ClientHost(spec, _assigned_device(num_gpus), after=vars(self).get("host"))
        info = self.host.load(dataset, partition)
        node_id = ray.get_runtime_context().get_node_id()
        return Loaded(info, node_id, is_forked(), self.slab is not None, self.bell is not None)

    def fit(self, arrays: Arrays, pieces: Sequence[tuple[FitTask, int]]) -> list[ClientUpdate]:
        """Trains clients; with each, the row of its update in the slab."""
        tasks = [task for task, _ in pieces]
        if arrays[0] is not None:
            return self.host.fit(self._weights(arrays), tasks)
        assert self.slab is not None, "weights are in the slab only where all actors reach it"
        updates = self.host.fit(self._weights(arrays), tasks, [self.slab.updates[row] for _, row in pieces])
        return [replace(update, update=IN_SLAB) for update in updates]

    def evaluate(self, arrays: Arrays, round: int, chunks: Sequence[Chunk]) -> list[Evaluation]:
        """Tests weights on chunks of the test set."""
        return self.host.evaluate(round, self._weights(arrays), chunks)

    def rest(self) -> None:
        """Sleeps until the driver has called another method, and rings."""
        if self.bell is not None:
            bell.rest(self.bell)

    def _weights(self, arrays: Arrays) -> Weights:
        flat, integers = arrays
        return Weights.of_arrays((self.slab.weights if self.slab and flat is None else flat, integers))


def _assigned_device(num_gpus: float) -> str:
    """The device from Ray's own accelerator ids: a CPU actor sees the machine's GPUs too, but must leave them alone."""
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # autograd would start CUDA on each of them, whatever it computes on
        return "cpu"
    import torch

    if num_gpus < 1:  # Ray's fraction does not limit memory; this does
        torch.cuda.set_per_process_memory_fraction(num_gpus)
    return "cuda"


class Handle:
    """The driver's end of an actor: starts it.

    Args:
        options: of the Ray actor.
        rests: whether it sleeps while it has nothing to do, instead of looking for signals as Ray lets it.

    Attributes:
        loaded: what the actor's `load` answered, once it was taken.
        last: the answer to come to the last call made.
        at: the answer to come that it was seen to be at.
        at_s: for how many seconds.
    """

    def __init__(self, options: dict[str, Any], *, rests: bool) -> None:
        self._actor = ray.remote(**options)(HostActor).remote()
        self._bell = bell.Bell() if rests else None
        self._is_called = False
        self._process: psutil.Process | None = None
        self._loading: ray.ObjectRef | None = None
        self.loaded: Loaded | None = None
        self.last: ray.ObjectRef | None = None
        self.at: ray.ObjectRef | None = None
        self.at_s = 0.0

    def load(self, *arguments: Any) -> ray.ObjectRef:
        """Calls `HostActor.load`, to which the calls made after it wait; its answer to come."""
        self._loading = self.call("load", *arguments, self._bell.address if self._bell else None)
        return self._loading

    def take_load(self) -> Loaded:
        """Waits for the answer to `load`.

        Raises:
            RayError: the actor died, or what it ran raised.
        """
        loaded: Loaded = ray.get(self._loading)
        if loaded.has_slab:
            with contextlib.suppress(psutil.NoSuchProcess):  # it is gone already
                self._process = psutil.Process(loaded.host.pid)
        self.loaded = loaded
        return loaded

    def call(self, method: str, *arguments: Any) -> ray.ObjectRef:
        """Makes a call, which waits for those before it; its answer to come."""
        answer = getattr(self._actor, method).remote(*arguments)
        if self._bell:
            self._actor.rest.remote()
            if self._is_called:  # so it rests, or will before it comes to this call
                self._bell.ring()
        self._is_called = True
        self.last = answer
        return answer

    def end(self) -> None:
        """Kills the actor, and waits until it is gone if it could still write into the memory of this machine."""
        ray.kill(self._actor)
        if self._process is not None:
            with contextlib.suppress(psutil.Error):
                self._process.kill()
                _wait_until_gone(self._process)
        self.close()

    def kill(self) -> None:
        """Kills the actor, whatever it does; does not wait."""
        ray.kill(self._actor)
        self.close()

    def close(self) -> None:
        """Frees what the driver holds of an actor that is no more."""
        if self._bell:
            self._bell.close()
            self._bell = None


def _wait_until_gone(process: psutil.Process) -> None:
    """Returns when a killed process does nothing any more, also if its parent has not taken note."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.001)
