"""Several nodes: the same bits, the same software, and errors that say what to do. What is lost has its own tests."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import ray
import yaml
from helpers import results_of
from ray._private import utils as ray_utils
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.cluster_utils import Cluster

import fedsim
from faults.ray_nodes import NO_NAMESPACES, alive_nodes, ray_cluster
from fedsim.actors import cluster, connection, handshake
from fedsim.errors import FedsimWarning, PlanError
from fedsim.recording import Recording

pytestmark = pytest.mark.ray
in_namespaces = pytest.mark.skipif(bool(NO_NAMESPACES), reason=f"a network namespace for each node {NO_NAMESPACES}")

CHANGES = {
    "data.dataset": "synthetic",
    "data.partition.name": "quantity",
    "clients.count": 6,
    "clients.per_round": 4,
    "rounds": 3,
    "training.local_epochs": 1,
    "placement.mode": "packed",
}
TINY = fedsim.Config().override(CHANGES)
SETTINGS = [f"--set={key}={value}" for key, value in CHANGES.items()]


@pytest.fixture(scope="module")
def reference():
    return fedsim.run(TINY.override({"placement.mode": "serial"}), results=None)


@pytest.fixture(scope="module")
def two_nodes():
    """A cluster of 1 and 3 CPUs."""
    node = {"object_store_memory": 300_000_000}
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **node})
    started.add_node(num_cpus=3, **node)
    yield started
    started.shutdown()


# ---------------------------------------------------------------- the same run


def test_unequal_nodes_are_filled_and_give_the_results_of_serial_to_the_bit(two_nodes):
    """With an actor a CPU, on both nodes, and the data once on each, also where three actors read them."""
    rng = np.random.Generator(np.random.PCG64(0))
    images = rng.integers(256, size=(40_000, 1, 28, 28), dtype=np.uint8)  # 31 MB
    data = fedsim.Dataset("noise", images[1000:], np.arange(39_000) % 10, images[:1000], np.arange(1000) % 10, 10)
    with Recording.of(TINY.override({"placement.address": two_nodes.address}), results=None, dataset=data) as recording:
        for record in recording:
            if record.round == 2:
                assert [node.num_cpus for node in connection.free_nodes()] == [0, 0]
                stored = [stored_bytes(node) for node in (two_nodes.head_node, *two_nodes.worker_nodes)]
    assert not ray.is_initialized()
    serial = fedsim.run(TINY.override({"placement.mode": "serial"}), results=None, dataset=data)
    assert results_of(recording.run) == results_of(serial)
    assert recording.run.clients["pid"].nunique() == 4
    assert len(stored) == 2
    assert all(images.nbytes < num_bytes < 1.5 * images.nbytes for num_bytes in stored)


def stored_bytes(node):
    """Memory that a node's object store takes: the pages of its file, which has no name."""
    pid = node.all_processes["raylet"][0].process.pid
    files = [path for path in Path(f"/proc/{pid}/fd").iterdir() if "plasma" in str(path.readlink())]
    return 512 * sum(blocks for _, blocks in {(path.stat().st_ino, path.stat().st_blocks) for path in files})


def test_a_ray_of_the_callers_own_with_several_nodes_is_used_and_left_running(two_nodes, reference, monkeypatch):
    ray.init(address=two_nodes.address, log_to_driver=False, logging_level="ERROR")
    try:
        assert results_of(fedsim.run(TINY, results=None)) == results_of(reference)
        own = handshake.software()
        monkeypatch.setattr(handshake, "software", lambda: replace(own, fedsim="0" * 64))
        with pytest.raises(PlanError, match=r"node .* has no fedsim, or another one: .*py_modules"):
            fedsim.run(TINY, results=None)
        assert ray.is_initialized()
    finally:
        ray.shutdown()


