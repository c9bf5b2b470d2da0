"""From checked parts to running hosts: the plan, the Ray it needs, and the pool."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from fedsim.actors import Pool
from fedsim.actors.serial import SerialPool
from fedsim.experiment import Experiment
from fedsim.placement import Node, Plan, Size, local_node, make_plan


def preview(x: Experiment) -> Plan:
    """The plan that `connect` would make, without starting a Ray; a cluster is asked for its nodes.

    Raises:
        PlanError: as `connect`.
    """
    if _is_alone(x):
        return _plan(x, local_node())
    with connect(x) as plan:
        return plan


@contextlib.contextmanager
def connect(x: Experiment, *, debug: bool = False) -> Iterator[Plan]:
    """Connects the Ray that an experiment needs, and makes its plan.

    Args:
        x: the experiment.
        debug: shows what the actors print.

    Raises:
        PlanError: the clients do not fit, or no Ray answers at the address.
    """
    node = local_node()
    if _is_alone(x):
        plan = _plan(x, node)  # refuses what does not fit before a Ray is started
    if x.config.placement.mode == "serial":
        yield plan
        return
    from fedsim.actors import connection  # imports ray, which a serial run does without

    with connection.connect(x.address, node, _store_bytes(x), debug=debug) as nodes:
        plan = _plan(x, *nodes)
        if not connection.has_room(plan):  # others use this Ray: what is left must do, or the plan is refused
            plan = _plan(x, *connection.free_nodes())
        yield plan


@contextlib.contextmanager
def open_pool(x: Experiment, plan: Plan) -> Iterator[Pool]:
    """Starts the hosts of the clients, and stops them at the end."""
    spec = dataclasses.replace(x.spec, stack_size=plan.stack_size)
    if plan.mode == "serial":
        pool: Pool = SerialPool(spec, x.dataset, x.partition)
    else:
        from fedsim.actors.ray_pool import RayPool

        pool = RayPool(
            plan, spec, x.dataset, x.partition, x.config.failures.max_retries, x.cohort_size, x.initial_weights
        )
    with contextlib.closing(pool):
        yield pool


def _is_alone(x: Experiment) -> bool:
    """Whether the run has this machine for itself: serial, or on a private Ray that is not started yet."""
    if x.config.placement.mode == "serial":
        return True
    from fedsim.actors import connection

    return x.address == "local" and not connection.is_connected()


def _plan(x: Experiment, *nodes: Node) -> Plan:
    size = Size(x.config.clients.count, x.cohort_size, x.model_bytes, x.spec.engine)
    return make_plan(x.config.placement, size, nodes)


def _store_bytes(x: Experiment) -> int:
    """What a private Ray's object store must hold: data, weights and a round's updates, twice over."""
    images = x.dataset.train_images.nbytes + x.dataset.test_images.nbytes
    return 2 * (images + x.partition.indices.nbytes + (x.cohort_size + 2) * x.model_bytes) + 100_000_000
