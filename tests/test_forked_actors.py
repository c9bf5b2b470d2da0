"""Forked actors, with a real Ray: the same bits as plain ones, and nothing lost when forking fails."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray
from helpers import is_gone, results_of, wait_until

import fedsim
from fedsim import forkserver
from fedsim.actors import bell, connection, crew, private
from fedsim.errors import FedsimWarning, PlanError, RunFailedError
from fedsim.experiment import prepare
from fedsim.forkserver import LAUNCHER
from fedsim.launch import connect, open_pool, preview
from fedsim.recording import Recording

pytestmark = [pytest.mark.ray, pytest.mark.skipif(not forkserver.is_supported(), reason="forking is for Linux")]

TINY = fedsim.Config().override(
    {
        "data.dataset": "synthetic",
        "data.partition.name": "quantity",
        "clients.count": 4,
        "clients.per_round": 3,
        "rounds": 3,
        "training.local_epochs": 1,
        "placement.mode": "actor-per-client",
    }
)


@pytest.fixture(scope="module")
def reference():
    return fedsim.run(TINY.override({"placement.mode": "serial"}), results=None)


@pytest.fixture(scope="class")
def forked_ray():
    """A private Ray with a fork server, for the tests that leave both as they were."""
    with connect(prepare(TINY.override({"placement.start": "fork"}))):
        yield private._running.fork_server


@contextmanager
def own_ray(config=TINY, **changes):
    """A private Ray of one test, whose fork server it may kill; and the experiment."""
    if ray.is_initialized():
        pytest.fail("another Ray runs: put the test below those with `forked_ray`")
    x = prepare(config.override(changes))
    with connect(x) as plan:
        yield x, plan, private._running.fork_server


def kill_one_of(record):
    """An actor of the round; the next round's work may have been done by one that is dead by now."""
    pid = next(client.pid for client in record.clients if psutil.pid_exists(client.pid))
    os.kill(pid, signal.SIGKILL)
    return pid


def pipes():
    """How many this process has open."""
    number = 0
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # one of Ray's threads closed it meanwhile
            number += os.readlink(file).startswith("pipe:")  # noqa: PTH115 - it is no path
    return number


def switches_a_second(pid):
    """Of the main thread of a process, how often it sleeps and wakes up."""
    status = Path(f"/proc/{pid}/task/{pid}/status")
    lines = [line for line in status.read_text().splitlines() if line.startswith("voluntary_ctxt")]
    time.sleep(0.5)
    later = [line for line in status.read_text().splitlines() if line.startswith("voluntary_ctxt")]
    return (int(later[0].split()[1]) - int(lines[0].split()[1])) / 0.5


