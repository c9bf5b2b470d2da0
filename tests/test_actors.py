"""The Ray pool, with a real Ray: bits, processes, failures, and what a private Ray shows to the network."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from helpers import results_of, wait_until

import fedsim
from fedsim import weights as weights_module
from fedsim.actors import PoolInfo, connection, crew, host, ray_pool
from fedsim.actors.slab import Slab
from fedsim.cli import terminal
from fedsim.errors import ClientError, PlanError, RunFailedError
from fedsim.experiment import prepare
from fedsim.launch import connect, open_pool
from fedsim.recording import Recording
from fedsim.weights import Weights

pytestmark = pytest.mark.ray

TINY = fedsim.Config().override(
    {
        "data.dataset": "synthetic",
        "data.partition.name": "quantity",  # unequal shards, short last batches
        "clients.count": 4,
        "clients.per_round": 3,
        "rounds": 3,
        "training.local_epochs": 1,
        "training.momentum": 0.5,
        "evaluation.clients": True,
    }
)


@pytest.fixture(scope="module")
def reference():
    return fedsim.run(TINY.override({"placement.mode": "serial"}), results=None)


@pytest.mark.parametrize("actors", [1, 3])  # two: below, with actors that die
def test_packed_gives_the_results_of_serial_to_the_bit(shared_ray, reference, actors):
    run = fedsim.run(TINY.override({"placement.mode": "packed", "placement.actors": actors}), results=None)
    assert results_of(run) == results_of(reference)
    assert run.rounds["weights_sha256"].nunique() == 4  # and the weights did move


def test_actor_per_client_gives_each_its_own_process_its_share_and_the_results_of_serial(shared_ray, reference):
    wait_until(lambda: shared_ray.available_resources().get("CPU") == 4)
    config = TINY.override({"placement.mode": "actor-per-client", "placement.num_cpus": 0.25})
    pids = {}
    with fedsim.recording.Recording.of(config, results=None) as recording:
        for record in recording:
            pids |= {client.client_id: client.pid for client in record.clients}
            if record.round == 3:
                wait_until(lambda: shared_ray.available_resources().get("CPU") == 3)  # 4 clients of a quarter
                assert all(psutil.pid_exists(pid) for pid in pids.values())
    assert results_of(recording.run) == results_of(reference)
    assert len(set(pids.values())) == len(pids) >= 3
    assert os.getpid() not in pids.values()
    wait_until(lambda: shared_ray.available_resources().get("CPU") == 4)
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids.values()))


@pytest.mark.parametrize("way", ["shared memory", "object store", "unreachable memory"])
def test_weights_are_handed_out_once_a_round_and_the_data_once(shared_ray, reference, monkeypatch, way):
    """In memory shared with the actors, where they reach it; else in the object store: with the same bits."""
    if way == "object store":
        monkeypatch.setattr(ray_pool, "is_on_one_machine", lambda: False)
    elif way == "unreachable memory":
        create = Slab.create

        def elsewhere(*arguments):
            slab = create(*arguments)
            slab.address = replace(slab.address, path="/proc/0/fd/0")
            return slab

        monkeypatch.setattr(Slab, "create", elsewhere)
    puts = []
    put = shared_ray.put
    monkeypatch.setattr(ray_pool.ray, "put", lambda value: puts.append(type(value).__name__) or put(value))
    run = fedsim.run(TINY.override({"placement.mode": "packed", "placement.actors": 2}), results=None)
    assert results_of(run) == results_of(reference)
    weights_of_rounds_0_to_3 = [] if way == "shared memory" else ["tuple"] * 4
    assert sorted(puts) == ["ClientSpec", "Dataset", "Partition", *weights_of_rounds_0_to_3]


def test_shared_memory_leaves_nothing_behind(shared_ray):
    """No file has its name, no descriptor stays open in the driver, and updates that are held stay valid."""

    def held_by_the_system():
        return set(Path("/dev/shm").iterdir()), psutil.Process().num_fds()

    before = held_by_the_system()
    weights = Weights(torch.arange(5.0), torch.empty(0, dtype=torch.int64))
    slab = Slab.create(3, weights)
    other = Slab(slab.address)
    other.updates[2] = 7.0
    held = slab.updates[2]
    slab.weights[:] = 1.0
    assert other.weights.tolist() == [1.0] * 5
    slab.close()
    slab.close()
    with pytest.raises(OSError, match="No such file"):
        Slab(slab.address)
    del slab, other
    assert held.tolist() == [7.0] * 5
    del held
    assert held_by_the_system() == before


def test_a_killed_actor_is_replaced_and_nothing_changes(shared_ray, reference, tmp_path):
    config = TINY.override({"placement.mode": "packed", "placement.actors": 2})
    with fedsim.recording.Recording.of(config, results=tmp_path) as recording:
        for record in recording:
            if record.round in (1, 2):
                os.kill(record.clients[0].pid, signal.SIGKILL)
    run = recording.run
    assert results_of(run) == results_of(reference)
    assert run.rounds["num_retries"].sum() > 0
    assert run.clients["attempts"].max() == 2
    assert run.clients["pid"].nunique() >= 3


def test_what_has_begun_is_taken_or_put_aside(shared_ray):
    """A pool begins the next round while it evaluates: asked for another one, or after a death, it gives the same."""
    x = prepare(TINY.override({"placement.mode": "packed", "placement.actors": 2}))
    weights = x.initial_weights
    with connect(x) as plan, open_pool(x, plan) as pool:

        def hashes(round, cohort):
            return [(r.update.client_id, r.update.update_sha256) for r in pool.fit(round, weights, cohort)]

        expected, other = hashes(1, [0, 1, 3]), hashes(2, [2])
        tested = pool.evaluate(0, weights)
        assert pool.evaluate(0, weights, then=[0, 1, 3]) == tested
        assert hashes(1, [0, 1, 3]) == expected
        pool.evaluate(0, weights, then=[0, 1, 3])
        assert hashes(2, [2]) == other
        results = pool.fit(1, weights, [0, 1, 3])
        assert [weights_module.sha256(r.update.update, r.update.integers) for r in results] == [h for _, h in expected]
        pool.evaluate(0, weights, then=[0, 1, 3])
        os.kill(results[0].update.pid, signal.SIGKILL)
        again = pool.fit(1, weights, [0, 1, 3])
        assert [(r.update.client_id, r.update.update_sha256) for r in again] == expected
        assert [weights_module.sha256(r.update.update, r.update.integers) for r in again] == [h for _, h in expected]


def test_one_death_is_one_restart(shared_ray, monkeypatch):
    """Also where the next round waits behind the evaluation in which the actor dies."""
    x = prepare(TINY.override({"placement.mode": "packed", "placement.actors": 2}))
    restarts = []
    replace_actor = crew.Crew._replace
    monkeypatch.setattr(
        crew.Crew, "_replace", lambda self, number, cause: restarts.append(number) or replace_actor(self, number, cause)
    )
    with connect(x) as plan, open_pool(x, plan) as pool:
        expected = [r.update.update_sha256 for r in pool.fit(1, x.initial_weights, [0, 1, 3])]
        tested = pool.evaluate(0, x.initial_weights)
        os.kill(pool.fit(1, x.initial_weights, [0])[0].update.pid, signal.SIGKILL)
        assert pool.evaluate(0, x.initial_weights, then=[0, 1, 3]) == tested
        results = pool.fit(1, x.initial_weights, [0, 1, 3])
    assert [r.update.update_sha256 for r in results] == expected
    assert [r.attempts for r in results] == [1, 1, 1], "what had not begun is not begun again"
    assert len(restarts) == 1


def test_exhausted_retries_stop_the_run_with_client_and_round(shared_ray, tmp_path):
    driver = os.getpid()

    def exits_in_actors():  # nested, so that it travels by value: an actor cannot import a test file
        module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
        module.register_forward_pre_hook(
            lambda self, _: os._exit(1) if self.training and os.getpid() != driver else None
        )
        return module

    config = TINY.override({"placement.mode": "packed", "placement.actors": 1, "failures.max_retries": 1})
    with pytest.raises(RunFailedError, match=r"client \d in round 1.*died, 2 times.*failures\.max_retries"):
        fedsim.run(config, results=tmp_path, name="dies", model=exits_in_actors)
    run = fedsim.load_run(tmp_path / "dies")
    assert run.status == "failed"
    assert run.rounds["round"].tolist() == [0]


def test_a_bug_in_a_model_comes_back_with_its_own_traceback(shared_ray, tmp_path):
    def raises_in_training():
        module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))

        def hook(self, _):  # not the module around it: each fit has a copy of its own
            if self.training:
                raise ZeroDivisionError("the user's own mistake")

        module.register_forward_pre_hook(hook)
        return module

    config = TINY.override({"placement.mode": "packed"})
    with pytest.raises(ClientError, match="the user's own mistake") as caught:
        fedsim.run(config, results=tmp_path, name="bug", model=raises_in_training)
    assert caught.value.round == 1
    assert f"client {caught.value.client_id} failed in round 1" in str(caught.value)
    assert ", in hook" in caught.value.client_traceback
    run = fedsim.load_run(tmp_path / "bug")
    assert (run.status, run.rounds["round"].tolist()) == ("failed", [0])
    assert "ZeroDivisionError" in run.info["error"]


def test_a_model_that_actors_cannot_make_fails_at_once_with_the_reason(shared_ray):
    driver = os.getpid()

    def only_in_the_driver():
        if os.getpid() != driver:
            raise ModuleNotFoundError("No module named 'my_models'")
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))

    with pytest.raises(RunFailedError, match="No module named 'my_models'"):
        fedsim.run(TINY.override({"placement.mode": "packed"}), results=None, model=only_in_the_driver)


def test_leaving_the_iteration_early_stops_the_actors_and_keeps_the_callers_ray(shared_ray):
    rounds = fedsim.rounds(TINY.override({"placement.mode": "packed", "placement.actors": 2, "rounds": 1000}))
    next(rounds)
    pids = [client.pid for client in next(rounds).clients]
    rounds.close()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert shared_ray.is_initialized()
    wait_until(lambda: shared_ray.available_resources().get("CPU") == 4)


def test_a_start_that_takes_long_says_how_many_are_up(shared_ray, monkeypatch, capsys):
    monkeypatch.setattr(crew, "_LOOK_S", 0.05)
    monkeypatch.setattr(crew, "_SAY_S", 0.1)
    config = TINY.override({"placement.mode": "packed", "placement.actors": 2, "rounds": 1})
    for quiet in (False, True):
        terminal.record(Recording.of(config, results=None), quiet=quiet)
        printed = capsys.readouterr().out
        assert bool(re.findall("^[01] of 2 actors up$", printed, re.M)) is not quiet
        assert "of 2 actors up\n" not in printed.partition("round 0/1")[2]


def test_what_does_not_fit_is_refused_before_any_actor(shared_ray, monkeypatch):
    monkeypatch.setattr(ray_pool, "RayPool", None)  # would fail with a TypeError if it came to that
    config = TINY.override({"placement.mode": "actor-per-client", "placement.num_cpus": 2})
    with pytest.raises(PlanError, match=r"4 actors of 2 CPU each need 8 CPUs, but there are 4; at most 1 each"):
        fedsim.run(config, results=None)


def test_a_ray_that_others_use_is_planned_by_what_is_left(shared_ray, monkeypatch, tmp_path):
    monkeypatch.setattr(connection.has_room, "__defaults__", (0.5,))  # seconds

    @shared_ray.remote(num_cpus=3.5)
    class Other:
        def ready(self):
            return True

    other = Other.remote()
    assert shared_ray.get(other.ready.remote())
    wait_until(lambda: shared_ray.available_resources().get("CPU") == 0.5)
    config = TINY.override({"placement.mode": "packed", "placement.actors": 2, "placement.num_cpus": 0.5})
    with pytest.raises(PlanError, match=r"2 actors of 0\.5 CPU each need 1 CPU, but there are 0\.5"):
        fedsim.run(config, results=None)
    runs = fedsim.sweep(
        TINY.override({"placement.mode": "packed"}), seeds=[0, 1], results=tmp_path
    )  # of the same actors, which take a part of that
    assert set(runs[0].clients["pid"]) == set(runs[1].clients["pid"])
    shared_ray.kill(other)
    wait_until(lambda: shared_ray.available_resources().get("CPU") == 4)


def test_device_comes_from_rays_ids_not_from_what_torch_sees(shared_ray, monkeypatch):
    limits = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)

    def context(ids):
        return lambda: type("Context", (), {"get_accelerator_ids": staticmethod(lambda: ids)})

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(host.ray, "get_runtime_context", context({"GPU": []}))
    assert host._assigned_device(0.0) == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "nothing in this process finds one"
    monkeypatch.setattr(host.ray, "get_runtime_context", context({"GPU": ["1"]}))
    assert host._assigned_device(0.25) == "cuda"
    assert limits == [0.25]


PRIVATE = """
import json, os, psutil, sys
import fedsim, ray
before = dict(os.environ)
listening = lambda: {(c.laddr.ip, c.pid) for c in psutil.net_connections("tcp") if c.status == "LISTEN"}
old = listening()
seen, pids = set(), set()
services = ray._private.services, ray._private.node.Node, ray._private.parameter, ray._private.worker
private = [dict(vars(owner)) for owner in services]
changes = {"data.dataset": "synthetic", "training.local_epochs": 1, "placement.start": sys.argv[1]}
config = fedsim.preset("seed").override(changes)
for record in fedsim.rounds(config):
    seen |= listening() - old
    pids |= {child.pid for child in psutil.Process().children(recursive=True)}
