"""Starts Ray's workers by forking a process that has torch loaded, where importing it would take each two seconds.

How a worker comes to be: Ray starts `launcher` where it would start its own script. The launcher hands itself over to
the `server`, which has imported torch once and forks; the child runs Ray's script. When it is known to Ray
(`registered`), the launcher ends. A launcher that gets no child turns into the plain worker it was meant to be: nothing
is lost but time.

The server dies with the driver, and its children with it, with the server, and with their node's Ray.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAUNCHER = Path(__file__).with_name("launcher.py")
"""What Ray is to start instead of its worker script, with the same arguments, in the server's `environment`."""

_CODE = "import sys; sys.path[:] = {path}; from fedsim.forkserver.server import main; main({address!r}, {driver})"

# Read when the libraries are loaded: no thread pools, as a fork has none of its parent's threads.
_SINGLE_THREADED = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


def is_supported() -> bool:
    """Whether this system can fork workers: Linux from 5.3 on."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open")


def is_forked() -> bool:
    """Whether this process is a worker that was forked."""
    return "FEDSIM_FORKED" in os.environ


class ForkServer:
    """A fork server of this process; it needs a second or two to be ready, and is waited for only by `obstacle`.

    Args:
        worker: Ray's own worker script.
        or_plain: whether a worker that cannot be forked starts all the same, as a plain one; else it ends.
    """

    def __init__(self, worker: Path, *, or_plain: bool = True) -> None:
        self.or_plain = or_plain
        self._folder = Path(tempfile.mkdtemp(prefix="fedsim-"))  # for this user only
        self._socket = self._folder / "socket"
        address = str(self._socket)
        self.environment = {"FEDSIM_FORK_SERVER": address, "FEDSIM_WORKER": str(worker)}
        if or_plain:
            self.environment["FEDSIM_OR_PLAIN"] = "1"
        self._is_ready: bool | None = None
        self._said = b""
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _CODE.format(
                        path=[path for path in sys.path if isinstance(path, str)], address=address, driver=os.getpid()
                    ),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_SINGLE_THREADED},
                process_group=0,  # Ctrl-C is for the driver
            )
        except OSError:
            shutil.rmtree(self._folder)
            raise
        assert self._process.stdout is not None
        self._output = self._process.stdout

    def obstacle(self, timeout_s: float = 10.0) -> str:
        """What keeps it from forking, as its test of itself or later events showed, or "". Waits for the test."""
        if self._is_ready is None:
            self._is_ready = self._read(timeout_s)
        if self._process.poll() is not None:
            return self._last_words()
        if not self._is_ready:
            return f"its test of itself took more than {timeout_s:g} s"
        return "" if self.is_serving() else "the fork server did not give a worker that it was asked for"

    def allow_plain(self) -> None:
        """From now on, a worker that cannot be forked starts as a plain one."""
        self.or_plain = True
        self._folder.mkdir(mode=0o700, exist_ok=True)  # a server that failed has taken it away
        (self._folder / "plain").touch()

    def is_serving(self) -> bool:
        """Whether it can be asked: it is there, and no launcher has asked in vain."""
        return self._process.poll() is None and self._socket.exists()

    def close(self) -> None:
        """Ends the server and all its children."""
        if self._is_ready:
            self._process.terminate()
        else:  # it may not listen to signals yet; children, if there are any, die with it
            self._process.kill()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, timeout_s: float) -> bool:
        """Reads on, until the server says that it is ready; else everything it says."""
        end = time.monotonic() + timeout_s
        while select.select([self._output], [], [], max(0.0, end - time.monotonic()))[0]:
            piece = os.read(self._output.fileno(), 4096)
            self._said += piece
            if not piece:  # it ends
                self._process.wait()
                return False
            if b"\nready\n" in b"\n" + self._said:
                return True
        return False

    def _last_words(self) -> str:
        """The last line of an error in the server, as Python prints it."""
        self._read(0)
        lines = self._said.decode(errors="replace").replace("ready\n", "").split("\n")
        return next(
            (line for line in reversed(lines) if line.strip()),
            f"the fork server was ended ({self._process.returncode})",
        )