class TestOneRay:
    """With one private Ray for all."""

    def test_the_installed_ray_is_one_whose_workers_can_be_forked(self, forked_ray, reference):
        """Fails when a new Ray breaks the mechanism: then look at `private` and `forkserver` before it is listed."""
        assert private.fork_obstacle() == "", f"add {ray.__version__} to TESTED_RAY only when this file passes with it"
        config = TINY.override({"placement.start": "fork"})
        with Recording.of(config, results=None) as recording:
            pids = {client.pid for record in recording for client in record.clients}
            parents = {psutil.Process(pid).ppid() for pid in pids}
        assert parents == {forked_ray._process.pid}
        assert len(pids) >= 3
        assert results_of(recording.run) == results_of(reference)

    def test_forked_and_plain_actors_give_equal_bits(self, forked_ray, reference, tmp_path):
        forked = fedsim.run(TINY.override({"placement.start": "fork"}), results=tmp_path, name="forked")
        plain = fedsim.run(TINY.override({"placement.start": "auto", "placement.mode": "packed"}), results=None)
        assert results_of(forked) == results_of(plain) == results_of(reference)
        assert (forked.info["num_forked"], forked.info["placement"]["start"]) == (4, "fork")

    def test_actors_are_like_plain_ones_to_the_system(self, forked_ray):
        x = prepare(TINY)
        with connect(x) as plan, open_pool(x, plan) as pool:
            pids = {result.update.pid for result in pool.fit(0, x.initial_weights, x.sample(1))}
            launchers = [p for p in psutil.process_iter(["cmdline"]) if str(LAUNCHER) in (p.info["cmdline"] or [])]
            assert launchers == [], "they have ended"
            for pid in pids:
                assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n", "as Ray sets it for its workers"
                assert os.getpgid(pid) not in (os.getpgid(0), pid)
                assert psutil.Process(pid).nice() == psutil.Process().nice()
                files = {str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()}
                assert not any("fedsim-" in file for file in files)
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))

    def test_a_killed_actor_is_forked_again_and_nothing_changes(self, forked_ray, reference):
        killed = []
        with Recording.of(TINY, results=None) as recording:
            for record in recording:
                if record.round in (1, 2):
                    killed.append(kill_one_of(record))
        assert len(set(killed)) == 2
        assert results_of(recording.run) == results_of(reference)
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in killed))
        wait_until(lambda: not psutil.Process(forked_ray._process.pid).children())

    @pytest.mark.parametrize("reach", ["near", "far"])
    def test_actors_that_rest_answer_as_others(self, forked_ray, reference, monkeypatch, reach):
        """Asleep inside a call between their calls, if they reach the bell; with deaths in between."""
        monkeypatch.setattr(crew, "_MANY", 2)
        rung = []
        ring = bell.Bell.ring
        monkeypatch.setattr(bell.Bell, "ring", lambda self: rung.append(self) or ring(self))
        if reach == "far":
            made = bell.Bell.__init__

            def unreachable(self):
                made(self)
                self.address = "/proc/0/fd/0"

            monkeypatch.setattr(bell.Bell, "__init__", unreachable)
        before = pipes()
        with Recording.of(TINY, results=None) as recording:
            for record in recording:
                if record.round == 1:
                    kill_one_of(record)
                elif record.round == 3 and reach == "near":
                    pid = next(client.pid for client in record.clients if psutil.pid_exists(client.pid))
                    wait_until(lambda pid=pid: switches_a_second(pid) < 20)  # else it looks for signals 100 times
        assert len(rung) >= 9
        assert results_of(recording.run) == results_of(reference)
        assert pipes() == before

    def test_plain_actors_as_asked_for_are_refused_nothing(self, forked_ray):
        """A Ray with a fork server forks whatever starts on it: only what run.json says of the plan differs."""
        x = prepare(TINY.override({"placement.start": "plain"}))
        with connect(x) as plan:
            assert (plan.start, plan.reasons[0]) == ("plain", "plain actors: as asked for")


# ---------------------------------------------------------------- with a Ray of its own


def killed(server):
    os.kill(server._process.pid, signal.SIGKILL)
    server._process.wait()


DRIVER = """
import sys
import fedsim
from fedsim.recording import Recording
config = fedsim.preset("seed").override({"data.dataset": "synthetic", "clients.count": 4, "rounds": 1000})
from fedsim.actors import private
with Recording.of(config, results=None) as recording:
    for record in recording:
        if record.round == 2:
            server = private._running.fork_server
            print(server._process.pid, server._folder, *[client.pid for client in record.clients], flush=True)
"""


def started_driver(tmp_path):
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert driver.stdout is not None
    server, home, *actors = driver.stdout.readline().split()
    descendants = [child.pid for child in psutil.Process(driver.pid).children(recursive=True)]
    return driver, int(server), Path(home), [int(pid) for pid in actors], descendants


def test_fork_server_and_actors_go_with_a_killed_driver(tmp_path):
    driver, server, home, actors, _ = started_driver(tmp_path)
    driver.kill()
    driver.wait(10)
    driver.stdout.close()
    wait_until(lambda: all(is_gone(pid) for pid in (server, *actors)), timeout_s=10)
    wait_until(lambda: not home.exists())


