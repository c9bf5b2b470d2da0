"""Nodes of a cluster that are killed, cut off or hang in the middle of a round, and nodes that join late."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

import fedsim
from faults.outcome import EQUAL, Outcome, compared, reference_of, stopwatch
from faults.ray_nodes import ClusterNode, RayCluster, ray_cluster
from fedsim.recording import Recording

SMALL = fedsim.Config().override(
    {
        "data.dataset": "synthetic",
        "data.partition.name": "quantity",
        "model.name": "2nn",
        "rounds": 12,
        "clients.count": 12,
        "clients.per_round": 8,
        "training.local_epochs": 5,
        "training.batch_size": 10,
        "placement.mode": "packed",
    }
)
LOST_AFTER = 3
"""The round after which a node is lost: while the next one is trained."""

Harm = Callable[[RayCluster, ClusterNode], object]


def _lost(
    fault: str, seed: int, folder: Path, harm: Harm, point: str, *, isolated: bool = False, then_join: bool = False
) -> list[Outcome]:
    """A run on two nodes of one core each, of which the second is harmed in the middle of a round."""
    delay_s = float(np.random.default_rng(seed).uniform(0.0, 0.3))
    with ray_cluster(1, 1, isolated=isolated) as cluster, stopwatch() as watch:
        config = SMALL.override({"placement.address": cluster.address})
        with Recording.of(config, results=folder, name="run") as recording:
            for record in recording:
                if record.round == LOST_AFTER:
                    threading.Timer(delay_s, harm, (cluster, cluster.nodes[1])).start()
                if record.round == LOST_AFTER + 3 and then_join:
                    cluster.join(1)
    run = recording.run
    outcome = compared(run, reference_of(config))
    by_round = run.clients.groupby("round")["pid"].nunique()
    if outcome == EQUAL and by_round[LOST_AFTER] != 2:
        outcome = f"not on two nodes: {by_round.to_dict()}"
    if outcome == EQUAL and by_round[SMALL.rounds] != (2 if then_join else 1):
        outcome = f"not on {2 if then_join else 1} nodes in the end: {by_round.to_dict()}"
    return [Outcome(fault, f"{delay_s:.2f} s after round {LOST_AFTER}: {point}", outcome, watch.seconds)]


def killed(seed: int, folder: Path) -> list[Outcome]:
    """A node of a cluster is killed with all of its processes in the middle of a round, at five drawn moments."""
    return [
        outcome
        for i in range(5)
        for outcome in _lost("node killed", seed + i, folder / str(i), RayCluster.kill, "kill -9 of a node")
    ]


def replaced(seed: int, folder: Path) -> list[Outcome]:
    """A node is killed and another one joins later: it is used."""
    return _lost("node replaced", seed, folder, RayCluster.kill, "kill -9 of a node, another joins", then_join=True)


def cut_off(seed: int, folder: Path) -> list[Outcome]:
    """A node in a network namespace of its own is cut off from the others in the middle of a round."""
    return _lost("node cut off", seed, folder, RayCluster.cut, "its link goes down", isolated=True)


def hung(seed: int, folder: Path) -> list[Outcome]:
    """All processes of a node stop in the middle of a round, as where a machine hangs."""
    return _lost("node hangs", seed, folder, RayCluster.stop, "SIGSTOP of a node")
