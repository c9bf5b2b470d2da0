"""The element-wise layers of the stacked engine; their signature is that of `layers.Layer`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.stacked.parameter import Parameter

# The derivatives that autograd itself calls.
threshold_backward: Callable[..., Tensor] = torch.ops.aten.threshold_backward
tanh_backward: Callable[..., Tensor] = torch.ops.aten.tanh_backward
sigmoid_backward: Callable[..., Tensor] = torch.ops.aten.sigmoid_backward
gelu_backward: Callable[..., Tensor] = torch.ops.aten.gelu_backward


class _Activation:
    """An element-wise function; `kept` are its inputs or outputs, whichever its derivative is written in."""

    is_trained = False
    kept: Tensor

    def __init__(self, module: nn.Module, parameters: dict[str, Parameter]) -> None:
        self.module: Any = module


class Identity(_Activation):
    """y = x."""

    def forward(self, x: Tensor) -> Tensor:
        """See `Layer.forward`."""
        return x

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        """See `Layer.backward`."""
        return g


class ReLU(_Activation):
    """y = max(x, 0); its slope at 0 is 0. Exact, hence computed for all clients at once."""

    def forward(self, x: Tensor) -> Tensor:
        """See `Layer.forward`."""
        self.kept = torch.relu(x)
        return self.kept

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        """See `Layer.backward`."""
        return threshold_backward(g, self.kept, 0)


class Tanh(_Activation):
    """y = tanh(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """See `Layer.forward`."""
        self.kept = _each(torch.tanh, x)
        return self.kept

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        """See `Layer.backward`."""
        return _each(tanh_backward, g, self.kept)


class Sigmoid(_Activation):
    """y = 1 / (1 + exp(-x))."""

    def forward(self, x: Tensor) -> Tensor:
        """See `Layer.forward`."""
        self.kept = _each(torch.sigmoid, x)
        return self.kept

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        """See `Layer.backward`."""
        return _each(sigmoid_backward, g, self.kept)


class GELU(_Activation):
    """y = x P(X <= x) of a normal X, or its approximation by tanh."""

    def forward(self, x: Tensor) -> Tensor:
        """See `Layer.forward`."""
        self.kept = x
        return _each(partial(F.gelu, approximate=self.module.approximate), x)

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        """See `Layer.backward`."""
        return _each(partial(gelu_backward, approximate=self.module.approximate), g, self.kept)


def _each(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function of tensors [K, ...], client by client on the CPU.

    A vector register and what is left over at the end of a tensor may round in different ways: so every client has its
    own end, as it has alone.
    """
    if tensors[0].is_cuda:
        return function(*tensors)
    return torch.stack([function(*some) for some in zip(*tensors, strict=True)])
