"""What a machine offers to its clients."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, replace

import psutil

_UNLIMITED = 10**9


@dataclass(frozen=True)
class Node:
    """What one machine offers."""

    num_cpus: float
    num_gpus: float
    memory_bytes: int
    """Free memory."""
    gpu_memory_bytes: int = 0
    """Of each GPU; 0 where it is not known."""
    max_threads: int = _UNLIMITED
    """That this user may start, all processes together."""
    max_files: int = _UNLIMITED
    """That a process may open."""
    fork_obstacle: str = "fedsim did not start this Ray"
    """Why actors cannot be forked here; "" if they can."""


def local_node() -> Node:
    """This machine, as this process may use it."""
    import torch  # counts GPUs without starting CUDA

    gpus = torch.cuda.device_count()
    return replace(cpu_node(), num_gpus=gpus, gpu_memory_bytes=_gpu_memory_bytes() if gpus else 0)


def cpu_node() -> Node:
    """This machine without its GPUs, which only torch can count: it need not be imported yet."""
    return Node(
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        num_gpus=0,
        memory_bytes=psutil.virtual_memory().available,
        max_threads=_limit("RLIMIT_NPROC"),
        max_files=_limit("RLIMIT_NOFILE"),
    )


def _limit(name: str) -> int:
    """A soft limit of the system, for this process."""
    try:
        import resource  # not on every system
    except ImportError:
        return _UNLIMITED
    limit = resource.getrlimit(getattr(resource, name))[0]
    return _UNLIMITED if limit == resource.RLIM_INFINITY else int(limit)


def _gpu_memory_bytes() -> int:
    """Of the smallest GPU; 0 where the driver's own tool does not say. Asking torch would start CUDA."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    command = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return min(int(line) for line in answer.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0
