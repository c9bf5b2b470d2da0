"""What a machine offers to its clients."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, replace

import psutil

from fedsim.placement.system import UNLIMITED, file_limit, thread_limit


@dataclass(frozen=True)
class Node:
    """What one machine offers."""

    num_cpus: float
    num_gpus: float
    memory_bytes: int
    """Free memory."""
    gpu_memory_bytes: int = 0
    """Of each GPU; 0 where it is not known."""
    max_threads: int = UNLIMITED
    """That a run may have, all its processes together."""
    threads_limit: str = "ulimit -u"
    """What limits them."""
    max_files: int = UNLIMITED
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
    max_threads, threads_limit = thread_limit()
    return Node(
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        num_gpus=0,
        memory_bytes=psutil.virtual_memory().available,
        max_threads=max_threads,
        threads_limit=threads_limit,
        max_files=file_limit(),
    )


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
