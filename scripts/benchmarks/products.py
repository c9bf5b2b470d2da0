"""The bound: how long a model's matrix products take here, alone, on all cores at once.

Of each Linear layer the products of one client's step: forward, weight gradient, and input gradient but for the first
layer; a convolution counts as the products that it amounts to, without the copies. Each is timed by itself, with its
operands in the cache, on one thread; a process a core does the same at the same time. Letters: B examples of a batch.

    python scripts/benchmarks/products.py 2nn --batch-size 10
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baselines.plain_loop import MODELS

EVALUATION_CHUNK = 1000
CONV_IMAGES = 10
"""Images of one product of a convolution: those of many more do not fit the cache."""
BLOCK_S = 0.005


@dataclass(frozen=True)
class Product:
    """[m, k] times [k, n], `count` times a step."""

    layer: int
    what: str
    m: int
    k: int
    n: int
    count: float = 1

    @property
    def flops(self) -> float:
        """Of all `count` of them."""
        return 2.0 * self.m * self.k * self.n * self.count


def products(module: nn.Module, batch_size: int, *, training: bool) -> Iterator[Product]:
    """The products of one step on images [B, 1, 28, 28], or of their forward pass alone."""
    shapes: dict[nn.Module, torch.Size] = {}
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, output: shapes.__setitem__(layer, output.shape))
    with torch.no_grad():
        module(torch.zeros(1, 1, 28, 28))
    for number, layer in enumerate(layers, start=1):
        if isinstance(layer, nn.Linear):
            count, examples, inputs, outputs = 1.0, batch_size, layer.in_features, layer.out_features
        else:
            images = min(batch_size, CONV_IMAGES)
            count, examples = batch_size / images, images * prod(shapes[layer][2:])
            inputs, outputs = layer.in_channels * prod(layer.kernel_size), layer.out_channels
        yield Product(number, "forward", examples, inputs, outputs, count)
        if training:
            yield Product(number, "weight gradient", outputs, examples, inputs, count)
        if training and number > 1:
            yield Product(number, "input gradient", examples, outputs, inputs, count)


def operands(product: Product) -> tuple[Tensor, Tensor]:
    """The factors as a layer has them: weights [outputs, inputs], examples row by row."""
    m, k, n = product.m, product.k, product.n
    if product.what == "forward":
        return torch.randn(m, k), torch.randn(n, k).T
    if product.what == "weight gradient":
        return torch.randn(k, m).T, torch.randn(k, n)
    return torch.randn(m, k), torch.randn(k, n)


def seconds(call: Callable[[], object], duration_s: float) -> float:
    """Of one call: the fastest tenth of blocks of calls, as a bound should not be slowed by what else happens."""
    blocks: list[float] = []
    calls = 1
    end = time.perf_counter() + duration_s
    while time.perf_counter() < end or len(blocks) < 2:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        elapsed = time.perf_counter() - start
        if elapsed < BLOCK_S / 2:  # too short to be timed well, and the first calls are slower
            calls *= 2
        else:
            blocks.append(elapsed / calls)
    return statistics.quantiles(blocks, n=10, method="inclusive")[0]


def _measure(todo: list[Product], duration_s: float, barrier: Barrier, results: SimpleQueue[list[float]]) -> None:
    torch.set_num_threads(1)
    measured = []
    with torch.inference_mode():
        for product in todo:
            left, right = operands(product)
            out = torch.empty(product.m, product.n)
            barrier.wait(timeout=120)
            measured.append(product.count * seconds(lambda: torch.mm(left, right, out=out), duration_s))  # noqa: B023
    results.put(measured)


def measure(todo: list[Product], cores: int, duration_s: float) -> list[float]:
    """Seconds of each product where `cores` processes do it at the same time: the mean over the processes."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(cores), context.SimpleQueue()
    workers = [context.Process(target=_measure, args=(todo, duration_s, barrier, results)) for _ in range(cores)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"a measuring process failed with exit code {worker.exitcode}")
    return [statistics.mean(times) for times in zip(*(results.get() for _ in workers), strict=True)]


def main() -> None:
    """Measures and prints JSON: each product with its seconds, for a training step and for an evaluation chunk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--duration", type=float, default=0.2, metavar="S", help="for each product")
    args = parser.parse_args()
    module = MODELS[args.model]()
    step = [("fit", product) for product in products(module, args.batch_size, training=True)]
    chunk = [("evaluate", product) for product in products(module, EVALUATION_CHUNK, training=False)]
    times = measure([product for _, product in step + chunk], args.cores, args.duration)
    for (phase, product), time_s in zip(step + chunk, times, strict=True):
        rate = product.flops / time_s / 1e9
        print(json.dumps({"phase": phase, **asdict(product), "seconds": time_s, "gflops": rate}), flush=True)


if __name__ == "__main__":
    main()
