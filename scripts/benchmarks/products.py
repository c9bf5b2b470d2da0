"""The bound: how long a model's matrix products take here, alone, on all cores at once.

Of each layer the products of one client's step: forward, weight gradient, and input gradient but for the first layer;
a convolution is one product, done by the library's own routine on a few images at a time. Each is timed by itself,
over and over on the same operands, on one thread, in the fastest way that torch has, while a process on every other
core does the same.

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
from dataclasses import dataclass, field
from math import prod
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baselines.plain_loop import MODELS

EVALUATION_CHUNK = 1000
CONVOLVED = 10
"""Images of one call of a convolution: what many more of them take is their results' way to memory and back."""
BLOCK_S = 0.005

Call = Callable[[], object]


@dataclass(frozen=True)
class Product:
    """One product of a step, and the ways to compute it."""

    phase: str
    """fit or evaluate."""
    layer: int
    what: str
    """forward, weight gradient or input gradient."""
    flops: float
    """Of all `count` calls."""
    count: float
    """How often a step does it."""
    ways: dict[str, Call] = field(repr=False)


def step_and_chunk(model: str, batch_size: int) -> list[Product]:
    """The products of a training step on `batch_size` examples, and of the evaluation of a chunk."""
    step = products("fit", MODELS[model](), batch_size)
    return [*step, *products("evaluate", MODELS[model](), EVALUATION_CHUNK)]


def products(phase: str, module: nn.Module, batch_size: int) -> Iterator[Product]:
    """The products of a module on images [batch_size, 1, 28, 28]; to evaluate takes the forward ones only."""
    shapes: dict[nn.Module, tuple[torch.Size, torch.Size]] = {}
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, given, out: shapes.__setitem__(layer, (given[0].shape, out.shape)))
    with torch.no_grad():
        module(torch.zeros(1, 1, 28, 28))
    for number, layer in enumerate(layers, start=1):
        examples = min(batch_size, CONVOLVED) if isinstance(layer, nn.Conv2d) else batch_size
        inputs, outputs = (torch.randn(examples, *shape[1:]) for shape in shapes[layer])
        count = batch_size / examples
        flops = count * 2.0 * outputs.numel() * prod(layer.weight.shape[1:])
        make = _of_linear if isinstance(layer, nn.Linear) else _of_convolution
        for what, ways in make(layer, inputs, outputs).items():
            if what == "forward" or (phase == "fit" and (what, number) != ("input gradient", 1)):
                yield Product(phase, number, what, flops, count, ways)


def _of_linear(layer: nn.Linear, inputs: Tensor, gradient: Tensor) -> dict[str, dict[str, Call]]:
    weight = layer.weight.detach()
    factors = {"forward": (inputs, weight.T), "weight gradient": (gradient.T, inputs)}
    factors["input gradient"] = (gradient, weight)
    return {what: _ways(left, right) for what, (left, right) in factors.items()}


def _ways(left: Tensor, right: Tensor) -> dict[str, Call]:
    """A product by the library behind `torch.mm`, and by the one behind convolutions, which may be the faster."""
    out = left @ right
    ways: dict[str, Call] = {"mm": lambda: torch.mm(left, right, out=out)}
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        ways["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    return ways


def _of_convolution(layer: nn.Conv2d, inputs: Tensor, gradient: Tensor) -> dict[str, dict[str, Call]]:
    weight, strides, padding, ones = layer.weight.detach(), layer.stride, layer.padding, layer.dilation
    rest = (None, strides, padding, ones, False, (0, 0), layer.groups)

    def backward(*mask: bool) -> Call:
        return lambda: torch.ops.aten.convolution_backward(gradient, inputs, weight, *rest, mask)

    return {
        "forward": {"conv": lambda: torch.conv2d(inputs, weight, None, strides, padding)},
        "weight gradient": {"conv": backward(False, True, False)},
        "input gradient": {"conv": backward(True, False, False)},
    }


def seconds(call: Call, duration_s: float) -> float:
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


def _measure(
    model: str, batch_size: int, duration_s: float, barrier: Barrier, results: SimpleQueue[list[tuple[float, str]]]
) -> None:
    torch.set_num_threads(1)
    fastest = []
    with torch.inference_mode():
        for product in step_and_chunk(model, batch_size):
            times = []
            for way, call in product.ways.items():
                barrier.wait(timeout=120)
                times.append((product.count * seconds(call, duration_s), way))
            fastest.append(min(times))
    results.put(fastest)


def measure(model: str, batch_size: int, cores: int, duration_s: float) -> list[tuple[float, str]]:
    """Of each product, its seconds where `cores` processes do it at the same time, on average, and the fastest way."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(cores), context.SimpleQueue()
    arguments = (model, batch_size, duration_s, barrier, results)
    workers = [context.Process(target=_measure, args=arguments) for _ in range(cores)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"a measuring process failed with exit code {worker.exitcode}")
    by_product = zip(*(results.get() for _ in workers), strict=True)
    return [(statistics.mean(time_s for time_s, _ in found), found[0][1]) for found in by_product]


def main() -> None:
    """Measures and prints JSON: each product with its seconds, for a training step and for an evaluation chunk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--duration", type=float, default=0.2, metavar="S", help="for each product")
    args = parser.parse_args()
    measured = measure(args.model, args.batch_size, args.cores, args.duration)
    for product, (time_s, way) in zip(step_and_chunk(args.model, args.batch_size), measured, strict=True):
        said = {key: getattr(product, key) for key in ("phase", "layer", "what", "flops")}
        print(json.dumps({**said, "seconds": time_s, "gflops": product.flops / time_s / 1e9, "by": way}), flush=True)


if __name__ == "__main__":
    main()
