"""The whole thing as a user has it: the command line, Ray, files, pandas; on the synthetic set and on real MNIST."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest

import fedsim

pytestmark = pytest.mark.ray

FEDSIM = [sys.executable, "-m", "fedsim"]


def fedsim_run(*arguments, folder, timeout_s=240):
    return subprocess.run(
        [*FEDSIM, "run", *arguments], capture_output=True, text=True, cwd=folder, timeout=timeout_s, check=False
    )


def test_ctrl_c_leaves_complete_files_and_no_process(tmp_path):
    command = [*FEDSIM, "run", "seed", "--set", "data.dataset=synthetic", "--set", "rounds=100000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("round 2/"):
            break
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("fedsim: interrupted: results/seed holds the rounds up to ")
    assert time.monotonic() - started < 30  # a few seconds on an idle machine
    assert psutil.wait_procs(children, timeout=30)[1] == []
    run = fedsim.load_run(tmp_path / "results/seed")
    assert run.status == "interrupted"
    rounds = run.rounds["round"].tolist()
    assert rounds == list(range(len(rounds)))
    assert len(rounds) >= 3
    assert sorted(run.clients["round"].tolist()) == sorted(2 * rounds[1:])


@pytest.mark.mnist
def test_seed_preset_on_mnist_from_the_command_line_is_the_same_without_ray(tmp_path, monkeypatch):
    answer = fedsim_run("seed", folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    *_, path_line, pandas_line = answer.stdout.splitlines()
    assert path_line.startswith("results/seed: test accuracy 0.9")
    monkeypatch.chdir(tmp_path)
    rounds = eval(pandas_line.partition("; ")[2], {"pd": pd})
    assert rounds["round"].tolist() == [0, 1, 2]
    assert 0.950 <= rounds["test_accuracy"].iloc[-1] <= 0.968
    with_ray = fedsim.load_run("results/seed")
    assert with_ray.status == "finished"
    assert with_ray.clients["pid"].nunique() == 2
    serial = fedsim.run(fedsim.preset("seed").override({"placement.mode": "serial"}), results=None)
    assert rounds["weights_sha256"].tolist() == serial.rounds["weights_sha256"].tolist()
    assert with_ray.clients["update_sha256"].tolist() == serial.clients["update_sha256"].tolist()


@pytest.mark.mnist
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_seed_preset_reaches_what_independent_programs_reach(seed, tmp_path):
    run = fedsim.run(fedsim.preset("seed").override({"seed": seed, "placement.mode": "serial"}), results=None)
    assert 0.950 <= run.rounds["test_accuracy"].iloc[-1] <= 0.968


@pytest.mark.mnist
@pytest.mark.slow
@pytest.mark.parametrize(("preset", "at_least"), [("2nn-iid", 0.945), ("2nn-shards", 0.80)])
def test_the_papers_2nn_in_30_rounds(preset, at_least):
    run = fedsim.run(fedsim.preset(preset).override({"rounds": 30}), results=None)
    accuracy = run.rounds["test_accuracy"]
    assert (accuracy.iloc[-1] if preset == "2nn-iid" else accuracy.max()) >= at_least


@pytest.mark.mnist
@pytest.mark.slow
def test_the_default_run_has_ten_processes_of_their_own(tmp_path):
    config = fedsim.preset("mnist").override({"rounds": 2})
    packings = [{}, {"placement.mode": "serial"}] + [
        {"placement.mode": "packed", "placement.actors": actors} for actors in (1, 2, 3)
    ]
    runs = [fedsim.run(config.override(packing), results=tmp_path) for packing in (*packings, {})]
    assert runs[0].clients["pid"].nunique() == 10
    assert len({run.rounds["weights_sha256"].iloc[-1] for run in runs}) == 1
