"""The Ray to run on: a private one on loopback, the caller's own, or a cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

import ray
from ray._private import ray_constants, services
from ray.exceptions import RayError

from fedsim.errors import PlanError
from fedsim.placement import Node


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
    on_sigterm = signal.getsignal(signal.SIGTERM)
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
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=debug, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError, RayError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise PlanError(
                f"no Ray answers at {address!r} ({reason}); start one with `ray start --head`, "
                "or leave placement.address at local"
            ) from None
    if on_sigterm is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init takes it, and its own way out is an abort
    try:
        yield _nodes()
    finally:
        ray.shutdown()


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


def _nodes() -> tuple[Node, ...]:
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return tuple(Node(r.get("CPU", 0.0), r.get("GPU", 0.0), int(r.get("memory", 0))) for r in alive)
