"""What the system lets a run have, of a Linux that is made up of files and numbers, and of this one."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from fedsim.config import PlacementConfig
from fedsim.errors import PlanError
from fedsim.placement import Size, cpu_node, make_plan, system
from fedsim.placement.system import UNLIMITED, file_limit, thread_limit

INFINITY = -1  # as Linux has it


class FakeLinux:
    """Without limits, unless a test sets them."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.groups = folder / "proc", folder / "cgroup"
        self.resources = {"RLIMIT_NPROC": (INFINITY, INFINITY), "RLIMIT_NOFILE": (INFINITY, INFINITY)}
        self.threads = 10, 0
        """Of this process and its children; of the same user beside them."""

    def set_kernel(self, **numbers: object) -> None:
        for name, number in numbers.items():
            _write(self.proc / "sys/kernel" / name.replace("threads_max", "threads-max"), number)

    def set_all_threads(self, count: int) -> None:
        _write(self.proc / "loadavg", f"0.11 0.22 0.33 2/{count} 12345")

    def set_group(self, line: str) -> None:
        """Where this process is, in the form of /proc/self/cgroup."""
        _write(self.proc / "self/cgroup", line)

    def limit_group(self, path: str, limit: object, used: object = None) -> None:
        _write(self.groups / path / "pids.max", limit)
        if used is not None:
            _write(self.groups / path / "pids.current", used)


def _write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def linux(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    made = FakeLinux(tmp_path)
    monkeypatch.setattr(system.sys, "platform", "linux")
    monkeypatch.setattr(system, "_PROC", made.proc)
    monkeypatch.setattr(system, "_CONTROL_GROUPS", made.groups)
    monkeypatch.setattr(system, "_threads", lambda: made.threads)
    names = {getattr(resource, name): name for name in made.resources}
    monkeypatch.setattr(resource, "getrlimit", lambda number: made.resources[names[number]])
    return made


# ---------------------------------------------------------------- threads


def test_a_system_that_says_nothing_has_no_limits(linux):
    assert thread_limit()[0] == UNLIMITED
    assert file_limit() == UNLIMITED


def test_the_users_limit_counts_what_runs_as_this_user(linux):
    linux.resources["RLIMIT_NPROC"] = 4000, INFINITY
    assert thread_limit() == (4000, "ulimit -u"), "the soft limit; and what this process has is for itself"
    linux.threads = 10, 300
    assert thread_limit() == (3700, "ulimit -u")


@pytest.mark.parametrize(("name", "known_as"), [("threads_max", "kernel.threads-max"), ("pid_max", "kernel.pid_max")])
def test_the_kernels_limits_count_everything(linux, name, known_as):
    linux.set_kernel(**{name: 3000})
    assert thread_limit() == (3000, known_as), "where it is not known what runs"
    linux.threads = 10, 300
    linux.set_all_threads(1500)
    assert thread_limit() == (1510, known_as)


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("0::/user.slice/user-1.slice/app", "user.slice/user-1.slice/app"),
        ("0::/user.slice/user-1.slice/app", "user.slice/user-1.slice"),
        ("0::/user.slice/user-1.slice/app", "user.slice"),
        ("0::/user.slice/user-1.slice/app", ""),
        ("0::/", ""),  # a container with its own view
        ("0::/../other", ""),  # outside of the view
        ("0::/with:colon", "with:colon"),
        ("9:name=systemd:/\n8:pids:/docker/a\n4:memory:/b\n0::/", "pids/docker/a"),  # version 1
        ("8:pids:/docker/a\n0::/", "pids"),  # whose container sees no other
    ],
)
def test_a_control_group_and_all_above_it_count_what_runs_in_them(linux, line, path):
    linux.set_group(line)
    linux.limit_group(path, 900)
    known_as = str(linux.groups / path / "pids.max")
    assert thread_limit() == (900, known_as), "where it is not known what runs"
    linux.limit_group(path, 900, used=110)
    assert thread_limit() == (800, known_as)


def test_groups_that_this_process_is_not_in_do_not_count(linux):
    linux.set_group("4:memory:/mine\n0::/mine/app")
    for path in ("other", "mine/other", "mine/app/below", "memory/mine", "pids/mine"):
        linux.limit_group(path, 100)
    assert thread_limit()[0] == UNLIMITED


def test_max_is_no_limit(linux):
    linux.set_group("0::/user.slice/app")
    linux.limit_group("user.slice/app", "max", used=110)
    linux.limit_group("user.slice", "max")
    assert thread_limit()[0] == UNLIMITED
    linux.limit_group("", 5000)
    assert thread_limit()[0] == 5000


