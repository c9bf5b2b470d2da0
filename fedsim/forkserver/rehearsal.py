"""A small run in the fork server, so that its children share what they would else each make: warm code, mostly.

Python 3.11 and later rewrite code as it runs, and torch and oneDNN keep what they have compiled. After a fork, each
process would write its own copy of the same pages: with 300 actors on two cores, 7 of the 47 ms of CPU that a
client's first training takes, and as much of its second.
"""

from __future__ import annotations

import numpy as np

from fedsim import models
from fedsim.client import ClientHost, ClientSpec, FitTask
from fedsim.config import TrainingConfig
from fedsim.datasets import Dataset
from fedsim.models import MODELS
from fedsim.numerics import set_numerics
from fedsim.partition import Partition
from fedsim.weights import Layout

_ROUNDS = 4


def rehearse() -> None:
    """Trains and evaluates a few clients with each engine, in one thread."""
    set_numerics(1)
    images, labels = (np.arange(128 * 28 * 28) % 251).astype(np.uint8).reshape(128, 1, 28, 28), np.arange(128) % 10
    dataset = Dataset("rehearsal", images, labels, images, labels, 10)
    partition = Partition.of([np.arange(63), np.arange(63, 128)])
    model = MODELS["2nn"]
    module = models.build(model, dataset.input_shape, dataset.num_classes, seed=0)
    weights = Layout.of(module).flatten(module)
    for engine in ("stacked", "loop"):
        training = TrainingConfig(batch_size=10)
        host = ClientHost(ClientSpec(training, 0, model, dataset.input_shape, dataset.num_classes, engine=engine))
        host.load(dataset, partition)
        for round in range(_ROUNDS):
            host.fit(weights, [FitTask(round, 0), FitTask(round, 1)])
            host.evaluate(round, weights, [(0, 128)])
