"""From checked parts to running hosts: the plan, the Ray it needs, and the pool."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

from fedsim.actors import Pool
from fedsim.actors.serial import SerialPool
from fedsim.experiment import Experiment
from fedsim.placement import Node, Plan, local_node, make_plan


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
    is_alone = _is_alone(x)
    if is_alone:
        plan = _plan(x, local_node())  # refuses what does not fit before a Ray is started
    if x.config.placement.mode == "serial":
        yield plan
        return
    from fedsim.actors import connection  # imports ray, which a serial run does without

    # A private Ray gets no more CPUs than the actors are pinned to: it starts a worker for each at once.
    num_cpus = math.ceil(plan.num_actors * plan.num_cpus) if is_alone else 0
    with connection.connect(x.address, num_cpus, _store_bytes(x), debug=debug) as nodes:
        if not is_alone:
            plan = _plan(x, *nodes)
        if not connection.has_room(plan):  # others use this Ray: what is left must do, or the plan is refused
            plan = _plan(x, *connection.free_nodes())
        yield plan


@contextlib.contextmanager
def open_pool(x: Experiment, plan: Plan) -> Iterator[Pool]:
    """Starts the hosts of the clients, and stops them at the end."""
    if plan.mode == "serial":
        pool: Pool = SerialPool(x.spec, x.dataset, x.partition)
    else:
        from fedsim.actors.ray_pool import RayPool

        pool = RayPool(plan, x.spec, x.dataset, x.partition, x.config.failures.max_retries)
    with contextlib.closing(pool):
        yield pool


def _is_alone(x: Experiment) -> bool:
    """Whether the run has this machine for itself: serial, or on a private Ray that is not started yet."""
    if x.config.placement.mode == "serial":
        return True
    from fedsim.actors import connection

    return x.address == "local" and not connection.is_connected()


def _plan(x: Experiment, *nodes: Node) -> Plan:
    return make_plan(
        x.config.placement,
        num_clients=x.config.clients.count,
        cohort_size=x.cohort_size,
        model_bytes=x.model_bytes,
        nodes=nodes,
    )


def _store_bytes(x: Experiment) -> int:
    """What a private Ray's object store must hold: data, weights and a round's updates, twice over."""
    images = x.dataset.train_images.nbytes + x.dataset.test_images.nbytes
    return 2 * (images + x.partition.indices.nbytes + (x.cohort_size + 2) * x.model_bytes) + 100_000_000