assert [dict(vars(owner)) for owner in services] == private, "Ray's own code is left as it was"
after = {name: value for name, value in os.environ.items() if before.get(name) != value}
gone = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)[1]
ips = sorted({ip for ip, _ in seen})
print(json.dumps([ips, len(seen), ray.is_initialized(), len(pids), len(gone), after]))
"""


@pytest.mark.parametrize(("start", "own"), [("plain", 0), ("fork", 3)])
def test_a_private_ray_listens_on_loopback_only_and_leaves_nothing_behind(start, own):
    """With forked actors there are, for a moment, the fork server and two launchers, too."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    answer = subprocess.run(
        [sys.executable, "-c", PRIVATE, start], capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    ips, num_ports, is_initialized, num_processes, num_left, changed = json.loads(answer.stdout)
    assert num_ports >= 4  # the gcs server, the raylet, the workers
    assert set(ips) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert not is_initialized
    assert 4 <= num_processes <= 6 + own  # gcs server, raylet, its two agents, two workers: more would cost time
    assert num_left == 0
    assert set(changed) <= {"RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"}  # Ray's own


EARLY = """
import sys
import ray
import fedsim.cli
real = ray.init
def init(**settings):
    print("init", "torch" in sys.modules, settings["num_cpus"])
    return real(**settings)
ray.init = init
fedsim.cli.main(["run", *sys.argv[1:], "--quiet"])
"""


