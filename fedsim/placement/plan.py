"""Where the clients run: a pure function from (configuration, sizes, machine) to a plan.

Nothing here changes a result, only where and when it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.config import PlacementConfig
from fedsim.errors import PlanError
from fedsim.placement.costs import BASE_FILES, BASE_THREADS, COSTS, FORK_SERVER_BYTES, PLAIN, Cost
from fedsim.placement.limits import UNITS, allowed, capacity, room
from fedsim.placement.machine import Node

GPU_ACTOR_BYTES = 600_000_000
"""GPU memory of an actor before it holds a model: its CUDA context and libraries."""
START_BUDGET_S = 10.0
"""`auto` gives each client its own actor up to this predicted start-up."""
STACK_BYTES = 8_000_000
"""Weights of a stack on a CPU: what stays in the caches between one step and the next."""
GPU_STACK_BYTES = 1_000_000_000
"""Weights of a stack on a GPU."""
MAX_STACK = 32
"""Clients in a stack on a CPU: more amortise nothing."""


@dataclass(frozen=True)
class Size:
    """What there is to place."""

    num_clients: int
    """K, all clients."""
    cohort_size: int
    """Clients trained in a round."""
    model_bytes: int
    """D * 4."""
    engine: str = "loop"
    """loop or stacked."""


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
    start: str
    """How the actors start: fork or plain."""
    or_plain: bool
    """Whether plain actors would fit too: what forked ones become where forking fails."""
    stack_size: int
    """At most so many clients train in one computation."""
    actor_bytes: int
    """Memory that Ray reserves for each actor: on several nodes, so that none is filled beyond its memory; else 0."""
    memory_bytes: int
    """Predicted memory of all actors and of a round's updates."""
    start_s: float
    """Predicted seconds until the actors are up."""
    reasons: tuple[str, ...]


