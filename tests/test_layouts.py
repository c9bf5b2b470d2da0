"""One run, many layouts: whatever trains where, and with whom in a stack, no result changes by a bit."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import fedsim
from fedsim.metrics import CLIENT_SCHEMA, ROUND_SCHEMA

pytestmark = pytest.mark.long

BASE = fedsim.Config().override(
    {
        "data.dataset": "synthetic",
        "clients.count": 12,
        "clients.per_round": 7,
        "rounds": 2,
        "model.name": "2nn",
        "training.local_epochs": 2,
        "training.batch_size": 10,
    }
)
SHARDS = {  # unequal ones, hence unequal step counts and short last batches
    "dirichlet": {"data.partition.name": "dirichlet", "data.partition.alpha": 0.3},
    "quantity": {"data.partition.name": "quantity", "data.partition.sigma": 1.5},
}
TRAINING: dict[str, dict[str, Any]] = {
    "looking ahead": {},
    "momentum": {"training.momentum": 0.9, "training.weight_decay": 0.001, "model.name": "mlp"},
    "whole shards": {"training.batch_size": 0},
    "single examples": {"training.batch_size": 1, "training.local_epochs": 1},
    "odd batches": {"training.batch_size": 7},
}


def odd_cnn(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Channels that fill no vector register, functions that round."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 5, stride=2), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(108, 11), nn.GELU(),
        nn.Linear(11, num_classes),
    )  # fmt: skip


def results_of(changes: dict[str, Any], **parts: Any) -> str:
    """The columns that must be equal between equal runs."""
    run = fedsim.run(BASE.override(changes), results=None, **parts)
    frames = []
    for frame, schema in ((run.rounds, ROUND_SCHEMA), (run.clients, CLIENT_SCHEMA)):
        names = [field.name for field in schema if field.metadata[b"kind"] == b"result" and field.name != "run"]
        frames.append(frame[names].to_dict("list"))
    assert run.rounds["weights_sha256"].nunique() == 3, "it has learnt"
    return repr(frames)  # repr: NaN equals itself, floats to the last bit


def serial(stack_size: int | str) -> dict[str, Any]:
    return {"placement.mode": "serial", "placement.stack_size": stack_size}


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("training", TRAINING)
def test_the_stack_changes_no_bit(shards, training):
    changes = {**SHARDS[shards], **TRAINING[training]}
    alone = results_of({**changes, **serial(1)})
    for stack_size in (2, 3, 7, "auto"):
        assert results_of({**changes, **serial(stack_size)}) == alone


@pytest.mark.parametrize("shards", SHARDS)
def test_the_stack_changes_no_bit_of_a_convolution(shards):
    alone = results_of({**SHARDS[shards], **serial(1)}, model=odd_cnn)
    for stack_size in (2, 7):
        assert results_of({**SHARDS[shards], **serial(stack_size)}, model=odd_cnn) == alone


def test_the_rows_say_how_many_shared_a_stack():
    run = fedsim.run(BASE.override(serial(3)), results=None)
    assert sorted(run.clients.loc[run.clients["round"] == 1, "stack_size"]) == [2, 2, 2, 2, 3, 3, 3], "even stacks"
    loop = fedsim.run(BASE.override({**serial("auto"), "training.engine": "loop"}), results=None)
    assert (loop.clients["stack_size"] == 1).all()


@pytest.mark.ray
@pytest.mark.parametrize("shards", SHARDS)
def test_the_packing_changes_no_bit(shared_ray, shards):
    few = {**SHARDS[shards], "clients.count": 5, "clients.per_round": 4}
    expected = results_of({**few, **serial("auto")})
    layouts: list[dict[str, Any]] = [
        {"placement.mode": "packed", "placement.actors": 1},
        {"placement.mode": "packed", "placement.actors": 2, "placement.stack_size": 1},
        {"placement.mode": "packed", "placement.actors": 3, "placement.stack_size": 2},
    ]
    if shards == "dirichlet":  # five processes
        layouts.append({"placement.mode": "actor-per-client", "placement.num_cpus": 0.25})
    for layout in layouts:
        assert results_of({**few, **layout}) == expected, layout
