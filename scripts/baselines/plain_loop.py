"""Federated averaging as anyone would write it: one process, the data in memory, clients one after another.

What fedsim is measured against (scripts/benchmark.py) and compared with (tests/test_baselines.py): none of fedsim's
training code is used here, only its data sets. Shape letters: N examples, T test examples.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)),
    "2nn": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    ),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    ),
}
"""Images [N, 1, 28, 28] to logits [N, 10]."""

BatchOrder = Callable[[int, int, int, Tensor], Tensor]


@dataclass(frozen=True)
class Round:
    """A finished round."""

    round: int
    test_accuracy: float
    round_s: float
    """Training, averaging, evaluation."""
    fit_s: float
    evaluate_s: float


def federated_averaging(
    module: nn.Module,
    shards: Sequence[Tensor],
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    rounds: int = 5,
    per_round: int | None = None,
    epochs: int = 2,
    batch_size: int = 32,
    lr: float = 0.1,
    seed: int = 0,
    batch_order: BatchOrder | None = None,
) -> Iterator[Round]:
    """Trains `module` in place, in the type of its own weights.

    Args:
        module: holds the initial weights, and after each round the averaged ones.
        shards: each client's indices into the examples, int64.
        images: shape [N, ...], of the module's type.
        labels: shape [N], int64.
        test_images: shape [T, ...].
        test_labels: shape [T], int64.
        rounds: communication rounds.
        per_round: clients drawn in a round; None for all of them.
        epochs: passes over its shard that a client makes in a round.
        batch_size: examples of a step.
        lr: learning rate.
        seed: of the cohorts and of the batch order.
        batch_order: (round, client, epoch, shard) -> the shard's indices in the order of training; None shuffles them.
    """
    generator = torch.Generator().manual_seed(seed)
    for round in range(1, rounds + 1):
        started = time.perf_counter()
        cohort = list(range(len(shards)))
        if per_round is not None:
            cohort = torch.randperm(len(shards), generator=generator)[:per_round].tolist()
        num_examples = sum(len(shards[client]) for client in cohort)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        mean = {name: torch.zeros_like(value) for name, value in before.items()}
        fit_s = 0.0
        for client in cohort:
            shard = shards[client]
            module.load_state_dict(before)
            fit_started = time.perf_counter()
            orders = (
                shard[torch.randperm(len(shard), generator=generator)]
                if batch_order is None
                else batch_order(round, client, epoch, shard)
                for epoch in range(epochs)
            )
            train(module, images, labels, orders, batch_size=batch_size, lr=lr)
            fit_s += time.perf_counter() - fit_started
            for name, value in module.state_dict().items():
                mean[name] += value * (len(shard) / num_examples)
        module.load_state_dict(mean)
        evaluation_started = time.perf_counter()
        accuracy = evaluate(module, test_images, test_labels)
        ended = time.perf_counter()
        yield Round(round, accuracy, ended - started, fit_s, ended - evaluation_started)


def train(
    module: nn.Module, images: Tensor, labels: Tensor, orders: Iterable[Tensor], *, batch_size: int, lr: float
) -> None:
    """Trains one client, in place: an epoch for each of `orders`, which holds the examples' indices."""
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    module.train()
    for order in orders:
        for batch in order.split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(module(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def evaluate(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The fraction of the examples that the module gets right."""
    module.eval()
    chunks = zip(images.split(1000), labels.split(1000), strict=True)
    return sum((module(some).argmax(1) == answers).sum().item() for some, answers in chunks) / len(labels)


def main() -> None:
    """Runs it on MNIST and prints a line a round. The defaults are the task of fedsim's preset `mnist`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="mnist", help="mnist, fashion_mnist or synthetic")
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--per-round", type=int, help="clients in a round; all, if left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", action="store_true", help="print each round as JSON")
    args = parser.parse_args()

    import fedsim.datasets  # here, so that the loop above stands without it

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = fedsim.datasets.load(args.data)
    rounds = federated_averaging(
        MODELS[args.model](),
        torch.randperm(len(data.train_labels)).tensor_split(args.clients),
        torch.from_numpy(data.train_images).float() / 255,
        torch.from_numpy(data.train_labels),
        torch.from_numpy(data.test_images).float() / 255,
        torch.from_numpy(data.test_labels),
        rounds=args.rounds,
        per_round=args.per_round,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
    )
    for done in rounds:
        if args.json:
            print(json.dumps(asdict(done)), flush=True)
        else:
            print(f"round {done.round}: test accuracy {done.test_accuracy:.4f}, {done.round_s:.3f} s", flush=True)


if __name__ == "__main__":
    main()
