"""A stack of clients: their weights as one matrix, and the layers of their models that work on it.

Shape letters: K clients, D values of the model, B examples, L classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fedsim.errors import first_line
from fedsim.stacked.layers import LAYERS, Conv2d, Layer, Linear
from fedsim.stacked.parameter import Parameter
from fedsim.stacked.products import aligned_like
from fedsim.training import Sgd
from fedsim.weights import Layout

_INFERENCE = 100
"""Test images computed at once on a CPU: what a convolution makes of them stays in its cache. Part of the results."""


class Stack:
    """The weights of K clients.

    Args:
        module: the model; its structure counts, not its weights.
        layout: of the module.
        sgd: how a step is taken.
        weights: what each client begins with. Shape [K, D]; copied.

    Attributes:
        flat: the weights. Shape [K, D].
    """

    def __init__(self, module: nn.Module, layout: Layout, sgd: Sgd, weights: Tensor) -> None:
        self._module, self._layout, self._sgd = module, layout, sgd
        self.flat = aligned_like(weights, *weights.shape)
        self._velocity = aligned_like(weights, *weights.shape) if sgd.momentum else None
        self._layers: dict[tuple[int, int], list[Layer]] = {}
        self.begin(weights)

    def begin(self, weights: Tensor) -> None:
        """Starts again, in the same memory, with other weights [K', D] for the first K' clients."""
        self.flat[: len(weights)] = weights
        if self._velocity is not None:
            self._velocity[: len(weights)] = 0

    def layers(self, clients: slice) -> list[Layer]:
        """The layers for some of the clients, from the inputs to the logits; training them changes `flat`."""
        key = clients.start, clients.stop
        if key not in self._layers:
            if self.flat.is_cuda:  # what the layers of others keep may be most of its memory
                self._layers.clear()
            own: dict[str, dict[str, Parameter]] = {}
            for entry in self._layout.floats:
                layer, _, name = entry.name.rpartition(".")
                place = clients, slice(entry.start, entry.stop)
                value = self.flat[place].view(-1, *entry.shape)
                velocity = None if self._velocity is None else self._velocity[place].view(-1, *entry.shape)
                own.setdefault(layer, {})[name] = Parameter(value, velocity, self._sgd)
            self._layers[key] = [LAYERS[type(m)](m, own.get(name, {})) for name, m in pooled_first(self._module)]
        return self._layers[key]


def forward(layers: list[Layer], x: Tensor) -> Tensor:
    """Logits [K, B, L] of images [K, B, C, H, W]; the layers keep what the way back needs."""
    for layer in layers:
        x = layer.forward(x)
    return x


def infer(layers: list[Layer], images: Tensor) -> Tensor:
    """Logits [N, L] of images [N, C, H, W], by the layers of one client, which are not trained any more."""
    at_once = len(images)
    if any(isinstance(layer, Conv2d) for layer in layers) and not images.is_cuda:
        at_once = _INFERENCE
    logits = []
    for x in torch.split(images[None], at_once, dim=1):
        for layer in layers:
            x = layer.infer(x) if isinstance(layer, Linear) else layer.forward(x)
        logits.append(x[0])
    return torch.cat(logits)


def obstacle(module: nn.Module, input_shape: tuple[int, ...], num_classes: int) -> str | None:
    """What keeps the stacked engine from running a model: the first such layer, and why; None where nothing does.

    Args:
        module: the model; it is tried on two images.
        input_shape: C, H, W of an image.
        num_classes: L.
    """
    if type(module) is not nn.Sequential:
        return f"{type(module).__name__} is not an nn.Sequential, which shows the order of its layers"
    seen: set[int] = set()
    for name, part in module.named_modules():
        if any(hooks for key, hooks in vars(part).items() if key.endswith("_hooks")) or "forward" in vars(part):
            return f"layer {name}, {type(part).__name__}, has hooks or a forward of its own"
    for name, layer in leaves(module):
        called, parts = f"layer {name}, {type(layer).__name__},", {id(p) for p in (layer, *layer.parameters())}
        if type(layer) not in LAYERS:
            return f"{called} is none of {', '.join(kind.__name__ for kind in LAYERS)}"
        if not all(parameter.requires_grad for parameter in layer.parameters()):
            return f"{called} has frozen parameters"
        if seen & parts:
            return f"{called} is used twice"
        seen |= parts
    return _trial(module, input_shape, num_classes)


def _trial(module: nn.Sequential, input_shape: tuple[int, ...], num_classes: int) -> str | None:
    """Whether the stack gives the module's own outputs."""
    layout = Layout.of(module)
    weights = layout.flatten(module).flat
    images = torch.linspace(0, 1, 2 * math.prod(input_shape), dtype=weights.dtype).view(2, *input_shape)
    try:
        with torch.inference_mode():
            layers = Stack(module, layout, Sgd(lr=0.1), weights[None]).layers(slice(0, 1))
            ours, own = forward(layers, images[None])[0], module(images)
    except Exception as error:  # noqa: BLE001 - the loop engine runs it, and shows the traceback if it is a bug
        return first_line(error)
    if own.shape != (2, num_classes):
        return f"outputs of shape {'x'.join(map(str, own.shape[1:]))} where there are {num_classes} classes"
    is_equal = ours.shape == own.shape and torch.allclose(ours, own, rtol=1e-3, atol=1e-4)
    return None if is_equal else "its layers give other outputs in a stack than alone"


def pooled_first(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The `leaves`, but a max pooling before the ReLU that it follows.

    The largest of rectified values is the largest value, rectified: the same bits, also of the gradients, and the ReLU
    goes through less memory.
    """
    found = list(leaves(module))
    for i in range(1, len(found)):
        if type(found[i - 1][1]) is nn.ReLU and type(found[i][1]) is nn.MaxPool2d:
            found[i - 1], found[i] = found[i], found[i - 1]
    return found


def leaves(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of nested `nn.Sequential`s in the order in which they run, with their names."""
    for name, child in module._modules.items():  # not named_children: it leaves out a layer's second use
        if child is None:
            continue
        if type(child) is nn.Sequential:
            yield from leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
