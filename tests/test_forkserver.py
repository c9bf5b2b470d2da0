"""The fork server and its launcher, with a script of the test's own in the place of Ray's worker: life and death."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from helpers import is_gone, wait_until

from fedsim import forkserver
from fedsim.forkserver import LAUNCHER, ForkServer, launcher, server, worker

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not forkserver.is_supported(), reason="forking is for Linux"),
]

SECRET = "a-token-that-nobody-else-may-read"

WORKER = """
import json, os, sys
loaded = sorted(m for m in ("torch", "ray", "fedsim.client") if m in sys.modules)
import pathlib, time
seen = {
    "pid": os.getpid(), "parent": os.getppid(), "group": os.getpgid(0), "arguments": sys.argv[1:], "loaded": loaded,
    "folder": os.getcwd(), "environment": dict(os.environ), "files": sorted(os.listdir("/proc/self/fd"), key=int),
    "threads": len(os.listdir("/proc/self/task")), "oom": open("/proc/self/oom_score_adj").read().strip(),
    "terminates": __import__("signal").getsignal(15) == 0, "main": __name__, "path": sys.path[0],
    "limit": __import__("resource").getrlimit(7),
    "drawn": sys.modules["numpy"].random.randint(10**9) if "numpy" in sys.modules else None,
}
file = pathlib.Path(sys.argv[1])
file.with_suffix(".part").write_text(json.dumps(seen))
file.with_suffix(".part").rename(file)
print("said by the worker", flush=True)
if "fail" in sys.argv and "FEDSIM_FORKED" in os.environ:
    raise SystemExit(3)
if "hang" not in sys.argv:
    import fedsim.forkserver.registered
if "end" not in sys.argv:
    time.sleep(60)
"""


class World:
    """A fork server, and a process that stands for Ray's raylet."""

    def __init__(self, folder: Path, **options):
        self.folder = folder
        self.script = folder / "worker.py"
        self.script.write_text(WORKER)
        self.raylet = subprocess.Popen(["sleep", "100"])
        self.server = ForkServer(self.script, **options)
        self.pid = self.server._process.pid
        self.home = self.server._folder
        self.launchers = []

    def launch(self, name, *arguments, **variables):
        """As Ray does: the launcher in place of the script, in a process group of its own."""
        variables = {"RAY_RAYLET_PID": str(self.raylet.pid), "RAY_AUTH_TOKEN": SECRET, **variables}
        with (self.folder / f"{name}.out").open("wb") as out:
            launcher = subprocess.Popen(
                [sys.executable, "-S", str(LAUNCHER), str(self.folder / f"{name}.json"), *arguments],
                env={**os.environ, **self.server.environment, **variables},
                cwd=self.folder,
                stdout=out,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        self.launchers.append(launcher)
        return launcher

    def seen(self, name, timeout_s=15.0):
        path = self.folder / f"{name}.json"
        wait_until(path.exists, timeout_s)
        return SimpleNamespace(**json.loads(path.read_text()))

    def close(self):
        self.server.close()
        for process in (*self.launchers, self.raylet):
            process.kill()
            process.wait()


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    assert made.server.obstacle() == ""
    yield made
    made.close()


# ---------------------------------------------------------------- what a forked worker is like


def test_a_forked_worker_is_like_the_one_that_ray_would_have_started(world):
    launcher = world.launch("one", "x", "y z", OTHER="1")
    seen = world.seen("one")
    assert launcher.wait(10) == 0, "it ends when its child is known"
    assert seen.parent == world.pid
    assert seen.loaded == ["fedsim.client", "ray", "torch"], "before its first line"
    assert (seen.arguments, seen.main) == ([str(world.folder / "one.json"), "x", "y z"], "__main__")
    assert (seen.folder, seen.path) == (str(world.folder), str(world.folder))
    assert seen.group == launcher.pid, "Ray ends a worker with the group that it made for it"
    expected = {**os.environ, "RAY_RAYLET_PID": str(world.raylet.pid), "RAY_AUTH_TOKEN": SECRET, "OTHER": "1"}
    own = {"FEDSIM_FORKED": "1", "FEDSIM_LAUNCHER": seen.environment["FEDSIM_LAUNCHER"]}
    assert seen.environment == expected | own
    wait_until(lambda: (world.folder / "one.out").read_text() == "said by the worker\n")
    assert seen.threads == 1
    assert seen.terminates, "by a signal, as any process"
    assert psutil.Process(seen.pid).status() in ("running", "sleeping")


def test_it_has_no_file_of_the_servers(world):
    for name in ("one", "two", "three"):
        world.launch(name)
    for name in ("one", "two", "three"):
        seen = world.seen(name)
        standard, launcher, listing = ["0", "1", "2"], seen.environment["FEDSIM_LAUNCHER"], 1
        assert len(seen.files) == len({*standard, launcher}) + listing, seen.files
        assert {*standard, launcher} <= set(seen.files)


def test_it_takes_the_score_by_which_the_system_chooses_when_memory_ends(world):
    launcher = world.launch("one", "hang")
    Path(f"/proc/{launcher.pid}/oom_score_adj").write_text("700")  # Ray does so right after the start
    assert world.seen("one").oom in ("700", "0")
    other = subprocess.Popen(
        ["sh", "-c", f'echo 900 > /proc/self/oom_score_adj; exec {sys.executable} -S {LAUNCHER} "$0" end',
         str(world.folder / "two.json")],
        env={**os.environ, **world.server.environment, "RAY_RAYLET_PID": str(world.raylet.pid),
             "RAY_AUTH_TOKEN": SECRET},
    )  # fmt: skip
    assert world.seen("two").oom == "900"
    assert other.wait(10) == 0


def test_no_two_draw_the_same_where_plain_ones_would_not(world):
    """From numpy's own generator; Python's and torch's see to it by themselves, or are alike in plain workers too."""
    for name in ("one", "two", "three"):
        world.launch(name)
    assert len({world.seen(name).drawn for name in ("one", "two", "three")}) == 3


def test_it_may_open_as_many_files_as_its_launcher(world):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 7, hard))
        world.launch("one")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert world.seen("one").limit == [soft - 7, hard]


