"""Memory that the driver shares with the actors of its machine: weights go down in it, updates come up.

Ray's object store takes some milliseconds to hand out weights, and one for each megabyte that an actor returns: a fifth
of a round of small models. Here both are read where they were written. The memory has no name: it is gone with the
processes that use it, however they end.

Shape letters: K clients of a cohort, D values of the model.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np

from fedsim.weights import Weights


@dataclass(frozen=True)
class SlabAddress:
    """How an actor finds a slab."""

    path: str
    shape: tuple[int, int]
    dtype: str


class Slab:
    """One row for the weights, and K for the updates of a round.

    Args:
        address: of the driver's slab.

    Attributes:
        address: for the actors.
        weights: shape [D]; written by the driver while no actor reads.
        updates: shape [K, D]; each row written by the actor that trains its client.

    Raises:
        OSError: the driver's memory cannot be reached.
    """

    def __init__(self, address: SlabAddress) -> None:
        self.address = address
        with open(address.path, "r+b") as file:  # noqa: PTH123 - the number of an open file
            memory = mmap.mmap(file.fileno(), 0)
        rows = np.frombuffer(memory, address.dtype).reshape(address.shape)
        self.weights, self.updates = rows[0], rows[1:]
        self._file: int | None = None

    @staticmethod
    def create(cohort_size: int, weights: Weights) -> Slab | None:
        """The driver's slab, for weights of this size and type; None where there is no such memory: Linux has it."""
        if not hasattr(os, "memfd_create"):
            return None
        values = weights.flat.numpy()
        file = os.memfd_create("fedsim")
        try:
            os.ftruncate(file, (1 + cohort_size) * values.nbytes)
            address = SlabAddress(f"/proc/{os.getpid()}/fd/{file}", (1 + cohort_size, len(values)), values.dtype.str)
            slab = Slab(address)
        except OSError:
            os.close(file)
            return None
        slab._file = file  # open for the actors
        return slab

    def close(self) -> None:
        """Nobody can attach any more; arrays that are held stay valid."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