def test_an_interrupted_command_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-m", "fedsim", "run", "seed", "--set", "data.dataset=synthetic"]
    process = subprocess.Popen(
        [*command, "--set", "rounds=10000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        process_group=0,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    while "round 2/" not in process.stdout.readline():
        pass
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("fedsim.forkserver.server" in " ".join(child.cmdline()) for child in children)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole foreground group
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.startswith("fedsim: interrupted: ")
    assert len(said.splitlines()) == 1
    wait_until(lambda: all(is_gone(child.pid) for child in children))


NO_FORK_FROM_THE_SERVER = """
import os, sys
if any("forkserver.server" in word for word in sys.orig_argv):
    os.register_at_fork(after_in_child=lambda: os._exit(7))
"""


class TestOwnRay:
    """Each with a Ray of its own, after the shared one has ended."""

    @pytest.fixture(autouse=True)
    def _alone(self):
        assert not ray.is_initialized()

    def test_a_server_that_dies_before_the_actors_start_costs_one_warning(self, reference):
        with own_ray() as (x, plan, server):
            killed(server)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                start = time.monotonic()
                with open_pool(x, plan) as pool:
                    assert time.monotonic() - start < 30  # plain ones take their time
                    assert pool.info.num_forked == 0
                    updates = pool.fit(1, x.initial_weights, x.sample(1))
        said = [str(warning.message) for warning in caught if warning.category is FedsimWarning]
        assert said == [
            "4 actors could not be forked (the fork server was ended (-9)): they started as plain ones, each with "
            "more memory"
        ]
        hashes = reference.clients.loc[reference.clients["round"] == 1, "update_sha256"].tolist()
        assert [result.update.update_sha256 for result in updates] == hashes

    def test_a_server_that_dies_in_a_run_changes_nothing(self, reference):
        """Also not that it took an actor with it, whose successor is a plain one; this is said."""

        def run():
            with own_ray() as (_, _, server), Recording.of(TINY, results=None) as recording:
                for record in recording:
                    if record.round == 1:
                        killed(server)
            return recording.run

        with pytest.warns(FedsimWarning, match=r"actor \d could not be forked again \(the fork server was ended"):
            assert results_of(run()) == results_of(reference)

    def test_without_room_for_plain_actors_a_dead_server_ends_the_run(self, monkeypatch):
        monkeypatch.setattr(private, "allow_plain", lambda: None)
        monkeypatch.setattr(
            private, "ForkServer", lambda worker, or_plain: forkserver.ForkServer(worker, or_plain=False)
        )

        def run():
            with own_ray() as (_, _, server), Recording.of(TINY, results=None) as recording:
                for record in recording:
                    if record.round == 1:
                        killed(server)

        with pytest.raises(RunFailedError) as caught:
            run()
        assert str(caught.value) == (
            "actors cannot be forked any more (the fork server was ended (-9)), and as many plain ones do not fit the "
            "machine; start again, or set placement.mode=packed"
        )

    @pytest.mark.parametrize("clients", [4, 60])  # as plain actors, 60 would not be planned, nor fit
    def test_an_early_ray_is_of_use_to_a_plan_that_was_made_anew(self, monkeypatch, tmp_path, clients):
        (tmp_path / "sitecustomize.py").write_text(NO_FORK_FROM_THE_SERVER)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        command = [sys.executable, "-m", "fedsim", "run", "seed", "--set", "data.dataset=synthetic"]
        changes = ["placement.mode=auto", "rounds=1", f"clients.count={clients}"]
        answer = subprocess.run(
            [*command, *[part for change in changes for part in ("--set", change)]],
            capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert (answer.returncode, answer.stderr) == (0, "")
        assert fedsim.load_run(tmp_path / "results/seed").info["placement"]["start"] == "plain"

    def test_a_self_test_that_fails_means_plain_actors_and_the_plan_says_so(self, monkeypatch, tmp_path, reference):
        (tmp_path / "sitecustomize.py").write_text("import os\nos.register_at_fork(after_in_child=lambda: os._exit(7))")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        made = preview(prepare(TINY))
        assert made.start == "plain"
        assert made.reasons[0] == (
            "plain actors: they cannot be forked here (RuntimeError: a forked process failed with exit code 7)"
        )
        with pytest.raises(PlanError, match="cannot be forked here: RuntimeError: a forked process failed"):
            preview(prepare(TINY.override({"placement.start": "fork"})))
        with own_ray() as (_, plan, server):
            assert plan == made
            server.or_plain = False
            with warnings.catch_warnings():
                warnings.simplefilter("error", FedsimWarning)  # it was planned so
                assert results_of(fedsim.run(TINY, results=None)) == results_of(reference)


def test_a_ray_that_was_not_tried_is_not_forked(monkeypatch):
    monkeypatch.setattr(private.ray, "__version__", "2.999.0")
    assert private.fork_obstacle() == "not tried with Ray 2.999.0, only with 2.60"
    monkeypatch.setattr(private, "is_supported", lambda: False)
    assert private.fork_obstacle() == "it takes Linux 5.3 or later"


def test_what_ray_says_is_shown_except_what_is_no_news():
    shown = []

    def show(*lines):
        private._show(lambda message, **named: shown.append((message["lines"], named)), {"lines": lines}, named=1)

    show("WARNING: 8 PYTHON worker processes have been started on node: x")
    show("A worker died or was killed while executing a task by an unexpected system error. To troubleshoot, ...")
    show("Something else")
    assert shown == [(("Something else",), {"named": 1})]


def test_the_callers_own_ray_gets_plain_actors(shared_ray):
    assert private.fork_obstacle() == "fedsim did not start this Ray"
    with pytest.raises(PlanError, match=r"cannot be forked here: fedsim did not start this Ray; set placement\.start"):
        fedsim.run(TINY.override({"placement.start": "fork"}), results=None)
    with connect(prepare(TINY)) as plan:
        assert plan.start == "plain"
    assert all(node.fork_obstacle for node in connection.free_nodes())


def test_what_the_user_sets_for_ray_stays_and_does_not_get_in_the_way(monkeypatch):
    server = type("Server", (), {"environment": {"FEDSIM_FORK_SERVER": "here"}})()
    monkeypatch.setenv("FEDSIM_FORK_SERVER", "of another")
    monkeypatch.setenv("RAY_preload_python_modules", "json")
    monkeypatch.setenv("RAY_worker_niceness", "3")
    before = dict(os.environ)
    with private._environment(server):
        assert os.environ["FEDSIM_FORK_SERVER"] == "here"
        assert os.environ["RAY_preload_python_modules"] == "json,fedsim.forkserver.registered"
        assert os.environ["RAY_worker_niceness"] == "3"
        assert os.environ["RAY_prestart_worker_first_driver"] == "0"
    assert dict(os.environ) == before


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_starting_and_stopping_twenty_actors_thirty_times_leaves_nothing():
    folder = tempfile.mkdtemp(prefix="c-")  # short: Ray has its sockets there, too
    answer = subprocess.run(
        [sys.executable, "-c", CYCLES, "30"],
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
        env={**os.environ, "TMPDIR": folder},
    )
    shutil.rmtree(folder)
    *cycles, left = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [cycle["forked"] for cycle in cycles] == [20] * 30
    early, late = cycles[5], cycles[-1]
    assert late["files"] <= early["files"]
    assert late["sockets"] <= early["sockets"] + 30, "Ray keeps one for each time it was started, also for plain actors"
    assert late["threads"] <= early["threads"] + 2
    assert late["bytes"] < early["bytes"] + 30_000_000
    assert late["available"] > early["available"] - 1_000_000_000, "an actor a cycle would be more"
    assert left == {"children": 0, "processes": 0, "folders": 0, "shm": 0}


CYCLES = """
import json, os, pathlib, sys, time
import psutil
import fedsim
from fedsim.experiment import prepare
from fedsim.forkserver import LAUNCHER
from fedsim.launch import connect, open_pool
config = fedsim.Config().override({"data.dataset": "synthetic", "clients.count": 20,
                                   "placement.mode": "actor-per-client", "placement.start": "fork"})
x, me, seen = prepare(config), psutil.Process(), set()
folders = lambda: {path.name for path in pathlib.Path(os.environ["TMPDIR"]).glob("fedsim-*")}
shm = lambda: {path.name for path in pathlib.Path("/dev/shm").iterdir()}
files = lambda: [os.readlink(file) for file in pathlib.Path("/proc/self/fd").iterdir() if file.is_symlink()]
sockets = lambda: sum(file.startswith("socket:") for file in files())
own_bytes = lambda: 1024 * int(pathlib.Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])
before = folders(), shm()
for _ in range(int(sys.argv[1])):
    with connect(x) as plan, open_pool(x, plan) as pool:
        pool.fit(1, x.initial_weights, x.sample(1))
        seen |= {child.pid for child in me.children(recursive=True)}
        forked = pool.info.num_forked
    print(json.dumps({"forked": forked, "files": len(files()) - sockets(), "sockets": sockets(),
                      "threads": me.num_threads(), "bytes": own_bytes(),
                      "available": psutil.virtual_memory().available}), flush=True)
end = time.monotonic() + 30
while time.monotonic() < end and any(psutil.pid_exists(pid) for pid in seen):
    time.sleep(0.1)
print(json.dumps({"children": len(me.children(recursive=True)), "processes": sum(map(psutil.pid_exists, seen)),
                  "folders": len(folders() - before[0]), "shm": len(shm() - before[1])}))
"""
