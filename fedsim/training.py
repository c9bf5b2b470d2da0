"""Local training and evaluation: what an engine is, and the loop engine, which runs any model by autograd.

Written for one process and one device; knows nothing of Ray, rounds or files. Shape letters: N examples, n examples of
a shard, B batch, C channels, H, W pixels, L classes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.weights import Layout, Weights

EVALUATION_CHUNK = 1000
"""Examples evaluated at once: part of the results, whatever the number of actors."""

_GATHER = 1024
"""Examples brought together at once; a memory limit that changes no bit."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Images and labels on one device, read by many."""

    images: Tensor
    """Shape [N, C, H, W]; uint8 (an image is byte/255) or floating."""
    labels: Tensor
    """Shape [N], int64."""


@dataclass(frozen=True)
class Sgd:
    """How a step is taken: as `torch.optim.SGD` does, momentum starting at zero in each fit."""

    lr: float
    momentum: float = 0.0
    """In [0, 1)."""
    weight_decay: float = 0.0
    """L2 penalty, added to the gradient."""


@dataclass(frozen=True)
class Work:
    """What one client does in one round."""

    epochs: Sequence[Tensor]
    """For each local epoch the shard's examples in their order. Shape [n] each, int64."""
    torch_seed: int
    """Of what a model draws itself (dropout)."""

    @property
    def num_examples(self) -> int:
        """Of the shard: n."""
        return len(self.epochs[0])


class Trained(NamedTuple):
    """What a client's local training gave."""

    num_steps: int
    train_loss: float
    """Mean over the examples processed, each before its step; nats."""
    weights: Weights


@dataclass(frozen=True)
class Evaluation:
    """Sums over some examples."""

    loss_sum: float
    """nats, float64."""
    num_correct: int
    num_examples: int

    @property
    def loss(self) -> float:
        """Mean of the examples, nats."""
        return self.loss_sum / self.num_examples

    @property
    def accuracy(self) -> float:
        """Fraction of the examples."""
        return self.num_correct / self.num_examples

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(
            self.loss_sum + other.loss_sum,
            self.num_correct + other.num_correct,
            self.num_examples + other.num_examples,
        )


Chunk = tuple[int, int]
"""Examples from the first number up to, not including, the second."""


class Engine(Protocol):
    """A way to compute what clients do. Each always gives the same bits; two of them agree up to rounding."""

    def train(self, weights: Weights, examples: Examples, work: Sequence[Work]) -> list[Trained]:
        """Trains clients from the same weights, each as if it were the only one.

        Returns:
            For each of them its outcome; its weights are valid until the next call of this method.
        """
        ...

    def evaluate(
        self, weights: Weights, examples: Examples, chunks: Sequence[Chunk], torch_seeds: Sequence[int]
    ) -> list[Evaluation]:
        """Tests the weights on chunks of the examples; each chunk has its own seed of what a model draws itself."""
        ...


class Loop:
    """The engine for any `nn.Module`: client after client, differentiated by autograd.

    Args:
        module: the model.
        sgd: how a step is taken.
        batch_size: B; 0 means the whole shard as one batch.
    """

    def __init__(self, module: nn.Module, sgd: Sgd, batch_size: int) -> None:
        self._pristine, self._layout, self._sgd, self._batch_size = module, Layout.of(module), sgd, batch_size

    def train(self, weights: Weights, examples: Examples, work: Sequence[Work]) -> list[Trained]:
        """See `Engine.train`."""
        trained = []
        for client in work:
            with _torch_seeded(client.torch_seed, examples.labels.device):
                module = self._module(weights)
                num_steps, train_loss = local_sgd(
                    module, examples, client.epochs, batch_size=self._batch_size, sgd=self._sgd
                )
                trained.append(Trained(num_steps, train_loss, self._layout.flatten(module)))
        return trained

    def evaluate(
        self, weights: Weights, examples: Examples, chunks: Sequence[Chunk], torch_seeds: Sequence[int]
    ) -> list[Evaluation]:
        """See `Engine.evaluate`."""
        module = self._module(weights)
        evaluations = []
        for (start, stop), seed in zip(chunks, torch_seeds, strict=True):
            with _torch_seeded(seed, examples.labels.device):
                evaluations.append(evaluate(module, examples, start, stop))
        return evaluations

    def _module(self, weights: Weights) -> nn.Module:
        """A model with these weights. Always a new one: no client finds what another left in a module."""
        module = copy.deepcopy(self._pristine)
        self._layout.load(module, weights)
        return module


