"""Matrix products of many rows, and memory in which every client's part begins alike."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

_ALIGNMENT = 16
"""Values to whose multiple a client's part is padded: where memory is not aligned, a kernel may round differently."""


def is_aligned(x: Tensor) -> bool:
    """Whether what follows a tensor of this shape in memory is aligned if its own begin is."""
    return x.numel() % _ALIGNMENT == 0


def aligned_like(like: Tensor, num_clients: int, *shape: int) -> Tensor:
    """An uninitialised tensor [K, ...] of another's type and device, every client's part contiguous and aligned."""
    size = prod(shape)
    rows = like.new_empty(num_clients, -(-size // _ALIGNMENT) * _ALIGNMENT)
    return rows[:, :size].view(num_clients, *shape)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W^T + b for many rows: [N, I] and [O, I] -> [N, O].

    In float32 on a CPU by oneDNN: its products use all of the processor's vector width where torch's others may not, on
    AMD's processors twice as much. It is what torch's own compiler calls.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and _HAS_ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)


_HAS_ONEDNN = bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
