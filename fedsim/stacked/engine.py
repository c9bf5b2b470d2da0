"""Local SGD and evaluation over a stack of clients.

Shape letters: K clients, D values of the model, n examples of a shard, S steps, B examples of a batch, L classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.stacked.layers import Layer
from fedsim.stacked.stack import Stack, forward, infer
from fedsim.training import Chunk, Evaluation, Examples, Sgd, Trained, Work, pixels, score
from fedsim.weights import Layout, Weights

_GATHER = 1024
"""Examples brought together at once; a memory limit that changes no bit."""
_VECTOR_BYTES, _ALIGNED_BYTES = 16, 64
"""Of the smallest vector register, and of torch's own allocations."""


class Stacked:
    """An `Engine` for the models in which `obstacle` finds none: many clients in one computation.

    Args:
        module: the model. Only its structure counts, not its weights.
        sgd: how a step is taken.
        batch_size: B; 0 means the whole shard as one batch.
        num_classes: L.
    """

    def __init__(self, module: nn.Module, sgd: Sgd, batch_size: int, num_classes: int) -> None:
        self._module, self._sgd, self._batch_size, self._num_classes = module, sgd, batch_size, num_classes
        self._layout = Layout.of(module)
        self._agreed: dict[tuple[int, ...], bool] = {}

    @torch.inference_mode()
    def train(self, weights: Weights, examples: Examples, work: Sequence[Work]) -> list[Trained]:
        """See `Engine.train`; clients of unequal size may share a stack."""
        order = sorted(range(len(work)), key=lambda k: -work[k].num_examples)  # the largest first, see `pieces`
        sizes = [work[k].num_examples for k in order]
        stack = self._stack(weights.flat.to(examples.labels.device).expand(len(work), -1))
        losses = stack.flat.new_zeros(len(work), len(work[0].epochs), sizes[0])
        num_steps = [0] * len(work)
        for epoch, orders in enumerate(zip(*(work[k].epochs for k in order), strict=True)):
            indices = nn.utils.rnn.pad_sequence(list(orders), batch_first=True)  # [K, n]
            for piece in pieces(sizes, self._batch_size):
                place = piece.clients, slice(piece.start, piece.stop)
                losses[place[0], epoch, place[1]] = self._take(stack, piece, examples, indices[place])
                for k in range(len(work))[piece.clients]:
                    num_steps[k] += piece.num_steps
        trained = {}
        for k, steps, size, flat, loss in zip(order, num_steps, sizes, stack.flat.cpu(), losses.cpu(), strict=True):
            own = loss[:, :size].double().flatten()  # added by themselves: the neighbours' places play no part
            trained[k] = Trained(steps, float(own.numpy().sum()) / len(own), Weights(flat, weights.integers))
        return [trained[k] for k in range(len(work))]

    @torch.inference_mode()
    def evaluate(
        self, weights: Weights, examples: Examples, chunks: Sequence[Chunk], torch_seeds: Sequence[int]
    ) -> list[Evaluation]:
        """See `Engine.evaluate`."""
        layers = self._stack(weights.flat.to(examples.labels.device)[None]).layers(slice(0, 1))
        evaluations = []
        for start, stop in chunks:
            images = pixels(examples.images[start:stop], weights.flat.dtype)
            evaluations.append(score(infer(layers, images), examples.labels[start:stop]))
        return evaluations

    def _take(self, stack: Stack, piece: Piece, examples: Examples, indices: Tensor) -> Tensor:
        """The steps of a piece, over the examples named by `indices` [K, S * B]; their losses, likewise [K, S * B]."""
        num_clients, batch, first = len(indices), piece.batch, piece.clients.start
        losses = []
        for some in torch.split(indices, max(1, _GATHER // (num_clients * batch)) * batch, dim=1):
            by_step = some.reshape(num_clients, -1, batch).transpose(0, 1)  # [S, K, B]
            images = pixels(examples.images.index_select(0, by_step.flatten()), stack.flat.dtype)
            images = images.view(*by_step.shape, *images.shape[1:])
            labels = examples.labels.index_select(0, by_step.flatten()).view(by_step.shape)
            targets = F.one_hot(labels, self._num_classes).to(images.dtype)
            logits = torch.empty_like(targets)
            is_aligned = images.stride(1) * images.itemsize % _ALIGNED_BYTES == 0
            for clients in self._together(piece.clients, images):
                layers, rows = stack.layers(clients), slice(clients.start - first, clients.stop - first)
                for x, y, z in zip(images[:, rows], targets[:, rows], logits[:, rows], strict=True):
                    z.copy_(_step(layers, x if is_aligned else x.clone(), y))
            losses.append(-logits.log_softmax(3).gather(3, labels[..., None]).transpose(0, 1).flatten(1))
        return torch.cat(losses, dim=1)

    def _stack(self, weights: Tensor) -> Stack:
        return Stack(self._module, self._layout, self._sgd, weights)

    def _together(self, clients: slice, images: Tensor) -> list[slice]:
        """The groups of clients that compute as one: all, or each alone where the bits would not be the same."""
        shape = tuple(images.shape[1:])
        if shape not in self._agreed:
            self._agreed[shape] = shape[0] == 1 or images.is_cuda or self._agrees(shape, images.dtype)
        singles = [slice(k, k + 1) for k in range(clients.start, clients.stop)]
        return [clients] if self._agreed[shape] else singles

    def _agrees(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether a stack with images [K, B, ...] trains with the bits that each of its clients has alone.

        Matrix products may round in another way where a client's values begin in the middle of a vector register; that
        is rare enough to escape a trial, so such shapes are out. The trial finds what else a kernel makes of a stack.
        """
        rng = torch.Generator().manual_seed(20170420)  # any values do: the rounding is a matter of the shapes
        num_clients, batch = shape[:2]
        weights = torch.rand(num_clients, self._layout.num_values, generator=rng, dtype=dtype).sub_(0.5)
        images = torch.rand(shape, generator=rng, dtype=dtype)
        labels = torch.arange(num_clients * batch).remainder_(self._num_classes).view(num_clients, batch)
        targets = F.one_hot(labels, self._num_classes).to(dtype)
        stack, x = self._stack(weights), images
        for layer in stack.layers(slice(0, num_clients)):
            x = layer.forward(x)
            if x.stride(0) * x.itemsize % _VECTOR_BYTES:
                return False
        logits = self._trial(stack, images, targets)
        for k in range(num_clients):
            client = slice(k, k + 1)
            alone = self._stack(weights[client])
            own = self._trial(alone, images[client], targets[client])
            if not (torch.equal(alone.flat[0], stack.flat[k]) and torch.equal(own[0], logits[k])):
                return False
        return True

    def _trial(self, stack: Stack, images: Tensor, targets: Tensor) -> Tensor:
        layers = stack.layers(slice(0, len(images)))
        for _ in range(3):
            logits = _step(layers, images.clone(), targets)
        return logits


def _step(layers: list[Layer], images: Tensor, targets: Tensor) -> Tensor:
    """One step of SGD on the mean cross-entropy of each client's batch.

    Args:
        layers: of the clients; their weights are changed.
        images: shape [K, B, C, H, W].
        targets: the labels as rows of the unit matrix. Shape [K, B, L].

    Returns:
        The logits before the step. Shape [K, B, L].
    """
    logits = forward(layers, images)
    g = logits.softmax(-1).sub_(targets)
    lowest = next(i for i, layer in enumerate(layers) if layer.is_trained)
    for i in range(len(layers) - 1, lowest - 1, -1):
        g = layers[i].backward(g, needs_input=i > lowest)
    return logits


class Piece(NamedTuple):
    """Some steps of an epoch that some clients of a stack take together."""

    clients: slice
    start: int
    """The first example, counted from the beginning of each client's epoch."""
    batch: int
    """Examples of each of the steps."""
    num_steps: int

    @property
    def stop(self) -> int:
        """After the last example."""
        return self.start + self.batch * self.num_steps


def pieces(sizes: Sequence[int], batch_size: int) -> Iterator[Piece]:
    """Cuts an epoch into pieces of equal batches: first the full batches, then the short last ones.

    Args:
        sizes: each client's examples, the largest first.
        batch_size: B; 0 means a client's whole shard as one batch.

    Example:
        >>> [(p.clients.stop, p.start, p.batch, p.num_steps) for p in pieces([25, 25, 10], 10)]
        [(3, 0, 10, 1), (2, 10, 10, 1), (2, 20, 5, 1)]
    """
    full = [size // batch_size if batch_size else 0 for size in sizes]
    done = 0
    for count in range(len(sizes), 0, -1):  # as many as the smallest of the first `count` clients has
        if full[count - 1] > done:
            yield Piece(slice(0, count), done * batch_size, batch_size, full[count - 1] - done)
            done = full[count - 1]
    for size, group in groupby(range(len(sizes)), key=sizes.__getitem__):
        clients = list(group)
        start = full[clients[0]] * batch_size
        if size > start:
            yield Piece(slice(clients[0], clients[-1] + 1), start, size - start, 1)
