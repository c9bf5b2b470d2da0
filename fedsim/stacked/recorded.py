"""A step on a GPU as one launch.

A step of a few small batches is a hundred kernels of some microseconds, which Python cannot launch as fast as the GPU
computes them. So CUDA records them once, as a graph, and plays them back for the batches of later steps.

Shape letters: K clients, B examples of a batch, L classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedsim.stacked.layers import Layer

Step = Callable[[list[Layer], Tensor, Tensor], Tensor]
"""Takes a step of SGD with some layers on images [K, B, C, H, W] and targets [K, B, L]; the log-probabilities before
it, [K, B, L]."""

_BEFORE = 50
"""Steps on batches of one shape that are launched kernel by kernel before one is recorded. A recorded step saves some
0.3 ms, a recording costs perhaps 20: where clients of unequal size share a stack, few steps of one shape follow each
other, and recording them would not pay."""


class Recorder:
    """Takes steps with the layers of a stack, and keeps what it has recorded of them.

    Args:
        step: how one is taken; it computes on the GPU alone, and waits for nothing there.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._layers: list[Layer] | None = None
        self._of_shape: dict[torch.Size, _OfShape] = {}

    def __call__(self, layers: list[Layer], images: Tensor, targets: Tensor) -> Tensor:
        """As the step itself, to the bit."""
        if layers is not self._layers:  # others have their weights elsewhere; what these keep is released first
            self._of_shape.clear()
            self._layers = layers
        if images.shape not in self._of_shape:
            self._of_shape[images.shape] = _OfShape(images, targets)
        return self._of_shape[images.shape].take(self._step, layers, images, targets)


class _OfShape:
    """The steps on batches of one shape: recorded or not they read the same memory, so their kernels are the same."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self._images = torch.empty(images.shape, dtype=images.dtype, device=images.device)
        self._targets = torch.empty(targets.shape, dtype=targets.dtype, device=targets.device)
        self._num_launched = 0
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def take(self, step: Step, layers: list[Layer], images: Tensor, targets: Tensor) -> Tensor:
        self._images.copy_(images)
        self._targets.copy_(targets)
        if self._num_launched < _BEFORE:
            self._num_launched += 1
            return step(layers, self._images, self._targets)
        if self._recorded is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
                out = step(layers, self._images, self._targets)  # computes nothing yet
            self._recorded = graph, out
        graph, out = self._recorded
        graph.replay()
        return out.clone()
