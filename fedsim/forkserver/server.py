"""The process that has torch loaded and forks: one thread, no thread pool, no CUDA, no gRPC.

It imports Ray only when it is first asked for a worker, with that worker's environment: Ray's library reads its
settings when it is loaded, and keeps them. Workers with other settings are not forked.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

from fedsim.forkserver.rehearsal import rehearse
from fedsim.forkserver.worker import Request, read_request, receive, turn_into_worker

_BEFORE = ("pyarrow", "fedsim.client")
"""Imported before anybody asks."""
_WITH_RAY = (
    "ray._private.workers.default_worker",
    "ray._common.usage.usage_lib",
    "ray._private.arrow_serialization",
    "fedsim.actors.ray_pool",
)
"""Imported for the first worker: what each would import by itself."""
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Where one is, autograd starts threads of it, whatever it computes on and whichever GPUs it sees: no fork after."""
_TEST_S = 10.0


def main(address: str, driver: int) -> None:
    """Serves until the driver or its Ray ends; returns only in a forked process, when its work is done.

    Args:
        address: path of the socket to listen at, alone in its folder.
        driver: process ID of the driver, which started this process.
    """
    server, pid = _Server(address, driver), os.getpid()
    try:
        _import(_BEFORE)
        if not any(Path(device).exists() for device in _GPU_DRIVERS):
            rehearse()
        _settle()
        _test()
        print("ready", flush=True)
        request = server.serve()
    except BaseException:  # in this process, not in a child of it
        server.close()
        raise
    turn_into_worker(request, pid)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _import(modules: tuple[str, ...]) -> None:
    """Imports for all children to come."""
    for name in modules:
        importlib.import_module(name)
    _settle()


def _settle() -> None:
    """Keeps the garbage collector from writing into what children will share.

    Raises:
        RuntimeError: threads run, which a fork would lack.
    """
    tasks = Path("/proc/self/task").iterdir()
    threads = [(task / "comm").read_text().strip() for task in tasks]
    if len(threads) > 1:
        raise RuntimeError(f"threads run in it, which no fork would have: {', '.join(threads)}")
    gc.collect()
    gc.freeze()


def _test() -> None:
    """Lets a child train.

    Raises:
        RuntimeError: it failed.
    """
    child = os.fork()
    if child == 0:
        try:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as an actor that computes on CPUs
            rehearse()
        except BaseException:  # noqa: BLE001 - whatever it is: it must not get to the parent's code
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + _TEST_S
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            raise RuntimeError(f"a forked process hung for {_TEST_S:g} s")
        time.sleep(0.005)
    if found[1] != 0:
        raise RuntimeError(f"a forked process failed with exit code {os.waitstatus_to_exitcode(found[1])}")


def _fork() -> int | None:
    """As `os.fork`; None where the system has no room for another process."""
    try:
        return os.fork()
    except OSError:
        return None


class _Server:
    """See `main` for the arguments."""

    def __init__(self, address: str, driver: int) -> None:
        self._folder = Path(address).parent
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(address)
        self._listener.listen(1024)
        self._signals, self._signals_in = socket.socketpair()
        self._signals_in.setblocking(False)
        signal.set_wakeup_fd(self._signals_in.fileno())
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda number, frame: None)  # read from the socket
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._answer)
        self._selector.register(self._signals, selectors.EVENT_READ, self._take_signals)
        self._children: set[int] = set()
        self._launchers: dict[int, socket.socket] = {}  # of children that Ray does not know yet
        self._settings: dict[bytes, bytes] | None = None  # of the Ray that has been imported
        self._watched: list[int] = []  # processes whose end is the server's
        self._watch(driver)
        if os.getppid() != driver:  # it has ended already
            self._end()

    def serve(self) -> Request:
        """Forks on request; returns, in each child, the request."""
        while True:
            for key, _ in self._selector.select():
                request: Request | None = key.data()
                if request is not None:
                    return request

    def close(self) -> None:
        """Leaves no file behind."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _watch(self, pid: int) -> None:
        try:
            self._watched.append(os.pidfd_open(pid))
        except ProcessLookupError:
            self._end()
        self._selector.register(self._watched[-1], selectors.EVENT_READ, self._end)

    def _end(self) -> None:
        """Ends the children and this process."""
        for child in self._children:
            os.kill(child, signal.SIGKILL)
        for child in self._children:
            os.waitpid(child, 0)
        self.close()
        os._exit(0)

    def _answer(self) -> Request | None:
        try:
            launcher, _ = self._listener.accept()
        except OSError:  # it is gone, or there are too many files
            return None
        standard = receive(launcher)
        request = read_request(launcher, standard) if len(standard) == 3 else None
        child = _fork() if request and self._has_its_ray(request) else None
        if child == 0:
            self._let_go()
            return request
        for file in standard:
            os.close(file)
        if child is None:
            launcher.close()
            return None
        self._children.add(child)
        self._launchers[child] = launcher
        self._selector.register(launcher, selectors.EVENT_READ, lambda: self._take_leave(child, launcher))
        with contextlib.suppress(OSError):
            launcher.send(b"f")
        return None

    def _has_its_ray(self, request: Request) -> bool:
        """Whether Ray is loaded with the settings of the request; the first one decides them."""
        if self._settings is None:
            self._settings = request.settings
            os.environb.clear()
            os.environb.update(request.environment)
            _import(_WITH_RAY)
            self._watch(int(self._settings[b"RAY_RAYLET_PID"]))
        return request.settings == self._settings

    def _take_leave(self, child: int, launcher: socket.socket) -> None:
        """A launcher ends: its child is known to Ray, or must go too."""
        if self._launchers.get(child) is not launcher:  # its child has just ended, too
            return
        self._forget_launcher(child)
        said = b""
        with contextlib.suppress(OSError):
            said = launcher.recv(1)
        launcher.close()
        if said != b"d":
            os.kill(child, signal.SIGKILL)

    def _take_signals(self) -> None:
        if signal.SIGTERM in self._signals.recv(4096):
            self._end()
        while self._children and (child := os.waitpid(-1, os.WNOHANG)[0]):
            self._children.remove(child)
            if child in self._launchers:
                self._forget_launcher(child).close()  # it will be a plain worker

    def _forget_launcher(self, child: int) -> socket.socket:
        launcher = self._launchers.pop(child)
        self._selector.unregister(launcher)
        return launcher

    def _let_go(self) -> None:
        """Gives up, in a child, what is the server's."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        self._selector.close()
        for end in (self._listener, self._signals, self._signals_in, *self._launchers.values()):
            end.close()
        for file in self._watched:
            os.close(file)
