import dataclasses
import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsim.config import PlacementConfig
from fedsim.errors import PlanError
from fedsim.placement import Node, Plan, Size, capacity, cpu_node, local_node, make_plan, system
from fedsim.placement import machine as machine_module
from fedsim.placement import plan as placement
from fedsim.placement.costs import BASE_FILES, BASE_THREADS, COSTS, FORKED, PLAIN

GB = 10**9
MLP = 50_890 * 4


def machine(num_cpus: float = 4, num_gpus: float = 0, memory_gb: float = 64) -> Node:
    """A node whose actors are plain."""
    return Node(num_cpus, num_gpus, int(memory_gb * GB), fork_obstacle="it is too old")


def forking(num_cpus: float = 4, num_gpus: float = 0, memory_gb: float = 64) -> Node:
    """A node whose actors can be forked."""
    return dataclasses.replace(machine(num_cpus, num_gpus, memory_gb), fork_obstacle="")


def planned(
    *nodes: Node,
    clients: int = 10,
    cohort: int | None = None,
    model_bytes: int = MLP,
    engine: str = "stacked",
    **asked: Any,
) -> Plan:
    size = Size(clients, clients if cohort is None else cohort, model_bytes, engine)
    return make_plan(PlacementConfig(**asked), size, nodes or (machine(),))


def refused(*nodes: Node, **asked: Any) -> str:
    with pytest.raises(PlanError) as caught:
        planned(*nodes, **asked)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert caught.value.exit_code == 2
    return message


# ---------------------------------------------------------------- auto


@pytest.mark.parametrize(
    ("clients", "node", "mode"),
    [
        (2, machine(2), "actor-per-client"),  # 2 s
        (10, machine(8), "actor-per-client"),  # 2.5 s
        (10, machine(2), "packed"),  # 10 s
        (79, machine(16, memory_gb=1000), "actor-per-client"),  # just below 10 s
        (81, machine(16, memory_gb=1000), "packed"),  # just above
        (1000, machine(64, memory_gb=1000), "packed"),
        (1000, machine(1000, memory_gb=1000), "actor-per-client"),
        (10, machine(8, memory_gb=8.1), "actor-per-client"),  # 4.00 GB of 4.05
        (10, machine(8, memory_gb=7.9), "packed"),  # 4.00 GB of 3.95
        (1, machine(0.5), "actor-per-client"),
    ],
)
def test_auto_gives_each_client_an_actor_while_start_and_memory_allow(clients, node, mode):
    plan = planned(node, clients=clients)
    assert plan.mode == mode
    if mode == "actor-per-client":
        assert plan.num_actors == clients
    else:
        assert plan.num_actors == min(int(node.num_cpus), clients)
    whom = f"each of {clients:,} clients" if clients > 1 else "the client"
    assert plan.reasons[1].startswith(f"{mode}: an actor for {whom} would start in about ")


