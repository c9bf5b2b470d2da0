"""Where the clients run: a pure function from (configuration, sizes, machine) to a plan.

The predictions are constants of the release, measured once, so that the same machine gets the same plan. Nothing
here changes a result, only where and when it is computed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

from fedsim.config import PlacementConfig
from fedsim.errors import PlanError

ACTOR_BYTES = 350_000_000
"""Memory of an actor that has torch loaded (PSS)."""
ACTOR_START_CORE_S = 4.0
"""Core-seconds to start one: importing torch and ray."""
START_BUDGET_S = 10.0
"""`auto` gives each client its own actor up to this predicted start-up."""

_UNITS = 10_000  # Ray counts resources in 1/10,000


@dataclass(frozen=True)
class Node:
    """What one machine offers."""

    num_cpus: float
    num_gpus: float
    memory_bytes: int
    """Free memory."""


@dataclass(frozen=True)
class Plan:
    """How the clients are placed; `reasons` says why, for a person."""

    mode: str
    """actor-per-client, packed or serial."""
    num_actors: int
    """0 in serial mode."""
    num_cpus: float
    """CPUs each actor is pinned to."""
    num_gpus: float
    """GPUs each actor is pinned to."""
    threads: int
    """Torch threads of each actor."""
    memory_bytes: int
    """Predicted memory of all actors and of a round's updates."""
    start_s: float
    """Predicted seconds until the actors are up."""
    reasons: tuple[str, ...]


def local_node() -> Node:
    """This machine, as this process may use it."""
    import torch  # counts GPUs without starting CUDA

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Node(cpus, torch.cuda.device_count(), psutil.virtual_memory().available)


def make_plan(
    placement: PlacementConfig, *, num_clients: int, cohort_size: int, model_bytes: int, nodes: tuple[Node, ...]
) -> Plan:
    """Decides mode, number of actors and the share of the machine that each gets.

    Args:
        placement: what the configuration asks for.
        num_clients: K, all clients.
        cohort_size: clients trained in a round.
        model_bytes: D * 4.
        nodes: the machines there are; one for a private Ray.

    Raises:
        PlanError: what was asked for does not fit, with the numbers.
    """
    updates_bytes = cohort_size * model_bytes  # the matrix [K, D] of a round
    if placement.mode == "serial":
        return Plan("serial", 0, 0.0, 0.0, placement.threads, updates_bytes, 0.0, ("serial: as asked for, no Ray",))

    cpus = sum(node.num_cpus for node in nodes)
    free = sum(node.memory_bytes for node in nodes)
    asked_cpus = 0.0 if placement.num_cpus == "auto" else placement.num_cpus
    asked_gpus = 0.0 if placement.num_gpus == "auto" else placement.num_gpus
    most = capacity(asked_cpus, asked_gpus, nodes)  # actors of the asked size
    reasons = []

    mode = placement.mode
    if mode == "auto" and placement.actors != "auto":
        mode = "packed"
        reasons.append(f"packed: {placement.actors} actors as asked for")
    elif mode == "auto":
        start_s = _start_s(num_clients, cpus)
        needed = num_clients * ACTOR_BYTES + updates_bytes
        fits = start_s < START_BUDGET_S and needed <= free / 2 and num_clients <= most
        mode = "actor-per-client" if fits else "packed"
        reasons.append(
            f"{mode}: an actor for each of {num_clients} clients would start in about {start_s:.0f} s "
            f"(auto takes less than {START_BUDGET_S:.0f} s) and take {_gb(needed)} "
            f"(half of what is free: {_gb(free / 2)})"
        )
    else:
        reasons.append(f"{mode}: as asked for")

    if mode == "actor-per-client":
        if placement.actors not in ("auto", num_clients):
            raise PlanError(
                f"placement.actors = {placement.actors}, but actor-per-client needs {num_clients}, one a client; "
                'leave it at "auto", or set placement.mode=packed'
            )
        actors = num_clients
    elif placement.actors == "auto":
        actors = max(1, min(int(cpus), cohort_size, most))
        reasons.append(
            f"{actors} actors: one a core, and no more than fit or than the {cohort_size} clients of a round"
        )
    else:
        actors = min(placement.actors, num_clients)
        if actors < placement.actors:
            reasons.append(f"{actors} actors: no more than there are clients")

    memory = actors * ACTOR_BYTES + updates_bytes
    if memory > free:
        raise PlanError(
            f"{actors} actors need about {_gb(memory)} of memory ({_gb(ACTOR_BYTES)} each), but {_gb(free)} are free; "
            "set placement.mode=packed or fewer placement.actors"
        )
    num_gpus = _gpu_share(placement, actors, nodes, reasons)
    num_cpus = _cpu_share(placement, actors, num_gpus, nodes)
    start = _start_s(actors, cpus)
    return Plan(mode, actors, num_cpus, num_gpus, placement.threads, memory, start, tuple(reasons))


def _gpu_share(placement: PlacementConfig, actors: int, nodes: tuple[Node, ...], reasons: list[str]) -> float:
    gpus = int(sum(node.num_gpus for node in nodes))
    share = _floor(1 / -(-actors // gpus)) if gpus else 0.0  # a share lies on one device
    if placement.num_gpus == "auto":
        if gpus:
            reasons.append(f"CPU only: {gpus:g} GPU found, not used unless asked for (placement.num_gpus={share:g})")
        return 0.0
    if capacity(0, placement.num_gpus, nodes) < actors:
        raise PlanError(
            f"{actors} actors of {placement.num_gpus:g} GPU each do not fit {gpus:g} GPUs"
            + (f"; at most {share:g} each" if gpus else "; set placement.num_gpus=0")
        )
    return placement.num_gpus


def _cpu_share(placement: PlacementConfig, actors: int, num_gpus: float, nodes: tuple[Node, ...]) -> float:
    # the largest share, up to one core, of which enough fit, node by node
    shares = {_floor(min(1.0, node.num_cpus / k)) for node in nodes for k in range(1, actors + 1)}
    best = max((s for s in shares if s > 0 and capacity(s, num_gpus, nodes) >= actors), default=0.0)
    cpus = " + ".join(f"{node.num_cpus:g}" for node in nodes)
    if placement.num_cpus == "auto":
        if not best:
            raise PlanError(f"{actors} actors do not fit {cpus} CPUs: Ray's smallest share is 0.0001; set fewer actors")
        return best
    if capacity(placement.num_cpus, num_gpus, nodes) < actors:
        raise PlanError(
            f"{actors} actors of {placement.num_cpus:g} CPU each need {actors * placement.num_cpus:g} CPUs, "
            f"but there are {cpus}; at most {best:g} each"
        )
    return placement.num_cpus


def capacity(num_cpus: float, num_gpus: float, nodes: tuple[Node, ...]) -> int:
    """How many actors of this size fit, node by node, in Ray's own units."""
    cpu, gpu = round(num_cpus * _UNITS), round(num_gpus * _UNITS)
    total = 0
    for node in nodes:
        by_cpu = round(node.num_cpus * _UNITS) // cpu if cpu else 10**9
        if gpu == 0:
            by_gpu = 10**9
        elif gpu <= _UNITS:  # a fraction lies on one device
            by_gpu = int(node.num_gpus) * (_UNITS // gpu)
        else:
            by_gpu = round(node.num_gpus * _UNITS) // gpu
        total += min(by_cpu, by_gpu)
    return total


def _start_s(actors: int, cpus: float) -> float:
    return actors * ACTOR_START_CORE_S / max(1.0, min(cpus, actors))


def _floor(share: float) -> float:
    return int(share * _UNITS + 1e-9) / _UNITS


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
