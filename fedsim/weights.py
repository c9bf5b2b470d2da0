"""Weights on the wire: one flat float vector [D] with a layout, and what is computed from it.

Shape letters: D float values of the model (parameters, then floating buffers), I integer values (integer buffers).
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.errors import ConfigError


class Weights(NamedTuple):
    """All values of a model: what the server sends and averages."""

    flat: Tensor
    """Parameters, then floating buffers, in layout order. Shape [D], float32 (float64 in tests)."""
    integers: Tensor
    """Integer and boolean buffers, in layout order. Shape [I], int64."""

    @property
    def num_bytes(self) -> int:
        """Size of the encoded weights."""
        return self.flat.nbytes + self.integers.nbytes

    @staticmethod
    def of_arrays(arrays: tuple[np.ndarray, np.ndarray]) -> Weights:
        """Weights that read the given arrays in place; they must not be written."""
        return Weights(read_only_tensor(arrays[0]), read_only_tensor(arrays[1]))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The two vectors as numpy arrays [D] and [I]: what is put into a shared object store."""
        return self.flat.numpy(), self.integers.numpy()

    def sha256(self) -> str:
        """64 hex digits over the little-endian bytes of `flat`, then of `integers`."""
        return sha256(self.flat.numpy(force=True), self.integers.numpy(force=True))


class Entry(NamedTuple):
    """One named tensor of a model and its place in the flat vector."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Names, shapes and places of a model's tensors in the flat vectors."""

    floats: tuple[Entry, ...]
    """Parameters, then floating buffers: slices of `Weights.flat`."""
    integers: tuple[Entry, ...]
    """Integer and boolean buffers: slices of `Weights.integers`."""

    @staticmethod
    def of(module: nn.Module) -> Layout:
        """The layout of a module: parameters in definition order, then persistent buffers.

        Raises:
            ConfigError: a tensor is neither float32, float64, integer nor boolean, or there is nothing to train.
        """
        persistent = module.state_dict(keep_vars=True)
        parameters = [(name, p, p.requires_grad) for name, p in module.named_parameters()]
        buffers = [(name, b, False) for name, b in module.named_buffers() if name in persistent]
        tensors = parameters + buffers
        for name, tensor, _ in tensors:
            if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
                raise ConfigError(f"the model's tensor {name} has no shape yet: use a layer that is not lazy")
            is_float = tensor.is_floating_point() or tensor.is_complex()
            if is_float and tensor.dtype not in (torch.float32, torch.float64):
                raise ConfigError(f"the model's tensor {name} is {tensor.dtype}; fedsim averages float32 models")
        dtypes = {t.dtype for _, t, _ in tensors if t.is_floating_point()}
        if len(dtypes) > 1:
            raise ConfigError(f"the model mixes {', '.join(sorted(map(str, dtypes)))}; make it one type with .float()")
        if not any(trainable for _, _, trainable in tensors):
            raise ConfigError("the model has no parameter to train")
        return Layout(
            _entries([t for t in tensors if t[1].is_floating_point()]),
            _entries([t for t in tensors if not t[1].is_floating_point()]),
        )

    @property
    def num_values(self) -> int:
        """D, the length of the flat float vector."""
        return self.floats[-1].stop

    def flatten(self, module: nn.Module) -> Weights:
        """A copy of a module's values, on the CPU."""
        return self.of_named({name: tensor.detach().cpu() for name, tensor in module.state_dict().items()})

    def load(self, module: nn.Module, weights: Weights) -> None:
        """Copies the values into the module's own tensors, wherever they live."""
        tensors = module.state_dict()
        with torch.no_grad():
            for e in self.floats:
                tensors[e.name].copy_(weights.flat[e.start : e.stop].view(e.shape))
            for e in self.integers:
                tensors[e.name].copy_(weights.integers[e.start : e.stop].view(e.shape))

    def of_named(self, tensors: Mapping[str, Tensor]) -> Weights:
        """The inverse of `unflatten`."""
        floats = [tensors[e.name].reshape(-1) for e in self.floats]
        integers = [tensors[e.name].reshape(-1).to(torch.int64) for e in self.integers]
        return Weights(torch.cat(floats), torch.cat(integers) if integers else torch.empty(0, dtype=torch.int64))

    def unflatten(self, weights: Weights) -> dict[str, Tensor]:
        """Name -> tensor of its own shape and type; a copy, as `nn.Module.load_state_dict` takes it."""
        floats = {e.name: weights.flat[e.start : e.stop].view(e.shape).clone() for e in self.floats}
        integers = {
            e.name: weights.integers[e.start : e.stop].view(e.shape).to(e.dtype, copy=True) for e in self.integers
        }
        return floats | integers


def _entries(tensors: list[tuple[str, Tensor, bool]]) -> tuple[Entry, ...]:
    entries, start = [], 0
    for name, tensor, trainable in tensors:
        entries.append(Entry(name, tuple(tensor.shape), tensor.dtype, trainable, start, start + tensor.numel()))
        start += tensor.numel()
    return tuple(entries)


def read_only_tensor(array: np.ndarray) -> Tensor:
    """A tensor that shares a contiguous array's memory, also where that is read-only, as in a shared object store."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch has no read-only tensors; nothing here writes to these
        return torch.from_numpy(np.ascontiguousarray(array))


def sha256(*arrays: np.ndarray) -> str:
    """64 lower-case hex digits over the arrays' little-endian bytes, one after the other."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def l2_norm(vector: Tensor) -> float:
    """||vector||, accumulated in float64. Shape [D] -> a number; NaN or infinity where the vector has one."""
    # numpy's own pairwise sum: it does not depend on the number of threads
    return math.sqrt(float(vector.double().square().numpy(force=True).sum()))


def cosines(vectors: Tensor, lengths: Sequence[float], other: Tensor) -> list[float | None]:
    """Cosine of the angle between each of K vectors and another, in [-1, 1]; None where one is zero or not finite.

    Args:
        vectors: shape [K, D].
        lengths: `l2_norm` of each.
        other: shape [D].
    """
    other, length = other.double(), l2_norm(other)
    found: list[float | None] = []
    for vector, own in zip(vectors, lengths, strict=True):
        is_defined = 0 < own * length < math.inf
        found.append(max(-1.0, min(1.0, float(vector.double() @ other) / (own * length))) if is_defined else None)
    return found
