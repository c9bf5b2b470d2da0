"""Federated averaging as anyone would write it: one process, the data in memory, clients one after another.

What fedsim is measured against (scripts/benchmark.py) and compared with (tests/test_baselines.py): none of fedsim's
training code is used here, only its data sets. Shape letters: N examples, T test examples.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN = {"mlp": [64], "2nn": [200, 200]}

BatchOrder = Callable[[int, int, int, Tensor], Tensor]


def make_model(name: str) -> nn.Module:
    """784, the hidden layers, 10; ReLU in between."""
    sizes = [784, *HIDDEN[name], 10]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


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
) -> Iterator[tuple[float, float]]:
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

    Yields:
        For each round the test accuracy after it, and its seconds: training, averaging, evaluation.
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
        for client in cohort:
            shard = shards[client]
            module.load_state_dict(before)
            optimizer = torch.optim.SGD(module.parameters(), lr=lr)
            module.train()
            for epoch in range(epochs):
                if batch_order is None:
                    order = shard[torch.randperm(len(shard), generator=generator)]
                else:
                    order = batch_order(round, client, epoch, shard)
                for batch in order.split(batch_size):
                    optimizer.zero_grad()
                    F.cross_entropy(module(images[batch]), labels[batch]).backward()
                    optimizer.step()
            for name, value in module.state_dict().items():
                mean[name] += value * (len(shard) / num_examples)
        module.load_state_dict(mean)
        accuracy = evaluate(module, test_images, test_labels)
        yield accuracy, time.perf_counter() - started


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
    parser.add_argument("--model", choices=HIDDEN, default="mlp")
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
        make_model(args.model),
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
    for round, (accuracy, seconds) in enumerate(rounds, start=1):
        if args.json:
            print(json.dumps({"round": round, "round_s": seconds, "test_accuracy": accuracy}), flush=True)
        else:
            print(f"round {round}: test accuracy {accuracy:.4f}, {seconds:.3f} s", flush=True)


if __name__ == "__main__":
    main()
