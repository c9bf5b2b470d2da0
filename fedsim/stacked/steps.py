"""Steps of local SGD over the layers of a stack: each by itself, or a block of them that its first layer looks ahead.

Shape letters: K clients, S steps, B examples of a batch, I inputs and O outputs of a layer, L classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.stacked.layers import Layer, Linear
from fedsim.stacked.lookahead import Lookahead
from fedsim.stacked.products import aligned_like, is_aligned
from fedsim.stacked.recorded import Step
from fedsim.stacked.stack import forward


def train(layers: list[Layer], images: Tensor, targets: Tensor, block: int, step: Step) -> Tensor:
    """Steps of SGD, each on the mean cross-entropy of every client's batch.

    Args:
        layers: of the clients; their weights are changed.
        images: shape [K, S, B, C, H, W].
        targets: the labels as rows of the unit matrix. Shape [K, S, B, L].
        block: steps that the first layer looks ahead, see `Lookahead`; 1 is none.
        step: how each is taken: `take` or what takes the same faster.

    Returns:
        The log-probabilities before each step. Shape [K, S, B, L].
    """
    lowest = _lowest(layers)
    first, before = layers[lowest], []
    for start in range(0, images.shape[1], block):
        some = images[:, start : start + block]
        if not is_aligned(some[0, 0]):  # else a client's values would begin in ways that depend on its neighbours
            some = aligned_like(some, *some.shape).copy_(some)
        if block > 1 and isinstance(first, Linear):
            ahead = Lookahead(first, some.flatten(3))
            layers = [*layers[:lowest], ahead, *layers[lowest + 1 :]]
        for at in range(some.shape[1]):
            before.append(step(layers, some[:, at], targets[:, start + at]))
        if block > 1:
            ahead.finish()
    return torch.stack(before, dim=1)


def take(layers: list[Layer], images: Tensor, targets: Tensor) -> Tensor:
    """One step, on images [K, B, C, H, W] and targets [K, B, L]; the log-probabilities before it, [K, B, L]."""
    lowest = _lowest(layers)
    log_probabilities = torch.log_softmax(forward(layers, images), -1)
    g = log_probabilities.exp().sub_(targets)
    for i in range(len(layers) - 1, lowest - 1, -1):
        g = layers[i].backward(g, needs_input=i > lowest)
    return log_probabilities


def _lowest(layers: list[Layer]) -> int:
    """The first layer that is trained; nothing below it needs a gradient."""
    return next(i for i, layer in enumerate(layers) if layer.is_trained)
