"""The program fedsim began as: two clients learn MNIST together, one after the other, in one process."""

import argparse
import copy
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, random_split
from torchvision import datasets, transforms

NUM_CLIENTS = 2
LOCAL_EPOCHS = 2
BATCH_SIZE = 32
LR = 0.1


class Net(nn.Module):
    """784-64-10."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, 1, 28, 28] to logits [B, 10]."""
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def train(model: nn.Module, shard: Dataset) -> None:
    """Trains on a client's own data."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    model.train()
    for _ in range(LOCAL_EPOCHS):
        for images, labels in DataLoader(shard, batch_size=BATCH_SIZE, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


def average(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of the clients' weights; the shards are equally large."""
    return {key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]}


@torch.no_grad()
def accuracy(model: nn.Module, test_set: Dataset) -> float:
    """The fraction of the test set that the model gets right."""
    model.eval()
    loader = DataLoader(test_set, batch_size=1000)
    return sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader) / len(test_set)


def main(arguments: list[str] | None = None) -> None:
    """Trains and prints the test accuracy after every round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="folder that holds MNIST/raw/*; default: fedsim's cache")
    args = parser.parse_args(arguments)
    if args.data is None:
        import fedsim.datasets

        fedsim.datasets.fetch("mnist")
        args.data = fedsim.datasets.cache_dir()

    torch.manual_seed(args.seed)
    train_set = datasets.MNIST(args.data, train=True, transform=transforms.ToTensor())
    test_set = datasets.MNIST(args.data, train=False, transform=transforms.ToTensor())
    shards = random_split(train_set, [1 / NUM_CLIENTS] * NUM_CLIENTS)
    global_model = Net()
    for round in range(1, args.rounds + 1):
        started = time.perf_counter()
        states = []
        for shard in shards:
            local_model = copy.deepcopy(global_model)
            train(local_model, shard)
            states.append(local_model.state_dict())
        global_model.load_state_dict(average(states))
        test_accuracy = accuracy(global_model, test_set)
        print(f"round {round}: test accuracy {test_accuracy:.4f} ({time.perf_counter() - started:.3f} s)")


if __name__ == "__main__":
    main()
