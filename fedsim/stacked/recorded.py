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

_BEFORE = 5
"""Steps that are launched kernel by kernel: recording costs as much as some, and needs the libraries to be warm."""


class Recorder:
    """Takes steps with the layers of a stack, and keeps what it has recorded of them.

    Args:
        step: how one is taken; it computes on the GPU alone, and waits for nothing there.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._layers: list[Layer] | None = None
        self._recorded: dict[torch.Size, _Recorded] = {}

    def __call__(self, layers: list[Layer], images: Tensor, targets: Tensor) -> Tensor:
        """As the step itself, to the bit."""
        if layers is not self._layers:  # others have their weights elsewhere; what these keep is released first
            self._recorded.clear()
            self._layers = layers
        if images.shape not in self._recorded:
            self._recorded[images.shape] = _Recorded(images, targets)
        return self._recorded[images.shape].take(self._step, layers, images, targets)


class _Recorded:
    """The steps on batches of one shape, which all read the same memory."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self._images = torch.empty(images.shape, dtype=images.dtype, device=images.device)
        self._targets = torch.empty(targets.shape, dtype=targets.dtype, device=targets.device)
        self._num_taken = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def take(self, step: Step, layers: list[Layer], images: Tensor, targets: Tensor) -> Tensor:
        self._images.copy_(images)
        self._targets.copy_(targets)
        self._num_taken += 1
        if self._num_taken <= _BEFORE:
            return step(layers, self._images, self._targets)
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
                self._out = step(layers, self._images, self._targets)
            self._graph = graph
        self._graph.replay()
        return self._out.clone()
