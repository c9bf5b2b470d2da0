"""On a GPU: the engines, serial runs and Ray actors. Where there is none, these tests are left out."""

import contextlib
import math
from pathlib import Path

import psutil
import pytest
import torch
from test_stacked import CLASSES, EXAMPLE_MODELS, EXAMPLES, HEAVY, PLAIN, SHAPE, bits, made, start, work
from torch import nn

import fedsim
from fedsim.config import Config
from fedsim.errors import ClientError, PlanError
from fedsim.numerics import numerics
from fedsim.stacked import Stacked, obstacle, recorded
from fedsim.stacked.layers import LAYERS
from fedsim.training import Examples, Loop, Work
from fedsim.verification import replay, verify

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

CONFIG = Config().override(
    {
        "data.dataset": "synthetic",
        "model.name": "cnn",
        "training.local_epochs": 1,
        "training.batch_size": 20,
        "clients.count": 8,
        "clients.per_round": 6,
        "evaluation.clients": True,
        "rounds": 3,
    }
)
GPUS = torch.cuda.device_count()
SERIAL = CONFIG.override({"placement.mode": "serial", "placement.num_gpus": 1})
ACTORS = CONFIG.override({"placement.actors": 4, "placement.num_gpus": 0.25})


def hashes(run):
    return run.rounds["weights_sha256"].tolist()


def on_gpu(clients):
    return [Work([epoch.cuda() for epoch in client.epochs], client.torch_seed) for client in clients]


@pytest.mark.parametrize("sgd", [PLAIN, HEAVY], ids=["plain", "momentum and decay"])
@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_both_engines_train_as_on_the_cpu(kind, sgd):
    """In float64, where every kernel is the same mathematics to 1e-9; clients of unequal size."""
    module = made(EXAMPLE_MODELS[kind], torch.float64)
    assert obstacle(module, SHAPE, CLASSES) is None
    clients, weights = work(23, 30, 30, 8, epochs=2), start(module)
    examples = Examples(EXAMPLES.images.cuda(), EXAMPLES.labels.cuda())
    with numerics(1):
        here = Loop(module, sgd, 10).train(weights, EXAMPLES, clients)
        there = made(EXAMPLE_MODELS[kind], torch.float64).cuda()
        for engine in (Loop(there, sgd, 10), Stacked(there, sgd, 10, CLASSES)):
            for a, b in zip(engine.train(weights, examples, on_gpu(clients)), here, strict=True):
                assert a.num_steps == b.num_steps
                assert a.train_loss == pytest.approx(b.train_loss, rel=1e-9)
                torch.testing.assert_close(a.weights.flat.cpu(), b.weights.flat, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sgd", [PLAIN, HEAVY], ids=["plain", "momentum and decay"])
@pytest.mark.parametrize("sizes", [(60,), (60, 60, 60), (60, 60, 35)], ids=str)
@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_recorded_steps_have_the_bits_of_others(kind, sizes, sgd, monkeypatch):
    """Over two rounds, the second in the memory of the first; with a shorter client what was recorded is given up."""
    module = made(EXAMPLE_MODELS[kind]).cuda()
    clients, weights = on_gpu(work(*sizes, epochs=2)), start(module)
    examples = Examples(EXAMPLES.images.cuda(), EXAMPLES.labels.cuda())
    replays, replay_graph = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(self), replay_graph(self)))
    found = []
    for before in (10**9, 1):
        monkeypatch.setattr(recorded, "_BEFORE", before)
        engine = Stacked(module, sgd, 10, CLASSES)
        with numerics(1):
            one = engine.train(weights, examples, clients)
            found.append([bits(trained) for trained in one + engine.train(one[0].weights, examples, clients)])
        assert bool(replays) == (before == 1)
    assert found[0] == found[1]


