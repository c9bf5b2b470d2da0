"""How many actors fit the machines that there are."""

from __future__ import annotations

from fedsim.placement.costs import BASE_FILES, BASE_THREADS, Cost
from fedsim.placement.machine import Node

UNITS = 10_000
"""Ray counts resources in 1/10,000."""


def capacity(num_cpus: float, num_gpus: float, nodes: tuple[Node, ...]) -> int:
    """How many actors of this size fit, node by node, in Ray's own units."""
    cpu, gpu = round(num_cpus * UNITS), round(num_gpus * UNITS)
    total = 0
    for node in nodes:
        by_cpu = round(node.num_cpus * UNITS) // cpu if cpu else 10**9
        if gpu == 0:
            by_gpu = 10**9
        elif gpu <= UNITS:  # a fraction lies on one device
            whole, part = divmod(round(node.num_gpus * UNITS), UNITS)  # a part: what others have left of one
            by_gpu = whole * (UNITS // gpu) + part // gpu
        else:
            by_gpu = round(node.num_gpus * UNITS) // gpu
        total += min(by_cpu, by_gpu)
    return total


def room(num_cpus: float, num_gpus: float, nodes: tuple[Node, ...], cost: Cost) -> int:
    """As `capacity`, within the memory and the limits of each node."""
    return sum(
        min(capacity(num_cpus, num_gpus, (node,)), held_by_memory(node, cost), allowed(node, cost)) for node in nodes
    )


def held_by_memory(node: Node, cost: Cost) -> int:
    """How many actors the free memory of a node holds."""
    return max(0, node.memory_bytes - cost.server_bytes) // cost.num_bytes


def allowed(node: Node, cost: Cost) -> int:
    """How many actors the system's limits allow on a node."""
    by_threads = (node.max_threads - BASE_THREADS) // cost.threads
    return max(0, min(by_threads, (node.max_files - BASE_FILES) // cost.files))
