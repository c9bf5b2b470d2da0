"""The share of its node that each actor is pinned to."""

from __future__ import annotations

from fedsim.config import PlacementConfig
from fedsim.errors import PlanError, counted
from fedsim.placement.costs import Cost
from fedsim.placement.limits import UNITS, capacity, room
from fedsim.placement.machine import Node


def fitting(placement: PlacementConfig, nodes: tuple[Node, ...], cost: Cost) -> int:
    """How many actors of the asked share fit, within all limits of each node."""
    cpus = 0.0 if placement.num_cpus == "auto" else placement.num_cpus
    gpus = 0.0 if placement.num_gpus == "auto" else placement.num_gpus
    return room(cpus, gpus, nodes, cost)


def gpu_share(placement: PlacementConfig, actors: int, nodes: tuple[Node, ...], reasons: list[str]) -> float:
    """GPUs of each actor: none unless asked for.

    Raises:
        PlanError: what is asked for is not there.
    """
    gpus = int(sum(node.num_gpus for node in nodes))
    share = _floor(1 / -(-actors // gpus)) if gpus else 0.0  # a share lies on one device
    if placement.num_gpus == "auto":
        if gpus:
            reasons.append(f"CPU only: {gpus:g} GPU found, not used unless asked for (placement.num_gpus={share:g})")
        return 0.0
    if capacity(0, placement.num_gpus, nodes) < actors:
        raise PlanError(
            f"{_of(placement.num_gpus, 'GPU', actors)} {'does' if actors == 1 else 'do'} not fit {counted(gpus, 'GPU')}"
            + (f"; at most {share:g} each" if gpus else "; set placement.num_gpus=0")
        )
    return placement.num_gpus


def serial_gpu(placement: PlacementConfig, nodes: tuple[Node, ...], reasons: list[str]) -> float:
    """GPUs of a run in this process, 0 or 1: none unless asked for.

    Raises:
        PlanError: there is none, or a part of one or several are asked for.
    """
    if placement.num_gpus == "auto":
        return gpu_share(placement, 1, nodes, reasons)
    asked = f"placement.num_gpus = {placement.num_gpus:g}"
    if placement.num_gpus not in (0, 1):
        raise PlanError(f"{asked}, but serial mode has a GPU or none; set placement.num_gpus=1")
    if placement.num_gpus and not any(node.num_gpus >= 1 for node in nodes):
        raise PlanError(f"{asked}, but torch finds no GPU here; set placement.num_gpus=0")
    return placement.num_gpus


def cpu_share(placement: PlacementConfig, actors: int, num_gpus: float, nodes: tuple[Node, ...], cost: Cost) -> float:
    """CPUs of each actor: what is asked for, or the largest share, up to one core, of which enough fit, node by node.

    Raises:
        PlanError: what is asked for is not there, or there is less of a CPU for each actor than Ray can count.
    """
    shares = {_floor(min(1.0, node.num_cpus / k)) for node in nodes for k in range(1, actors + 1)}
    best = max((s for s in shares if s > 0 and room(s, num_gpus, nodes, cost) >= actors), default=0.0)
    cpus = " + ".join(f"{node.num_cpus:g}" for node in nodes)
    if placement.num_cpus == "auto":
        if not any(node.num_cpus for node in nodes):
            raise PlanError(f"no CPU for actors on any node ({cpus}): others use them, or Ray was started without")
        if not best:
            raise PlanError(
                f"{actors:,} actors do not fit {_cpus(cpus)}: Ray's smallest share is 0.0001; set fewer actors"
            )
        return best
    if room(placement.num_cpus, num_gpus, nodes, cost) < actors:
        needed = actors * placement.num_cpus
        raise PlanError(
            f"{_of(placement.num_cpus, 'CPU', actors)} need{'s' * (actors == 1)} {_cpus(f'{needed:g}')}, "
            f"but there are {cpus}; at most {best:g} each"
        )
    return placement.num_cpus


def _of(share: float, unit: str, actors: int) -> str:
    """1 actor of 2 CPU, 3 actors of 2 CPU each."""
    return f"{counted(actors, 'actor')} of {share:g} {unit}" + " each" * (actors != 1)


def _cpus(number: str) -> str:
    return f"{number} CPU" + "s" * (number != "1")


def _floor(share: float) -> float:
    return int(share * UNITS + 1e-9) / UNITS