@contextlib.contextmanager
def _torch_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's own generators for what a model draws itself; the process gets back the ones it had."""
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        torch.default_generator.manual_seed(seed)
        if is_cuda:
            torch.cuda.manual_seed(seed)
        yield


def batches(examples: Examples, order: Tensor, batch_size: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Cuts the examples named by `order` into batches; the last one may be short.

    Args:
        examples: all examples of the data set.
        order: which examples, in which order. Shape [n], int64.
        batch_size: B; 0 means all as one batch.
        dtype: of the images handed out.

    Yields:
        images [B, C, H, W] and labels [B].
    """
    batch_size = batch_size or len(order)
    gather = max(1, _GATHER // batch_size) * batch_size
    for some in torch.split(order, gather):
        images = pixels(examples.images.index_select(0, some), dtype)
        labels = examples.labels.index_select(0, some)
        yield from zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)


def pixels(images: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Images as a model takes them: bytes become byte/255, floats stay as they are. A copy: the model may write."""
    copied = images.to(dtype, copy=True) if out is None else out.copy_(images)
    return copied.div_(255) if images.dtype == torch.uint8 else copied


def local_sgd(
    module: nn.Module,
    examples: Examples,
    epochs: Iterable[Tensor],
    *,
    batch_size: int,
    sgd: Sgd,
) -> tuple[int, float]:
    """Trains `module` in place by SGD on the mean cross-entropy of each batch.

    The update is that of `torch.optim.SGD`, written out, to the bit: creating a process's first torch.optim object
    imports a compiler and costs 1 to 2 s. Momentum starts at zero.

    Args:
        module: maps [B, C, H, W] to logits [B, num_classes]; its weights are changed.
        examples: all examples of the data set.
        epochs: for each local epoch the order of the shard's examples, int64 [n].
        batch_size: B; 0 means the whole shard as one batch.
        sgd: how a step is taken.

    Returns:
        The number of steps, and the mean loss in nats over all examples processed, each taken before its step.

    Reference:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
        Algorithm 1, ClientUpdate. https://arxiv.org/abs/1602.05629
    """
    module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    velocities: list[Tensor | None] = [None] * len(parameters)
    loss_sum = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    num_steps = num_examples = 0
    for order in epochs:
        for images, labels in batches(examples, order, batch_size, parameters[0].dtype):
            loss = F.cross_entropy(module(images), labels)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            with torch.no_grad():
                for i, (parameter, step) in enumerate(zip(parameters, gradients, strict=True)):
                    if step is None:  # the loss does not depend on this parameter
                        continue
                    if sgd.weight_decay:
                        step = step.add(parameter, alpha=sgd.weight_decay)
                    if sgd.momentum:
                        velocity = velocities[i]
                        step = step.clone() if velocity is None else velocity.mul_(sgd.momentum).add_(step)
                        velocities[i] = step
                    parameter.add_(step, alpha=-sgd.lr)
                loss_sum.add_(loss, alpha=len(labels))
            num_steps += 1
            num_examples += len(labels)
    return num_steps, float(loss_sum) / num_examples


def evaluate(module: nn.Module, examples: Examples, start: int, stop: int) -> Evaluation:
    """Tests `module` on the examples `start` to `stop`, as one batch."""
    module.eval()
    with torch.no_grad():
        dtype = next(module.parameters()).dtype
        return score(module(pixels(examples.images[start:stop], dtype)), examples.labels[start:stop])


def score(logits: Tensor, labels: Tensor) -> Evaluation:
    """Compares logits [N, L] with labels [N]; the losses are computed and added in float64."""
    loss_sum = F.cross_entropy(logits.double(), labels, reduction="sum")
    return Evaluation(float(loss_sum), int((logits.argmax(1) == labels).sum()), len(labels))
