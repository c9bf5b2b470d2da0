"""Local training and evaluation: the loop engine. The only module that differentiates anything.

Written for one process and one device; knows nothing of Ray, rounds or files. Shape letters: N examples, B batch,
C channels, H, W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

EVALUATION_CHUNK = 1000
"""Test examples evaluated at once: part of the results, whatever the number of actors."""

_GATHER = 1024
"""Examples brought together at once; a memory limit that changes no bit."""


@dataclass(frozen=True)
class Examples:
    """Images and labels on one device, read by many."""

    images: Tensor
    """Shape [N, C, H, W]; uint8 (an image is byte/255) or floating."""
    labels: Tensor
    """Shape [N], int64."""


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


def pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images as a model takes them: bytes become byte/255, floats stay as they are. A copy: the model may write."""
    copied = images.to(dtype, copy=True)
    return copied.div_(255) if images.dtype == torch.uint8 else copied


def local_sgd(
    module: nn.Module,
    examples: Examples,
    epochs: Iterator[Tensor],
    *,
    batch_size: int,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> tuple[int, float]:
    """Trains `module` in place by SGD on the mean cross-entropy of each batch.

    The update is that of `torch.optim.SGD`, written out, to the bit: creating a process's first torch.optim object
    imports a compiler and costs 1 to 2 s. Momentum starts at zero.

    Args:
        module: maps [B, C, H, W] to logits [B, num_classes]; its weights are changed.
        examples: all examples of the data set.
        epochs: for each local epoch the order of the shard's examples, int64 [n].
        batch_size: B; 0 means the whole shard as one batch.
        lr: learning rate.
        momentum: in [0, 1).
        weight_decay: L2 penalty, added to the gradient.

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
                    if weight_decay:
                        step = step.add(parameter, alpha=weight_decay)
                    if momentum:
                        velocity = velocities[i]
                        step = step.clone() if velocity is None else velocity.mul_(momentum).add_(step)
                        velocities[i] = step
                    parameter.add_(step, alpha=-lr)
                loss_sum.add_(loss, alpha=len(labels))
            num_steps += 1
            num_examples += len(labels)
    return num_steps, float(loss_sum) / num_examples


def evaluate(module: nn.Module, examples: Examples, start: int, stop: int) -> tuple[float, int, int]:
    """Tests `module` on the examples `start` to `stop`, as one batch.

    Returns:
        The sum of the losses in nats (float64), the number of correct predictions, the number of examples.
    """
    module.eval()
    with torch.no_grad():
        dtype = next(module.parameters()).dtype
        logits = module(pixels(examples.images[start:stop], dtype))
        labels = examples.labels[start:stop]
        loss_sum = F.cross_entropy(logits.double(), labels, reduction="sum")
        return float(loss_sum), int((logits.argmax(1) == labels).sum()), stop - start


def fingerprint(device: torch.device) -> str:
    """16 hex digits over the outcome of a few tiny training steps on this device.

    Two processes with equal fingerprints compute the same bits here: same kernels, instruction set and threads.
    """
    rng = np.random.Generator(np.random.PCG64(20170420))  # fixed for good: no run's seed plays a part

    def drawn(*shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(-1, 1, shape).astype(np.float32)).to(device)

    with torch.random.fork_rng(devices=[]):  # the modules' own initialisation, replaced below, draws from it
        modules = [
            nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)),
            nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(392, 10)),
        ]
    digest = hashlib.sha256()
    for module in modules:
        module.to(device)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(drawn(*parameter.shape).div_(8))
        labels = torch.arange(20, device=device) % 10
        examples = Examples(drawn(20, 1, 28, 28), labels)
        local_sgd(module, examples, iter([torch.arange(20, device=device)]), batch_size=10, lr=0.1)
        for parameter in module.parameters():
            digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