def test_a_serial_run_has_the_same_bits_again(tmp_path):
    one, other = (fedsim.run(SERIAL, results=tmp_path, name=name) for name in ("one", "other"))
    assert hashes(one) == hashes(other)
    assert one.info["device"] == f"cuda ({torch.cuda.get_device_name()})"
    here = fedsim.run(SERIAL.override({"placement.num_gpus": 0}), results=tmp_path, name="here")
    assert here.info["device"] == "cpu"
    assert one.rounds["test_accuracy"].iloc[-1] == pytest.approx(here.rounds["test_accuracy"].iloc[-1], abs=0.02)
    difference = (one.clients["update_l2_norm"] / here.clients["update_l2_norm"] - 1).abs()
    assert difference[one.clients["round"] == 1].max() < 1e-3, "one round of the same steps from the same weights"
    assert verify(one.path, rounds="all").is_equal
    client = int(one.clients["client_id"].iloc[-1])
    assert replay(one.path, round=3, client=client).differences == (), "in its stack"
    alone = fedsim.run(SERIAL.override({"placement.stack_size": 1}), results=tmp_path, name="alone")
    assert replay(alone.path, round=3, client=client).differences == ()


@pytest.mark.ray
def test_actors_share_a_gpu_and_have_the_same_bits_again(tmp_path):
    one, other = (fedsim.run(ACTORS, results=tmp_path, name=name) for name in ("one", "other"))
    assert hashes(one) == hashes(other)
    assert one.info["device"].startswith("cuda (")
    assert one.info["placement"]["num_gpus"] == 0.25
    for record in fedsim.rounds(ACTORS):
        if record.round == 1:
            assert any("cuda" in name for name in threads_of_actors())
    assert set(one.clients["actor"]) == {0, 1, 2, 3}
    assert not one.clients["accuracy_after"].isna().any()
    assert verify(one.path, rounds="all").is_equal
    client = int(one.clients["client_id"].iloc[-1])
    assert replay(one.path, round=3, client=client).differences == (), "in its stack"
    stopped = fedsim.run(ACTORS.override({"rounds": 1}), results=tmp_path, name="stopped")
    assert hashes(fedsim.resume(stopped.path, changes={"rounds": 3})) == hashes(one)


def threads_of_actors():
    """Names of the threads of all processes that this one has started."""
    names = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):
            names += [(task / "comm").read_text().strip() for task in Path(f"/proc/{process.pid}/task").iterdir()]
    return names


@pytest.mark.ray
def test_actors_without_a_share_leave_it_alone(tmp_path):
    config = ACTORS.override({"placement.num_gpus": "auto", "rounds": 40, "training.engine": "loop"})
    for way in ("fork", "plain"):
        for record in fedsim.rounds(config.override({"placement.start": way})):
            if record.round == 2:
                threads = threads_of_actors()
                break
        assert threads
        assert not [name for name in threads if name.startswith("pt_autograd_")], "autograd has a thread for each GPU"
    run = fedsim.run(config.override({"rounds": 1}), results=tmp_path)
    assert run.info["device"] == "cpu"
    assert run.info["num_forked"] == 4
    assert any(f"{GPUS} GPU found" in reason for reason in run.info["placement"]["reasons"])


@pytest.mark.ray
def test_an_actor_that_takes_more_than_its_share_is_named(tmp_path):
    class Greedy(nn.Module):
        """Takes a third of the GPU's memory."""

        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(784, 10)

        def forward(self, images):
            if images.is_cuda and self.training:
                torch.empty(torch.cuda.get_device_properties(0).total_memory // 3, dtype=torch.uint8, device="cuda")
            return self.inner(images.flatten(1))

    with pytest.raises(ClientError, match="out of memory") as caught:
        fedsim.run(ACTORS, model=Greedy, results=tmp_path)
    assert "in round 1" in str(caught.value)
    run = fedsim.run(
        ACTORS.override({"placement.actors": 2, "placement.num_gpus": 0.5}), model=Greedy, results=tmp_path
    )
    assert math.isfinite(run.rounds["test_loss"].iloc[-1])


def test_more_than_there_is(tmp_path):
    with pytest.raises(PlanError, match="serial mode has a GPU or none"):
        fedsim.run(SERIAL.override({"placement.num_gpus": 2}), results=tmp_path)
    with pytest.raises(PlanError, match="do not fit"):
        fedsim.run(ACTORS.override({"placement.actors": 4 * GPUS + 1, "clients.count": 6 * GPUS}), results=tmp_path)
    assert not any(tmp_path.iterdir())
