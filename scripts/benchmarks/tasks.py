"""Which systems do which workload, and what is to be reached. To add a task: an entry in `make_tasks`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from benchmarks import systems
from benchmarks.systems import System, Workload

ACTOR_PER_CLIENT, PACKED, UNSTACKED = "actor per client", "packed", "packed, stacks of 1"
PLAIN, FORKED = "plain", "forked"
BOUND = "matrix products alone"
PLAIN_SUM = "plain sum"


@dataclass(frozen=True)
class Task:
    """Several systems that take turns, each run in a fresh process; of the report, a section."""

    title: str
    systems: dict[str, System]
    """By the names that the report gives them."""
    rounds: int
    """Of each run."""
    kind: Literal["speed", "start", "scale", "memory", "actors", "hundreds"] = "speed"
    """Which section the report makes of it."""
    warm_up: int = 1
    """First rounds of a run that do not count."""
    times_as_fast: Mapping[str, float] = field(default_factory=dict)
    """What is to be reached: seconds of this system's round over seconds of fedsim's."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """What is to be kept: see the sections of `report` and `actors`."""
    repetitions: int = 5
    """Runs of each system."""


T1 = Workload("mlp", clients=2, per_round=2, batch_size=32, epochs=2)
T2 = Workload("2nn", clients=100, per_round=10, batch_size=10, epochs=1)
T3 = Workload("2nn", clients=500, per_round=50, batch_size=10, epochs=5)
T4 = Workload("cnn", clients=100, per_round=10, batch_size=10, epochs=1)
MNIST = Workload("mlp", clients=10, per_round=10, batch_size=32, epochs=2, mode="actor-per-client")
SCALED = replace(T2, examples_per_client=600)


def make_tasks(flower_python: Path | None) -> dict[str, Task]:
    """All tasks, in the report's order.

    Args:
        flower_python: the Python of Flower's environment; None leaves Flower out.
    """

    def against(workload: Workload, **others: System) -> dict[str, System]:
        found = {"fedsim": systems.fedsim_run(workload), "plain loop": systems.plain_loop(workload)}
        found |= {name.replace("_", " "): system for name, system in others.items()}
        if flower_python:
            found["Flower"] = systems.flower(workload, flower_python)
        return found | {BOUND: systems.matrix_products(workload)}

    return {
        "T1": Task(
            "T1: 2 clients, mlp, batch 32, 2 epochs",
            against(T1, original_program=systems.original(T1)),
            rounds=5,
            times_as_fast={"plain loop": 3, "original program": 14},
        ),
        "T2": Task(
            "T2: 10 of 100 clients, 2nn, batch 10, 1 epoch",
            against(T2),
            rounds=30,
            warm_up=3,
            times_as_fast={"plain loop": 3.5},
            limits={"overhead_ms": 15, "memory_mb": 2_000},
        ),
        "T3": Task(
            "T3: 50 of 500 clients, 2nn, batch 10, 5 epochs",
            against(T3),
            rounds=8,
            times_as_fast={"plain loop": 4},
            limits={"memory_mb": 2_000},
        ),
        "T4": Task(
            "T4: 10 of 100 clients, cnn, batch 10, 1 epoch", against(T4), rounds=4, times_as_fast={"plain loop": 1.9}
        ),
        "mnist_round": Task(
            "Preset `mnist`: 10 clients, each its own Ray actor, mlp, batch 32, 2 epochs",
            {"fedsim": systems.fedsim_run(MNIST), "plain loop": systems.plain_loop(MNIST)},
            rounds=6,
            times_as_fast={"plain loop": 1.33},
        ),
        "start": Task(
            "Start-up of T2: from the command to the first round's start",
            {"fedsim": systems.fedsim_run(T2), PLAIN_SUM: systems.plain_start},
            kind="start",
            rounds=1,
            warm_up=0,
            limits={"ratio": 0.85},
        ),
        "actors_start": Task(
            "10 actors of the default run: plain and forked",
            {PLAIN: systems.placed("mnist", start="plain"), FORKED: systems.placed("mnist", start="fork")},
            kind="actors",
            rounds=2,
            warm_up=0,
            limits={"ratio": 0.25, "actor_mb": 120},
        ),
        "hundreds_actors": Task(
            "300 clients, 30 a round (2nn, batch 10, 5 epochs): each its own forked actor, and packed",
            {
                ACTOR_PER_CLIENT: systems.placed("hundreds", mode="actor-per-client", start="fork"),
                PACKED: systems.placed("hundreds", mode="packed"),
                UNSTACKED: systems.placed("hundreds", mode="packed", stack_size=1),
            },
            kind="hundreds",
            repetitions=3,
            rounds=15,
            limits={"up_s": 200, "used_gb": 18, "overhead_ms": 10 + 2 * 30},
        ),
        "scale_clients": Task(
            "More clients, cohort of 10 (2nn, batch 10, 1 epoch, 600 examples a client)",
            {f"{n:,} clients": systems.fedsim_run(replace(SCALED, clients=n)) for n in (100, 1_000, 10_000)},
            kind="scale",
            rounds=20,
            warm_up=3,
            limits={"ratio": 1.2},
        ),
        "scale_cohort": Task(
            "Larger cohorts of 1,000 clients (2nn, batch 10, 1 epoch, 600 examples a client)",
            {
                f"cohort of {n}": systems.fedsim_run(replace(SCALED, clients=1_000, per_round=n))
                for n in (10, 30, 100, 300)
            },
            kind="scale",
            rounds=8,
        ),
        "memory": Task(
            "Memory over 500 rounds of T2",
            {"fedsim": systems.fedsim_run(T2)},
            kind="memory",
            rounds=500,
            limits={"drift": 0.03},
        ),
    }
