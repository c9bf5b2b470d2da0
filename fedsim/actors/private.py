"""A private Ray: on this machine only, reachable from nowhere else, started with what the plan needs and no more."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import node as ray_node
from ray._private import parameter, ray_constants, services, utils
from ray._private import worker as ray_worker

from fedsim.errors import PlanError, first_line
from fedsim.forkserver import LAUNCHER, ForkServer, is_supported
from fedsim.placement import Plan

TESTED_RAY = ("2.60",)
"""Minor versions of Ray whose workers can be forked; a test looks whether the installed one is as it was."""


@dataclass(frozen=True)
class _PrivateRay:
    free_bytes: int
    """Free memory before it was started."""
    fork_server: ForkServer | None


_running: _PrivateRay | None = None  # a process has one Ray at a time


def free_before_start() -> int | None:
    """Free memory when the private Ray that this process uses was started; None if it uses none or another."""
    return _running.free_bytes if _running and ray.is_initialized() else None


def fork_obstacle() -> str:
    """Why the actors of this process's Ray cannot be forked; "" if they can. Of a private Ray, if there is none yet."""
    if not is_supported():
        return "it takes Linux 5.3 or later"
    if not any(ray.__version__.startswith(f"{minor}.") for minor in TESTED_RAY):
        return f"not tried with Ray {ray.__version__}, only with {', '.join(TESTED_RAY)}"
    if not ray.is_initialized():
        return ""
    if _running is None:
        return "fedsim did not start this Ray"
    return _running.fork_server.obstacle() if _running.fork_server else "this Ray was started for plain actors"


def allow_plain() -> None:
    """Lets workers that cannot be forked start as plain ones: a plan that was made since has room for them."""
    if _running and _running.fork_server:
        _running.fork_server.allow_plain()


def failure() -> str:
    """Why nothing can come of a private Ray any more; "" as long as it is well, and of any other Ray."""
    if _running is None:
        return ""
    node = ray_worker._global_node
    dead = sorted({kind for kind, _ in node.dead_processes()} & {"raylet", "gcs_server"}) if node else []
    if dead:  # Ray itself would end this process soon, without a word to Python
        return f"Ray's own process {dead[0]} died"
    server = _running.fork_server
    if server is None or server.or_plain or server.is_serving():
        return ""
    return (
        f"actors cannot be forked any more ({server.obstacle()}), and as many plain ones do not fit the machine; "
        "start again, or set placement.mode=packed"
    )


def try_fork() -> str:
    """As `fork_obstacle`, before there is a Ray: tries a fork server for a moment."""
    found = fork_obstacle()
    if found or ray.is_initialized():
        return found
    server = ForkServer(_worker_script())
    with contextlib.closing(server):
        return server.obstacle()


@contextlib.contextmanager
def private_ray(plan: Plan, store_bytes: int, meanwhile: Callable[[], object], *, debug: bool) -> Iterator[None]:
    """Starts a Ray for the actors of a plan, and stops it at the end.

    Args:
        plan: what it must have room for.
        store_bytes: size of its object store.
        meanwhile: called while its processes start, if this is possible: an import, say.
        debug: shows what the actors print.
    """
    global _running
    free_bytes = psutil.virtual_memory().available
    with contextlib.ExitStack() as stack:
        server = None
        if plan.start == "fork":
            server = ForkServer(_worker_script(), or_plain=plan.or_plain)
            stack.callback(server.close)
        stack.callback(ray.shutdown)
        with (
            signals_held(),
            _environment(server),
            _on_loopback(),
            _launched(server),
            _lean_start(meanwhile, debug),
        ):
            _init(plan, store_bytes, debug)
        _running = _PrivateRay(free_bytes, server)
        try:
            with replaced(ray_worker, "print_to_stdstream", partial(_show, ray_worker.print_to_stdstream)):
                yield
        finally:
            _running = None