def test_variables_of_the_user_that_begin_like_the_servers_are_kept(world):
    world.launch("one", FEDSIM_DATA="here")
    assert world.seen("one").environment["FEDSIM_DATA"] == "here"
    world.launch("two", FEDSIM_DATA="here", RAY_OTHER="1")
    assert world.seen("two").environment["FEDSIM_DATA"] == "here"


def test_a_plain_worker_is_not_started_for_a_ray_that_has_ended(world):
    world.launch("one")
    world.seen("one")
    world.raylet.kill()
    world.raylet.wait()
    launcher = world.launch("two")
    assert launcher.wait(10) == 1
    assert "ProcessLookupError" in (world.folder / "two.out").read_text()


def test_paths_that_are_no_strings_are_left_out_as_python_does(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    world = World(tmp_path)
    try:
        assert world.server.obstacle() == ""
    finally:
        world.close()


def test_other_settings_of_ray_make_a_plain_worker(world):
    """Ray's library reads them when it is loaded, which it is."""
    world.launch("one")
    assert world.seen("one").parent == world.pid
    launcher = world.launch("two", RAY_OTHER="1")
    seen = world.seen("two")
    assert (seen.pid, seen.loaded, seen.arguments[1:]) == (launcher.pid, [], [])
    assert not any(name.startswith("FEDSIM_") and name not in os.environ for name in seen.environment)
    world.launch("three")
    assert world.seen("three").parent == world.pid


# ---------------------------------------------------------------- deaths


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_child_that_ray_does_not_know_dies_with_its_launcher(world, number):
    launcher = world.launch("one", "hang")
    child = world.seen("one").pid
    launcher.send_signal(number)
    wait_until(lambda: not psutil.pid_exists(child))  # not even a zombie
    assert launcher.wait(10) == -number or number == signal.SIGINT
    world.launch("two")
    assert world.seen("two").parent == world.pid, "the others are not concerned"


def test_a_child_that_ray_knows_outlives_its_launcher_and_leaves_no_zombie(world):
    launcher = world.launch("one")
    child = world.seen("one").pid
    launcher.wait(10)
    time.sleep(0.2)
    assert not is_gone(child)
    os.killpg(launcher.pid, signal.SIGKILL)  # as Ray ends a worker: by its group
    wait_until(lambda: not psutil.pid_exists(child))


def test_children_die_with_a_killed_server_and_later_workers_are_plain(world):
    world.launch("one")
    child = world.seen("one").pid
    os.kill(world.pid, signal.SIGKILL)
    wait_until(lambda: is_gone(child))
    launcher = world.launch("two")
    assert world.seen("two").pid == launcher.pid
    assert world.server.obstacle() == "the fork server was ended (-9)"
    assert not world.server.is_serving()


def test_a_server_that_is_killed_between_fork_and_registration_leaves_a_plain_worker(world):
    launcher = world.launch("one", "hang")
    child = world.seen("one").pid
    (world.folder / "one.json").unlink()
    os.kill(world.pid, signal.SIGKILL)
    assert world.seen("one").pid == launcher.pid
    assert is_gone(child)


def test_server_and_children_end_with_ray(world):
    world.launch("one")
    child = world.seen("one").pid
    world.raylet.kill()
    world.raylet.wait()
    wait_until(lambda: is_gone(child) and is_gone(world.pid))
    assert not world.home.exists()


def test_a_server_that_nobody_asked_ends_when_it_is_closed(world):
    world.server.close()
    assert is_gone(world.pid)
    assert not world.home.exists()


DRIVER = """
import os, pathlib, subprocess, sys, time
from fedsim.forkserver import LAUNCHER, ForkServer
folder = pathlib.Path(sys.argv[1])
server = ForkServer(folder / "worker.py")
if "early" not in sys.argv:
    assert server.obstacle() == ""
    variables = {**os.environ, **server.environment, "RAY_RAYLET_PID": str(os.getppid())}
    command = [sys.executable, "-S", str(LAUNCHER), str(folder / "one.json")]
    subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL)
    while not (folder / "one.json").exists():
        time.sleep(0.01)
print(server._process.pid, server._folder, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("moment", ["early", "late"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_server_children_and_socket_go_with_the_driver_however_it_ends(tmp_path, number, moment):
    (tmp_path / "worker.py").write_text(WORKER)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), moment], stdout=subprocess.PIPE, text=True, process_group=0
    )
    assert driver.stdout is not None
    server_pid, home = driver.stdout.readline().split()
    driver.send_signal(number)
    driver.wait(10)
    driver.stdout.close()
    pids = [int(server_pid)]
    if moment == "late":
        pids.append(json.loads((tmp_path / "one.json").read_text())["pid"])
    wait_until(lambda: all(is_gone(pid) for pid in pids))
    wait_until(lambda: not Path(home).exists())


def test_closing_ends_everything(world):
    world.launch("one")
    world.launch("two", "hang")
    children = [world.seen("one").pid, world.seen("two").pid]
    world.server.close()
    assert is_gone(world.pid)
    assert not any(psutil.pid_exists(child) for child in children), "it took leave of them, too"
    assert not world.home.exists()


def test_a_worker_that_fails_when_forked_is_started_again_as_a_plain_one(world):
    launcher = world.launch("one", "fail")
    wait_until(lambda: (world.folder / "one.out").read_text().count("said by the worker") == 3 + 1)
    assert world.seen("one").pid == launcher.pid


@pytest.mark.parametrize("trouble", ["killed", "fail"])
def test_where_plain_workers_do_not_fit_none_is_started_and_the_driver_can_know(tmp_path, trouble):
    world = World(tmp_path, or_plain=False)
    try:
        assert world.server.obstacle() == ""
        assert world.server.is_serving()
        if trouble == "killed":
            os.kill(world.pid, signal.SIGKILL)
        launcher = world.launch("one", trouble)
        assert launcher.wait(10) == 1
        *_, said = (tmp_path / "one.out").read_text().splitlines()
        assert said == "fedsim: the fork server gave no worker, and plain ones do not fit this machine"
        assert not world.server.is_serving()
        assert world.server.obstacle() == {
            "killed": "the fork server was ended (-9)",
            "fail": "the fork server did not give a worker that it was asked for",
        }.get(trouble)
    finally:
        world.close()


def test_plain_workers_can_be_allowed_later(tmp_path):
    """When a plan is made anew, with fewer of them."""
    world = World(tmp_path, or_plain=False)
    try:
        assert world.server.obstacle() == ""
        world.server.allow_plain()
        os.kill(world.pid, signal.SIGKILL)
        launcher = world.launch("one")
        assert world.seen("one").pid == launcher.pid
        assert world.server.or_plain
        world.server._process.wait()
        (world.home / "plain").unlink()
        (world.home / "socket").unlink()
        world.home.rmdir()
        world.server.allow_plain()
        assert stat.S_IMODE(world.home.stat().st_mode) == 0o700
    finally:
        world.close()
    assert not world.home.exists()


@pytest.mark.slow
def test_a_server_that_hangs_costs_ten_seconds_once(world):
    os.kill(world.pid, signal.SIGSTOP)
    start = time.monotonic()
    launchers = [world.launch(name) for name in ("one", "two")]
    assert [world.seen(name).pid for name in ("one", "two")] == [launcher.pid for launcher in launchers]
    assert time.monotonic() - start < 10
    assert world.server.obstacle() == "the fork server did not give a worker that it was asked for"
    start = time.monotonic()
    launcher = world.launch("three")
    assert world.seen("three").pid == launcher.pid
    assert time.monotonic() - start < 3, "who comes later does not wait"


def test_children_come_and_go_without_a_trace(world):
    world.launch("first", "end")
    world.seen("first")
    process = psutil.Process(world.pid)
    wait_until(lambda: not process.children())
    before = process.num_fds()
    for name in map(str, range(30)):
        world.launch(name, "end")
    for name in map(str, range(30)):
        assert world.seen(name).parent == world.pid
    wait_until(lambda: not process.children() and process.num_fds() == before)
    assert process.num_threads() == 1
    assert [launcher.wait(10) for launcher in world.launchers] == [0] * 31


@pytest.mark.parametrize(("answer", "is_replaced"), [(b"fr", True), (b"f", False), (b"", False)])
def test_whoever_was_known_to_ray_and_has_ended_is_not_started_again(tmp_path, answer, is_replaced):
    """By a launcher that learns of it late: it cannot say that it is done."""

    def serve():
        asked, _ = listener.accept()
        with asked:
            asked.recv(1)
            asked.shutdown(socket.SHUT_RD)
            asked.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        served = pool.submit(serve)
        assert launcher._is_replaced(str(tmp_path / "socket")) == is_replaced
        served.result()


# ---------------------------------------------------------------- what others can see, and reach


def test_nobody_else_sees_the_environment_or_reaches_the_socket(world):
    launcher = world.launch("one", "hang")
    child = world.seen("one").pid
    assert stat.S_IMODE(world.home.stat().st_mode) == 0o700
    assert world.home.stat().st_uid == os.getuid()
    for pid in (world.pid, launcher.pid, child):
        assert SECRET not in " ".join(psutil.Process(pid).cmdline()), "which everybody may read"
    assert [path.name for path in world.home.iterdir()] == ["socket"]


def test_another_users_request_is_not_answered(world, monkeypatch):
    one, other = socket.socketpair()
    with one, other:
        socket.send_fds(other, [b"?"], [0, 1, 2])
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        assert worker.receive(one) == []


@pytest.mark.parametrize("files", [0, 2, 3])
def test_nonsense_at_the_socket_is_ignored_and_costs_nothing(world, files):
    world.launch("one", "end")
    assert world.seen("one").parent == world.pid
    process = psutil.Process(world.pid)
    wait_until(lambda: not process.children())
    before = process.num_fds()
    for message in (b"", b"?") * 3:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(world.home / "socket"))
            if files and message:
                socket.send_fds(stranger, [message], list(range(files)))
            else:
                stranger.send(message)
    world.launch("two", RAY_OTHER="1")  # is refused
    assert world.seen("two").parent == os.getpid()
    world.launch("three", "end")
    assert world.seen("three").parent == world.pid
    wait_until(lambda: process.num_fds() == before)


# ---------------------------------------------------------------- what it says of itself


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()", "threads run"),
        ("import sys\nsys.modules['pyarrow'] = None", "ModuleNotFoundError: import of pyarrow halted"),
        ("import os\nos.register_at_fork(after_in_child=lambda: os._exit(7))", "a forked process failed with exit"),
    ],
)
def test_an_obstacle_is_named_and_workers_are_plain(tmp_path, monkeypatch, code, reason):
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    world = World(tmp_path)
    try:
        assert reason in world.server.obstacle()
        assert "\n" not in world.server.obstacle()
        launcher = world.launch("one")
        assert world.seen("one").pid == launcher.pid
    finally:
        world.close()


def test_a_socket_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(forkserver.tempfile, "tempdir", str(long))
    world = World(tmp_path)
    try:
        assert "path too long" in world.server.obstacle()
    finally:
        world.close()


def test_a_test_that_takes_too_long_is_an_obstacle(tmp_path):
    world = World(tmp_path)
    try:
        assert world.server.obstacle(timeout_s=0.01) == "its test of itself took more than 0.01 s"
    finally:
        world.close()


@pytest.mark.parametrize("is_there", [True, False])
def test_nothing_that_would_start_cuda_runs_before_a_fork(tmp_path, monkeypatch, is_there):
    """Autograd does, wherever there is a GPU's driver; the trial is in a child, which no other is forked from."""
    done = []
    for name in ("_import", "rehearse", "_settle", "_test"):
        monkeypatch.setattr(server, name, lambda *arguments, name=name: done.append(name))
    monkeypatch.setattr(server, "_GPU_DRIVERS", (str(tmp_path / "none"), str(tmp_path / "driver")))
    if is_there:
        (tmp_path / "driver").touch()

    class Server:
        def __init__(self, address, driver):
            pass

        def serve(self):
            raise InterruptedError

        def close(self):
            done.append("close")

    monkeypatch.setattr(server, "_Server", Server)
    with pytest.raises(InterruptedError):
        server.main("somewhere", 1)
    assert done == ["_import", *([] if is_there else ["rehearse"]), "_settle", "_test", "close"]


def test_it_is_for_linux(monkeypatch):
    assert forkserver.is_supported()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not forkserver.is_supported()