def test_auto_counts_the_updates_of_a_round_as_memory():
    """10 actors of 0.4 GB and 10 updates of 0.1 GB are 5 GB."""
    assert planned(machine(8, memory_gb=10.1), model_bytes=GB // 10).mode == "actor-per-client"
    assert planned(machine(8, memory_gb=9.9), model_bytes=GB // 10).mode == "packed"
    assert planned(machine(8, memory_gb=9.9), model_bytes=GB // 10, cohort=1).mode == "actor-per-client"


def test_auto_says_what_it_counted():
    assert planned(machine(2)).reasons[1] == (
        "packed: an actor for each of 10 clients would start in about 10 s (auto takes less than 10 s) "
        "and take 4.0 GB (half of what is free: 32.0 GB)"
    )


def test_the_predictions_of_a_plan():
    plan = planned(machine(4), mode="actor-per-client", model_bytes=GB)
    assert plan.memory_bytes == 10 * PLAIN.num_bytes + 10 * GB
    assert plan.start_s == 10 * PLAIN.start_core_s / 4
    assert planned(machine(16), mode="actor-per-client").start_s == PLAIN.start_core_s


# ---------------------------------------------------------------- modes


def test_serial_has_no_actors_and_fits_everywhere():
    plan = planned(machine(0, memory_gb=0.5), mode="serial", threads=3, num_cpus=64, clients=10**6, cohort=1000)
    message = refused(machine(2, memory_gb=0.1), mode="serial", clients=10**6, cohort=1000)
    assert message.startswith("the 1,000 updates of a round are 0.2 GB, but 0.1 GB are free")
    assert (plan.mode, plan.num_actors, plan.num_cpus, plan.num_gpus, plan.threads) == ("serial", 0, 0.0, 0.0, 3)
    assert plan.reasons[0] == "serial: as asked for, no Ray"


def test_one_actor_is_called_one():
    assert any(reason.startswith("1 actor: one a core") for reason in planned(machine(1), mode="packed").reasons)
    assert "packed: 1 actor as asked for" in planned(machine(4), actors=1).reasons
    message = refused(machine(1), mode="packed", actors=1, num_cpus=2)
    assert message == "1 actor of 2 CPU needs 2 CPUs, but there are 1; at most 1 each"
    message = refused(machine(4), mode="packed", actors=1, num_gpus=1)
    assert message == "1 actor of 1 GPU does not fit 0 GPUs; set placement.num_gpus=0"


def test_actor_per_client_shares_the_machine_evenly():
    plan = planned(machine(4), mode="actor-per-client")
    assert (plan.mode, plan.num_actors, plan.num_cpus, plan.num_gpus) == ("actor-per-client", 10, 0.4, 0.0)
    assert planned(machine(64), mode="actor-per-client").num_cpus == 1.0, "a core is enough for one thread"
    assert plan.reasons == (
        "plain actors: they cannot be forked here (it is too old)",
        "actor-per-client: as asked for",
    )


def test_packed_has_an_actor_a_core_and_none_that_a_round_leaves_idle():
    assert planned(machine(4), mode="packed", clients=100, cohort=10).num_actors == 4
    assert planned(machine(16), mode="packed", clients=100, cohort=10).num_actors == 10
    assert planned(machine(0.5), mode="packed").num_actors == 1
    assert planned(machine(4.9), mode="packed").num_actors == 4
    assert planned(machine(4), mode="packed", clients=100).num_cpus == 1.0


def test_packed_with_a_number_of_actors():
    plan = planned(machine(4), mode="packed", actors=6, clients=100, cohort=2)
    assert (plan.num_actors, plan.num_cpus) == (6, 0.6666)
    few = planned(machine(4), mode="packed", actors=50, clients=3)
    assert few.num_actors == 3
    assert "3 actors: no more than there are clients" in few.reasons


def test_actor_per_client_takes_no_other_number_of_actors():
    message = refused(mode="actor-per-client", actors=4)
    assert "placement.actors = 4" in message
    assert "needs 10" in message
    assert "placement.mode=packed" in message
    assert planned(mode="actor-per-client", actors=10).num_actors == 10


def test_threads_are_handed_on():
    assert [planned(mode=mode, threads=2).threads for mode in ("auto", "packed", "serial")] == [2, 2, 2]


# ---------------------------------------------------------------- ways to start


def test_actors_are_forked_where_this_is_possible():
    plan = planned(forking(), clients=4)
    assert (plan.start, plan.reasons[0]) == ("fork", "forked actors: from a process that has torch loaded")
    assert planned(forking(), clients=4, start="fork") == plan


def test_auto_starts_plain_actors_where_forking_is_impossible_and_says_why():
    plan = planned(machine(), clients=4)
    assert (plan.start, plan.reasons[0]) == ("plain", "plain actors: they cannot be forked here (it is too old)")
    unknown = Node(4, 0, 64 * GB)
    assert planned(unknown, clients=4).start == "plain", "of a node that nobody asked"


@pytest.mark.parametrize("node", [machine(), forking()], ids=["machine", "forking"])
def test_plain_actors_as_asked_for(node):
    plan = planned(node, clients=4, start="plain")
    assert (plan.start, plan.reasons[0]) == ("plain", "plain actors: as asked for")


@pytest.mark.parametrize("mode", ["auto", "actor-per-client", "packed"])
def test_forking_that_is_impossible_is_refused_with_the_reason(mode):
    message = refused(machine(), mode=mode, start="fork")
    assert message == 'actors cannot be forked here: it is too old; set placement.start to "auto" or "plain"'


@pytest.mark.parametrize("node", [machine(), forking()], ids=["machine", "forking"])
def test_serial_has_nothing_to_fork(node):
    assert refused(node, mode="serial", start="fork") == (
        "serial mode starts no actors: there is nothing to fork; leave placement.start at auto"
    )
    plan = planned(node, mode="serial")
    assert (plan.start, plan.or_plain, plan.start_s) == ("", False, 0.0)


def test_one_node_that_cannot_fork_makes_all_actors_plain():
    nodes = forking(), machine(), forking()
    plan = planned(*nodes, mode="packed")
    assert (plan.start, plan.actor_bytes) == ("plain", PLAIN.num_bytes)
    assert plan.reasons[0] == "plain actors: they cannot be forked here (it is too old)"
    assert "cannot be forked here: it is too old" in refused(*nodes, mode="packed", start="fork")
    able = planned(nodes[0], nodes[2], mode="packed", start="fork")
    assert (able.start, able.actor_bytes) == ("fork", FORKED.num_bytes)


@pytest.mark.parametrize(("node", "cost"), [(machine, PLAIN), (forking, FORKED)], ids=["plain", "fork"])
@pytest.mark.parametrize("cpus", [2, 3, 16])
def test_auto_reaches_as_far_as_the_budget_of_start_up(node, cost, cpus):
    """Forked actors reach 13 times as far: to 133 clients on two cores, where plain ones reach 9."""
    most = math.ceil(placement.START_BUDGET_S * cpus / cost.start_core_s) - 1
    last, beyond = (planned(node(cpus, memory_gb=10**4), clients=clients) for clients in (most, most + 1))
    assert (last.mode, last.num_actors, beyond.mode) == ("actor-per-client", most, "packed")
    assert last.start_s < placement.START_BUDGET_S <= last.start_s + cost.start_core_s / cpus


def test_auto_counts_what_actors_are_forked_from_as_memory():
    """100 actors of 50 MB and their server's 300 MB are 5.3 GB."""
    fits, short = forking(8, memory_gb=10.7), forking(8, memory_gb=10.5)
    assert planned(fits, clients=100, model_bytes=0).mode == "actor-per-client"
    plan = planned(short, clients=100, model_bytes=0)
    assert plan.mode == "packed"
    assert plan.reasons[1] == (
        "packed: an actor for each of 100 clients would start in about 3 s (auto takes less than 10 s) "
        "and take 5.3 GB (half of what is free: 5.2 GB)"
    )


def test_the_predictions_of_a_plan_of_forked_actors():
    plan = planned(forking(4), mode="actor-per-client", model_bytes=GB)
    assert plan.memory_bytes == 10 * FORKED.num_bytes + FORKED.server_bytes + 10 * GB
    assert plan.start_s == 10 * FORKED.start_core_s / 4
    two = planned(forking(4), forking(4), mode="actor-per-client", model_bytes=GB)
    assert two.memory_bytes == plan.memory_bytes + FORKED.server_bytes, "each node has its own"


def test_memory_for_forked_actors_that_is_not_there():
    few, asked = forking(64, memory_gb=15.2), {"mode": "actor-per-client", "clients": 300, "model_bytes": 0}
    assert refused(few, **asked) == (
        "300 actors need about 15.3 GB of memory (50 MB each, and 0.3 GB for what they are forked from), "
        "but 15.2 GB are free; set placement.mode=packed or fewer placement.actors"
    )
    enough = forking(64, memory_gb=15.3)
    assert planned(enough, **asked).num_actors == 300
    assert "300 actors need about 120.0 GB of memory (0.4 GB each)" in refused(enough, start="plain", **asked)


def test_a_plan_says_whether_plain_actors_would_fit_too():
    """Ten of them take 4 GB, and ten updates 1 GB."""
    asked = {"mode": "actor-per-client", "model_bytes": GB // 10}
    assert planned(forking(memory_gb=5), **asked).or_plain
    assert not planned(forking(memory_gb=4.99), **asked).or_plain
    assert planned(machine(memory_gb=5), **asked).or_plain
    apart = forking(memory_gb=1.9), forking(memory_gb=1.9), forking(memory_gb=1.9)  # 4 on each
    assert planned(*apart, clients=12, model_bytes=0, mode="actor-per-client").or_plain
    assert not planned(*apart, clients=13, model_bytes=0, mode="actor-per-client").or_plain


# ---------------------------------------------------------------- CPU shares


def test_tenths_of_a_cpu_fit_ten_times():
    """Though 10 * 0.1 is not 1 in binary for every way to add it."""
    plan = planned(machine(1), mode="actor-per-client", num_cpus=0.1)
    assert (plan.num_actors, plan.num_cpus) == (10, 0.1)
    assert "11 actors of 0.1 CPU" in refused(machine(1), mode="actor-per-client", num_cpus=0.1, clients=11)


@pytest.mark.parametrize("denominator", [1, 2, 3, 6, 7, 10, 49, 99, 1000, 9999, 10000])
def test_auto_shares_of_one_cpu_are_as_large_as_ray_can_count(denominator):
    plan = planned(machine(1, memory_gb=10**6), mode="actor-per-client", clients=denominator)
    assert plan.num_cpus == (10_000 // denominator) / 10_000


def test_the_smallest_share_is_a_ten_thousandth():
    node = machine(1, memory_gb=10**6)
    assert planned(node, mode="actor-per-client", num_cpus=0.0001, clients=10_000).num_actors == 10_000
    assert "10,001 actors" in refused(node, mode="actor-per-client", num_cpus=0.0001, clients=10_001)
    message = refused(node, mode="actor-per-client", clients=10_001)
    assert "10,001 actors do not fit 1 CPU:" in message
    assert "smallest share is 0.0001" in message


def test_cpus_that_are_not_there_are_refused_with_the_numbers():
    message = refused(machine(4), mode="actor-per-client", num_cpus=1)
    assert message == "10 actors of 1 CPU each need 10 CPUs, but there are 4; at most 0.4 each"
    assert planned(machine(4), mode="actor-per-client", num_cpus=0.4).num_cpus == 0.4
    assert "at most 0.4 each" in refused(machine(4), mode="actor-per-client", num_cpus=0.4001)


def test_cpus_are_counted_node_by_node():
    """Two nodes of 1.5 CPUs are 3 CPUs, and yet have room for two actors of 1."""
    halves = machine(1.5), machine(1.5)
    assert planned(*halves, mode="packed", actors=2, num_cpus=1).num_actors == 2
    message = refused(*halves, mode="packed", actors=3, num_cpus=1)
    assert message == "3 actors of 1 CPU each need 3 CPUs, but there are 1.5 + 1.5; at most 0.75 each"
    assert planned(*halves, mode="packed", actors=3).num_cpus == 0.75


def test_a_head_without_cpus_hosts_nobody_and_other_nodes_all():
    head, node = machine(0), machine(4)
    assert planned(head, node, mode="packed").num_actors == planned(node, mode="packed").num_actors == 4
    assert capacity(planned(head, node, mode="packed").num_cpus, 0, (head,)) == 0
    assert "no CPU for actors on any node (0 + 0)" in refused(head, head, mode="packed")


def test_auto_shares_on_unequal_nodes():
    assert planned(machine(3), machine(1), mode="packed", actors=4).num_cpus == 1.0
    assert planned(machine(2.5), machine(1), mode="packed", actors=4).num_cpus == 0.8333  # 3 + 1
    assert planned(machine(1), machine(0.1), mode="packed", actors=2).num_cpus == 0.5  # 2 + 0


# ---------------------------------------------------------------- GPU shares


def test_gpus_are_not_used_unless_asked_for():
    plan = planned(machine(4, num_gpus=1))
    assert plan.num_gpus == 0.0
    assert any("1 GPU found, not used unless asked for" in reason for reason in plan.reasons)
    assert not any("GPU" in reason for reason in planned(machine(4)).reasons)
    assert planned(machine(4, num_gpus=1), num_gpus=0).num_gpus == 0


def test_a_gpu_share_lies_on_one_device():
    """0.3 goes three times into a GPU; 0.4 four times into two, not five: the remainders do not add up."""
    assert planned(machine(8, 1), mode="packed", actors=3, num_gpus=0.3).num_gpus == 0.3
    assert "4 actors of 0.3 GPU each do not fit 1 GPU; at most" in refused(
        machine(8, 1), mode="packed", actors=4, num_gpus=0.3
    )
    assert planned(machine(8, 2), mode="packed", actors=4, num_gpus=0.4).num_actors == 4
    assert "5 actors of 0.4 GPU each do not fit 2 GPUs" in refused(machine(8, 2), mode="packed", actors=5, num_gpus=0.4)
    assert planned(machine(8, 1), mode="packed", actors=10, num_gpus=0.1).num_actors == 10


def test_whole_gpus():
    assert planned(machine(8, 4), mode="packed", actors=2, num_gpus=2).num_gpus == 2
    refused(machine(8, 4), mode="packed", actors=3, num_gpus=2)
    refused(machine(8, 1), machine(8, 1), mode="packed", actors=1, num_gpus=2)


def test_a_serial_run_computes_on_one_gpu_where_it_is_asked_to():
    assert planned(machine(8, 2), mode="serial").num_gpus == 0.0
    assert "1 GPU found" in planned(machine(8, 1), mode="serial").reasons[1]
    assert [planned(machine(8, 2), mode="serial", num_gpus=share).num_gpus for share in (0, 1)] == [0, 1]
    for gpus in (0, 0.5):
        message = refused(machine(8, gpus), mode="serial", num_gpus=1)
        assert message == "placement.num_gpus = 1, but torch finds no GPU here; set placement.num_gpus=0"
    for share in (0.5, 2):
        message = refused(machine(8, 2), mode="serial", num_gpus=share)
        assert message == f"placement.num_gpus = {share}, but serial mode has a GPU or none; set placement.num_gpus=1"


def test_actors_on_a_gpu_are_not_forked():
    plan = planned(forking(8, 1), mode="packed", actors=2, num_gpus=0.5)
    assert (plan.start, plan.reasons[0]) == (
        "plain",
        "plain actors: they cannot be forked here (CUDA works in no fork)",
    )
    message = refused(forking(8, 1), mode="packed", actors=2, num_gpus=0.5, start="fork")
    assert message.startswith("actors cannot be forked here: CUDA works in no fork; set placement.start")
    assert planned(forking(8, 1), mode="packed", actors=2, num_gpus=0).start == "fork"
    message = refused(forking(8), mode="packed", actors=2, num_gpus=0.5, start="fork")
    assert message == "2 actors of 0.5 GPU each do not fit 0 GPUs; set placement.num_gpus=0"


def test_gpus_that_are_not_there():
    message = refused(machine(4), mode="packed", actors=2, num_gpus=0.5)
    assert message == "2 actors of 0.5 GPU each do not fit 0 GPUs; set placement.num_gpus=0"
    assert "at most 0.5 each" in refused(machine(4, 1), mode="packed", actors=2, num_gpus=1)


def test_cpu_and_gpu_have_to_be_on_the_same_node():
    plan = planned(machine(1, 2), machine(7, 0), mode="packed", actors=2, num_gpus=1)
    assert plan.num_cpus == 0.5, "both actors share the one CPU beside the GPUs"
    message = refused(machine(1, 2), machine(7, 0), mode="packed", actors=2, num_gpus=1, num_cpus=1)
    assert "at most 0.5 each" in message


# ---------------------------------------------------------------- memory


def test_memory_that_is_not_there():
    message = refused(machine(64, memory_gb=3), mode="actor-per-client")
    assert message == (
        "10 actors need about 4.0 GB of memory (0.4 GB each), but 3.0 GB are free; "
        "set placement.mode=packed or fewer placement.actors"
    )
    assert planned(machine(64, memory_gb=4.1), mode="actor-per-client").num_actors == 10
    assert "2.4 GB of memory" in refused(machine(1, memory_gb=2), mode="packed", clients=2, model_bytes=GB)


@pytest.mark.parametrize(
    ("node", "actors"),
    [
        (machine(64, memory_gb=3), 5),  # 2 GB of actors beside 1 GB of updates
        (machine(64, memory_gb=2.9), 4),
        (machine(64, memory_gb=1.4), 1),
        (forking(64, memory_gb=1.55), 5),  # 0.25 GB of actors and 0.3 GB of their server
        (forking(64, memory_gb=1.35), 1),
    ],
)
def test_an_automatic_number_of_actors_fits_the_memory_beside_a_round(node, actors):
    assert planned(node, mode="packed", clients=100, cohort=10, model_bytes=GB // 10).num_actors == actors


def test_memory_for_not_one_actor():
    message = refused(machine(2, memory_gb=1.39), mode="packed", model_bytes=GB // 10)
    assert message.startswith("1 actor needs about 1.4 GB")
    assert message.endswith("set placement.mode=serial"), "which needs the updates alone"
    assert planned(machine(2, memory_gb=1.39), mode="serial", model_bytes=GB // 10).num_actors == 0


# ---------------------------------------------------------------- properties

CPUS = st.integers(0, 16) | st.sampled_from([0.5, 1.5, 2.25, 0.1, 0.3333, 7.9999])
NODES = st.lists(
    st.builds(
        lambda node, max_threads, max_files: dataclasses.replace(node, max_threads=max_threads, max_files=max_files),
        st.builds(
            lambda make, *arguments: make(*arguments),
            st.sampled_from([machine, forking, forking]),
            CPUS,
            st.integers(0, 4),
            st.sampled_from([1, 16, 1000]),
        ),
        st.sampled_from([100, 400, 2000, system.UNLIMITED, system.UNLIMITED]),
        st.sampled_from([100, 150, 1024, system.UNLIMITED, system.UNLIMITED]),
    ),
    min_size=1,
    max_size=4,
)
SHARES = st.just("auto") | st.floats(0.0001, 1) | st.sampled_from([0.1, 0.3, 1 / 3, 0.5, 1, 2])
ASKED = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["auto", "actor-per-client", "packed", "serial"]),
        "actors": st.just("auto") | st.integers(1, 40),
        "num_cpus": SHARES,
        "num_gpus": st.just("auto") | SHARES | st.just(0),
        "start": st.sampled_from(["auto", "fork", "plain"]),
        "threads": st.sampled_from([1, 1, 8]),
    }
)


def units(share: float) -> int:
    """In Ray's ten-thousandths."""
    return round(share * 10_000)


@dataclasses.dataclass
class Left:
    """What a node has left for more actors."""

    cpus: int
    devices: list[int]
    memory: int
    threads: int
    files: int


def all_find_a_place(plan: Plan, nodes: list[Node]) -> bool:
    """Places one actor after the other: CPUs and devices of the same node, as Ray does; memory, threads and files."""
    cpu, gpu, cost = units(plan.num_cpus), units(plan.num_gpus), COSTS.get(plan.start, PLAIN)
    left = [
        Left(
            units(node.num_cpus),
            [10_000] * int(node.num_gpus),
            node.memory_bytes - cost.server_bytes,
            node.max_threads - BASE_THREADS,
            node.max_files - BASE_FILES,
        )
        for node in nodes
    ]
    threads = cost.threads + plan.threads - 1
    for _ in range(plan.num_actors):
        for node in left:
            devices = [i for i, free in enumerate(node.devices) if free >= min(gpu, 10_000)]
            wanted = 1 if 0 < gpu <= 10_000 else gpu // 10_000
            is_within = node.memory >= cost.num_bytes and node.threads >= threads and node.files >= cost.files
            if is_within and node.cpus >= cpu and len(devices) >= wanted:
                node.cpus -= cpu
                node.memory -= cost.num_bytes
                node.threads -= threads
                node.files -= cost.files
                for i in devices[:wanted]:
                    node.devices[i] -= min(gpu, 10_000)
                break
        else:
            return False
    return True


@pytest.mark.long
@settings(derandomize=True, deadline=None, max_examples=200)
@given(NODES, ASKED, st.integers(1, 60), st.floats(0.01, 1), st.sampled_from([MLP, GB]))
def test_whatever_is_planned_fits(nodes, asked, clients, fraction, model_bytes):
    cohort = max(1, round(fraction * clients))

    def answer() -> Plan | str:
        try:
            return planned(*nodes, clients=clients, cohort=cohort, model_bytes=model_bytes, **asked)
        except PlanError as error:
            return str(error)

    plan = answer()
    assert plan == answer(), "the same question gets the same plan"
    if isinstance(plan, str):
        assert plan
        assert "\n" not in plan
        if asked["actors"] == "auto" and asked["mode"] in ("auto", "packed"):
            assert " actors need about" not in plan, "fewer are planned as long as one fits"
        return
    assert all_find_a_place(plan, nodes)
    if plan.mode == "serial":
        assert (asked["mode"], plan.num_actors, plan.start) == ("serial", 0, "")
        assert asked["start"] != "fork"
        return
    can_fork = asked["num_gpus"] in ("auto", 0) and not any(node.fork_obstacle for node in nodes)
    assert plan.start == ("fork" if can_fork and asked["start"] != "plain" else "plain")
    assert plan.start == asked["start"] or asked["start"] == "auto"
    cost = COSTS[plan.start]
    assert plan.actor_bytes == (cost.num_bytes if len(nodes) > 1 else 0)
    assert plan.or_plain or plan.start == "fork"
    held = sum(node.memory_bytes // PLAIN.num_bytes for node in nodes)
    plain_bytes = plan.num_actors * PLAIN.num_bytes + cohort * model_bytes
    assert plan.or_plain == (plan.num_actors <= held and plain_bytes <= sum(node.memory_bytes for node in nodes))
    assert 1 <= plan.num_actors <= clients
    assert plan.mode == "packed" or plan.num_actors == clients
    assert plan.mode == asked["mode"] or asked["mode"] == "auto"
    assert plan.num_cpus >= 0.0001
    assert plan.memory_bytes == plan.num_actors * cost.num_bytes + len(nodes) * cost.server_bytes + cohort * model_bytes
    assert plan.memory_bytes <= sum(node.memory_bytes for node in nodes)
    assert plan.reasons
    if asked["actors"] != "auto":
        assert plan.num_actors == min(asked["actors"], clients)
    for key in ("num_cpus", "num_gpus"):
        if asked[key] != "auto":
            assert getattr(plan, key) == asked[key]
    if asked["num_cpus"] == "auto" and plan.num_cpus < 1:
        larger = dataclasses.replace(plan, num_cpus=plan.num_cpus + 0.0001)
        assert not all_find_a_place(larger, nodes), "an automatic share is the largest that fits"


@settings(derandomize=True, deadline=None, max_examples=100)
@given(NODES, ASKED, st.integers(1, 60))
def test_what_is_refused_for_its_cpus_does_not_fit(nodes, asked, clients):
    """The other direction: nobody is turned away who would have had a place."""
    can_fork = not any(node.fork_obstacle for node in nodes)
    assume(asked["start"] != "fork" or can_fork)
    asked = {**asked, "mode": "actor-per-client", "actors": "auto", "num_gpus": 0}
    rich = [dataclasses.replace(node, memory_bytes=10**15) for node in nodes]
    try:
        planned(*rich, clients=clients, **asked)
        is_refused = False
    except PlanError:
        is_refused = True
    share = 0.0001 if asked["num_cpus"] == "auto" else asked["num_cpus"]
    wanted = Plan(
        mode="actor-per-client",
        num_actors=clients,
        num_cpus=share,
        threads=asked["threads"],
        start="fork" if can_fork and asked["start"] != "plain" else "plain",
        stack_size=1,
        memory_bytes=0,
        reasons=(),
    )
    assert is_refused != all_find_a_place(wanted, rich)


@pytest.mark.long
@settings(derandomize=True, deadline=None, max_examples=100)
@given(NODES, ASKED, st.integers(1, 60), st.sampled_from([MLP, GB]))
def test_where_plain_actors_fit_forked_ones_do(nodes, asked, clients, model_bytes):
    """On one machine: forking, which `auto` prefers, turns nobody away."""
    plain, able = ({**asked, "start": start} for start in ("plain", "auto"))
    node = dataclasses.replace(nodes[0], fork_obstacle="")
    try:
        before = planned(node, clients=clients, model_bytes=model_bytes, **plain)
    except PlanError:
        assume(False)
    plan = planned(node, clients=clients, model_bytes=model_bytes, **able)
    assert plan.num_actors >= before.num_actors
    assert plan.memory_bytes <= before.memory_bytes or plan.num_actors > before.num_actors
    assert plan.start_s <= before.start_s or plan.num_actors > before.num_actors


def test_this_machine():
    node = local_node()
    assert node.num_cpus >= 1
    assert node.num_gpus >= 0
    assert node.memory_bytes > 0
    assert planned(node, mode="packed", clients=1).num_actors == 1
    changing = {"memory_bytes": 0, "max_threads": 0}  # by what others do meanwhile
    no_gpu = dataclasses.replace(node, num_gpus=0, gpu_memory_bytes=0, **changing)
    assert dataclasses.replace(cpu_node(), **changing) == no_gpu, "what is known before torch is imported"


def test_the_advice_on_gpu_shares_fits():
    with pytest.raises(PlanError) as caught:
        planned(machine(8, 2), mode="packed", actors=3, num_gpus=1)
    advice = float(str(caught.value).rpartition("at most ")[2].removesuffix(" each"))
    assert planned(machine(8, 2), mode="packed", actors=3, num_gpus=advice).num_actors == 3


def test_the_hint_on_unused_gpus_fits():
    plan = planned(machine(8, 2), mode="packed", actors=3)
    (hint,) = [reason for reason in plan.reasons if "GPU found" in reason]
    advice = float(hint.rpartition("=")[2].removesuffix(")"))
    assert planned(machine(8, 2), mode="packed", actors=3, num_gpus=advice).num_actors == 3


def test_auto_takes_the_number_of_actors_on_any_machine():
    assert planned(machine(2), actors=4).num_actors == 4
    assert planned(machine(8), actors=4).num_actors == 4


def test_auto_packs_what_does_not_fit_one_by_one():
    assert planned(machine(8), mode="packed", num_cpus=1).num_actors == 8
    assert planned(machine(8), mode="auto", num_cpus=1).num_actors == 8


@pytest.mark.parametrize("asked", [{"num_cpus": 2}, {"num_gpus": 0.5}], ids=str)
def test_an_automatic_number_of_actors_fits_the_share_asked_for(asked):
    plan = planned(machine(8, 1), mode="packed", **asked)
    assert plan.num_actors >= 1


def test_start_up_of_exactly_the_budget_is_too_long():
    assert planned(machine(2), clients=10).mode == "packed"
    assert planned(machine(2), clients=9).mode == "actor-per-client"


# ---------------------------------------------------------------- stacks


@pytest.mark.parametrize(
    ("asked", "clients", "model_bytes", "engine", "stack_size"),
    [
        ({}, 10, 800_000, "stacked", 5),  # two actors share the round
        ({}, 100, 800_000, "stacked", 10),  # 8 MB stay in the caches
        ({}, 100, 200_000, "stacked", 32),  # more would amortise nothing
        ({}, 100, 6_700_000, "stacked", 1),
        ({}, 100, 10**9, "stacked", 1),
        ({"stack_size": 3}, 100, 800_000, "stacked", 3),
        ({"stack_size": 300}, 100, 800_000, "stacked", 50),
        ({}, 100, 200_000, "loop", 1),
        ({"stack_size": 3}, 100, 200_000, "loop", 1),
    ],
)
def test_stacks_are_as_large_as_pays(asked, clients, model_bytes, engine, stack_size):
    node = machine(2, memory_gb=1000)
    plan = planned(node, mode="packed", clients=clients, model_bytes=model_bytes, engine=engine, **asked)
    assert plan.stack_size == stack_size
    assert any("stacks of up to" in reason for reason in plan.reasons) == (engine == "stacked" and not asked)


def test_an_actor_of_one_client_has_no_stack():
    assert planned(machine(16), mode="actor-per-client").stack_size == 1
    assert planned(mode="serial", clients=20).stack_size == 20


def test_stacks_on_a_gpu_are_large():
    node = Node(8, 1, 64 * GB, gpu_memory_bytes=24 * GB)
    plan = planned(node, mode="packed", actors=2, num_gpus=0.5, clients=600, model_bytes=800_000)
    assert plan.stack_size == 300


def test_gpu_memory_that_is_not_there():
    node = Node(8, 1, 64 * GB, gpu_memory_bytes=8 * GB)
    large = {"mode": "packed", "clients": 600, "model_bytes": 10_000_000, "stack_size": 50}
    message = refused(node, actors=4, num_gpus=0.25, **large)
    assert message == (
        "0.25 GPU is 2.0 GB, but an actor needs about 3.6 GB there for stacks of 50 clients; "
        "set a larger placement.num_gpus or a smaller placement.stack_size"
    )
    assert planned(node, actors=2, num_gpus=0.5, **large).num_gpus == 0.5
    unknown = Node(8, 1, 64 * GB)
    assert planned(unknown, actors=4, num_gpus=0.25, **large).num_actors == 4


def test_memory_of_a_gpu_comes_from_the_drivers_tool(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine_module._gpu_memory_bytes() == 40960 * 2**20
    tool.write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    assert machine_module._gpu_memory_bytes() == 0
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert machine_module._gpu_memory_bytes() == 0


# ---------------------------------------------------------------- limits of the system


def test_limits_of_threads_and_files_bound_the_actors():
    small = dataclasses.replace(machine(64, memory_gb=1000), max_threads=1000)  # (1000 - 250) / 25
    assert planned(small, clients=100).num_actors == 30
    assert planned(small, clients=30, mode="auto").mode == "actor-per-client"
    assert planned(small, clients=31, mode="auto").mode == "packed"
    message = refused(small, mode="actor-per-client", clients=31)
    assert message.startswith("31 actors need about 1,025 threads and 224 open files")
    assert "allow 30 actors" in message
    files = dataclasses.replace(machine(64, memory_gb=1000), max_files=140)  # (140 - 100) / 4
    assert planned(files, clients=100).num_actors == 10


def limited(**limits: Any) -> Node:
    """A large node with some limits."""
    return dataclasses.replace(forking(64, memory_gb=1000), **limits)


def test_what_is_over_a_limit_is_refused_with_the_numbers_and_the_limits_name():
    asked = {"mode": "actor-per-client", "clients": 300, "model_bytes": 0}
    assert refused(limited(max_threads=7749, threads_limit="kernel.pid_max"), **asked) == (
        "300 actors need about 7,750 threads and 1,300 open files; the limits leave 7,749 threads (kernel.pid_max), "
        "which allow 299 actors: raise them, or set placement.mode=packed or fewer placement.actors"
    )
    assert "the limits leave 1,299 open files (ulimit -n), which allow 299 actors" in refused(
        limited(max_files=1299), **asked
    )
    both = limited(max_threads=5000, max_files=1299)
    assert "leave 5,000 threads (ulimit -u) and 1,299 open files (ulimit -n), which allow 190 actors" in refused(
        both, **asked
    )
    assert planned(limited(max_threads=7750, max_files=1300), **asked).num_actors == 300


def test_limits_are_counted_node_by_node():
    nodes = limited(max_threads=300), limited(max_threads=350)  # 2 and 4
    assert planned(*nodes, mode="packed", clients=100).num_actors == 6
    message = refused(*nodes, mode="packed", actors=7, clients=100)
    assert "leave 300 threads (ulimit -u) and 350 threads (ulimit -u), which allow 6 actors" in message


@pytest.mark.parametrize("limits", [{"max_threads": 274}, {"max_files": 103}], ids=str)
@pytest.mark.parametrize("mode", ["auto", "packed", "actor-per-client"])
def test_limits_too_low_for_one_actor_leave_serial(limits, mode):
    node = limited(**limits)
    message = refused(node, mode=mode, clients=1)
    assert message.startswith("1 actor needs about 275 threads and 104 open files")
    assert message.endswith("which allow 0 actors: raise them, or set placement.mode=serial")
    assert planned(node, mode="serial", clients=1).num_actors == 0


def test_threads_of_torch_count_too():
    node = limited(max_threads=1000)
    assert planned(node, mode="packed", clients=100, threads=1).num_actors == 30
    assert planned(node, mode="packed", clients=100, threads=6).num_actors == 25
    assert "26 actors need about 1,030 threads" in refused(node, mode="packed", clients=100, actors=26, threads=6)


def test_the_advice_on_limits_fits():
    node = limited(max_threads=1000)
    message = refused(node, mode="actor-per-client", clients=100)
    allowed = int(message.partition("which allow ")[2].partition(" ")[0])
    assert planned(node, mode="packed", clients=100, actors=allowed).num_actors == allowed
    assert planned(node, mode="packed", clients=100).num_actors <= allowed


def test_memory_is_counted_node_by_node():
    """Half an actor's memory on each of two nodes is none."""
    halves = machine(4, memory_gb=0.6), machine(4, memory_gb=0.6)
    assert planned(*halves, mode="packed", clients=100).num_actors == 2
    assert "3 actors need about" in refused(*halves, mode="packed", actors=3)


def test_no_node_of_a_cluster_is_filled_beyond_its_memory():
    """Ray would put 64 actors of one CPU on the first node: it reserves their memory too."""
    plan = planned(machine(64, memory_gb=1), machine(2, memory_gb=100), mode="packed", clients=1000)
    assert (plan.num_actors, plan.actor_bytes) == (4, PLAIN.num_bytes)
    plan = planned(machine(16, memory_gb=1), machine(2, memory_gb=100), mode="packed", actors=20, clients=20)
    assert plan.num_cpus == 0.1111, "two on the first node, 18 on the second"
    assert planned(machine(16), mode="packed").actor_bytes == 0


def test_what_others_have_left_of_a_gpu_counts():
    assert capacity(0, 0.25, (machine(2, 0.75),)) == 3
    assert capacity(0, 0.5, (machine(2, 1.75),)) == 3
    assert capacity(0, 0.5, (machine(2, 0.25),)) == 0


def test_an_automatic_stack_fits_the_gpu():
    node = Node(8, 1, 64 * GB, gpu_memory_bytes=8 * GB)
    plan = planned(node, mode="packed", actors=10, num_gpus=0.1, clients=1000, model_bytes=800_000)
    assert plan.stack_size == 41, "of 0.8 GB, 0.6 are the context's"


def test_a_plan_can_be_made_before_the_model_is_known():
    assert planned(machine(2), mode="packed", model_bytes=0).num_actors == 2