def test_ray_starts_before_torch_is_imported_and_with_no_more_workers_than_actors(tmp_path):
    def started(*changes):
        arguments = [part for change in changes for part in ("--set", change)]
        return subprocess.run(
            [sys.executable, "-c", EARLY, "seed", "--set", "data.dataset=synthetic", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            check=False,
        )

    answer = started("placement.mode=packed", "placement.actors=1")
    assert answer.returncode == 0, answer.stderr
    assert [line for line in answer.stdout.splitlines() if line.startswith("init")] == ["init False 1"]
    assert fedsim.load_run(tmp_path / "results/seed").info["placement"]["num_actors"] == 1
    for wrong in ("model.name=mpl", "strategy.name=fedsum", "placement.num_cpus=1000"):
        refused = started(wrong)
        assert (refused.returncode, refused.stdout) == (2, ""), wrong
        assert refused.stderr.startswith("fedsim: ")


def test_a_ray_that_cannot_start_says_why_and_leaves_nothing(tmp_path):
    """Here its token has no place: as where there is no home, or one that cannot be written."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "fedsim", "run", "seed", "--set", "data.dataset=synthetic"]
    answer = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**environment, "HOME": "/proc", "FEDSIM_DATA": str(tmp_path)},
        check=False,
    )
    assert answer.returncode == 2
    assert re.fullmatch(
        r"fedsim: Ray cannot be started on this machine: .*/proc/\.ray.*RAY_AUTH_TOKEN_PATH .*\n", answer.stderr
    )
    assert list(tmp_path.iterdir()) == []


NO_MOUNTS = "" if sys.platform == "linux" and os.geteuid() == 0 and shutil.which("unshare") else "takes Linux and root"


@pytest.mark.skipif(bool(NO_MOUNTS), reason=f"another /dev/shm {NO_MOUNTS}")
def test_a_small_dev_shm_is_enough(tmp_path):
    """As in a container that was started without --shm-size: Ray then takes /tmp."""
    run = shlex.join([sys.executable, "-m", "fedsim", "run", "seed", "--set", "data.dataset=synthetic", "--quiet"])
    small = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs -o size=4m tmpfs /dev/shm && {run}"]
    answer = subprocess.run(small, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert answer.returncode == 0, answer.stderr
    assert fedsim.load_run(tmp_path / "results/seed").status == "finished"


TERMINATED = """
import signal, sys
import fedsim.cli
from ray._private.node import Node
start = Node.start_ray_processes
def during(self):
    start(self)
    signal.raise_signal(signal.SIGTERM)
Node.start_ray_processes = during
fedsim.cli.main(["run", "seed", "--set", "data.dataset=synthetic"])
"""


def test_sigterm_while_ray_starts_ends_the_run_in_its_own_words(tmp_path):
    """ray.init would exit with 15, without a word, and leave its agents behind."""
    answer = subprocess.run(
        [sys.executable, "-c", TERMINATED], capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False
    )
    assert (answer.returncode, answer.stderr) == (130, "fedsim: interrupted: no round was finished\n")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_cluster_is_joined_by_its_address(shared_ray, reference):
    program = (
        "import fedsim, sys, json; from fedsim.config import Config;"
        "run = fedsim.run(Config.from_dict(json.loads(sys.argv[1])), results=None);"
        "print(run.rounds['weights_sha256'].iloc[-1])"
    )
    address = shared_ray.get_runtime_context().gcs_address
    config = TINY.override({"placement.mode": "packed", "placement.actors": 2, "placement.address": address})
    answer = subprocess.run(
        [sys.executable, "-c", program, json.dumps(config.to_dict())],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},  # it listens on loopback, which Ray else avoids
    )
    assert answer.stdout.strip() == reference.rounds["weights_sha256"].iloc[-1]
    assert shared_ray.is_initialized()


def test_unequal_fingerprints_and_devices_are_refused():
    from fedsim.client import HostInfo

    infos = [HostInfo(1, "a", "cpu", "0123"), HostInfo(2, "b", "cpu", "4567")]
    with pytest.raises(PlanError, match=r"a: 0123 on cpu, b: 4567 on cpu"):
        ray_pool._common_info(infos, 0)
    gpus = [HostInfo(1, "a", "cuda (A)", "0123"), HostInfo(2, "b", "cuda (B)", "0123")]
    with pytest.raises(PlanError, match=r"a: 0123 on cuda \(A\), b: 0123 on cuda \(B\)"):
        ray_pool._common_info(gpus, 0)
    assert ray_pool._common_info(infos[:1], 1) == PoolInfo("cpu", "0123", num_forked=1)


def test_nodes_of_this_ray(shared_ray):
    with connection.connect("local", None, 0) as nodes:
        assert [node.num_cpus for node in nodes] == [4]
