"""Where the clients run: a pure function from (configuration, sizes, machine) to a plan.

Nothing here changes a result, only where and when it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedsim.config import PlacementConfig
from fedsim.errors import PlanError, counted
from fedsim.placement.costs import BASE_FILES, BASE_THREADS, COSTS, PLAIN, Cost
from fedsim.placement.limits import allowed, held_by_memory
from fedsim.placement.machine import Node
from fedsim.placement.shares import cpu_share, fitting, gpu_share, serial_gpu
from fedsim.placement.system import UNLIMITED

GPU_ACTOR_BYTES = 600_000_000
"""GPU memory of an actor before it holds a model: its CUDA context and libraries."""
START_BUDGET_S = 10.0
"""`auto` gives each client its own actor up to this predicted start-up."""
STACK_BYTES = 8_000_000
"""Weights of a stack on a CPU: what stays in the caches between one step and the next."""
GPU_STACK_BYTES = 1_000_000_000
"""Weights of a stack on a GPU."""
GPU_COPIES = 6
"""Times the weights of a stack, there: weights, momentum, and what a step computes, twice where it is recorded."""
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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the clients are placed; `reasons` says why, for a person."""

    mode: str
    """actor-per-client, packed or serial."""
    num_actors: int = 0
    """0 in serial mode, which has nothing of what is said of actors."""
    num_cpus: float = 0.0
    """CPUs each actor is pinned to."""
    num_gpus: float = 0.0
    """GPUs each actor is pinned to; in serial mode of this process."""
    threads: int
    """Torch threads of each actor."""
    start: str = ""
    """How the actors start: fork or plain."""
    or_plain: bool = False
    """Whether plain actors would fit too: what forked ones become where forking fails."""
    stack_size: int
    """At most so many clients train in one computation."""
    actor_bytes: int = 0
    """Memory that Ray reserves for each actor: on several nodes, so that none is filled beyond its memory; else 0."""
    memory_bytes: int
    """Predicted memory of all actors and of a round's updates."""
    start_s: float = 0.0
    """Predicted seconds until the actors are up."""
    reasons: tuple[str, ...]

    @property
    def total_cpus(self) -> int:
        """CPUs of all actors together: as many calls are worth having at work at a time."""
        return max(1, round(self.num_actors * self.num_cpus))


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
        return _serial_plan(placement, size, nodes, reasons)
    start = _start(placement, nodes, reasons)
    cost = replace(COSTS[start], threads=COSTS[start].threads + placement.threads - 1)  # it has one of torch's
    mode = _mode(placement, size, nodes, cost, reasons)
    actors = _num_actors(placement, size, nodes, mode, cost, reasons)
    _check_limits(actors, nodes, cost)
    _check_memory(actors, size, nodes, cost)
    num_gpus = gpu_share(placement, actors, nodes, reasons)
    num_cpus = cpu_share(placement, actors, num_gpus, nodes, cost)
    stack = 1
    if mode == "packed":
        of_actor = -(-size.cohort_size // actors)
        stack = _stack_size(placement, size, of_actor, num_gpus, _gpu_bytes(nodes), reasons)
    _check_gpu_memory(num_gpus, stack, size, nodes)
    return Plan(
        mode=mode,
        num_actors=actors,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        threads=placement.threads,
        start=start,
        or_plain=actors <= _held_by_memory(size, nodes, PLAIN),
        stack_size=stack,
        actor_bytes=cost.num_bytes if len(nodes) > 1 else 0,
        memory_bytes=_memory_bytes(actors, size, nodes, cost),
        start_s=_start_s(actors, nodes, cost),
        reasons=tuple(reasons),
    )


def _serial_plan(placement: PlacementConfig, size: Size, nodes: tuple[Node, ...], reasons: list[str]) -> Plan:
    if placement.start == "fork":
        raise PlanError("serial mode starts no actors: there is nothing to fork; leave placement.start at auto")
    reasons.append("serial: as asked for, no Ray")
    if _round_bytes(size) > _free_bytes(nodes):
        raise PlanError(
            f"the {size.cohort_size:,} updates of a round are {_gb(_round_bytes(size))}, "
            f"but {_gb(_free_bytes(nodes))} are free; set a smaller clients.per_round"
        )
    num_gpus = serial_gpu(placement, nodes, reasons)
    stack = _stack_size(placement, size, size.cohort_size, num_gpus, _gpu_bytes(nodes), reasons)
    _check_gpu_memory(num_gpus, stack, size, nodes)
    return Plan(
        mode="serial",
        num_gpus=num_gpus,
        threads=placement.threads,
        stack_size=stack,
        memory_bytes=_round_bytes(size),
        reasons=tuple(reasons),
    )


def _start(placement: PlacementConfig, nodes: tuple[Node, ...], reasons: list[str]) -> str:
    """How actors start: forked where this is possible."""
    is_on_gpu = placement.num_gpus not in ("auto", 0) and any(node.num_gpus for node in nodes)
    obstacle = next((node.fork_obstacle for node in nodes if node.fork_obstacle), "")
    if is_on_gpu:
        obstacle = "CUDA works in no fork"
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
        reasons.append(f"packed: {counted(placement.actors, 'actor')} as asked for")
        return "packed"
    clients, free, most = size.num_clients, _free_bytes(nodes), fitting(placement, nodes, cost)
    start_s, needed = _start_s(clients, nodes, cost), _memory_bytes(clients, size, nodes, cost)
    whom = "the client" if clients == 1 else f"each of {clients:,} clients"
    mode = "actor-per-client" if start_s < START_BUDGET_S and needed <= free / 2 and clients <= most else "packed"
    reasons.append(
        f"{mode}: an actor for {whom} would start in about {start_s:.0f} s "
        f"(auto takes less than {START_BUDGET_S:.0f} s) and take {_gb(needed)} "
        f"(half of what is free: {_gb(free / 2)})" + (f"; {most:,} fit" if clients > most else "")
    )
    return mode


def _num_actors(
    placement: PlacementConfig, size: Size, nodes: tuple[Node, ...], mode: str, cost: Cost, reasons: list[str]
) -> int:
    if mode == "actor-per-client":
        actors = size.num_clients
        if placement.actors not in ("auto", actors):
            raise PlanError(
                f"placement.actors = {placement.actors}, but actor-per-client needs {actors}, one a client; "
                'leave it at "auto", or set placement.mode=packed'
            )
    elif placement.actors == "auto":
        cores = sum(min(int(node.num_cpus), fitting(placement, (node,), cost)) for node in nodes)
        actors = max(1, min(cores, size.cohort_size, _held_by_memory(size, nodes, cost)))
        said = f"one a core, and no more than fit or than the {size.cohort_size:,} of a round"
        reasons.append(f"{counted(actors, 'actor')}: {said}")
    else:
        actors = min(placement.actors, size.num_clients)
        if actors < placement.actors:
            reasons.append(f"{counted(actors, 'actor')}: no more than there are clients")
    return actors


def _check_limits(actors: int, nodes: tuple[Node, ...], cost: Cost) -> None:
    most = sum(allowed(node, cost) for node in nodes)
    if actors > most:
        threads = [f"{n.max_threads:,} threads ({n.threads_limit})" for n in nodes if n.max_threads < UNLIMITED]
        files = [f"{n.max_files:,} open files (ulimit -n)" for n in nodes if n.max_files < UNLIMITED]
        raise PlanError(
            f"{_needed(actors)} {BASE_THREADS + actors * cost.threads:,} threads and "
            f"{BASE_FILES + actors * cost.files:,} open files; the limits leave {' and '.join([*threads, *files])}, "
            f"which allow {counted(most, 'actor')}: raise them, or {_advice(most)}"
        )


def _check_memory(actors: int, size: Size, nodes: tuple[Node, ...], cost: Cost) -> None:
    most = _held_by_memory(size, nodes, cost)
    if actors > most:
        server = f", and {_gb(cost.server_bytes)} for what they are forked from" if cost.server_bytes else ""
        raise PlanError(
            f"{_needed(actors)} {_gb(_memory_bytes(actors, size, nodes, cost))} of memory "
            f"({_gb(cost.num_bytes)} each{server}), but {_gb(_free_bytes(nodes))} are free; {_advice(most)}"
        )


def _needed(actors: int) -> str:
    return f"{counted(actors, 'actor')} need{'s' * (actors == 1)} about"


def _advice(most: int) -> str:
    return "set placement.mode=packed or fewer placement.actors" if most else "set placement.mode=serial"


def _check_gpu_memory(num_gpus: float, stack: int, size: Size, nodes: tuple[Node, ...]) -> None:
    known = _gpu_bytes(nodes)
    needed = GPU_ACTOR_BYTES + GPU_COPIES * stack * size.model_bytes
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
    if num_gpus and gpu_bytes:  # what is left beside the context
        limit = min(limit, int(num_gpus * gpu_bytes - GPU_ACTOR_BYTES) // GPU_COPIES)
    stack = max(1, min(clients, most, limit // max(1, size.model_bytes)))
    where = "are little of a GPU's memory" if num_gpus else "stay in the caches"
    reasons.append(f"stacks of up to {stack}: {stack} x {size.model_bytes / 1e6:.1f} MB of weights {where}")
    return stack


def _round_bytes(size: Size) -> int:
    return size.cohort_size * size.model_bytes  # the matrix [K, D] of a round


def _free_bytes(nodes: tuple[Node, ...]) -> int:
    return sum(node.memory_bytes for node in nodes)


def _memory_bytes(actors: int, size: Size, nodes: tuple[Node, ...], cost: Cost) -> int:
    """Of all actors, of what they are forked from, and of a round."""
    return actors * cost.num_bytes + len(nodes) * cost.server_bytes + _round_bytes(size)


def _held_by_memory(size: Size, nodes: tuple[Node, ...], cost: Cost) -> int:
    """How many actors fit the memory, that of each node and, beside a round, all together."""
    beside_round = (_free_bytes(nodes) - _memory_bytes(0, size, nodes, cost)) // cost.num_bytes
    return max(0, min(beside_round, sum(held_by_memory(node, cost) for node in nodes)))


def _gpu_bytes(nodes: tuple[Node, ...]) -> int:
    """Memory of the smallest GPU that is known of; 0 for none."""
    return min((node.gpu_memory_bytes for node in nodes if node.gpu_memory_bytes), default=0)


def _start_s(actors: int, nodes: tuple[Node, ...], cost: Cost) -> float:
    return actors * cost.start_core_s / max(1.0, min(sum(node.num_cpus for node in nodes), actors))


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.0f} MB"
