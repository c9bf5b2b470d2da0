"""The first layer over a block of steps.

Shape letters: K clients, S steps, B examples of a batch, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsim.stacked.layers import Linear
from fedsim.stacked.products import aligned_like, product
from fedsim.training import Sgd

_GRAM_SHARE = 0.3
"""Rows of a block as a share of the layer's outputs: what looking ahead costs more, of what it makes faster."""


class Lookahead:
    """A first layer that knows the inputs of a block of steps, which do not depend on the weights.

    Its outputs in step s are those of the weights at the block's begin, less lr/B x_s sum_t x_t^T g_t over the steps t
    before. So one product serves the block, a second gives all x_s x_t^T, a third the change of the weights: the same
    mathematics in products of many rows, which a processor computes up to twice as fast as those of one small batch.

    Args:
        layer: trained by plain SGD.
        x: its inputs. Shape [K, S, B, I].
    """

    is_trained = True

    def __init__(self, layer: Linear, x: Tensor) -> None:
        self._layer, self._batch = layer, x.shape[2]
        self._x = x.flatten(1, 2)  # [K, S * B, I]
        num_clients, rows, _ = self._x.shape
        self._ahead = aligned_like(x, num_clients, rows, layer.weight.value.shape[1])
        self._gram = aligned_like(x, num_clients, rows, rows)
        for k, (own, weight) in enumerate(zip(self._x, layer.weight.value, strict=True)):
            self._ahead[k] = product(own, weight)
            self._gram[k] = product(own, own)
        self._g = aligned_like(x, num_clients, rows, self._ahead.shape[2])
        self._now = slice(0, self._batch)

    def forward(self, x: Tensor) -> Tensor:
        """See `Layer.forward`; `x` is known already."""
        y, before = self._ahead[:, self._now], slice(0, self._now.start)
        if self._now.start:
            alpha = -self._layer.weight.sgd.lr / self._batch
            y = torch.baddbmm(y, self._gram[:, self._now, before], self._g[:, before], alpha=alpha)
        return y if self._layer.bias is None else y + self._layer.bias.value[:, None]

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        """See `Layer.backward`; the weights are changed by `finish`."""
        self._g[:, self._now] = g
        if self._layer.bias:
            self._layer.bias.descend(g.sum(1), self._batch)
        self._now = slice(self._now.stop, self._now.stop + self._batch)
        return g

    def finish(self) -> None:
        """Changes the weights by all steps of the block."""
        rate = self._layer.weight.sgd.lr / self._batch
        for weight, g, x in zip(self._layer.weight.value, self._g, self._x, strict=True):
            weight.sub_(product(g.mT.contiguous(), x.mT.contiguous()), alpha=rate)


def worthwhile_block(leaves: list[nn.Module], sgd: Sgd, batch_size: int) -> int:
    """Steps that a model's first layer should look ahead; 1 where it cannot, or where it would not pay.

    Args:
        leaves: the model's layers in their order.
        sgd: how a step is taken.
        batch_size: B; 0 means the whole shard as one batch.
    """
    first = next((m for m in leaves if not isinstance(m, nn.Flatten | nn.Identity)), None)
    if not isinstance(first, nn.Linear) or sgd.momentum or sgd.weight_decay or not batch_size:
        return 1
    if first.weight.is_cuda:  # one product of all clients' small batches keeps a GPU busier than one a client
        return 1
    return max(1, int(_GRAM_SHARE * first.out_features) // batch_size)
