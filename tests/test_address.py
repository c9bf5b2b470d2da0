"""Where Ray is looked for. Kept apart from tests that have a Ray already: fedsim would use that one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import fedsim
from fedsim.errors import PlanError

pytestmark = pytest.mark.ray

TINY = fedsim.Config().override({"data.dataset": "synthetic", "placement.mode": "packed"})


def test_nobody_answers_at_the_address(tmp_path):
    with pytest.raises(PlanError, match=r"no Ray answers at '127\.0\.0\.1:9'.*ray start --head"):
        list(fedsim.rounds(TINY.override({"placement.mode": "packed", "placement.address": "127.0.0.1:9"})))
    with pytest.raises(PlanError, match="no Ray answers at 'nonsense'"):
        fedsim.run(TINY.override({"placement.mode": "packed", "placement.address": "nonsense"}), results=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_address_is_the_keys_then_rays_variable_then_local(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(PlanError, match=r"no Ray answers at '127\.0\.0\.1:9'"):
        list(fedsim.rounds(TINY.override({"placement.mode": "packed"})))
    with pytest.raises(PlanError, match="no Ray answers at 'elsewhere'"):
        list(fedsim.rounds(TINY.override({"placement.mode": "packed", "placement.address": "elsewhere"})))


def test_what_a_dead_ray_left_is_told_by_auto_and_else_ignored(tmp_path):
    """The file that names the machine's cluster outlives it."""
    rays = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: sockets in it have names of at most 107 bytes
    (rays / "ray").mkdir()
    (rays / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}

    def run(*options):
        command = [
            sys.executable,
            "-m",
            "fedsim",
            "run",
            "seed",
            "--set",
            "data.dataset=synthetic",
            "--quiet",
            *options,
        ]
        environment["RAY_TMPDIR"] = str(rays)
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment, check=False
        )

    refused = run("--address", "auto")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("fedsim: no Ray answers at 'auto' ([Errno 111] Connection refused); start one")
    assert not (tmp_path / "results").exists()
    assert run().returncode == 0
    assert fedsim.load_run(tmp_path / "results" / "seed").status == "finished"
    shutil.rmtree(rays)


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://127.0.0.1:8265"])
def test_what_is_no_place_to_join_is_told_from_one_that_does_not_answer(address, tmp_path):
    with pytest.raises(PlanError, match=rf"'{address}' cannot be joined: use HOST:PORT .* or `ray job submit`"):
        fedsim.run(TINY.override({"placement.address": address}), results=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""], ids=["a web server", "silence"])
def test_something_else_that_listens_is_no_ray(answer):
    """Ray would try for 40 s, twenty times."""

    def serve():
        connection, _ = server.accept()
        with connection:
            connection.sendall(answer)
            is_over.wait(30)

    start, is_over = time.monotonic(), threading.Event()
    with socket.create_server(("", 0)) as server:  # Ray looks for 127.0.0.1 at this machine's own address
        server.settimeout(20)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with pytest.raises(PlanError, match=rf"no Ray answers at '{address}' \(something else listens there\)"):
                list(fedsim.rounds(TINY.override({"placement.address": address})))
        finally:
            is_over.set()
            thread.join()
    assert time.monotonic() - start < 15
