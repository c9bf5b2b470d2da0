"""A run keeps to itself: the caller's torch does not reach it, it reaches neither the caller nor the next client."""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import fedsim
from fedsim import models
from fedsim.client import ClientHost, ClientSpec, FitTask
from fedsim.config import Config, TrainingConfig
from fedsim.datasets import Dataset
from fedsim.fingerprint import fingerprint
from fedsim.numerics import numerics
from fedsim.partition import Partition
from fedsim.training import Examples, evaluate
from fedsim.weights import Layout

SERIAL = Config().override(
    {"data.dataset": "synthetic", "placement.mode": "serial", "rounds": 1, "clients.count": 3, "model.name": "logistic"}
)


def hashes(config: Config = SERIAL, **parts: Any) -> list[str]:
    return [record.weights_sha256 for record in fedsim.rounds(config, **parts)]


def host(model) -> ClientHost:
    rng = np.random.Generator(np.random.PCG64(0))
    images = rng.integers(256, size=(30, 1, 4, 4), dtype=np.uint8)
    labels = rng.integers(3, size=30)
    made = ClientHost(ClientSpec(TrainingConfig(batch_size=5), 0, model, (1, 4, 4), 3))
    made.load(Dataset("t", images, labels, images, labels, 3), Partition.of([np.arange(15), np.arange(15, 30)]))
    return made


def test_fingerprint_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    fingerprint(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_serial_run_leaves_the_callers_generator_alone():
    before = torch.get_rng_state()
    hashes()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_callers_default_dtype_changes_nothing():
    expected = hashes()
    torch.set_default_dtype(torch.float64)
    try:
        assert hashes() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_callers_autocast_changes_nothing():
    expected = hashes()
    with torch.autocast("cpu"):
        assert hashes() == expected


def test_the_callers_autocast_of_a_gpu_is_off_too():
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with numerics(1):
            assert not torch.is_autocast_enabled("cuda")
        assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", before)


def test_the_callers_no_grad_changes_nothing():
    expected = hashes()
    with torch.no_grad():
        assert hashes() == expected


class Leaks(nn.Module):
    """State that is not in state_dict: a non-persistent buffer, updated in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean())
        return self.head(x.flatten(1) - self.mean)


def test_a_non_persistent_buffer_stays_with_its_client():
    weights = host(Leaks).layout.flatten(models.build(Leaks, (1, 4, 4), 3, 0))
    fresh = host(Leaks).fit(weights, [FitTask(1, 1)])[0].update_sha256
    after_another = host(Leaks).fit(weights, [FitTask(1, 0), FitTask(1, 1)])[1].update_sha256
    assert after_another == fresh


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.sub_(0.5).flatten(1))  # normalises in place


def test_a_model_that_works_in_place_cannot_change_the_test_set():
    examples = Examples(torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(10).long())
    module = models.build(InPlace, (1, 4, 4), 3, 0)
    assert evaluate(module, examples, 0, 10) == evaluate(module, examples, 0, 10)


class Caches(nn.Module):
    """Makes a constant when first called: masks, positional encodings and the like."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(784, 10)
        self.mask = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            self.mask = torch.full((10, 784), 0.5)
        return F.linear(x.flatten(1), self.head.weight * self.mask, self.head.bias)


def test_a_model_may_cache_what_it_makes_in_evaluation():
    assert len(hashes(model=Caches)) == 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(784, 784), nn.Linear(784, 784), nn.Linear(784, 10)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(x.flatten(1))))


def test_a_model_with_tied_weights_is_loaded_after_its_run():
    assert fedsim.run(SERIAL, results=None, model=Tied).model()


def test_unflatten_copies_integer_buffers():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    layout = Layout.of(module)
    weights = layout.flatten(module)
    layout.unflatten(weights)["1.num_batches_tracked"].add_(5)
    assert weights.integers.tolist() == [0]


def test_torchs_old_tf32_interface_can_be_read_inside_numerics():
    with numerics(1):
        assert torch.backends.cudnn.allow_tf32 is False
