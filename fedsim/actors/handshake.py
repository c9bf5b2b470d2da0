"""Whether a cluster's nodes have what actors need: the driver's own versions, as others would compute other bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedsim.errors import PlanError, first_line

_EQUAL = ("ray", "torch", "numpy")
_NEEDED = ("pydantic", "platformdirs", "tomli-w")
"""What an actor imports besides; their versions change no result."""
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Software:
    """What a process would import."""

    versions: dict[str, str | None]
    """Of Python (its minor version) and of packages; None for what is not installed."""
    fedsim: str | None
    """SHA-256 of its source, as equal version numbers do not make equal checkouts; None where there is none."""


def handshake(nodes: Sequence[dict[str, Any]]) -> list[str]:
    """Asks nodes what their actors would import.

    Args:
        nodes: as `ray.nodes()` lists them.

    Returns:
        The names of the nodes without this fedsim: they have none, or another one.

    Raises:
        PlanError: a node does not answer, or lacks another package in the driver's version.
    """
    own = software()
    found = _ask(nodes)
    for node, other in zip(nodes, found, strict=True):
        _check(node_name(node), other, own)
    return [node_name(node) for node, other in zip(nodes, found, strict=True) if other.fedsim != own.fedsim]


def software() -> Software:
    """What this process would import; without importing it."""
    return Software(*_reporter()((*_EQUAL, *_NEEDED)))


def node_name(node: dict[str, Any]) -> str:
    """How a node is called in messages: nodes in containers may share a hostname, those on one machine an address."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _reporter() -> Callable[[Sequence[str]], tuple[dict[str, str | None], str | None]]:
    def report(packages: Sequence[str]) -> tuple[dict[str, str | None], str | None]:
        import hashlib
        import importlib.metadata
        import importlib.util
        import sys
        from pathlib import Path

        versions: dict[str, str | None] = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
        for package in packages:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = None
        found = importlib.util.find_spec("fedsim")
        if found is None or found.origin is None:
            return versions, None
        digest, folder = hashlib.sha256(), Path(found.origin).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
        return versions, digest.hexdigest()

    return report  # made in here, it travels as code, not as a name to import: the nodes may have no fedsim


def _ask(nodes: Sequence[dict[str, Any]]) -> list[Software]:
    """The nodes' answers. The task takes no CPU: also a node that is full answers."""
    task = ray.remote(num_cpus=0, max_retries=0)(_reporter())
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    answers = [task.options(scheduling_strategy=place).remote((*_EQUAL, *_NEEDED)) for place in places]
    end, found = time.monotonic() + _TIMEOUT_S, []
    for node, answer in zip(nodes, answers, strict=True):
        try:
            found.append(Software(*ray.get(answer, timeout=max(0.0, end - time.monotonic()))))
        except RayError as error:  # GetTimeoutError is one
            raise PlanError(
                f"node {node_name(node)} does not say what is installed there ({first_line(error)}); is it well? "
                "see `ray status`, or leave it out of the cluster"
            ) from None
    return found


def _check(name: str, other: Software, own: Software) -> None:
    for package in ("python", *_EQUAL):
        there, here = other.versions[package], own.versions[package]
        if there != here:
            has = f"{package} {there}" if there else f"no {package}"
            raise PlanError(
                f"node {name} has {has}, this process {here}: results would differ; "
                f"install {package} {here} there, as on all nodes"
            )
    missing = [package for package in _NEEDED if other.versions[package] is None]
    if missing:
        raise PlanError(f"node {name} has no {', '.join(missing)}, which actors import; install fedsim there")
