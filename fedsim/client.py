"""What a simulated client does: get the weights, train its shard, send back an update.

`ClientHost` is a plain class that trains any client it is asked for. A Ray actor wraps one of them, the serial pool
holds one: the same code, hence the same bits.
"""

from __future__ import annotations

import math
import operator
import os
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch
from torch import nn

from fedsim import models, training, weights
from fedsim.config import TrainingConfig
from fedsim.datasets import Dataset
from fedsim.errors import ClientError
from fedsim.fingerprint import fingerprint
from fedsim.partition import Partition
from fedsim.seeding import generator, torch_seed
from fedsim.stacked import Stacked
from fedsim.training import Chunk, Engine, Evaluation, Loop, Sgd, Work
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
    before: Evaluation | None
    """Of the global weights on the client's own shard; None where clients are not evaluated."""
    after: Evaluation | None
    """Of its own weights, likewise; None also where they are not finite."""


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
    engine: str = "loop"
    """loop or stacked."""
    stack_size: int = 1
    """At most so many clients of a host train in one computation; the bits do not depend on it."""
    evaluates: bool = False
    """Whether clients test the weights on their own shards before and after training."""


class ClientHost:
    """Trains and evaluates on one device, for any of the clients.

    Args:
        spec: what the clients do.
        device: "cpu", "cuda", ... .
        after: a host of this process that is no longer used; what it has learnt and holds serves this one where it can.
    """

    def __init__(self, spec: ClientSpec, device: str = "cpu", after: ClientHost | None = None) -> None:
        self.spec = spec
        self.device = torch.device(device)
        module = models.build(spec.model, spec.input_shape, spec.num_classes, spec.seed).to(self.device)
        self.layout = Layout.of(module)
        # all that a stacked engine depends on, as no weight counts; a loop engine works with the module itself
        self._engine_for = replace(spec, seed=0), self.device, self.layout, _structure(module)
        self._engine = _engine(spec, module)
        if after and isinstance(self._engine, Stacked) and after._engine_for == self._engine_for:
            self._engine = after._engine
        self._fingerprints: dict[tuple[torch.device, int], str] = after._fingerprints if after else {}

    def load(self, dataset: Dataset, partition: Partition) -> HostInfo:
        """Takes the data set; arrays are read in place, never written.

        Returns:
            Where this host runs, once it is ready to train.
        """
        self.partition = partition
        self.train_set = self._examples(dataset.train_images, dataset.train_labels)
        self.test_set = self._examples(dataset.test_images, dataset.test_labels)
        arithmetic = self.device, self.spec.threads
        if arithmetic not in self._fingerprints:
            self._fingerprints[arithmetic] = fingerprint(self.device)
        return HostInfo(os.getpid(), platform.node(), _called(self.device), self._fingerprints[arithmetic])

    def fit(
        self, global_weights: Weights, tasks: Sequence[FitTask], out: Sequence[np.ndarray] | None = None
    ) -> list[ClientUpdate]:
        """Trains some clients, each from the global weights; as many as fit share a stack.

        Args:
            global_weights: read in place.
            tasks: what to train.
            out: for each task where its update is written, shape [D]; None gives each memory of its own.

        Raises:
            ClientError: the model, its loss or the data raised; carries the traceback, the client and the round.
        """
        places = [np.empty_like(global_weights.flat.numpy()) for _ in tasks] if out is None else out
        pairs = list(zip(tasks, places, strict=True))
        pairs.sort(key=lambda pair: -len(self.partition.shard(pair[0].client_id)))  # equal ones side by side
        num_stacks = -(-len(pairs) // self.spec.stack_size)
        stacks = [pairs[len(pairs) * i // num_stacks : len(pairs) * (i + 1) // num_stacks] for i in range(num_stacks)]
        updates = {update.client_id: update for stack in stacks for update in self._fit_stack(global_weights, stack)}
        return [updates[task.client_id] for task in tasks]

    def evaluate(self, round: int, global_weights: Weights, chunks: Sequence[Chunk]) -> list[Evaluation]:
        """Tests the global weights on chunks [start, stop) of the test set.

        Raises:
            ClientError: the model raised.
        """
        try:
            seeds = [torch_seed("evaluation", self.spec.seed, round=round, client=start) for start, _ in chunks]
            return self._engine.evaluate(global_weights, self.test_set, chunks, seeds)
        except Exception:  # noqa: BLE001 - whatever the model or the data raised, with its traceback
            raise ClientError(round, -1, traceback.format_exc()) from None

    def _fit_stack(self, global_weights: Weights, stack: Sequence[tuple[FitTask, np.ndarray]]) -> list[ClientUpdate]:
        started, tasks = time.perf_counter(), [task for task, _ in stack]
        try:
            trained = self._engine.train(global_weights, self.train_set, [self._work(task) for task in tasks])
        except Exception:  # noqa: BLE001 - whatever the model or the data raised, with its traceback
            told = traceback.format_exc()
            if len(tasks) > 1:  # whose it is shows when each trains alone
                alone = [update for one in stack for update in self._fit_stack(global_weights, [one])]
                if self.device.type == "cpu":
                    return alone  # the bits are the same
                told += f"in a stack of {len(tasks)} clients, not alone; set a smaller placement.stack_size\n"
            raise ClientError(tasks[0].round, tasks[0].client_id, told) from None
        fit_s = time.perf_counter() - started
        return [
            self._update(global_weights, task, outcome, update, fit_s, len(stack))
            for (task, update), outcome in zip(stack, trained, strict=True)
        ]

    def _update(
        self,
        global_weights: Weights,
        task: FitTask,
        trained: training.Trained,
        update: np.ndarray,
        fit_s: float,
        stack_size: int,
    ) -> ClientUpdate:
        local, integers = trained.weights.arrays()
        np.subtract(local, global_weights.flat.numpy(), out=update)
        norm = weights.l2_norm(torch.from_numpy(update))
        is_finite = math.isfinite(norm)  # it is so exactly if all values are: float64 holds their squares
        before = after = None
        if self.spec.evaluates:
            shard = self._own_examples(task.client_id)
            before = self._evaluate_on(shard, task, global_weights)
            after = self._evaluate_on(shard, task, trained.weights) if is_finite else None
        return ClientUpdate(
            client_id=task.client_id,
            num_examples=len(self.partition.shard(task.client_id)),
            num_steps=trained.num_steps,
            train_loss=trained.train_loss,
            update=update,
            integers=integers,
            update_l2_norm=norm,
            update_sha256=weights.sha256(update, integers),
            is_finite=is_finite,
            fit_s=fit_s,
            stack_size=stack_size,
            pid=os.getpid(),
            node=platform.node(),
            before=before,
            after=after,
        )

    def _own_examples(self, client_id: int) -> training.Examples:
        """A client's shard, in its order."""
        shard = weights.read_only_tensor(self.partition.shard(client_id)).to(self.device)
        return training.Examples(
            self.train_set.images.index_select(0, shard), self.train_set.labels.index_select(0, shard)
        )

    def _evaluate_on(self, shard: training.Examples, task: FitTask, tested: Weights) -> Evaluation:
        """Tests weights on a client's shard; always one client at a time, so that no bit depends on its neighbours.

        Raises:
            ClientError: the model raised.
        """
        pieces = _chunks(len(shard.labels))
        try:
            seeds = [
                torch_seed("client_evaluation", self.spec.seed, round=task.round, client=task.client_id, epoch=start)
                for start, _ in pieces
            ]
            return total(self._engine.evaluate(tested, shard, pieces, seeds))
        except Exception:  # noqa: BLE001 - whatever the model raised, with its traceback
            raise ClientError(task.round, task.client_id, traceback.format_exc()) from None

    def _work(self, task: FitTask) -> Work:
        """For each local epoch a fresh permutation of the shard."""
        shard, seed = self.partition.shard(task.client_id), self.spec.seed
        generators = [
            generator("shuffle", seed, round=task.round, client=task.client_id, epoch=epoch)
            for epoch in range(self.spec.training.local_epochs)
        ]
        return Work(
            [torch.from_numpy(rng.permutation(shard)).to(self.device) for rng in generators],
            torch_seed("model", seed, round=task.round, client=task.client_id),
        )

    def _examples(self, images: np.ndarray, labels: np.ndarray) -> training.Examples:
        return training.Examples(
            weights.read_only_tensor(images).to(self.device), weights.read_only_tensor(labels).to(self.device)
        )


def _called(device: torch.device) -> str:
    """A device with the model of its GPU, on which the bits depend."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _structure(module: nn.Module) -> list[tuple[str, type[nn.Module], str]]:
    """Its layers with all their settings: a layer's own text leaves some out."""
    return [
        (name, type(layer), str({key: value for key, value in vars(layer).items() if not key.startswith("_")}))
        for name, layer in module.named_modules(remove_duplicate=False)
    ]


def _engine(spec: ClientSpec, module: nn.Module) -> Engine:
    sgd = Sgd(spec.training.lr, spec.training.momentum, spec.training.weight_decay)
    if spec.engine == "stacked":
        return Stacked(module, sgd, spec.training.batch_size, spec.num_classes)
    return Loop(module, sgd, spec.training.batch_size)


def evaluation_chunks(dataset: Dataset) -> list[Chunk]:
    """The fixed pieces [start, stop) in which the test set is evaluated."""
    return _chunks(len(dataset.test_labels))


def _chunks(size: int) -> list[Chunk]:
    return [
        (start, min(start + training.EVALUATION_CHUNK, size)) for start in range(0, size, training.EVALUATION_CHUNK)
    ]


def total(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The sum of the chunks' evaluations, added in the order given."""
    return reduce(operator.add, evaluations)
