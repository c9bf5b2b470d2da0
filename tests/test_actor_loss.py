"""Actors that die, hang or come back otherwise: the same results, or a clear end."""

from __future__ import annotations

import os
import time

import numpy as np
import psutil
import pytest
import torch
from helpers import is_gone, results_of, wait_until

import fedsim
from fedsim import Dataset
from fedsim.actors import crew
from fedsim.errors import FedsimWarning, RunFailedError
from fedsim.experiment import prepare
from fedsim.recording import Recording

pytestmark = pytest.mark.ray

CONFIG = fedsim.Config().override(
    {
        "clients.count": 4,
        "rounds": 3,
        "training.local_epochs": 1,
        "placement.mode": "packed",
        "placement.actors": 2,
        "failures.max_retries": 1,
    }
)
MARKED = 2
"""The client whose images have a bright first pixel, by which a model knows that it is at work on them."""


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (400, 1, 28, 28), dtype=np.uint8)
    images[:, 0, 0, 0] = 0
    labels = rng.integers(0, 10, 400)
    shard = prepare(CONFIG, dataset=Dataset("marked", images, labels, images[:50], labels[:50], 10)).partition.shard(
        MARKED
    )
    images[shard, 0, 0, 0] = 255
    clean = images[:50].copy()
    clean[:, 0, 0, 0] = 0
    return Dataset("marked", images, labels, clean, labels[:50], 10)


@pytest.fixture(scope="module")
def reference(data):
    """The same model in this process, where it does no harm."""
    config = CONFIG.override({"placement.mode": "serial", "placement.actors": "auto"})
    return fedsim.run(config, results=None, dataset=data, model=dies())


def harmful(harm, client=MARKED, *, training=True):
    """A model that does harm in an actor when it trains a client, or any, or is tested; actors cannot import tests."""
    driver = os.getpid()

    def model():
        module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))

        def hook(self, inputs):
            if (
                self.training == training
                and os.getpid() != driver
                and (client is None or inputs[0][:, 0, 0, 0].max() > 0)
            ):
                harm()

        module.register_forward_pre_hook(hook)
        return module

    return model


def dies(client=MARKED):
    return harmful(lambda: os._exit(1), client)


def harmless():
    return harmful(lambda: None)


def hangs(marker):
    """Once, where there is a marker to remember it by; else always."""

    def harm():
        if marker is None or not marker.exists():
            if marker:
                marker.write_text(str(os.getpid()))
            time.sleep(1000)

    return harmful(harm)


def test_a_client_that_kills_its_actors_is_left_out_alone_where_this_is_asked_for(shared_ray, data, reference):
    config = CONFIG.override({"failures.on_exhausted": "drop"})
    run = fedsim.run(config, results=None, dataset=data, model=dies())
    clients = run.clients.set_index(["round", "client_id"])
    for round in (1, 2, 3):
        assert clients.loc[round, "status"].tolist() == ["completed", "completed", "dropped", "completed"]
    dropped = clients.loc[(1, MARKED)]
    assert "the actor died" in dropped["error"]
    assert dropped["attempts"] == 2
    assert dropped["num_examples"] == 100
    assert dropped[["num_steps", "train_loss", "update_sha256", "cosine_to_mean", "fit_s", "pid"]].isna().all()
    rounds = run.rounds.set_index("round")
    assert rounds["num_dropped"].tolist() == [0, 1, 1, 1]
    assert rounds["num_completed"].tolist() == [0, 3, 3, 3]
    assert rounds["num_examples"].tolist() == [0, 300, 300, 300]
    assert rounds["bytes_down"][1] * 3 == rounds["bytes_up"][1] * 4
    undisturbed = reference.clients.set_index(["round", "client_id"]).loc[1, "update_sha256"].drop(MARKED)
    assert clients.loc[1, "update_sha256"].drop(MARKED).tolist() == undisturbed.tolist()


