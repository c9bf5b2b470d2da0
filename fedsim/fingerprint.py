"""The fingerprint of a process's arithmetic."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.stacked import Stacked
from fedsim.training import Engine, Examples, Loop, Sgd, Work
from fedsim.weights import Layout


def fingerprint(device: torch.device) -> str:
    """16 hex digits over the outcome of a few tiny training steps of each engine on this device.

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
    examples = Examples(drawn(20, 1, 28, 28), torch.arange(20, device=device) % 10)
    work = Work([torch.arange(20, device=device)], torch_seed=0)
    for module in modules:
        module.to(device)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(drawn(*parameter.shape).div_(8))
        weights = Layout.of(module).flatten(module)
        engines: list[Engine] = [Loop(module, Sgd(lr=0.1), 10), Stacked(module, Sgd(lr=0.1), 10, num_classes=10)]
        for engine in engines:
            for trained in engine.train(weights, examples, [work, work]):
                digest.update(trained.weights.flat.numpy(force=True).tobytes())
    return digest.hexdigest()[:16]