# ---------------------------------------------------------------- nodes that come and go; more in test_reliability


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "actors"), [("packed", 2), ("actor-per-client", 6)])
def test_a_node_that_joins_is_used_from_the_next_round(reference, mode, actors):
    """Also where each actor gets a larger share by it, and where the driver had memory in common with the first."""
    with ray_cluster(1) as nodes:
        config = TINY.override({"placement.mode": mode, "placement.address": nodes.address})
        with Recording.of(config, results=None) as recording:
            assert recording.plan.num_actors == {"packed": 1, "actor-per-client": 6}[mode]
            for record in recording:
                if record.round == 1:
                    nodes.join(1)
                if record.round == 3:
                    free = [node.num_cpus for node in connection.free_nodes()]
    assert len(free) == 2
    assert free == [pytest.approx(0, abs=0.01)] * 2
    assert results_of(recording.run) == results_of(reference)
    pids = recording.run.clients.groupby("round")["pid"].unique()
    assert len(set(pids[3]) - set(pids[1])) >= 1


def test_a_node_that_is_killed_in_a_round_costs_only_time(reference):
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = started.add_node(num_cpus=1)
        config = TINY.override({"placement.address": started.address, "rounds": 5})
        with Recording.of(config, results=None) as recording:
            assert recording.plan.num_actors == 2
            for record in recording:
                if record.round == 1:  # the next one has begun
                    started.remove_node(lost, allow_graceful=False)
                if record.round == 5:
                    assert connection.free_nodes()[0].num_cpus == 0
        run = recording.run
    finally:
        started.shutdown()
    assert results_of(run) == results_of(
        fedsim.run(TINY.override({"placement.mode": "serial", "rounds": 5}), results=None)
    )
    pids = run.clients.groupby("round")["pid"].unique()
    assert (len(pids[1]), len(pids[5])) == (2, 1)


@pytest.mark.slow
def test_a_node_that_joins_with_other_software_is_left_out(reference, monkeypatch):
    def run():
        with ray_cluster(1) as nodes:
            own, config = handshake.software(), TINY.override({"placement.address": nodes.address})
            with Recording.of(config, results=None) as recording:
                for record in recording:
                    if record.round == 1:
                        nodes.join(1)
                        monkeypatch.setattr(handshake, "software", lambda: replace(own, fedsim="0" * 64))
        return recording.run

    with pytest.warns(FedsimWarning, match=r"without the nodes that joined: node .* has no fedsim, or another"):
        found = run()
    assert results_of(found) == results_of(reference)
    assert found.clients["pid"].nunique() == 1


# ---------------------------------------------------------------- the handshake


