"""What explains a difference to the paper: one cell again, with one thing changed at a time.

The paper names neither initialisation, nor the scaling of pixels, nor the rates that it chose. Each of these is changed
by itself in the cell that the paper's first speed-up is about: 2NN, IID, E = 1, B = 10, C = 0.1, target 97 %.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

import fedsim
from fedsim import datasets, models
from fedsim.targets import Target
from mcmahan2017.plan import Cell

CELL = "table1-2nn-iid-E1-B10-C0.1"
SEEDS = (1, 2, 3, 4, 5)
MAX_ROUNDS = 200
FILE = "variants.parquet"


def _initialised(module: nn.Module, weights: Callable[[Any], Any], bias: float) -> nn.Module:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            weights(layer.weight)
            nn.init.constant_(layer.bias, bias)
    return module


def glorot(input_shape: models.ImageShape, num_classes: int) -> nn.Module:
    """The 2NN as Keras initialises: Glorot uniform, no bias."""
    return _initialised(models.two_nn(input_shape, num_classes), nn.init.xavier_uniform_, 0.0)


def tutorial(input_shape: models.ImageShape, num_classes: int) -> nn.Module:
    """The 2NN as TensorFlow's tutorials of 2016 initialised: normal with deviation 0.1 cut at two, biases 0.1."""
    weights = functools.partial(nn.init.trunc_normal_, std=0.1, a=-0.2, b=0.2)
    return _initialised(models.two_nn(input_shape, num_classes), weights, 0.1)


def he(input_shape: models.ImageShape, num_classes: int) -> nn.Module:
    """The 2NN with He's normal initialisation for ReLU, no bias."""
    weights = functools.partial(nn.init.kaiming_normal_, nonlinearity="relu")
    return _initialised(models.two_nn(input_shape, num_classes), weights, 0.0)


def scaled(scale: float, shift: float) -> fedsim.Dataset:
    """MNIST with pixels byte / 255 * scale + shift."""
    data = datasets.load("mnist")
    train, test = (images.astype(np.float32) / 255 * scale + shift for images in (data.train_images, data.test_images))
    train, test = train.astype(np.float32), test.astype(np.float32)
    return fedsim.Dataset("mnist-scaled", train, data.train_labels, test, data.test_labels, num_classes=10)


_standardised = functools.partial(scaled, 1 / 0.3081, -0.1307 / 0.3081)
_symmetric = functools.partial(scaled, 2.0, -1.0)

VARIANTS: dict[str, dict[str, Any]] = {
    "rate 0.1, as fedsim does it": {},
    "rate 0.0464": {"lr": 0.0464},
    "rate 0.0681": {"lr": 0.0681},
    "rate 0.147": {"lr": 0.147},
    "rate 0.215": {"lr": 0.215},
    "weights Glorot uniform, biases 0": {"model": glorot},
    "weights normal 0.1 cut at 2 deviations, biases 0.1": {"model": tutorial},
    "weights He normal, biases 0": {"model": he},
    "pixels of mean 0 and deviation 1": {"dataset": _standardised},
    "pixels in -1..1": {"dataset": _symmetric},
    "pixels in -1..1, rate 0.0464": {"dataset": _symmetric, "lr": 0.0464},
    "pixels in -1..1, rate 0.215": {"dataset": _symmetric, "lr": 0.215},
}
"""What is changed: the rate, the model's factory, or the data set's."""


def run(cell: Cell, variant: str, seed: int) -> dict[str, Any]:
    """A row of variants.parquet."""
    changes = VARIANTS[variant]
    make = changes.get("dataset")
    done = fedsim.run(
        cell.config(changes.get("lr", 0.1), seed, MAX_ROUNDS),
        results=None,
        stop_at={"test_accuracy": cell.target},
        model=changes.get("model"),
        dataset=make() if make else None,
    )
    rounds = done.rounds
    crossing = Target("test_accuracy", cell.target).crossing(rounds["round"].tolist(), rounds["test_accuracy"].tolist())
    is_there = crossing is not None
    return {
        "variant": variant,
        "seed": seed,
        "rounds_to_target": crossing if is_there else math.nan,
        "first_round_at_target": float(rounds["round"].max()) if is_there else math.nan,
        "seconds": rounds["round_s"].sum(),
    }


def measure(cell: Cell, folder: Path, pool: Executor) -> None:
    """Makes the runs that variants.parquet has not."""
    path = folder / FILE
    before = pd.read_parquet(path) if path.exists() else pd.DataFrame(columns=["variant", "seed"])
    there = set(zip(before["variant"], before["seed"], strict=True))
    missing = [(variant, seed) for variant in VARIANTS for seed in SEEDS if (variant, seed) not in there]
    rows = list(pool.map(functools.partial(run, cell), *zip(*missing, strict=True))) if missing else []
    new = pd.DataFrame(rows)
    folder.mkdir(parents=True, exist_ok=True)
    pd.concat([frame for frame in (before, new) if len(frame)], ignore_index=True).to_parquet(path, index=False)


def rows(folder: Path, published: int) -> Iterator[tuple[str, ...]]:
    """Of the page's table: variant, median, range, over the published rounds."""
    frame = pd.read_parquet(folder / FILE)
    for variant in VARIANTS:
        found = frame[frame["variant"] == variant]
        values = sorted(found["rounds_to_target"].fillna(math.inf))
        if values:
            median = statistics.median(values)
            shown = "not in 200" if math.isinf(median) else f"{median:.1f}"
            ratio = "" if math.isinf(median) else f"{median / published:.2f}"
            yield variant, shown, ", ".join("-" if math.isinf(v) else f"{v:.1f}" for v in values), ratio