def _init(plan: Plan, store_bytes: int, debug: bool) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=math.ceil(plan.num_actors * plan.num_cpus),  # it starts a plain worker for each at once
            object_store_memory=store_bytes,
            include_dashboard=False,
            log_to_driver=debug,
            logging_level="ERROR",
        )
    except Exception as error:  # whatever it is, Ray does not run, and nothing was done yet
        raise PlanError(
            f"Ray cannot be started on this machine: {first_line(error)}. It needs room in /tmp/ray (RAY_TMPDIR names "
            "another folder) and a file in ~/.ray (RAY_AUTH_TOKEN_PATH names another); "
            "placement.mode=serial does without Ray"
        ) from error


_HUSHED = (
    "worker processes have been started",  # how many actors there are, said again for every few that start
    "A worker died or was killed while executing a task",  # fedsim says so, in a line that is not a page
)


def _show(original: Callable[..., None], message: dict[str, Any], *arguments: Any, **named: Any) -> None:
    """What Ray has to say, except what is no news."""
    if not any(hushed in line for line in message.get("lines", ()) for hushed in _HUSHED):
        original(message, *arguments, **named)


def _worker_script() -> Path:
    return Path(ray_node.__file__).parent / "workers" / "default_worker.py"


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
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
        with replaced(utils, "set_sigterm_handler", lambda handler: None):
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if held:
            signal.raise_signal(held[0])


@contextlib.contextmanager
def _environment(server: ForkServer | None) -> Iterator[None]:
    """What a private Ray's own processes are started with; this process is left as it was."""
    settings = {
        "RAY_worker_niceness": "0",  # the clients are the work, not a background job
        "RAY_preload_python_modules": "fedsim.client",  # torch: workers import it before they are asked for
    }
    own: dict[str, str] = {}
    if server:
        settings |= {
            # a child waits for others more than it works, and more than these would keep the server from its turn
            "RAY_worker_maximum_startup_concurrency": str(4 * (os.cpu_count() or 1)),
            "RAY_prestart_worker_first_driver": "0",  # these would have other settings than those for actors
            "RAY_worker_register_timeout_seconds": "20",  # a worker that dies just then is noticed only after it
        }
        modules = os.environ.get("RAY_preload_python_modules", "fedsim.client")
        own = server.environment | {"RAY_preload_python_modules": f"{modules},fedsim.forkserver.registered"}
    before = dict(os.environ)
    os.environ.update({name: value for name, value in settings.items() if name not in before} | own)
    try:
        yield
    finally:
        for name in {**settings, **own}:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray opens its ports on all interfaces, except on systems where it forms no clusters: there, on loopback.

    The environment variable behind this is read when ray is imported, maybe long ago. A test looks at the ports.
    """
    with replaced(ray_constants, "ENABLE_RAY_CLUSTER", False):
        yield


@contextlib.contextmanager
def _lean_start(meanwhile: Callable[[], object], debug: bool) -> Iterator[None]:
    """Leaves out what a private Ray of one machine does not need; half of the seconds that `ray.init` takes.

    `ray.init` itself has no way to say so. Where another version of Ray has not what is replaced, it starts as it does.
    """
    needed = partial(parameter.RayParams, no_monitor=True, include_log_monitor=debug)  # no autoscaler, no log reader
    with (
        replaced(parameter, "RayParams", needed),
        replaced(ray_node.Node, "start_api_server", lambda self, **_: None),  # include_dashboard=False starts one too
        replaced(services, "get_node", partial(_get_node, services.get_node, meanwhile)),
    ):
        yield


@contextlib.contextmanager
def _launched(server: ForkServer | None) -> Iterator[None]:
    """Lets Ray start the launcher as its worker script, in an interpreter that imports next to nothing."""
    if server is None:
        yield
        return
    flags = services._site_flags
    with (
        replaced(parameter, "RayParams", partial(parameter.RayParams, worker_path=str(LAUNCHER))),
        replaced(services, "_site_flags", lambda: ["-S", *flags()]),
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
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
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
