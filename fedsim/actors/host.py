"""A Ray actor from both ends: what runs inside, on the device that Ray gave it, and the driver's handle."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from fedsim.actors import bell
from fedsim.actors.slab import Slab, SlabAddress
from fedsim.client import ClientHost, ClientSpec, ClientUpdate, FitTask, HostInfo
from fedsim.datasets import Dataset
from fedsim.forkserver import is_forked
from fedsim.numerics import set_numerics
from fedsim.partition import Partition
from fedsim.training import Evaluation
from fedsim.weights import Weights

Arrays = tuple[Any, np.ndarray]
"""Weights [D], or None where they are in the slab and the updates shall be, and integers [I]."""

IN_SLAB = np.empty(0, np.float32)
"""Stands for the values of an update that are in the slab."""


@dataclass(frozen=True)
class Loaded:
    """An actor that is ready, and which ways to the driver it has."""

    host: HostInfo
    is_forked: bool
    has_slab: bool
    has_bell: bool


class HostActor:
    """Becomes a Ray actor.

    It has no constructor: what goes wrong in one looks like a dead actor, in a method like the bug that it is.
    """

    def load(
        self,
        spec: ClientSpec,
        num_gpus: float,
        dataset: Dataset,
        partition: Partition,
        slab: SlabAddress | None,
        bell_address: str | None,
    ) -> Loaded:
        """Makes the host."""
        set_numerics(spec.threads)
        self.slab: Slab | None = None
        self.bell: int | None = None
        with contextlib.suppress(OSError, ValueError):
            self.slab = Slab(slab) if slab else None
        with contextlib.suppress(OSError):
            self.bell = bell.listen(bell_address) if bell_address else None
        self.host = ClientHost(spec, _assigned_device(num_gpus))
        info = self.host.load(dataset, partition)
        return Loaded(info, is_forked(), self.slab is not None, self.bell is not None)

    def fit(self, arrays: Arrays, tasks: list[FitTask], rows: list[int]) -> list[ClientUpdate]:
        """Trains clients; `rows` are those of their updates in the slab."""
        if arrays[0] is not None:
            return self.host.fit(self._weights(arrays), tasks)
        assert self.slab is not None, "weights are in the slab only where all actors reach it"
        updates = self.host.fit(self._weights(arrays), tasks, [self.slab.updates[row] for row in rows])
        return [replace(update, update=IN_SLAB) for update in updates]

    def evaluate(self, arrays: Arrays, round: int, chunks: list[tuple[int, int]]) -> list[Evaluation]:
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
    """

    def __init__(self, options: dict[str, Any], *, rests: bool) -> None:
        self._actor = ray.remote(**options)(HostActor).remote()
        self._bell = bell.Bell() if rests else None
        self._is_called = False

    @property
    def bell(self) -> str | None:
        """For `HostActor.load`."""
        return self._bell.address if self._bell else None

    def call(self, method: str, *arguments: Any) -> ray.ObjectRef:
        """Makes a call, which waits for those before it; its answer to come."""
        answer = getattr(self._actor, method).remote(*arguments)
        if self._bell:
            self._actor.rest.remote()
            if self._is_called:  # so it rests, or will before it comes to this call
                self._bell.ring()
        self._is_called = True
        return answer

    def kill(self) -> None:
        """Ends the actor, whatever it does."""
        ray.kill(self._actor)
        if self._bell:
            self._bell.close()
            self._bell = None
