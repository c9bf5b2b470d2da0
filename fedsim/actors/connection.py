"""The Ray to run on: a private one on loopback, the caller's own, or a cluster."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Collection, Iterator

import ray
from ray._private import worker
from ray._private.state import available_resources_per_node

from fedsim.actors import cluster
from fedsim.actors.private import fork_obstacle, private_ray
from fedsim.placement import Node, Plan, capacity


@contextlib.contextmanager
def connect(
    address: str,
    plan: Plan | None,
    store_bytes: int,
    *,
    meanwhile: Callable[[], object] = lambda: None,
    debug: bool = False,
) -> Iterator[tuple[Node, ...]]:
    """A Ray to run on: the one this process already uses, a private one, or a cluster.

    Args:
        address: "local" starts a private Ray that is reachable from this machine only and stops it at the end;
            anything else joins that Ray.
        plan: what a private Ray must have room for; not needed to join another.
        store_bytes: size of a private Ray's object store.
        meanwhile: called while a private Ray's processes start, if this is possible: an import, say.
        debug: shows what the actors print.

    Yields:
        The nodes of the Ray.

    Raises:
        PlanError: nobody answers at the address, this process is not let in, or a node has other software.
    """
    with contextlib.ExitStack() as stack:
        if not is_connected():  # else the caller's own Ray, or the private one of an outer `connect`: left running
            if address == "local":
                assert plan is not None, "a private Ray is made for a plan"
                stack.enter_context(private_ray(plan, store_bytes, meanwhile, debug=debug))
            else:
                stack.callback(ray.shutdown)
                cluster.join(address, debug=debug)
        elif not is_on_one_machine():
            cluster.check()
        yield live_nodes()


def is_connected() -> bool:
    """Whether this process already uses a Ray."""
    return bool(ray.is_initialized())


def logs() -> str:
    """The folder of this Ray's logs on this machine."""
    node = worker._global_node
    return str(node.get_logs_dir_path()) if node else "/tmp/ray"


def is_on_one_machine() -> bool:
    """Whether this Ray is this machine alone, so that its actors can share the driver's memory."""
    nodes = cluster.alive()
    return len(nodes) == 1 and nodes[0]["NodeManagerHostname"] == platform.node()


def has_room(plan: Plan, timeout_s: float = 10.0) -> bool:
    """Whether the plan's actors fit what is free; waits a while, as those of a run before may be on their way out."""
    end = time.monotonic() + timeout_s
    while capacity(plan.num_cpus, plan.num_gpus, free_nodes()) < plan.num_actors:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def is_full(plan: Plan) -> bool:
    """Whether no other of the plan's actors fits what is free."""
    return capacity(plan.num_cpus, plan.num_gpus, free_nodes()) == 0


def live_nodes() -> tuple[Node, ...]:
    """What the nodes of this Ray have in all."""
    return tuple(_node(node["Resources"]) for node in cluster.alive())


def holds(plan: Plan, without: Collection[str] = ()) -> int:
    """How many of a plan's actors the nodes that live hold, if nobody else uses them; `without` those of these ids."""
    total = 0
    for node in cluster.alive():
        if node["NodeID"] in without:
            continue
        by_cpu = capacity(plan.num_cpus, plan.num_gpus, (_node(node["Resources"]),))
        memory = node["Resources"].get("memory", 0.0)
        total += min(by_cpu, int(memory // plan.actor_bytes)) if plan.actor_bytes else by_cpu
    return total


def live_node_ids() -> frozenset[str]:
    """Ray's names of the nodes that live."""
    return frozenset(node["NodeID"] for node in cluster.alive())


def free_nodes() -> tuple[Node, ...]:
    """What the nodes of this Ray have left: actors that find no room would wait for ever, without a word."""
    free = available_resources_per_node()
    return tuple(_node(free.get(node["NodeID"], {})) for node in cluster.alive())


def _node(resources: dict[str, float]) -> Node:
    cpus, gpus, memory = (resources.get(name, 0.0) for name in ("CPU", "GPU", "memory"))
    return Node(cpus, gpus, int(memory), fork_obstacle=fork_obstacle())