def make_plan(placement: PlacementConfig, size: Size, nodes: tuple[Node, ...]) -> Plan:
    """Decides mode, number of actors, the share of the machine that each gets, and the size of stacks.

    Args:
        placement: what the configuration asks for.
        size: what there is to place.
        nodes: the machines there are; one for a private Ray.

    Raises:
        PlanError: what was asked for does not fit, with the numbers.
    """
    reasons: list[str] = []
    if placement.mode == "serial":
        reasons.append("serial: as asked for, no Ray")
        if placement.start == "fork":
            raise PlanError("serial mode starts no actors: there is nothing to fork; leave placement.start at auto")
        free = sum(node.memory_bytes for node in nodes)
        if _round_bytes(size) > free:
            raise PlanError(
                f"the {size.cohort_size:,} updates of a round are {_gb(_round_bytes(size))}, but {_gb(free)} are free; "
                "set a smaller clients.per_round"
            )
        stack = _stack_size(placement, size, size.cohort_size, 0.0, 0, reasons)
        return Plan(
            "serial", 0, 0.0, 0.0, placement.threads, "", False, stack, 0, _round_bytes(size), 0.0, tuple(reasons)
        )

    start = _start(placement, nodes, reasons)
    cost = COSTS[start]
    mode = _mode(placement, size, nodes, cost, reasons)
    actors = _num_actors(placement, size, nodes, mode, cost, reasons)
    _check_memory(actors, size, nodes, cost)
    num_gpus = _gpu_share(placement, actors, nodes, reasons)
    num_cpus = _cpu_share(placement, actors, num_gpus, nodes, cost)
    stack = 1
    if mode == "packed":
        of_actor = -(-size.cohort_size // actors)
        stack = _stack_size(placement, size, of_actor, num_gpus, _gpu_bytes(nodes), reasons)
    _check_gpu_memory(num_gpus, stack, size, nodes)
    memory = _memory_bytes(actors, size, cost)
    start_s = _start_s(actors, sum(node.num_cpus for node in nodes), cost)
    or_plain = _memory_bytes(actors, size, PLAIN) <= sum(node.memory_bytes for node in nodes)
    reserved = cost.num_bytes if len(nodes) > 1 else 0
    return Plan(
        mode,
        actors,
        num_cpus,
        num_gpus,
        placement.threads,
        start,
        or_plain,
        stack,
        reserved,
        memory,
        start_s,
        tuple(reasons),
    )


def _start(placement: PlacementConfig, nodes: tuple[Node, ...], reasons: list[str]) -> str:
    """How actors start: forked where this is possible."""
    obstacle = next((node.fork_obstacle for node in nodes if node.fork_obstacle), "")
    if placement.start == "plain":
        reasons.append("plain actors: as asked for")
        return "plain"
    if not obstacle:
        reasons.append("forked actors: from a process that has torch loaded")
        return "fork"
    if placement.start == "fork":
        raise PlanError(f'actors cannot be forked here: {obstacle}; set placement.start to "auto" or "plain"')
    reasons.append(f"plain actors: they cannot be forked here ({obstacle})")
    return "plain"


def _mode(placement: PlacementConfig, size: Size, nodes: tuple[Node, ...], cost: Cost, reasons: list[str]) -> str:
    if placement.mode != "auto":
        reasons.append(f"{placement.mode}: as asked for")
        return placement.mode
    if placement.actors != "auto":
        reasons.append(f"packed: {placement.actors} actors as asked for")
        return "packed"
    clients, free = size.num_clients, sum(node.memory_bytes for node in nodes)
    start_s = _start_s(clients, sum(node.num_cpus for node in nodes), cost)
    needed = _memory_bytes(clients, size, cost)
    most = _most(placement, nodes, cost)
    mode = "actor-per-client" if start_s < START_BUDGET_S and needed <= free / 2 and clients <= most else "packed"
    reasons.append(
        f"{mode}: an actor for each of {clients:,} clients would start in about {start_s:.0f} s "
        f"(auto takes less than {START_BUDGET_S:.0f} s) and take {_gb(needed)} "
        f"(half of what is free: {_gb(free / 2)})" + (f"; {most:,} fit" if clients > most else "")
    )
    return mode


def _num_actors(
    placement: PlacementConfig, size: Size, nodes: tuple[Node, ...], mode: str, cost: Cost, reasons: list[str]
) -> int:
    most = sum(allowed(node, cost) for node in nodes)
    if mode == "actor-per-client":
        actors = size.num_clients
        if placement.actors not in ("auto", actors):
            raise PlanError(
                f"placement.actors = {placement.actors}, but actor-per-client needs {actors}, one a client; "
                'leave it at "auto", or set placement.mode=packed'
            )
    elif placement.actors == "auto":
        cores = sum(min(int(node.num_cpus), room(0, 0, (node,), cost)) for node in nodes)
        actors = max(1, min(cores, size.cohort_size, _most(placement, nodes, cost)))
        reasons.append(f"{actors} actors: one a core, and no more than fit or than the {size.cohort_size:,} of a round")
    else:
        actors = min(placement.actors, size.num_clients)
        if actors < placement.actors:
            reasons.append(f"{actors} actors: no more than there are clients")
    if actors > max(1, most):
        raise PlanError(
            f"{actors:,} actors need about {BASE_THREADS + actors * cost.threads:,} threads and "
            f"{BASE_FILES + actors * cost.files:,} open files; the limits (ulimit -u, ulimit -n) allow {most:,} "
            "actors: raise them, or set placement.mode=packed or fewer placement.actors"
        )
    return actors


def _check_memory(actors: int, size: Size, nodes: tuple[Node, ...], cost: Cost) -> None:
    free, memory = sum(node.memory_bytes for node in nodes), _memory_bytes(actors, size, cost)
    if memory > free or actors > sum(node.memory_bytes // cost.num_bytes for node in nodes):
        raise PlanError(
            f"{actors:,} actors need about {_gb(memory)} of memory ({_gb(cost.num_bytes)} each), but {_gb(free)} are "
            "free; set placement.mode=packed or fewer placement.actors"
        )


def _check_gpu_memory(num_gpus: float, stack: int, size: Size, nodes: tuple[Node, ...]) -> None:
    known = _gpu_bytes(nodes)
    needed = GPU_ACTOR_BYTES + 3 * stack * size.model_bytes  # weights, momentum, and what a step computes
    if num_gpus and known and min(1.0, num_gpus) * known < needed:
        raise PlanError(
            f"{num_gpus:g} GPU is {_gb(min(1.0, num_gpus) * known)}, but an actor needs about {_gb(needed)} there "
            f"for stacks of {stack:,} clients; set a larger placement.num_gpus or a smaller placement.stack_size"
        )


def _stack_size(
    placement: PlacementConfig, size: Size, clients: int, num_gpus: float, gpu_bytes: int, reasons: list[str]
) -> int:
    """How many of an actor's clients train in one computation: as many as pay."""
    if size.engine != "stacked":
        return 1
    if placement.stack_size != "auto":
        return min(placement.stack_size, clients)
    limit, most = (GPU_STACK_BYTES, clients) if num_gpus else (STACK_BYTES, MAX_STACK)
    if num_gpus and gpu_bytes:  # what is left beside the context, for weights, momentum and what a step computes
        limit = min(limit, int(num_gpus * gpu_bytes - GPU_ACTOR_BYTES) // 3)
    stack = max(1, min(clients, most, limit // max(1, size.model_bytes)))
    reasons.append(f"stacks of up to {stack}: {stack} x {size.model_bytes / 1e6:.1f} MB of weights stay in the caches")
    return stack


def _round_bytes(size: Size) -> int:
    return size.cohort_size * size.model_bytes  # the matrix [K, D] of a round


def _memory_bytes(actors: int, size: Size, cost: Cost) -> int:
    """Of all actors, of what they are forked from, and of a round."""
    return actors * cost.num_bytes + (0 if cost is PLAIN else FORK_SERVER_BYTES) + _round_bytes(size)


def _most(placement: PlacementConfig, nodes: tuple[Node, ...], cost: Cost) -> int:
    """How many actors of the asked share fit, within all limits of each node."""
    cpus = 0.0 if placement.num_cpus == "auto" else placement.num_cpus
    gpus = 0.0 if placement.num_gpus == "auto" else placement.num_gpus
    return room(cpus, gpus, nodes, cost)


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


def _cpu_share(placement: PlacementConfig, actors: int, num_gpus: float, nodes: tuple[Node, ...], cost: Cost) -> float:
    # the largest share, up to one core, of which enough fit, node by node
    shares = {_floor(min(1.0, node.num_cpus / k)) for node in nodes for k in range(1, actors + 1)}
    best = max((s for s in shares if s > 0 and room(s, num_gpus, nodes, cost) >= actors), default=0.0)
    cpus = " + ".join(f"{node.num_cpus:g}" for node in nodes)
    if placement.num_cpus == "auto":
        if not best:
            raise PlanError(f"{actors} actors do not fit {cpus} CPUs: Ray's smallest share is 0.0001; set fewer actors")
        return best
    if room(placement.num_cpus, num_gpus, nodes, cost) < actors:
        raise PlanError(
            f"{actors} actors of {placement.num_cpus:g} CPU each need {actors * placement.num_cpus:g} CPUs, "
            f"but there are {cpus}; at most {best:g} each"
        )
    return placement.num_cpus


def _gpu_bytes(nodes: tuple[Node, ...]) -> int:
    """Memory of the smallest GPU that is known of; 0 for none."""
    return min((node.gpu_memory_bytes for node in nodes if node.gpu_memory_bytes), default=0)


def _start_s(actors: int, cpus: float, cost: Cost) -> float:
    return actors * cost.start_core_s / max(1.0, min(cpus, actors))


def _floor(share: float) -> float:
    return int(share * UNITS + 1e-9) / UNITS


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
