"""Local SGD and evaluation over a stack of clients.

Shape letters: K clients, D values of the model, n examples of a shard, S steps, B examples of a batch, L classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.stacked.lookahead import worthwhile_block
from fedsim.stacked.recorded import Recorder
from fedsim.stacked.stack import Stack, infer, leaves
from fedsim.stacked.steps import take, train
from fedsim.training import Chunk, Evaluation, Examples, Sgd, Trained, Work, pixels, score
from fedsim.weights import Layout, Weights

_GATHER = 512
"""Examples brought together at once; a memory limit that changes no bit."""
_GPU_EXAMPLES = 2000
"""Of a step on a GPU: a batched convolution holds all their patches, of the paper's CNN some 3 GB forth and back."""
_VECTOR_BYTES = 16
"""Of the smallest vector register."""


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
        self._block = worthwhile_block([layer for _, layer in leaves(module)], sgd, batch_size)
        # a product with a dimension of 1 is a matrix and a vector, for which a stack takes another routine
        self._is_thin = any(len(entry.shape) == 2 and 1 in entry.shape for entry in self._layout.floats)
        self._agreed: dict[tuple[int, ...], bool] = {}
        self._kept: Stack | None = None
        self._recorder = Recorder(take)
        self._tested: WeakKeyDictionary[Examples, dict[Chunk, Tensor]] = WeakKeyDictionary()
        self._memory: Tensor | None = None

    @torch.inference_mode()
    def train(self, weights: Weights, examples: Examples, work: Sequence[Work]) -> list[Trained]:
        """See `Engine.train`; clients of unequal size may share a stack."""
        order = sorted(range(len(work)), key=lambda k: -work[k].num_examples)  # the largest first, see `pieces`
        sizes = [work[k].num_examples for k in order]
        stack = self._begun(weights.flat.to(examples.labels.device).expand(len(work), -1))
        losses = stack.flat.new_zeros(len(work), len(work[0].epochs), sizes[0])
        num_steps = [0] * len(work)
        for epoch, orders in enumerate(zip(*(work[k].epochs for k in order), strict=True)):
            indices = nn.utils.rnn.pad_sequence(list(orders), batch_first=True)  # [K, n]
            for piece in pieces(sizes, self._batch_size, self._block):
                place = piece.clients, slice(piece.start, piece.stop)
                losses[place[0], epoch, place[1]] = self._take(stack, piece, examples, indices[place])
                for k in range(len(work))[piece.clients]:
                    num_steps[k] += piece.num_steps
        trained = {}
        local = stack.flat[: len(work)].cpu()
        for k, steps, size, flat, loss in zip(order, num_steps, sizes, local, losses.cpu(), strict=True):
            own = loss[:, :size].double().flatten()  # added by themselves: the neighbours' places play no part
            trained[k] = Trained(steps, float(own.numpy().sum()) / len(own), Weights(flat, weights.integers))
        return [trained[k] for k in range(len(work))]

    @torch.inference_mode()
    def evaluate(
        self, weights: Weights, examples: Examples, chunks: Sequence[Chunk], torch_seeds: Sequence[int]
    ) -> list[Evaluation]:
        """See `Engine.evaluate`."""
        layers = self._stack(weights.flat.to(examples.labels.device)[None]).layers(slice(0, 1))
        tested = self._tested.setdefault(examples, {})  # kept: new memory each time costs half as much as the products
        evaluations = []
        for start, stop in chunks:
            if (start, stop) not in tested:
                tested[start, stop] = pixels(examples.images[start:stop], weights.flat.dtype)
            logits = infer(layers, tested[start, stop])
            evaluations.append(score(logits, examples.labels[start:stop]))
        return evaluations

    def _take(self, stack: Stack, piece: Piece, examples: Examples, indices: Tensor) -> Tensor:
        """The steps of a piece, over the examples named by `indices` [K, S * B]; their losses, likewise [K, S * B]."""
        block = min(self._block, piece.num_steps)
        steps = max(1, _GATHER // (len(indices) * piece.batch * block)) * block
        step = self._recorder if stack.flat.is_cuda else take
        losses = []
        for some in torch.split(indices, steps * piece.batch, dim=1):
            labels = examples.labels.index_select(0, some.flatten()).view(len(some), -1, piece.batch)
            targets = F.one_hot(labels, self._num_classes).to(stack.flat.dtype)
            images = self._pixels(examples.images.index_select(0, some.flatten()), stack.flat.dtype)
            images = images.view(*labels.shape, *images.shape[1:])
            log_probabilities = [
                train(stack.layers(clients), images[rows], targets[rows], block, step)
                for clients, rows in self._together(piece, block, images)
            ]
            losses.append(-torch.cat(log_probabilities).gather(3, labels[..., None]).flatten(1))
        return torch.cat(losses, dim=1)

    def _stack(self, weights: Tensor) -> Stack:
        return Stack(self._module, self._layout, self._sgd, weights)

    def _begun(self, weights: Tensor) -> Stack:
        """A stack in the memory of the last one, where that is large enough: new memory costs as much as some steps."""
        if self._kept is None or len(self._kept.flat) < len(weights):
            self._kept, self._recorder = None, Recorder(take)  # what they keep is released first
            self._kept = self._stack(weights)
        else:
            self._kept.begin(weights)
        return self._kept

    def _pixels(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """As `pixels`, in memory that is used again by the next call."""
        if self._memory is None or self._memory.numel() < images.numel():
            self._memory = torch.empty(images.numel(), dtype=dtype, device=images.device)
        return pixels(images, dtype, out=self._memory[: images.numel()].view(images.shape))

    def _together(self, piece: Piece, block: int, images: Tensor) -> list[tuple[slice, slice]]:
        """The clients that compute as one, as rows of the stack and of the piece."""
        first, last = piece.clients.start, piece.clients.stop
        at_once = self._at_once(piece, block, images)
        groups = [(k, min(k + at_once, last)) for k in range(first, last, at_once)]
        return [(slice(start, stop), slice(start - first, stop - first)) for start, stop in groups]

    def _at_once(self, piece: Piece, block: int, images: Tensor) -> int:
        """On a GPU all whose examples are not too many; on a CPU all, or one where the bits would not be the same."""
        num_clients = piece.clients.stop - piece.clients.start
        if images.is_cuda:
            return max(1, _GPU_EXAMPLES // piece.batch)
        key = num_clients, block, *images.shape[2:]
        if key not in self._agreed:
            self._agreed[key] = num_clients == 1 or self._agrees(key, images.dtype)
        return num_clients if self._agreed[key] else 1

    def _agrees(self, key: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether clients, blocks and images of these shapes train with the bits that each client has alone.

        Matrix products may round in another way where a client's values begin in the middle of a vector register; that
        is rare enough to escape a trial, so such shapes are out. The trial finds what else a kernel makes of a stack.
        """
        if self._is_thin:
            return False
        num_clients, block, batch, *image_shape = key
        rng = torch.Generator().manual_seed(20170420)  # any values do: the rounding is a matter of the shapes
        weights = torch.rand(num_clients, self._layout.num_values, generator=rng, dtype=dtype).sub_(0.5)
        images = torch.rand(num_clients, 3 * block, batch, *image_shape, generator=rng, dtype=dtype)
        labels = torch.arange(images[..., 0, 0, 0].numel()).remainder_(self._num_classes)
        targets = F.one_hot(labels.view(images.shape[:3]), self._num_classes).to(dtype)
        stack, x = self._stack(weights), images[:, 0]
        for layer in stack.layers(slice(0, num_clients)):
            x = layer.forward(x)
            if x.stride(0) * x.itemsize % _VECTOR_BYTES:
                return False
        out = train(stack.layers(slice(0, num_clients)), images, targets, block, take)
        for k in range(num_clients):
            one = slice(k, k + 1)
            alone = self._stack(weights[one])
            own = train(alone.layers(slice(0, 1)), images[one].clone(), targets[one].clone(), block, take)
            pairs = (alone.flat[0], stack.flat[k]), (own[0], out[k])
            if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
                return False
        return True


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


def pieces(sizes: Sequence[int], batch_size: int, block: int = 1) -> Iterator[Piece]:
    """Cuts an epoch into pieces of equal batches: whole blocks of full ones, the other full ones, the short last ones.

    Args:
        sizes: each client's examples, the largest first.
        batch_size: B; 0 means a client's whole shard as one batch.
        block: steps that belong together: where a client's blocks lie does not depend on its neighbours.

    Example:
        >>> [(p.clients.stop, p.start, p.batch, p.num_steps) for p in pieces([25, 25, 10], 10)]
        [(3, 0, 10, 1), (2, 10, 10, 1), (2, 20, 5, 1)]
    """
    full = [size // batch_size if batch_size else 0 for size in sizes]
    in_blocks = [steps // block * block for steps in full]
    done = 0
    for count in range(len(sizes), 0, -1):  # as many as the smallest of the first `count` clients has
        if in_blocks[count - 1] > done:
            yield Piece(slice(0, count), done * batch_size, batch_size, in_blocks[count - 1] - done)
            done = in_blocks[count - 1]
    for size, group in groupby(range(len(sizes)), key=sizes.__getitem__):
        equal = list(group)
        k, clients = equal[0], slice(equal[0], equal[-1] + 1)
        if full[k] > in_blocks[k]:
            yield Piece(clients, in_blocks[k] * batch_size, batch_size, full[k] - in_blocks[k])
        if size > full[k] * batch_size:
            yield Piece(clients, full[k] * batch_size, size - full[k] * batch_size, 1)
