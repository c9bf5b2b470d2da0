"""What the operating system lets a run have: threads and open files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

UNLIMITED = 10**9

_PROC, _CONTROL_GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_RAISED_FILES = 65_536
"""What `ray.init` raises the soft limit of open files to, where the hard one allows it."""


def thread_limit() -> tuple[int, str]:
    """How many threads this process and all that it starts may have together, and the name of the limit that says so.

    What others have is taken off. The user's limit counts the threads of this user, that of a control group those in
    it, and those of the kernel all.
    """
    of_user = _count(_resource_limits("RLIMIT_NPROC")[0])
    if sys.platform != "linux":
        return of_user, "ulimit -u"
    own, others_of_user = _threads()
    limits = [(of_user, others_of_user, "ulimit -u")]
    for name in ("threads-max", "pid_max"):
        limits.append((_number(_PROC / "sys/kernel" / name, UNLIMITED), _all_threads() - own, f"kernel.{name}"))
    for group in _control_groups():
        used = _number(group / "pids.current", 0)
        limits.append((_number(group / "pids.max", UNLIMITED), used - own, f"{group}/pids.max"))
    return min(
        (limit if limit == UNLIMITED else max(0, limit - max(0, others)), name) for limit, others, name in limits
    )


def file_limit() -> int:
    """How many files each process of a private Ray may open."""
    soft, hard = _resource_limits("RLIMIT_NOFILE")
    return _count(max(soft, min(hard, _RAISED_FILES)))


def _resource_limits(name: str) -> tuple[int, int]:
    """The soft and the hard limit of this process, as the system has them."""
    try:
        import resource  # not on every system
    except ImportError:
        return UNLIMITED, UNLIMITED
    return resource.getrlimit(getattr(resource, name))


def _count(limit: int) -> int:
    return UNLIMITED if limit < 0 else min(limit, UNLIMITED)  # infinity is -1, or very large


def _threads() -> tuple[int, int]:
    """Threads of this process and all that it has started, and those of this user beside them."""
    this = psutil.Process()
    family = {process.pid for process in (this, *this.children(recursive=True))}
    own = others_of_user = 0
    for process in psutil.process_iter(["num_threads", "uids"]):
        num_threads, uids = process.info["num_threads"] or 0, process.info["uids"]  # None where it may not be known
        if process.pid in family:
            own += num_threads
        elif uids and uids.real == os.getuid():
            others_of_user += num_threads
    return own, others_of_user


def _all_threads() -> int:
    """Threads of all users; 0 where it is not known."""
    try:
        return int((_PROC / "loadavg").read_text().split()[3].partition("/")[2])
    except (OSError, ValueError, IndexError):
        return 0


def _control_groups() -> Iterator[Path]:
    """The folders of the control groups that count this process's threads: its own, and all above it."""
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers in ("", "pids"):  # version 2, and version 1
            for group in (PurePosixPath(path), *PurePosixPath(path).parents):
                yield _CONTROL_GROUPS / controllers / str(group).lstrip("/")


def _number(path: Path, otherwise: int) -> int:
    """The number in a file, unless there is none: no such file, or "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return otherwise