@pytest.mark.slow
def test_run_json_says_how_often_a_client_was_left_out(shared_ray, data, tmp_path):
    """In the rows that there are: also after a resume that has to do some of them again."""
    config = CONFIG.override({"failures.on_exhausted": "drop", "placement.actors": 1, "checkpoint.every_s": 0})
    with Recording.of(config, results=tmp_path, dataset=data, model=dies()) as recording:
        for record in recording:
            if record.round == 2:
                break
    folder = recording.folder
    assert fedsim.load_run(folder).info["num_dropped"] == 2
    for path in (folder / "checkpoint").glob("000002*"):
        path.unlink()
    run = fedsim.resume(folder, dataset=data, model=dies())
    assert (run.info["num_dropped"], run.rounds["num_dropped"].sum()) == (3, 3)


def test_without_that_it_stops_the_run_and_is_named_alone(shared_ray, data):
    with pytest.raises(RunFailedError, match=rf"^client {MARKED} in round 1: the actor died, 2 times .*max_retries"):
        fedsim.run(CONFIG, results=None, dataset=data, model=dies())


@pytest.mark.parametrize("actors", [1, 2])
def test_no_neighbour_is_left_out_also_without_retries(shared_ray, data, actors):
    config = CONFIG.override(
        {"failures.on_exhausted": "drop", "failures.max_retries": 0, "placement.actors": actors, "rounds": 1}
    )
    run = fedsim.run(config, results=None, dataset=data, model=dies())
    assert run.clients["status"].tolist() == ["completed", "completed", "dropped", "completed"]


def test_time_in_which_nobody_waits_is_not_the_clients(shared_ray, data):
    config = CONFIG.override({"failures.timeout_s": 0.2, "failures.max_retries": 0})
    num_retries = []
    for record in fedsim.rounds(config, dataset=data, model=harmless()):
        num_retries.append(record.num_retries)
        time.sleep(1)
    assert num_retries == [0, 0, 0, 0]


def test_a_round_without_any_client_stops_the_run_after_its_rows_are_written(shared_ray, data, tmp_path):
    config = CONFIG.override({"failures.on_exhausted": "drop", "failures.max_retries": 0, "placement.actors": 1})
    with pytest.raises(
        RunFailedError, match=r"round 1: nothing to average: 4 clients were lost after all retries \(the"
    ):
        fedsim.run(config, results=tmp_path, name="lost", dataset=data, model=dies(None))
    run = fedsim.load_run(tmp_path / "lost")
    assert run.status == "failed"
    assert run.clients["status"].tolist() == ["dropped"] * 4
    assert run.rounds["num_dropped"].tolist() == [0, 4]
    assert run.rounds["weights_sha256"].nunique() == 1


def test_an_evaluation_is_not_given_up_for_what_its_actor_was_asked_for_next(shared_ray, data, tmp_path):
    """Training for the next round may end an actor before the answer got out: so the first loss may not be its own."""
    tests = tmp_path / "tests"

    def run(*deadly):
        def harm():
            with tests.open("a") as file:
                file.write("x")
            if tests.stat().st_size in deadly:
                os._exit(1)

        tests.write_text("")
        config = CONFIG.override({"failures.max_retries": 0, "placement.actors": 1, "rounds": 2})
        return fedsim.run(config, results=None, dataset=data, model=harmful(harm, None, training=False))

    assert run(2).status == "finished"
    assert tests.stat().st_size == 4, "of rounds 0, 1, 1 again, 2"
    with pytest.raises(RunFailedError, match=r"^the evaluation: the actor died, 1 time "):
        run(3)
    with pytest.raises(RunFailedError, match=r"^the evaluation: the actor died, 2 times "):
        run(2, 3)


