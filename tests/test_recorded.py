"""Steps that are recorded, on a CPU: with a stand-in for CUDA's graphs. On a GPU see test_gpu.py."""

import contextlib
import math

import numpy as np
import pytest
import torch
from test_stacked import CLASSES, EXAMPLE_MODELS, EXAMPLES, HEAVY, PLAIN, bits, made, start, work
from torch import nn

from fedsim.numerics import numerics
from fedsim.stacked import Stacked, engine, recorded
from fedsim.stacked.recorded import Recorder
from fedsim.stacked.stack import Stack
from fedsim.stacked.steps import take
from fedsim.weights import Weights


class Graph:
    """Of CUDA's, what counts: a step that is recorded computes nothing; each replay takes it, in the same memory."""

    recording: "Graph | None" = None
    num_recorded = num_replayed = 0

    @classmethod
    @contextlib.contextmanager
    def record(cls, graph, capture_error_mode):
        cls.recording, cls.num_recorded = graph, cls.num_recorded + 1
        yield
        cls.recording = None

    def replay(self):
        Graph.num_replayed += 1
        layers, images, targets, out = self.step
        out.copy_(take(layers, images, targets))


def step(layers, images, targets):
    if not Graph.recording:
        return take(layers, images, targets)
    out = torch.full(targets.shape, math.nan)
    Graph.recording.step = layers, images, targets, out
    return out


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Layers are forgotten and no block looked ahead as there, and few clients may compute as one."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph.record)
    monkeypatch.setattr(engine, "worthwhile_block", lambda *_: 1)
    kept = Stack.layers

    def layers(self, clients):
        if (clients.start, clients.stop) not in self._layers:
            self._layers.clear()
        return kept(self, clients)

    monkeypatch.setattr(Stack, "layers", layers)
    Graph.num_recorded = Graph.num_replayed = 0


@pytest.mark.parametrize("seed", range(12))
def test_recorded_steps_are_those_of_others(as_on_a_gpu, monkeypatch, seed):
    """Over rounds in which the stack grows and shrinks, clients are of unequal size and groups of them alternate."""
    rng = np.random.default_rng(seed)
    kinds = (nn.Linear, nn.Conv2d, nn.MaxPool2d, nn.GELU)
    module, sgd = made(EXAMPLE_MODELS[kinds[seed % 4]]), (PLAIN, HEAVY)[seed % 2]
    rounds = [rng.choice([15, 30, 30, 60, 37], size=rng.integers(1, 6)).tolist() for _ in range(4)]
    batch, at_once = int(rng.choice([3, 5, 10])), int(rng.choice([1, 2, 5]))
    found = []
    for before in (int(rng.choice([0, 1, 2, 5])), 10**9):
        monkeypatch.setattr(recorded, "_BEFORE", before)
        stacked = Stacked(module, sgd, batch, CLASSES)
        monkeypatch.setattr(stacked, "_at_once", lambda *_: at_once)
        monkeypatch.setattr(engine, "take", Recorder(step))
        weights, trained = start(module), []
        with numerics(1):
            for sizes in rounds:
                trained += stacked.train(weights, EXAMPLES, work(*sizes, epochs=2))
                weights = Weights(trained[-1].weights.flat.clone(), weights.integers)  # its memory is the stack's
        found.append([bits(each) for each in trained])
    assert found[0] == found[1]
    assert Graph.num_replayed >= Graph.num_recorded > 0


def test_few_steps_of_a_shape_are_not_recorded(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(engine, "take", Recorder(step))
    module = made(EXAMPLE_MODELS[nn.Linear])
    stacked = Stacked(module, PLAIN, 5, CLASSES)
    monkeypatch.setattr(stacked, "_at_once", lambda *_: 5)
    with numerics(1):
        for _ in range(3):
            stacked.train(start(module), EXAMPLES, work(60, 20, epochs=2))
    assert Graph.num_recorded == 0, "at most 16 steps follow each other before the other clients' come"
    with numerics(1):
        for _ in range(3):
            stacked.train(start(module), EXAMPLES, work(60, 60, epochs=2))
    assert (Graph.num_recorded, Graph.num_replayed) == (1, 3 * 24 - recorded._BEFORE)
