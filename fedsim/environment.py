"""What a run was made with: versions, machine and git commit, for run.json."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

from fedsim import __version__

_PACKAGES = ("ray", "torch", "torchvision", "numpy", "pandas", "pyarrow")


def versions() -> dict[str, str]:
    """Python's version and those of the packages that can change a result or a file."""
    packages = {name: _version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "fedsim": __version__, **packages}


@functools.cache  # a tenth of what a sweep takes between two runs
def _version(package: str) -> str:
    return importlib.metadata.version(package)


def machine() -> dict[str, Any]:
    """The driver's machine."""
    return {
        "node": platform.node(),
        "platform": platform.platform(),
        "processor": _processor(),
        "num_cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def git_commit() -> str | None:
    """The commit checked out in the current folder, "-dirty" with uncommitted changes; None outside a repository."""
    try:
        git = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        answer = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
