"""The Ray to run on: a private one on loopback, the caller's own, or a cluster."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import ray
from ray._private import node as ray_node
from ray._private import parameter, ray_constants, services, utils
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError

from fedsim.errors import PlanError
from fedsim.placement import Node, Plan, capacity

_free_bytes: int | None = None  # when the private Ray started; a process has one Ray at a time


@contextlib.contextmanager
def connect(
    address: str,
    num_cpus: int,
    store_bytes: int,
    *,
    meanwhile: Callable[[], object] = lambda: None,
    debug: bool = False,
) -> Iterator[tuple[Node, ...]]:
    """A Ray to run on: the one this process already uses, a private one, or a cluster.

    Args:
        address: "local" starts a private Ray that is reachable from this machine only and stops it at the end;
            anything else joins that Ray.
        num_cpus: what a private Ray gives out. It starts as many workers at once, before any actor is asked for.
        store_bytes: size of a private Ray's object store.
        meanwhile: called while a private Ray's processes start, if this is possible: an import, say.
        debug: shows what the actors print.

    Yields:
        The nodes of the Ray.

    Raises:
        PlanError: nobody answers at the address.
    """
    global _free_bytes
    if is_connected():  # the caller's own Ray, or the private one of an outer `connect`: left running
        yield _nodes()
        return
    try:
        with _signals_held():
            if address == "local":
                _free_bytes = psutil.virtual_memory().available
                with _private_ray_environment(), _lean_start(meanwhile, debug):
                    ray.init(
                        address="local",
                        num_cpus=num_cpus,
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
        _free_bytes = None


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

    ray.init would take SIGTERM for itself, with an exit of its own that leaves processes behind.
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
        with _replaced(utils, "set_sigterm_handler", lambda handler: None):
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


def free_before_start() -> int | None:
    """Free memory when `connect` started the private Ray that this process uses; None if it uses none or another."""
    return _free_bytes if is_connected() else None


@contextlib.contextmanager
def _private_ray_environment() -> Iterator[None]:
    """What a private Ray's own processes are started with; this process is left as it was."""
    settings = {
        "RAY_worker_niceness": "0",  # the clients are the work, not a background job
        "RAY_preload_python_modules": "fedsim.client",  # torch: workers import it before they are asked for
    }
    added = [name for name in settings if name not in os.environ]
    os.environ.update({name: settings[name] for name in added})
    try:
        # Ray opens its ports on all interfaces, except on systems where it forms no clusters: there, on loopback. The
        # environment variable behind this is read when ray is imported, maybe long ago. A test looks at the ports.
        with _replaced(ray_constants, "ENABLE_RAY_CLUSTER", False):
            yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def _lean_start(meanwhile: Callable[[], object], debug: bool) -> Iterator[None]:
    """Leaves out what a private Ray of one machine does not need; half of the seconds that `ray.init` takes.

    `ray.init` itself has no way to say so. Where another version of Ray has not what is replaced, it starts as it does.
    """
    needed = partial(parameter.RayParams, no_monitor=True, include_log_monitor=debug)  # no autoscaler, no log reader
    with (
        _replaced(parameter, "RayParams", needed),
        _replaced(ray_node.Node, "start_api_server", lambda self, **_: None),  # include_dashboard=False starts one too
        _replaced(services, "get_node", partial(_get_node, services.get_node, meanwhile)),
    ):
        yield


def _get_node(original: Callable[..., Any], meanwhile: Callable[[], object], gcs_address: str, node_id: str) -> Any:
    """The new node, once it has told Ray that it is up: Ray's own look is repeated only every second."""
    with contextlib.suppress(
        Exception
    ):  # what is wrong comes up again where it is needed; here Ray would be half started
        meanwhile()
    client = ray._raylet.GcsClient(address=gcs_address)
    end = time.monotonic() + 30
    while not client.get_all_node_info(timeout=10) and time.monotonic() < end:
        time.sleep(0.01)
    return original(gcs_address, node_id)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Gives an attribute another value for a while, if there is one of that name."""
    if not hasattr(owner, name):
        yield
        return
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def is_on_one_machine() -> bool:
    """Whether this Ray is this machine alone, so that its actors can share the driver's memory."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return len(alive) == 1 and alive[0]["NodeManagerHostname"] == platform.node()


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
