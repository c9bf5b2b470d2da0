"""What a simulated client does: get the weights, train its shard, send back an update.

`ClientHost` is a plain class that trains any client it is asked for. A Ray actor wraps one of them, the serial pool
holds one: the same code, hence the same bits.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor, nn

from fedsim import models, training, weights
from fedsim.config import TrainingConfig
from fedsim.datasets import Dataset
from fedsim.errors import ClientError
from fedsim.partition import Partition
from fedsim.seeding import generator, torch_seed
from fedsim.weights import Layout, Weights


@dataclass(frozen=True)
class FitTask:
    """One client's work in one round."""

    round: int
    client_id: int


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends back, and what is known about its work."""

    client_id: int
    num_examples: int
    num_steps: int
    train_loss: float
    """Mean over the examples processed, each before its step; nats."""
    update: np.ndarray
    """w_k - w, in layout order. Shape [D], float32."""
    integers: np.ndarray
    """The integer buffers after training. Shape [I], int64."""
    update_l2_norm: float
    update_sha256: str
    is_finite: bool
    fit_s: float
    stack_size: int
    pid: int
    node: str


@dataclass(frozen=True)
class Evaluation:
    """Sums over a chunk of the test set, or over all of it."""

    loss_sum: float
    """nats, float64."""
    num_correct: int
    num_examples: int

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(
            self.loss_sum + other.loss_sum,
            self.num_correct + other.num_correct,
            self.num_examples + other.num_examples,
        )


@dataclass(frozen=True)
class HostInfo:
    """Where a host runs, and the fingerprint of its arithmetic."""

    pid: int
    node: str
    device: str
    fingerprint: str


@dataclass(frozen=True)
class ClientSpec:
    """Everything a client's work depends on besides the data and the weights."""

    training: TrainingConfig
    seed: int
    model: Callable[..., nn.Module]
    input_shape: models.ImageShape
    num_classes: int
    threads: int = 1
    """Torch threads: part of the promise of equal bits."""


class ClientHost:
    """Trains and evaluates on one device, for any of the clients.

    Args:
        spec: what the clients do.
        device: "cpu", "cuda", ... .
    """

    def __init__(self, spec: ClientSpec, device: str = "cpu") -> None:
        self.spec = spec
        self.device = torch.device(device)
        self._pristine = models.build(spec.model, spec.input_shape, spec.num_classes, spec.seed).to(self.device)
        self.layout = Layout.of(self._pristine)

    def load(self, dataset: Dataset, partition: Partition) -> HostInfo:
        """Takes the data set; arrays are read in place, never written.

        Returns:
            Where this host runs, once it is ready to train.
        """
        self.partition = partition
        self.train_set = self._examples(dataset.train_images, dataset.train_labels)
        self.test_set = self._examples(dataset.test_images, dataset.test_labels)
        return HostInfo(os.getpid(), platform.node(), str(self.device), training.fingerprint(self.device))

    def fit(self, global_weights: Weights, tasks: Sequence[FitTask]) -> list[ClientUpdate]:
        """Trains some clients, each from the global weights.

        Raises:
            ClientError: the model, its loss or the data raised; carries the traceback, the client and the round.
        """
        return [self._fit_one(global_weights, task) for task in tasks]

    def evaluate(self, round: int, global_weights: Weights, chunks: Sequence[tuple[int, int]]) -> list[Evaluation]:
        """Tests the global weights on chunks [start, stop) of the test set.

        Raises:
            ClientError: the model raised.
        """
        evaluations = []
        try:
            module = self._module(global_weights)
            for start, stop in chunks:
                with self._torch_seeded(torch_seed("evaluation", self.spec.seed, round=round, client=start)):
                    evaluations.append(Evaluation(*training.evaluate(module, self.test_set, start, stop)))
        except Exception:  # noqa: BLE001 - whatever the model or the data raised, with its traceback
            raise ClientError(round, -1, traceback.format_exc()) from None
        return evaluations

    def _fit_one(self, global_weights: Weights, task: FitTask) -> ClientUpdate:
        started = time.perf_counter()
        shard = self.partition.shard(task.client_id)
        try:
            with self._torch_seeded(torch_seed("model", self.spec.seed, round=task.round, client=task.client_id)):
                module = self._module(global_weights)
                num_steps, train_loss = training.local_sgd(
                    module,
                    self.train_set,
                    self._epochs(shard, task),
                    batch_size=self.spec.training.batch_size,
                    lr=self.spec.training.lr,
                    momentum=self.spec.training.momentum,
                    weight_decay=self.spec.training.weight_decay,
                )
                local = self.layout.flatten(module)
        except Exception:  # noqa: BLE001 - whatever the model or the data raised, with its traceback
            raise ClientError(task.round, task.client_id, traceback.format_exc()) from None
        update = local.flat.sub_(global_weights.flat)
        norm = weights.l2_norm(update)
        return ClientUpdate(
            client_id=task.client_id,
            num_examples=len(shard),
            num_steps=num_steps,
            train_loss=train_loss,
            update=update.numpy(),
            integers=local.integers.numpy(),
            update_l2_norm=norm,
            update_sha256=weights.sha256(update.numpy(), local.integers.numpy()),
            is_finite=bool(torch.isfinite(update).all()),
            fit_s=time.perf_counter() - started,
            stack_size=1,
            pid=os.getpid(),
            node=platform.node(),
        )

    @contextlib.contextmanager
    def _torch_seeded(self, seed: int) -> Iterator[None]:
        """Torch's own generators for what a model draws itself (dropout); the process gets back the ones it had."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.default_generator.manual_seed(seed)
            if self.device.type == "cuda":
                torch.cuda.manual_seed(seed)
            yield

    def _module(self, global_weights: Weights) -> nn.Module:
        """A model with the global weights. Always a new one: no client finds what another left in a module."""
        module = copy.deepcopy(self._pristine)
        self.layout.load(module, global_weights)
        return module

    def _epochs(self, shard: np.ndarray, task: FitTask) -> Iterator[Tensor]:
        """For each local epoch a fresh permutation of the shard."""
        for epoch in range(self.spec.training.local_epochs):
            rng = generator("shuffle", self.spec.seed, round=task.round, client=task.client_id, epoch=epoch)
            yield torch.from_numpy(rng.permutation(shard)).to(self.device)

    def _examples(self, images: np.ndarray, labels: np.ndarray) -> training.Examples:
        return training.Examples(
            weights.read_only_tensor(images).to(self.device), weights.read_only_tensor(labels).to(self.device)
        )


def evaluation_chunks(dataset: Dataset) -> list[tuple[int, int]]:
    """The fixed pieces [start, stop) in which the test set is evaluated."""
    size = len(dataset.test_labels)
    return [
        (start, min(start + training.EVALUATION_CHUNK, size)) for start in range(0, size, training.EVALUATION_CHUNK)
    ]


def total(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The sum of the chunks' evaluations, added in the order given."""
    return reduce(operator.add, evaluations)
