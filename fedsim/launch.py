"""From a configuration to running hosts: the Ray that it needs, the plan, and the pool."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedsim.actors import Assignment
from fedsim.config import Config
from fedsim.errors import DivergedError, FedsimWarning, PlanError
from fedsim.placement import Node, Plan, Size, cpu_node, local_node, make_plan
from fedsim.resolution import address, resolve
from fedsim.sampling import cohort_size

if TYPE_CHECKING:
    from fedsim.actors import Pool
    from fedsim.actors.ray_pool import RayPool
    from fedsim.experiment import Experiment


@contextlib.contextmanager
def early_ray(config: Config, *, debug: bool = False) -> Iterator[None]:
    """Starts the private Ray that a run of this configuration will use, if it uses one; stops it at the end.

    To be entered before torch is imported: this process and the workers do it while Ray starts.

    Raises:
        ConfigError, PlanError: what can be known to be wrong without torch; nothing was started.
    """
    config = resolve(config)
    placement, clients = config.placement, config.clients
    if placement.mode == "serial" or address(config) != "local" or placement.num_gpus not in ("auto", 0):
        yield
        return
    from fedsim.actors import connection, private

    node = replace(cpu_node(), fork_obstacle=private.fork_obstacle())
    # before model and engine are known, of which only stacks depend; the final plan asks for no more actors
    size = Size(clients.count, cohort_size(clients.per_round, clients.count), model_bytes=0)
    plan = make_plan(placement, size, (node,))
    store_bytes = _early_store_bytes(node.memory_bytes)
    with connection.connect("local", plan, store_bytes, meanwhile=_import_parts, debug=debug):
        yield


def check(x: Experiment) -> None:
    """Lets pass what fits this machine, if the run has it for itself; others are seen when Ray is connected.

    Raises:
        PlanError: it does not.
    """
    if _is_alone(x):
        _plan(x, _this_machine(x))


def preview(x: Experiment) -> Plan:
    """The plan that `connect` would make, without starting a Ray; a cluster is asked for its nodes.

    Raises:
        PlanError: as `connect`.
    """
    if _is_alone(x):
        return _plan(x, _this_machine(x, is_preview=True))
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
        plan = _plan(x, _this_machine(x))  # refuses what does not fit before any actor is asked for
    if x.config.placement.mode == "serial":
        yield plan
        return
    from fedsim.actors import connection, private  # they import ray, which a serial run does without

    with connection.connect(x.address, plan if is_alone else None, _store_bytes(x), debug=debug) as nodes:
        if not is_alone:
            plan = _plan(x, *nodes)
        elif plan.start == "fork" and private.fork_obstacle():
            plan = _plan(x, _this_machine(x))
        if is_alone and (plan.start == "plain" or plan.or_plain):
            private.allow_plain()
        if not connection.has_room(plan):  # others use this Ray: what is left must do, or the plan is refused
            plan = _plan(x, *connection.free_nodes())
        yield plan


@contextlib.contextmanager
def open_pool(x: Experiment, plan: Plan) -> Iterator[Pool]:
    """Starts the hosts of the clients, and stops them at the end."""
    pool: Pool
    if plan.mode == "serial":
        from fedsim.actors.serial import SerialPool

        spec = replace(x.spec, stack_size=plan.stack_size)
        pool = SerialPool(spec, x.dataset, x.partition, "cuda" if plan.num_gpus else "cpu")
    else:
        from fedsim.actors.ray_pool import RayPool

        pool = RayPool(plan, _assignment(x))
    with contextlib.closing(pool):
        yield pool


class Launch(Protocol):
    """How a run gets its hosts: this module, which starts them for it, or a `Warm`, which keeps them for the next."""

    def connect(self, x: Experiment, *, debug: bool = False) -> AbstractContextManager[Plan]:
        """See `connect`."""
        ...

    def open_pool(self, x: Experiment, plan: Plan) -> AbstractContextManager[Pool]:
        """See `open_pool`."""
        ...


class Warm:
    """A `Launch` for runs one after another: a run has the Ray and the actors of the one before if they fit.

    To be closed in the end.
    """

    def __init__(self) -> None:
        self._hosts = contextlib.ExitStack()
        self._plan: Plan | None = None
        self._asked: object = None
        self._pool: RayPool | None = None

    @contextlib.contextmanager
    def connect(self, x: Experiment, *, debug: bool = False) -> Iterator[Plan]:
        """See `connect`."""
        plan = self._next_plan(x)
        if plan is None:
            self.close()
            plan = self._hosts.enter_context(connect(x, debug=debug))
        self._plan, self._asked = plan, _asked(x)
        try:
            yield plan
        except DivergedError:  # it ended between two rounds, and the actors are well
            raise
        except BaseException:  # who knows what its actors are at
            self.close()
            raise

    @contextlib.contextmanager
    def open_pool(self, x: Experiment, plan: Plan) -> Iterator[Pool]:
        """See `open_pool`."""
        if plan.mode == "serial":
            with open_pool(x, plan) as pool:
                yield pool
            return
        if self._pool:
            self._pool.reload(plan, _assignment(x))
        else:
            from fedsim.actors.ray_pool import RayPool

            self._pool = self._hosts.enter_context(contextlib.closing(RayPool(plan, _assignment(x))))
        yield self._pool

    def close(self) -> None:
        """Stops what runs."""
        self._plan = self._pool = None
        self._hosts.close()

    def _next_plan(self, x: Experiment) -> Plan | None:
        """The plan of a run that the hosts of the one before are fit for; None if they are not."""
        before = self._plan
        if before is None or x.config.placement.mode == "serial" or before.mode == "serial":
            return None
        if not _is_alone(x) and _asked(x) == self._asked:  # the plan may have been made by what was free then
            return before
        plan = _plan(x, *_nodes(x))
        return plan if _hosts_of(plan) == _hosts_of(before) else None


def _hosts_of(plan: Plan) -> tuple[Any, ...]:
    """What must be equal for a run to have the actors of another."""
    return plan.mode, plan.num_actors, plan.num_cpus, plan.num_gpus, plan.threads, plan.start, plan.actor_bytes


def _assignment(x: Experiment) -> Assignment:
    return Assignment(
        x.spec, x.dataset, x.partition, x.cohort_size, x.initial_weights, x.config.failures, partial(_replan, x)
    )


def _asked(x: Experiment) -> tuple[Any, ...]:
    """All that a plan depends on, but for what others use of the Ray."""
    return x.config.placement, _size(x), _nodes(x)


def _nodes(x: Experiment) -> tuple[Node, ...]:
    if _is_alone(x):
        return (_this_machine(x),)
    from fedsim.actors import connection

    return connection.live_nodes()


def _is_alone(x: Experiment) -> bool:
    """Whether the run has this machine for itself: serial, or on a private Ray."""
    if x.config.placement.mode == "serial":
        return True
    from fedsim.actors import connection, private

    return x.address == "local" and (private.free_before_start() is not None or not connection.is_connected())


def _this_machine(x: Experiment, *, is_preview: bool = False) -> Node:
    """This machine as a run that is alone has it: the idle workers of an early Ray will be its actors."""
    node = local_node()
    if x.config.placement.mode == "serial":
        return node
    from fedsim.actors import private

    obstacle = private.try_fork() if is_preview else private.fork_obstacle()
    return replace(node, memory_bytes=private.free_before_start() or node.memory_bytes, fork_obstacle=obstacle)


def _replan(x: Experiment) -> Plan | None:
    """A plan for a cluster that nodes have joined; None, with a warning, if they are not fit for it."""
    from fedsim.actors import cluster, connection

    try:
        cluster.check()
        return _plan(x, *connection.live_nodes())
    except PlanError as error:
        warnings.warn(f"the run goes on without the nodes that joined: {error}", FedsimWarning, stacklevel=2)
        return None


def _plan(x: Experiment, *nodes: Node) -> Plan:
    return make_plan(x.config.placement, _size(x), nodes)


def _size(x: Experiment) -> Size:
    return Size(x.config.clients.count, x.cohort_size, x.model_bytes, x.spec.engine)


def _store_bytes(x: Experiment) -> int:
    """What a private Ray's object store must hold: data, weights and a round's updates, twice over."""
    images = x.dataset.train_images.nbytes + x.dataset.test_images.nbytes
    return 2 * (images + x.partition.indices.nbytes + (x.cohort_size + 2) * x.model_bytes) + 100_000_000


def _import_parts() -> None:
    import fedsim.experiment  # noqa: F401 - brings torch, a second's work


def _early_store_bytes(free_bytes: int) -> int:
    """What the object store of an early Ray may grow to, while data and model are unknown."""
    num_bytes = min(free_bytes // 4, 8_000_000_000)
    if Path("/dev/shm").is_dir():  # where Ray puts it, if it fits
        num_bytes = min(num_bytes, int(0.9 * shutil.disk_usage("/dev/shm").free))
    return max(num_bytes, 200_000_000)
