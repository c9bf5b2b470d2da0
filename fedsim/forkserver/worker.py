"""A worker to be forked: what its launcher hands over, and how a child of the server becomes it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedsim.forkserver import LAUNCHER

_OWN = (b"FEDSIM_FORK_SERVER", b"FEDSIM_WORKER", b"FEDSIM_OR_PLAIN")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Request:
    """A launcher, and all in which its worker is to be like it."""

    launcher: socket.socket
    standard: tuple[int, ...]
    """Its standard input, output and error."""
    arguments: list[str]
    environment: dict[bytes, bytes]
    folder: str
    group: int
    oom_score: str
    files: tuple[int, int]
    """How many it may open: the soft and the hard limit."""

    @property
    def settings(self) -> dict[bytes, bytes]:
        """What Ray's library reads when it is loaded."""
        return {name: value for name, value in self.environment.items() if name.startswith(b"RAY_")}


def receive(launcher: socket.socket) -> list[int]:
    """The files that a launcher sends; none if it is gone, or is another user's."""
    launcher.settimeout(1.0)
    with contextlib.suppress(OSError):
        if _peer(launcher)[1] == os.getuid():
            return socket.recv_fds(launcher, 1, 3)[1]
    return []


def read_request(launcher: socket.socket, standard: list[int]) -> Request | None:
    """What else a launcher has, from where the system shows it; None if it is gone, or is none."""
    process = Path(f"/proc/{_peer(launcher)[0]}")
    with contextlib.suppress(OSError, ValueError):
        arguments = [os.fsdecode(word) for word in (process / "cmdline").read_bytes().split(b"\0")[:-1]]
        pairs = [pair.partition(b"=") for pair in (process / "environ").read_bytes().split(b"\0")[:-1]]
        return Request(
            launcher,
            tuple(standard),
            arguments[arguments.index(str(LAUNCHER)) + 1 :],
            {name: value for name, _, value in pairs},
            str((process / "cwd").readlink()),
            os.getpgid(int(process.name)),
            (process / "oom_score_adj").read_text(),
            resource.prlimit(int(process.name), resource.RLIMIT_NOFILE),
        )
    return None


def _peer(launcher: socket.socket) -> tuple[int, int]:
    """Process ID and user ID of a launcher."""
    pid, user, _ = struct.unpack("3i", launcher.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, user


def turn_into_worker(request: Request, server: int) -> None:
    """Gives this process, a child of the server, everything that Ray's worker would have."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:  # it ended before it could be bound to it
        os._exit(1)
    try:
        os.setpgid(0, request.group)  # Ray ends a worker with its group
    except OSError:
        os.setpgid(0, 0)
    Path("/proc/self/oom_score_adj").write_text(request.oom_score)
    resource.setrlimit(resource.RLIMIT_NOFILE, request.files)
    np.random.seed()  # noqa: NPY002 - else all would draw the same, as the other generators see to by themselves
    for number, file in enumerate(request.standard):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request.folder)
    worker = os.fsdecode(request.environment[b"FEDSIM_WORKER"])
    os.environb.clear()
    os.environb.update({name: value for name, value in request.environment.items() if name not in _OWN})
    os.environ["FEDSIM_FORKED"] = "1"
    os.environ["FEDSIM_LAUNCHER"] = str(request.launcher.detach())
    sys.argv = [worker, *request.arguments]
    sys.path.insert(0, os.path.dirname(worker))  # noqa: PTH120