def test_a_node_needs_what_an_actor_imports():
    """Of what fedsim itself would be shipped without: found by importing an actor's module."""
    code = (
        "import sys, numpy, torch, ray; before = set(sys.modules); import fedsim.actors.host; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    foreign = {name.replace("_", "-") for name in loaded} - {n.replace("_", "-") for n in sys.stdlib_module_names}
    of_pydantic = {"pydantic-core", "annotated-types", "typing-inspection"}
    assert foreign - of_pydantic - {"fedsim", "numpy"} == set(handshake._NEEDED)


def test_a_node_with_other_software_is_named_with_both_versions(two_nodes, monkeypatch):
    own = handshake.software()
    assert None not in own.versions.values()
    with connection.connect(two_nodes.address, None, 0):
        assert handshake.handshake(cluster.hosts()) == []
        for package, there in (("python", "3.10"), ("torch", None), ("numpy", "1.0"), ("ray", "2.0")):
            other = replace(own, versions=own.versions | {package: there})
            with pytest.raises(PlanError) as caught:
                handshake._check("gpu-7 (10.0.0.7)", other, own)
            has = f"{package} {there}" if there else f"no {package}"
            assert f"node gpu-7 (10.0.0.7) has {has}, this process {own.versions[package]}" in str(caught.value)
        with pytest.raises(PlanError, match="has no pydantic, which actors import; install fedsim there"):
            handshake._check("gpu-7", replace(own, versions=own.versions | {"pydantic": None}), own)
        monkeypatch.setattr(handshake, "software", lambda: replace(own, versions=own.versions | {"torch": "9.9"}))
        with pytest.raises(PlanError, match=r"node .* has torch .*, this process 9\.9: results would differ"):
            handshake.handshake(cluster.hosts())


def test_a_fedsim_that_hides_the_one_sent_is_an_error(two_nodes, monkeypatch):
    own = handshake.software()
    monkeypatch.setattr(handshake, "software", lambda: replace(own, fedsim="0" * 64))
    with pytest.raises(PlanError, match=r"node .* has another fedsim than this one, .* remove that one"):
        list(fedsim.rounds(TINY.override({"placement.address": two_nodes.address})))
    assert not ray.is_initialized()


def test_a_node_that_is_gone_or_hangs_is_named(two_nodes, monkeypatch):
    gone = {"NodeID": "ab" * 28, "NodeManagerHostname": "gpu-7", "NodeManagerAddress": "10.0.0.7"}
    with connection.connect(two_nodes.address, None, 0):
        with pytest.raises(PlanError, match=r"node gpu-7 \(10\.0\.0\.7\) does not say what is installed there"):
            handshake.handshake([gone])
        monkeypatch.setattr(handshake, "_TIMEOUT_S", 0.0)
        with pytest.raises(PlanError, match=r"does not say what is installed there \(Get timed out"):
            handshake.handshake(cluster.hosts())


def test_another_ray_or_python_than_the_clusters_is_refused(two_nodes, monkeypatch, tmp_path):
    monkeypatch.setattr(ray_utils, "compute_version_info", lambda: ("2.0.0", "3.10.1"))
    message = rf"is Ray {ray.__version__} on Python 3\.\d+\.\d+, this process has Ray 2\.0\.0 on Python 3\.10\.1"
    with pytest.raises(PlanError, match=message):
        fedsim.run(TINY.override({"placement.address": two_nodes.address}), results=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- nodes that `ray start` makes


def python_without_fedsim(folder: Path) -> str:
    """An interpreter with all packages of this one but fedsim."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "fedsim" not in path.name:
            (packages / path.name).symlink_to(path)
    python = str(folder / "bin" / "python")
    command = [python, "-c", "import torch, fedsim"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd="/", env=os.environ | {"PYTHONPATH": ""})
    assert "No module named 'fedsim'" in answer.stderr
    return python


def run_cli(*arguments, folder, **environment):
    """`fedsim ARGUMENTS` as another process, in a folder that has no fedsim for the nodes to find."""
    source = str(Path(fedsim.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "fedsim", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": source} | environment,
        timeout=120,
    )


@in_namespaces
@pytest.mark.slow
def test_machines_of_their_own_get_fedsim_and_give_the_same_bits(tmp_path, reference):
    """Two nodes in network namespaces, of which one has no fedsim; then a third with another torch."""
    python = python_without_fedsim(tmp_path / "python")
    with ray_cluster(1, isolated=True, environment={"PYTHONPATH": ""}) as nodes:
        nodes.join(2, python=python)
        answer = run_cli("run", *SETTINGS, f"--address={nodes.address}", "--name=two", folder=tmp_path)
        assert answer.returncode == 0, answer.stderr
        run = fedsim.load_run(tmp_path / "results" / "two")
        assert results_of(run) == results_of(reference)
        machines = Counter(dict(run.clients.groupby("node")["pid"].nunique()))
        assert machines == {os.uname().nodename: 1, "node1": 2}

        answer = run_cli("plan", *SETTINGS, f"--address={nodes.address}", folder=tmp_path)
        assert (answer.returncode, "3 actors" in answer.stdout) == (0, True)

        start = time.monotonic()
        elsewhere = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m", "fedsim"]
        answer = subprocess.run(
            [*elsewhere, "plan", *SETTINGS, f"--address={nodes.address}"], capture_output=True, text=True, cwd=tmp_path
        )
        assert (answer.returncode, answer.stdout) == (2, "")
        assert f"this machine is no node of the cluster at '{nodes.address}'" in answer.stderr
        assert time.monotonic() - start < 30

        (tmp_path / "other" / "torch-9.9.dist-info").mkdir(parents=True)
        (tmp_path / "other" / "torch-9.9.dist-info" / "METADATA").write_text("Name: torch\nVersion: 9.9\n")
        nodes.join(1, environment={"PYTHONPATH": str(tmp_path / "other")})
        answer = run_cli("run", *SETTINGS, f"--address={nodes.address}", "--name=three", folder=tmp_path)
        assert answer.returncode == 2
        assert f"node node2 ({nodes.nodes[2].ip}) has torch 9.9, this process" in answer.stderr
        assert not (tmp_path / "results" / "three").exists()


@pytest.mark.slow
def test_a_cluster_that_wants_a_token(tmp_path):
    token = "0123456789abcdef" * 4
    with ray_cluster(1, environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}) as nodes:
        command = ["plan", *SETTINGS, f"--address={nodes.address}"]
        wrong = [
            {"RAY_AUTH_MODE": "disabled"},
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token[::-1]},
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "missing")},
        ]
        for environment in wrong:
            start = time.monotonic()
            answer = run_cli(*command, folder=tmp_path, **environment)
            assert (answer.returncode, answer.stdout) == (2, "")
            assert f"the Ray at '{nodes.address}' wants a token" in answer.stderr
            assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH" in answer.stderr
            assert token not in answer.stderr
            assert time.monotonic() - start < 15, "Ray alone tries for 20 s"
        (tmp_path / "token").write_text(token)
        for environment in ({"RAY_AUTH_TOKEN": token}, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}):
            answer = run_cli(*command, folder=tmp_path, RAY_AUTH_MODE="token", **environment)
            assert answer.returncode == 0, answer.stderr


@in_namespaces
@pytest.mark.slow
def test_the_nodes_of_these_tests_can_be_lost():
    """What tests of lost nodes stand on: each way is noticed, and nothing of a cluster stays."""
    with ray_cluster(1, 1, isolated=True) as nodes:
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        try:
            for lose in (nodes.cut, nodes.kill, nodes.stop):
                node = nodes.nodes[-1]
                assert sorted(alive_nodes()) == sorted([nodes.nodes[0].ip, node.ip])
                lose(node)
                end = time.monotonic() + 20
                while alive_nodes() != [nodes.nodes[0].ip]:
                    assert time.monotonic() < end, "a lost node is not noticed"
                    time.sleep(0.1)
                nodes.join(1)
        finally:
            ray.shutdown()
        processes = [process for node in nodes.nodes for process in node.processes]
    assert len(processes) > 10
    assert not [process for process in processes if process.is_running() and process.status() != "zombie"]
    left = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert nodes._bridge not in left


# ---------------------------------------------------------------- Ray's cluster launcher


def test_the_launchers_file_is_what_ray_and_pip_take():
    """Its keys are Ray's; what it copies to a node is there, and is enough to install fedsim from."""
    root = Path(__file__).parents[1]
    given = yaml.safe_load((root / "scripts/cluster/on_premise.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(given)))
    with pytest.raises(jsonschema.ValidationError, match="setup_command"):
        validate_config(prepare_config({**given, "setup_command": []}))

    copied = {there: root / here for there, here in given["file_mounts"].items() if not here.startswith("~")}
    assert all(here.exists() for here in copied.values())
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    named = {"fedsim", "pyproject.toml", project["readme"], *project["license-files"]}
    assert {Path(there).relative_to("~/fedsim").name for there in copied} == named
    for command in given["setup_commands"] + given["head_start_ray_commands"] + given["worker_start_ray_commands"]:
        subprocess.run(["bash", "-n", "-c", command], check=True)