@pytest.mark.parametrize("actors", [1, 2])
def test_work_that_takes_too_long_is_given_to_another_actor_with_the_same_results(
    shared_ray, data, reference, tmp_path, actors
):
    marker = tmp_path / "hung"
    config = CONFIG.override({"failures.timeout_s": 1.0, "placement.actors": actors})
    gone = []
    with Recording.of(config, results=None, dataset=data, model=hangs(marker)) as recording:
        for record in recording:
            if record.round == 1:
                gone.append(is_gone(int(marker.read_text())))
    assert results_of(recording.run) == results_of(reference)
    assert gone == [True], "else it could write into the memory of a later round"
    assert recording.run.rounds["num_retries"][1] >= 1
    assert recording.run.rounds["num_retries"][2] == 0


def test_work_that_always_takes_too_long_stops_the_run_also_where_clients_may_be_left_out(shared_ray, data):
    config = CONFIG.override({"failures.timeout_s": 0.5, "failures.on_exhausted": "drop"})
    with pytest.raises(
        RunFailedError, match=rf"^client {MARKED} in round 1: no answer within 0\.5 s, 2 times; see fail"
    ):
        fedsim.run(config, results=None, dataset=data, model=hangs(None))


def test_a_new_actor_that_cannot_load_says_why(shared_ray, data, tmp_path):
    """Not that some attribute of it is missing."""
    driver = os.getpid()

    def model():
        if os.getpid() != driver:
            (tmp_path / str(os.getpid())).touch()
            if len(list(tmp_path.iterdir())) > 2:
                raise OSError("no more of my files")
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))

    with pytest.raises(RunFailedError, match="OSError: no more of my files"):
        killed_in_round_1(CONFIG, data, model)


def test_an_actor_that_never_gets_up_ends_the_run_and_says_where_to_look(shared_ray, data):
    driver = os.getpid()

    def model():
        if os.getpid() != driver:
            os._exit(1)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))

    with pytest.raises(
        RunFailedError, match=r"^starting the actor: the actor died, 2 times .*logs may say why: /.*/logs\);"
    ):
        fedsim.run(CONFIG, results=None, dataset=data, model=model)


def killed_in_round_1(config, data, model=None):
    with Recording.of(config, results=None, dataset=data, model=model or harmless()) as recording:
        for record in recording:
            if record.round == 1:
                psutil.Process(record.clients[0].pid).kill()
    return recording.run


def test_an_actor_that_has_no_successor_leaves_its_work_to_the_others(shared_ray, data, reference, monkeypatch):
    """As after the loss of a node; also in the mode in which each client has its own actor."""
    monkeypatch.setattr(crew, "holds", lambda plan, without: 0)
    for changes in ({}, {"placement.mode": "actor-per-client", "placement.actors": "auto"}):
        run = killed_in_round_1(CONFIG.override(changes), data)
        assert results_of(run) == results_of(reference)
        actors = run.clients.groupby("round")["actor"].unique()
        assert len(actors[3]) == len(actors[1]) - 1


def test_the_last_actor_without_successor_ends_the_run(shared_ray, data, monkeypatch):
    monkeypatch.setattr(crew, "holds", lambda plan, without: 0)
    with pytest.raises(RunFailedError, match="no actor is left: the cluster has no room for another one"):
        killed_in_round_1(CONFIG.override({"placement.actors": 1}), data)


def test_a_successor_that_computes_other_bits_is_not_used(shared_ray, data, reference, monkeypatch):
    welcome = crew.Crew._welcome

    def on_another_processor(self, number, loaded):
        if self.fingerprint:
            object.__setattr__(loaded.host, "fingerprint", "other")
        welcome(self, number, loaded)

    monkeypatch.setattr(crew.Crew, "_welcome", on_another_processor)
    with pytest.warns(FedsimWarning, match=r"is not used: .*\(fingerprint other, not [0-9a-f]{16}\)"):
        run = killed_in_round_1(CONFIG, data)
    assert results_of(run) == results_of(reference)


def test_all_that_was_taken_is_given_back(shared_ray):
    """The last test here: whatever the others did to their actors."""
    wait_until(lambda: shared_ray.available_resources().get("CPU") == 4)
