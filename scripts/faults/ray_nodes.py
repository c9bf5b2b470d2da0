"""Ray clusters of several nodes on this machine, for tests and scripts: nodes can join, be killed, or be cut off.

Each node is a `ray start` of its own. In network namespaces a node has an interface of its own, on a bridge to the
driver and the head; this takes Linux and root. The clusters of others on this machine are left alone: all addresses,
ports and folders are this cluster's own, and what is killed are its own processes, one by one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray

QUICK_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1500",
    "RAY_health_check_failure_threshold": "2",
}
"""A node that is cut off is found dead in about 4 s; with Ray's own settings in 64 s (14 s if it was killed)."""

NO_NAMESPACES = "" if sys.platform == "linux" and os.geteuid() == 0 and shutil.which("ip") else "takes Linux and root"
"""Why nodes cannot have network namespaces here; "" if they can."""


@dataclass
class ClusterNode:
    """A node, as long as its `ray start --block` runs."""

    name: str
    """Its hostname, where it has a namespace."""
    ip: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def processes(self) -> list[psutil.Process]:
        """All of it: the one that watches, Ray's own, and the workers."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        return []

    @property
    def raylet(self) -> psutil.Process:
        """The process that is the node."""
        return next(process for process in self.processes if process.name() == "raylet")


class RayCluster:
    """A head, and the nodes that join it. Made by `ray_cluster`.

    Attributes:
        address: of the head, for `fedsim run --address`.
        nodes: that were started, the head first.
        environment: of the nodes' processes.
    """

    def __init__(self, environment: dict[str, str], *, isolated: bool) -> None:
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0", **environment}
        self.nodes: list[ClusterNode] = []
        self._folder = Path(tempfile.mkdtemp(prefix="fsr-", dir="/tmp"))  # short: sockets have names of 107 bytes
        self._isolated = isolated
        self._id = os.getpid() % 16384  # each has 8 addresses of 198.18.0.0/15, which are kept for tests of networks
        self._bridge = f"fsr{self._id}"
        self.address = ""

    def ip(self, number: int) -> str:
        """Of the head, 0, or of another node."""
        if not self._isolated:
            return "127.0.0.1"
        number += 8 * self._id + 1
        return f"198.{18 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"

    def start_head(self, cpus: float) -> ClusterNode:
        """The first node, in the driver's own namespace."""
        if self._isolated:
            _ip(f"link add {self._bridge} type bridge")
            _ip(f"addr add {self.ip(0)}/29 dev {self._bridge}")
            _ip(f"link set {self._bridge} up")
        with socket.create_server((self.ip(0), 0)) as free:
            self.address = f"{self.ip(0)}:{free.getsockname()[1]}"
        port = self.address.rpartition(":")[2]
        options = ["--head", f"--port={port}", f"--temp-dir={self._folder}", "--include-dashboard=false"]
        return self._start([], options, cpus, sys.executable)

    def join(
        self, cpus: float = 1, python: str = sys.executable, environment: dict[str, str] | None = None
    ) -> ClusterNode:
        """Adds a node; returns when it is part of the cluster.

        Args:
            cpus: that it offers.
            python: the interpreter whose packages it has.
            environment: of its processes, besides the cluster's.
        """
        number = len(self.nodes)
        prefix = []
        if self._isolated:
            assert number < 6, "a bridge has 6 addresses"
            space, here, there = self._space(number), f"{self._bridge}-{number}", f"{self._bridge}n{number}"
            _ip(f"netns add {space}")
            _ip(f"link add {here} type veth peer name {there}")
            _ip(f"link set {there} netns {space}")
            _ip(f"link set {here} master {self._bridge} up")
            _ip(f"-n {space} addr add {self.ip(number)}/29 dev {there}")
            _ip(f"-n {space} link set {there} up")
            _ip(f"-n {space} link set lo up")
            name = 'hostname "$0" && exec "$@"'
            prefix = ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", name, f"node{number}"]
        return self._start(prefix, [f"--address={self.address}"], cpus, python, environment)

    def kill(self, node: ClusterNode) -> None:
        """Kill -9 of all of its processes: as when it loses power, except that its connections are closed."""
        for process in node.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.process.wait()

    def stop(self, node: ClusterNode) -> None:
        """As a machine that hangs: SIGSTOP to all of its processes. `kill` ends them too."""
        for process in node.processes:
            process.send_signal(signal.SIGSTOP)

    def cut(self, node: ClusterNode) -> None:
        """As a cable that is pulled out. The node ends itself when it is back and finds that it was given up."""
        _ip(f"link set {self._bridge}-{self.nodes.index(node)} down")

    def mend(self, node: ClusterNode) -> None:
        """Undoes `cut`."""
        _ip(f"link set {self._bridge}-{self.nodes.index(node)} up")

    def close(self) -> None:
        """Ends all processes, and removes folders, namespaces and interfaces."""
        for node in reversed(self.nodes):
            self.kill(node)
        if self._isolated:
            for number in range(1, len(self.nodes)):
                for pid in _ip(f"netns pids {self._space(number)}").split():  # whose parents died before them
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                _ip(f"link del {self._bridge}-{number}")
                _ip(f"netns del {self._space(number)}")
            _ip(f"link del {self._bridge}")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _space(self, number: int) -> str:
        return f"{self._bridge}-{number}"

    def _start(
        self,
        prefix: list[str],
        options: list[str],
        cpus: float,
        python: str,
        environment: dict[str, str] | None = None,
    ) -> ClusterNode:
        number = len(self.nodes)
        log = self._folder / f"node{number}.log"
        command = [*prefix, python, "-m", "ray.scripts.scripts", "start", "--block", *options]
        command += [f"--num-cpus={cpus}", f"--node-ip-address={self.ip(number)}", "--object-store-memory=200000000"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment | (environment or {}),
                cwd="/",
            )
        node = ClusterNode(f"node{number}", self.ip(number), process, log)
        self.nodes.append(node)

        def is_up() -> bool:
            assert process.poll() is None, log.read_text()
            return "Ray runtime started" in log.read_text()

        _wait_until(is_up, timeout_s=60)
        return node


@contextlib.contextmanager
def ray_cluster(
    *cpus: float, isolated: bool = False, quick: bool = True, environment: dict[str, str] | None = None
) -> Iterator[RayCluster]:
    """A cluster, ended on leaving.

    Args:
        cpus: of each node, the head first.
        isolated: gives each node but the head a network namespace and a hostname.
        quick: finds nodes dead sooner than Ray does by itself.
        environment: of the nodes' processes, besides this one's.
    """
    _make_token()
    settings = QUICK_HEALTH_CHECKS if quick else {}
    cluster = RayCluster({**settings, **(environment or {})}, isolated=isolated)
    try:
        cluster.start_head(cpus[0])
        for number in cpus[1:]:
            cluster.join(number)
        yield cluster
    finally:
        cluster.close()


def alive_nodes() -> list[str]:
    """The addresses of the nodes that Ray takes for alive; of the Ray that this process uses."""
    return [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("waited too long for a node")
        time.sleep(0.02)


def _make_token() -> None:
    """Where tokens are asked for (conftest), `ray start` wants one to be there; `ray.init` would make it."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        command = [sys.executable, "-m", "ray.scripts.scripts", "get-auth-token", "--generate"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)


def _ip(command: str) -> str:
    return subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True).stdout