def test_the_smallest_of_all_counts(linux):
    linux.threads = 10, 100
    linux.set_all_threads(1010)
    linux.set_group("0::/user.slice/app")
    linux.resources["RLIMIT_NPROC"] = 8100, 9000
    assert thread_limit() == (8000, "ulimit -u")
    linux.set_kernel(threads_max=8000, pid_max=32_768)
    assert thread_limit() == (7000, "kernel.threads-max")
    linux.set_kernel(threads_max=60_000, pid_max=7500)
    assert thread_limit() == (6500, "kernel.pid_max")
    linux.limit_group("user.slice", 6500, used=510)
    assert thread_limit() == (6000, str(linux.groups / "user.slice/pids.max"))
    linux.limit_group("user.slice/app", 5000, used=10)
    assert thread_limit() == (5000, str(linux.groups / "user.slice/app/pids.max"))
    linux.resources["RLIMIT_NPROC"] = 4100, 4100
    assert thread_limit() == (4000, "ulimit -u")


def test_a_limit_that_others_have_used_up_leaves_nothing(linux):
    linux.resources["RLIMIT_NPROC"] = 200, 200
    linux.threads = 10, 300
    assert thread_limit() == (0, "ulimit -u")


@pytest.mark.parametrize("text", ["", "what", "0.11 0.22", "0.11 0.22 0.33 2", "::", "8:pids"])
def test_files_that_say_something_else_say_nothing(linux, text):
    linux.set_kernel(threads_max=text, pid_max=text)
    linux.set_group(text)
    linux.limit_group("", text, used=text)
    _write(linux.proc / "loadavg", text)
    linux.resources["RLIMIT_NPROC"] = 4000, 4000
    assert thread_limit() == (4000, "ulimit -u")


def test_other_systems_have_the_users_limit_alone(linux, monkeypatch):
    linux.resources["RLIMIT_NPROC"] = 4000, INFINITY
    linux.threads = 10, 300
    linux.set_kernel(threads_max=3000)
    monkeypatch.setattr(system.sys, "platform", "darwin")
    assert thread_limit() == (4000, "ulimit -u")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("soft", "hard", "limit"),
    [
        (1024, 4096, 4096),
        (1024, 524_288, 65_536),
        (100_000, 524_288, 100_000),
        (20_000, 20_000, 20_000),
        (256, 2**63 - 1, 65_536),  # infinity, as macOS has it
        (1024, INFINITY, 1024),  # which Ray takes for a number
        (INFINITY, INFINITY, UNLIMITED),
        (2**63 - 1, 2**63 - 1, UNLIMITED),
    ],
)
def test_ray_raises_the_limit_of_open_files_as_far_as_it_may(linux, soft, hard, limit):
    linux.resources["RLIMIT_NOFILE"] = soft, hard
    assert file_limit() == limit


def test_this_ray_raises_it_so():
    found = find_spec("ray._private.worker")
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).read_text(encoding="utf-8")
    assert f"max(soft, min(hard, {system._RAISED_FILES}))" in source


# ---------------------------------------------------------------- from the system to the plan


def test_a_plan_over_the_limit_of_a_control_group_names_it(linux):
    linux.set_group("0::/docker/a")
    linux.limit_group("docker", 1060, used=70)
    linux.resources["RLIMIT_NOFILE"] = 1024, 4096
    node = cpu_node()
    assert (node.max_threads, node.max_files) == (1000, 4096)
    with pytest.raises(PlanError) as caught:
        make_plan(PlacementConfig(mode="actor-per-client"), Size(31, 31, 0), (node,))
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "31 actors need about 1,025 threads and 224 open files; the limits leave 1,000 threads "
        f"({linux.groups}/docker/pids.max) and 4,096 open files (ulimit -n), which allow 30 actors: raise them, "
        "or set placement.mode=packed or fewer placement.actors"
    )


# ---------------------------------------------------------------- this machine


def test_threads_of_what_this_process_has_started_are_its_own():
    own, _ = system._threads()
    assert own >= psutil.Process().num_threads()
    code = "import threading; [threading.Thread(target=input).start() for _ in range(6)]; print('up', flush=True)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        with_child, _ = system._threads()
        process.kill()
    assert with_child >= own + 7


@pytest.mark.skipif(sys.platform != "linux", reason="the files are Linux's")
def test_this_linux_says_what_it_allows():
    soft, hard = system._resource_limits("RLIMIT_NPROC")
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NPROC, (3000, {hard}))
from fedsim.placement import cpu_node
print(cpu_node().max_threads, cpu_node().threads_limit)
"""
    assert soft < 0 or soft > 3000, "otherwise there is nothing to lower"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    limit, name = answer.split(maxsplit=1)
    assert 0 <= int(limit) <= 3000
    assert name
    assert system._all_threads() >= psutil.Process().num_threads()
