"""A program in a fresh process, and the memory of everything it starts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

OURS = ("driver", "actors")
ROLES = (*OURS, "ray")
FORK_SERVER = "fork server"
RAYS_OWN = (
    "gcs_server",
    "raylet",
    "ray::IDLE",
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
    "ray/_private/",
    "ray/dashboard/",
)
"""What the command lines of Ray's own processes have in them, those of a worker that nobody uses yet among them."""


@dataclass(frozen=True)
class Finished:
    """What is left of a process that ended well."""

    stdout: str
    started: float
    """When it was started, in seconds since the epoch."""
    seconds: float
    """From its start to its end."""
    memory: list[dict[str, float]] = field(default_factory=list)
    """A row a sample: `at`, in seconds since the epoch, and what was seen: the bytes of each of `ROLES`, mostly."""


def pss(root: psutil.Process) -> dict[str, float]:
    """Bytes of each of `ROLES`; what actors are forked from counts as actors."""
    total = dict.fromkeys(ROLES, 0.0)
    for whose, num_bytes in each_pss(root):
        total["actors" if whose == FORK_SERVER else whose] += num_bytes
    return total


def each_pss(root: psutil.Process) -> list[tuple[str, float]]:
    """Role and bytes of a process and each of its descendants: pages that several share are divided among them."""
    found: list[tuple[str, float]] = []
    with contextlib.suppress(psutil.Error):
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # it has just ended
                whose = "driver" if process == root else role(process.cmdline())
                found.append((whose, process.memory_full_info().pss))
    return found


def available(root: psutil.Process) -> dict[str, float]:
    """Bytes that the whole machine has left: quickly read, however many processes there are."""
    return {"available": psutil.virtual_memory().available}


def role(command: Sequence[str]) -> str:
    """Whether a process that the driver started, or one of these did, is a worker, the fork server's or Ray's own."""
    line = " ".join(command)
    # as a word: Ray's own have the launcher's path within one
    if "fedsim.forkserver.server" in line or any(word.endswith("forkserver/launcher.py") for word in command):
        return FORK_SERVER
    return "ray" if any(name in line for name in RAYS_OWN) else "actors"


def run(
    command: Sequence[str],
    *,
    sample_s: float | None = None,
    look: Callable[[psutil.Process], dict[str, float]] = pss,
    variables: Mapping[str, str] | None = None,
) -> Finished:
    """Runs a program to its end; a Ray that the shell knows of is none of its business.

    Args:
        command: program and arguments.
        sample_s: looks at the memory this often, which costs the program some time; None for never.
        look: what it looks at.
        variables: environment variables to set.

    Raises:
        subprocess.CalledProcessError: the program failed; what it said is on stderr.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= variables or {}
    started, start = time.time(), time.perf_counter()
    memory = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**environment, **(variables or {})}
    ) as process:
        root = psutil.Process(process.pid)
        while True:
            try:
                stdout, _ = process.communicate(timeout=sample_s)
                break
            except subprocess.TimeoutExpired:
                memory.append({"at": time.time(), **look(root)})
            except BaseException:
                process.terminate()
                raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Finished(stdout, started, time.perf_counter() - start, memory)
