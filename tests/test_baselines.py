import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import fedsim
from fedsim import datasets, models
from fedsim.datasets import idx
from fedsim.experiment import prepare
from fedsim.models import ImageShape
from fedsim.seeding import generator

pytestmark = pytest.mark.long

SCRIPTS = Path(__file__).parent.parent / "scripts"
PLAIN_LOOP, ORIGINAL = SCRIPTS / "baselines" / "plain_loop.py", SCRIPTS / "baselines" / "original.py"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def float64_mlp(input_shape: ImageShape, num_classes: int) -> nn.Module:
    return models.mlp(input_shape, num_classes).double()


def float64_two_nn(input_shape: ImageShape, num_classes: int) -> nn.Module:
    return models.two_nn(input_shape, num_classes).double()


def float64_cnn(input_shape: ImageShape, num_classes: int) -> nn.Module:
    return models.cnn(input_shape, num_classes).double()


@pytest.mark.parametrize(
    ("dataset", "name", "factory"),
    [
        ("synthetic", "mlp", float64_mlp),
        ("synthetic", "2nn", float64_two_nn),
        ("synthetic", "cnn", float64_cnn),
        pytest.param("mnist", "mlp", float64_mlp, marks=pytest.mark.mnist),
    ],
)
def test_the_plain_loop_ends_where_fedsim_does(dataset: str, name: str, factory: models.ModelFactory) -> None:
    config = fedsim.preset("seed").override({"rounds": 1, "training.local_epochs": 1, "placement.mode": "serial"})
    data = datasets.load(dataset)
    if name == "cnn":  # a few steps are enough, and slow
        train, test = slice(200), slice(100)
        data = replace(
            data,
            train_images=data.train_images[train],
            train_labels=data.train_labels[train],
            test_images=data.test_images[test],
            test_labels=data.test_labels[test],
        )
    run = fedsim.run(config, model=factory, dataset=data, results=None)

    x = prepare(config, model=factory, dataset=data)
    plain_loop = load(PLAIN_LOOP)
    module = plain_loop.MODELS[name]().double()
    initial = x.layout.unflatten(x.initial_weights)
    module.load_state_dict(initial)

    def batch_order(round: int, client: int, epoch: int, shard: torch.Tensor) -> torch.Tensor:
        rng = generator("shuffle", config.seed, round=round, client=client, epoch=epoch)
        return torch.from_numpy(rng.permutation(shard.numpy()))

    (plain_round,) = plain_loop.federated_averaging(
        module,
        [torch.from_numpy(x.partition.shard(client)) for client in range(config.clients.count)],
        torch.from_numpy(x.dataset.train_images).double() / 255,
        torch.from_numpy(x.dataset.train_labels),
        torch.from_numpy(x.dataset.test_images).double() / 255,
        torch.from_numpy(x.dataset.test_labels),
        rounds=1,
        epochs=1,
        batch_size=config.training.batch_size,
        lr=config.training.lr,
        batch_order=batch_order,
    )

    ours, plain = run.weights(), module.state_dict()
    assert {value.dtype for value in [*ours.values(), *plain.values()]} == {torch.float64}
    assert ours.keys() == plain.keys()
    assert max((plain[name] - initial[name]).abs().max().item() for name in initial) > 0.01, "it has learnt"
    assert max((plain[name] - ours[name]).abs().max().item() for name in ours) <= 1e-5
    assert plain_round.test_accuracy == run.rounds["test_accuracy"].iloc[-1]
    assert 0 < plain_round.fit_s + plain_round.evaluate_s <= plain_round.round_s


def test_the_plain_loop_weighs_clients_by_examples_and_draws_cohorts() -> None:
    plain_loop = load(PLAIN_LOOP)
    images, labels = torch.eye(3, dtype=torch.float64), torch.tensor([0, 1, 1])
    shards = [torch.tensor([0]), torch.tensor([1, 2])]

    def trained(*clients: torch.Tensor, **options: int) -> torch.Tensor:
        module = nn.Linear(3, 2, bias=False, dtype=torch.float64)
        nn.init.zeros_(module.weight)
        options = {"rounds": 1, "epochs": 1, "batch_size": 2, **options}
        list(plain_loop.federated_averaging(module, clients, images, labels, images, labels, **options))
        return module.weight.detach()

    alone = [trained(shard) for shard in shards]
    torch.testing.assert_close(trained(*shards), (alone[0] + 2 * alone[1]) / 3)
    drawn = [trained(*shards, per_round=1, seed=seed) for seed in range(20)]
    which = [next(i for i, weight in enumerate(alone) if torch.equal(weight, one)) for one in drawn]
    assert set(which) == {0, 1}


def test_the_plain_loop_as_a_script() -> None:
    command = [sys.executable, PLAIN_LOOP, "--data", "synthetic", "--rounds", "2", "--model", "2nn"]
    command += ["--json", "--clients", "5", "--per-round", "2"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    records = [json.loads(line) for line in printed]
    assert [record["round"] for record in records] == [1, 2]
    assert all(0 <= record["test_accuracy"] <= 1 and record["round_s"] > 0 for record in records)


def test_the_original_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "MNIST" / "raw"  # where torchvision looks; it checks that the files are there, not what is in
    folder.mkdir(parents=True)
    for part, num_examples in (("train", 70), ("t10k", 20)):
        images = rng.integers(256, size=(num_examples, 28, 28), dtype=np.uint8)
        labels = rng.integers(10, size=num_examples, dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx.encode(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx.encode(labels))
    arguments = ["--rounds", "1", "--data", str(tmp_path)]
    with torch.random.fork_rng(devices=[]):  # the program seeds the global generator
        load(ORIGINAL).main(arguments)
    printed = capsys.readouterr().out
    assert printed.startswith("round 1: test accuracy 0.")
    assert len(printed.splitlines()) == 1
