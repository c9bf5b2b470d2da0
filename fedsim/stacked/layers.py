"""The layers of the stacked engine: what each computes for K clients at once, every client with its own weights.

A layer goes forward and backward over a whole stack, without autograd, and takes its SGD step on the way back: no
gradient of a weight matrix is ever stored. To add a type, write one class with the signature below and give it a line
in `LAYERS`; the tests over the table compare it with autograd.

Shape letters: K clients of the stack, B examples of a client's batch, I inputs, O outputs, C channels, H, W pixels.
Images are [K, B, C, H, W] with the channels innermost in memory, where pooling and convolutions are fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.stacked.activations import GELU, Identity, ReLU, Sigmoid, Tanh
from fedsim.stacked.parameter import Parameter
from fedsim.stacked.patches import PatchedConv2d
from fedsim.stacked.products import product

# The derivatives that autograd itself calls.
convolution_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.aten.convolution_backward
max_pool2d_with_indices: Callable[..., tuple[Tensor, Tensor]] = torch.ops.aten.max_pool2d_with_indices
max_pool2d_backward: Callable[..., Tensor] = torch.ops.aten.max_pool2d_with_indices_backward
avg_pool2d_backward: Callable[..., Tensor] = torch.ops.aten.avg_pool2d_backward


class Layer(Protocol):
    """One layer of a stack, made from a module and its parameters by name.

    Its constructor raises NotImplementedError for a module whose options it does not know.
    """

    is_trained: bool
    """Whether it has parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [K, B, ...] from inputs [K, B, ...]; keeps what the way back needs, changes no input."""
        ...

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        """Takes the step, and returns the gradient of the inputs from that of the outputs, both summed over a batch.

        Args:
            g: shape [K, B, ...] as the outputs; may be changed in place.
            needs_input: something below is trained; otherwise anything may be returned.
        """
        ...


class Linear:
    """y = x W^T + b, a batched product over the clients."""

    is_trained = True

    def __init__(self, module: nn.Linear, parameters: dict[str, Parameter]) -> None:
        self.weight, self.bias = parameters["weight"], parameters.get("bias")
        self._transposed = self.weight.value.mT
        self._shift = self.bias.value[:, None] if self.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[K, B, I] -> [K, B, O]."""
        self.x = x
        if self._shift is None:
            return torch.bmm(x, self._transposed)
        return torch.baddbmm(self._shift, x, self._transposed)

    def infer(self, x: Tensor) -> Tensor:
        """As `forward`, of one client and with nothing kept: [1, N, I] -> [1, N, O]."""
        return product(x[0], self.weight.value[0], self.bias.value[0] if self.bias else None)[None]

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        """See `Layer.backward`."""
        batch = g.shape[1]
        below = torch.bmm(g, self.weight.value) if needs_input else g
        self.weight.descend_along(g.mT, self.x, batch)
        if self.bias:
            self.bias.descend(g.sum(1), batch)
        return below


class Conv2d:
    """A convolution a client: on the CPU they are faster, and surely of the same bits, one by one."""

    is_trained = True

    def __init__(self, module: nn.Conv2d, parameters: dict[str, Parameter]) -> None:
        self.weight, self.bias = parameters["weight"], parameters.get("bias")
        self._options = module.stride, _padding(module), module.dilation
        self._groups = module.groups

    def forward(self, x: Tensor) -> Tensor:
        """[K, B, C, H, W] -> [K, B, O, H', W']."""
        self.x = x = channels_innermost(x)
        biases: Any = self.bias.value if self.bias else [None] * len(x)
        return _stacked(
            [
                F.conv2d(image, weight, bias, *self._options, self._groups)
                for image, weight, bias in zip(x, self.weight.value, biases, strict=True)
            ]
        )

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        """See `Layer.backward`."""
        wanted = [needs_input, True, self.bias is not None]
        fixed = [self.weight.value.shape[1]], *self._options, False, [0, 0], self._groups, wanted
        triples = zip(channels_innermost(g), self.x, self.weight.value, strict=True)
        found = [convolution_backward(*triple, *fixed) for triple in triples]
        self.weight.descend(_stacked([weight for _, weight, _ in found]), g.shape[1])
        if self.bias:
            self.bias.descend(_stacked([bias for _, _, bias in found]), g.shape[1])
        return _stacked([below for below, _, _ in found]) if needs_input else g


