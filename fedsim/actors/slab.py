"""Memory that the driver shares with the actors of its machine, in which they hand over their updates.

Ray's object store takes about a millisecond for each megabyte that an actor returns: the tenth part of a round of small
models. Here an actor writes its rows in place. The memory has no name: it is gone with the processes that use it,
however they end.

Shape letters: K clients of a cohort, D values of the model.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SlabAddress:
    """How an actor finds a slab."""

    path: str
    shape: tuple[int, int]
    dtype: str

    def attach(self) -> np.ndarray | None:
        """The rows [K, D]; None where the driver's memory cannot be reached, as from another machine."""
        try:
            with open(self.path, "r+b") as file:  # noqa: PTH123 - a number of an open file, no path to a file
                return _rows(file.fileno(), self.shape, self.dtype)
        except OSError:
            return None


class Slab:
    """Rows [K, D] for the updates of a round.

    Args:
        num_rows: K.
        num_values: D.
        dtype: of the model.
    """

    def __init__(self, num_rows: int, num_values: int, dtype: np.dtype) -> None:
        self._file = os.memfd_create("fedsim-updates")
        shape = num_rows, num_values
        os.ftruncate(self._file, num_rows * num_values * dtype.itemsize)
        self.rows = _rows(self._file, shape, dtype.str)
        self.address = SlabAddress(f"/proc/{os.getpid()}/fd/{self._file}", shape, dtype.str)

    @staticmethod
    def is_possible() -> bool:
        """Whether this system has such memory: Linux does."""
        return hasattr(os, "memfd_create")

    def close(self) -> None:
        """Lets go of the memory; rows that are still held stay valid."""
        os.close(self._file)


def _rows(file: int, shape: tuple[int, int], dtype: str) -> np.ndarray:
    memory = mmap.mmap(file, 0)
    return np.frombuffer(memory, dtype).reshape(shape)
