"""The Ray to run on: a private one on loopback, the caller's own, or a cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import ray
from ray._private import ray_constants, services
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError

from fedsim.errors import PlanError
from fedsim.placement import Node, Plan, capacity


@contextlib.contextmanager
def connect(address: str, node: Node, store_bytes: int, *, debug: bool = False) -> Iterator[tuple[Node, ...]]:
    """A Ray to run on: the one this process already uses, a private one, or a cluster.

    Args:
        address: "local" starts a private Ray that is reachable from this machine only and stops it at the end;
            anything else joins that Ray.
        node: this machine, for a private Ray.
        store_bytes: size of a private Ray's object store.
        debug: shows what the actors print.

    Yields:
        The nodes of the Ray.

    Raises:
        PlanError: nobody answers at the address.
    """
    if is_connected():  # the caller's own Ray, left running
        yield _nodes()
        return
    try:
        with _signals_held():
            if address == "local":
                with _private_ray_environment():
                    ray.init(
                        address="local",
                        num_cpus=max(1, int(node.num_cpus)),
                        object_store_memory=store_bytes,
                        include_dashboard=False,
                        log_to_driver=debug,
                        logging_level="ERROR",
                    )
            else:
                _join(address, debug)
        yield _nodes()
    finally:
        ray.shutdown()


def _join(address: str, debug: bool) -> None:
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=debug, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, RayError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PlanError(
            f"no Ray answers at {address!r} ({reason}); start one with `ray start --head`, "
            "or leave placement.address at local"
        ) from None


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Puts Ctrl-C and SIGTERM off until the end: an interrupted ray.init crashes the process when it exits.

    ray.init takes SIGTERM for itself, and its own way out is an abort: the caller's handlers are put back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    held: list[int] = []
    for number in numbers:
        signal.signal(number, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if held:
            signal.raise_signal(held[0])


def _knock(address: str) -> None:
    """Fails at once where nobody listens: `ray.init` would try for many minutes."""
    found = services.canonicalize_bootstrap_address(address)  # resolves auto as `ray.init` does
    host, _, port = found.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def is_connected() -> bool:
    """Whether this process already uses a Ray."""
    return bool(ray.is_initialized())


@contextlib.contextmanager
def _private_ray_environment() -> Iterator[None]:
    """What a private Ray's own processes are started with; this process is left as it was."""
    niceness = os.environ.get("RAY_worker_niceness")
    clusters_allowed = ray_constants.ENABLE_RAY_CLUSTER
    # Ray opens its ports on all interfaces, except on systems where it forms no clusters: there, on loopback. The
    # environment variable behind this is read when ray is imported, which may be long ago. A test looks at the ports.
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.setdefault("RAY_worker_niceness", "0")  # the clients are the work, not a background job
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters_allowed
        if niceness is None:
            del os.environ["RAY_worker_niceness"]


def has_room(plan: Plan, timeout_s: float = 10.0) -> bool:
    """Whether the plan's actors fit what is free; waits a while, as those of a run before may be on their way out."""
    end = time.monotonic() + timeout_s
    while capacity(plan.num_cpus, plan.num_gpus, free_nodes()) < plan.num_actors:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def free_nodes() -> tuple[Node, ...]:
    """What the nodes of this Ray have left: actors that find no room would wait for ever, without a word."""
    free = available_resources_per_node()
    left = [free.get(node["NodeID"], {}) for node in ray.nodes() if node["Alive"]]
    return tuple(Node(r.get("CPU", 0.0), r.get("GPU", 0.0), int(r.get("memory", 0))) for r in left)


def _nodes() -> tuple[Node, ...]:
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return tuple(Node(r.get("CPU", 0.0), r.get("GPU", 0.0), int(r.get("memory", 0))) for r in alive)
