"""What parts from Python are called: two that were made with different values have different names."""

import functools
import subprocess
import sys

import numpy as np
import pytest
import torch

import fedsim
from fedsim.own import called


def strategy(mu, inner=None):
    def aggregate(state, weights, updates, num_examples):
        return weights * mu if inner is None else inner.aggregate(state, weights, updates, num_examples)

    return fedsim.Strategy(init=lambda weights: {}, aggregate=aggregate)


def model(width, *, depth=1):
    return torch.nn.Linear(width, depth)


class Factory:
    def __init__(self, width):
        self.width, self._cache = width, object()

    def __call__(self):
        return torch.nn.Linear(self.width, 1)

    def make(self):
        return self()


def with_default(lr):
    return fedsim.Strategy(init=lambda weights: {}, aggregate=lambda s, w, u, n, lr=lr, *, p=(1, None): (w * lr, s))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (strategy(0.5), "strategy(inner=None, mu=0.5)"),
        (strategy(np.float64(0.5)), "strategy(inner=None, mu=0.5)"),
        (strategy(1, strategy(2)), "strategy(inner=test_own.strategy(inner=None, mu=2), mu=1)"),
        (with_default(0.5), "with_default(lr=0.5, p=(1, None))"),
        (model, "model(depth=1)"),
        (functools.partial(model, 8, depth=2), "model(depth=2, 0=8)"),
        (Factory, "Factory"),
        (Factory(3), "Factory(width=3)"),
        (Factory(3).make, "Factory.make(width=3)"),
        (strategy(torch.zeros(3)), "strategy(inner=None)"),
        (strategy((1, "b")), "strategy(inner=None, mu=(1, 'b'))"),
        (strategy([1, 2]), "strategy(inner=None)"),
    ],
)
def test_names_by_hand(part, name):
    assert called(part).replace("tests.", "") == f"test_own.{name}"


def test_of_fedsims_own():
    assert called(fedsim.strategies.fedavg()) == "fedsim.strategies.fedavg"
    named = "fedsim.strategies.fedavgm(server_lr=1.0, server_momentum=0.5)"
    assert called(fedsim.strategies.fedavgm(server_momentum=0.5)) == named


def test_many_values_become_a_hash():
    names = {called(strategy(tuple(range(number)))) for number in (100, 101)}
    assert len(names) == 2
    assert all(len(name) < 60 for name in names)


@pytest.mark.parametrize("secret", ["/home/me/data.npz", "ghp_16C7e42F292c6912E7710c838347Ae178B4a", "a b", "\udc80"])
def test_paths_and_keys_are_not_written_down(secret):
    name, other = called(strategy(0.5, secret)), called(strategy(0.5, f"{secret}2"))
    assert secret not in name
    assert name != other
    assert called(strategy(0.5, (secret,))) != called(strategy(0.5, (f"{secret}2",)))


def test_what_holds_itself_has_a_name():
    def aggregate(state, weights, updates, num_examples):
        return aggregate, held

    held = [aggregate]
    assert called(aggregate).startswith(aggregate.__module__)


def test_it_is_the_same_in_every_process():
    code = (
        "import fedsim.own, fedsim\n"
        "def make(names, mu):\n"
        "    return fedsim.Strategy(lambda w: {}, lambda s, w, u, n: (names, mu, make))\n"
        "print(fedsim.own.called(make(('b', 'a'), 0.1)))"
    )
    said = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    ]
    assert said[0] == said[1] == "__main__.make(mu=0.1, names=('b', 'a'))\n"