class MaxPool2d:
    """The largest of each window; all clients' images at once."""

    is_trained = False

    def __init__(self, module: nn.MaxPool2d, parameters: dict[str, Parameter]) -> None:
        if module.return_indices:
            raise NotImplementedError("MaxPool2d with return_indices=True")
        pairs = [_pair(v) for v in (module.kernel_size, module.stride, module.padding, module.dilation)]
        self._options = *pairs, module.ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        """[K, B, C, H, W] -> [K, B, C, H', W']."""
        self.x = x.flatten(0, 1)
        y, self._where = max_pool2d_with_indices(self.x, *self._options)
        return _by_client(y, x)

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        """See `Layer.backward`."""
        below = max_pool2d_backward(g.flatten(0, 1), self.x, *self._options, self._where)
        return _by_client(below, g)


class AvgPool2d:
    """The mean of each window; all clients' images at once."""

    is_trained = False

    def __init__(self, module: nn.AvgPool2d, parameters: dict[str, Parameter]) -> None:
        pairs = [_pair(v) for v in (module.kernel_size, module.stride, module.padding)]
        self._options: Any = *pairs, module.ceil_mode, module.count_include_pad, module.divisor_override

    def forward(self, x: Tensor) -> Tensor:
        """[K, B, C, H, W] -> [K, B, C, H', W']."""
        self.x = x.flatten(0, 1)
        if x.is_cuda:  # in torch 2.11 its derivative there is wrong with channels innermost: pytorch/pytorch#188344
            self.x = self.x.contiguous()
        return _by_client(F.avg_pool2d(self.x, *self._options), x)

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        """See `Layer.backward`."""
        return _by_client(avg_pool2d_backward(g.flatten(0, 1), self.x, *self._options), g)


class Flatten:
    """[K, B, C, H, W] -> [K, B, C * H * W], in the order of C, H, W as a module's weights have it."""

    is_trained = False

    def __init__(self, module: nn.Flatten, parameters: dict[str, Parameter]) -> None:
        if (module.start_dim, module.end_dim) != (1, -1):
            raise NotImplementedError(f"Flatten of dimensions {module.start_dim} to {module.end_dim}")

    def forward(self, x: Tensor) -> Tensor:
        """See `Layer.forward`."""
        self._shape = x.shape[2:]
        return x.flatten(2)

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        """See `Layer.backward`."""
        return g.view(*g.shape[:2], *self._shape)


def convolution(module: nn.Conv2d, parameters: dict[str, Parameter]) -> Layer:
    """The convolutions of a stack: on a CPU one a client, on a GPU all in one product."""
    if module.padding_mode != "zeros":
        raise NotImplementedError(f"Conv2d with padding_mode={module.padding_mode!r}")
    weight = parameters["weight"].value
    if weight.is_cuda and len(weight) > 1 and module.groups == 1:
        return PatchedConv2d(module, parameters, _padding(module))
    return Conv2d(module, parameters)


def channels_innermost(images: Tensor) -> Tensor:
    """The same images [K, B, C, H, W] with the channels innermost in memory; not copied where they are already."""
    if images.shape[2] == 1:  # in both orders at once: torch goes by the strides, and gives its outputs the same order
        return images.squeeze(2).unsqueeze(-1).movedim(-1, 2)
    return _by_client(images.flatten(0, 1).to(memory_format=torch.channels_last), images)


def _by_client(images: Tensor, like: Tensor) -> Tensor:
    """[K * B, ...] -> [K, B, ...], with the K and B of another tensor; the same memory."""
    return images.view(*like.shape[:2], *images.shape[1:])


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Tensors of K clients as one, in the order of memory that they have; that of a single client is not copied."""
    if len(tensors) == 1:
        return tensors[0][None]
    return torch.cat(tensors).view(len(tensors), *tensors[0].shape)


def _pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _padding(module: nn.Conv2d) -> tuple[int, int]:
    """The padding in numbers, also where it was given as a word."""
    left, right, top, bottom = module._reversed_padding_repeated_twice
    if (left, top) != (right, bottom):
        raise NotImplementedError(f"Conv2d whose padding={module.padding!r} differs from side to side")
    return top, left


LAYERS: dict[type[nn.Module], Callable[[Any, dict[str, Parameter]], Layer]] = {
    nn.Linear: Linear,
    nn.Conv2d: convolution,
    nn.MaxPool2d: MaxPool2d,
    nn.AvgPool2d: AvgPool2d,
    nn.Flatten: Flatten,
    nn.Identity: Identity,
    nn.ReLU: ReLU,
    nn.Tanh: Tanh,
    nn.Sigmoid: Sigmoid,
    nn.GELU: GELU,
}
