from dataclasses import replace
from typing import Any

import pytest

import fedsim
from fedsim.config import Config
from fedsim.errors import ConfigError, PlanError
from fedsim.placement import Node, Size, make_plan
from fedsim.presets import PRESETS, experiment, preset
from fedsim.resolution import resolve

# What each preset promises; every other key has its default.
MNIST = {
    "clients": {"count": 10, "per_round": "all"},
    "data": {"dataset": "mnist", "partition": {"name": "iid"}},
    "model": {"name": "mlp"},
    "training": {"local_epochs": 2, "batch_size": 32, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0},
    "strategy": {"name": "fedavg", "weighting": "examples"},
    "placement": {"mode": "actor-per-client"},
    "rounds": 5,
}
MCMAHAN = {
    "clients": {"count": 100, "per_round": 10},
    "data": {"dataset": "mnist", "partition": {"name": "iid"}},
    "model": {"name": "2nn"},
    "training": {"local_epochs": 1, "batch_size": 10, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0},
    "strategy": {"name": "fedavg", "weighting": "examples"},
    "placement": {"mode": "packed"},
    "rounds": 100,
}
HUNDREDS = {
    **MCMAHAN,
    "training": {**MCMAHAN["training"], "local_epochs": 5},
    "placement": {"mode": "auto"},
    "rounds": 50,
}
CONTRACT: dict[str, dict[str, Any]] = {
    "mnist": MNIST,
    "seed": {**MNIST, "clients": {"count": 2, "per_round": "all"}, "rounds": 2},
    "2nn-iid": MCMAHAN,
    "2nn-shards": {**MCMAHAN, "data": {"dataset": "mnist", "partition": {"name": "shards", "shards_per_client": 2}}},
    "cnn-iid": {
        **MCMAHAN,
        "model": {"name": "cnn"},
        "training": {**MCMAHAN["training"], "local_epochs": 5},
        "rounds": PRESETS["cnn-iid"][1]["rounds"],  # how long it goes on is free
    },
    "hundreds": {**HUNDREDS, "clients": {"count": 300, "per_round": 30}},
    "hundreds-actors": {
        **HUNDREDS,
        "clients": {"count": 300, "per_round": 30},
        "placement": {"mode": "actor-per-client"},
    },
    "thousand": {**HUNDREDS, "clients": {"count": 1000, "per_round": 100}},
}


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The values with some changed, in all depths."""
    result = dict(values)
    for name, value in changes.items():
        result[name] = merged(result.get(name, {}), value) if isinstance(value, dict) else value
    return result


@pytest.mark.parametrize("name", CONTRACT)
def test_the_contracts_presets_have_its_values_and_defaults_elsewhere(name):
    assert preset(name).to_dict() == merged(Config().to_dict(), {"name": name, **CONTRACT[name]})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_its_names_and_arguments_are_known(name):
    config = preset(name)
    assert config.name == name, "a run is called after its preset"
    resolved = resolve(config)
    assert resolve(resolved) == resolved
    assert merged(config.to_dict(), resolved.to_dict()) == resolved.to_dict()
    assert PRESETS[name][0]


def test_seed_is_mnist_but_for_its_size():
    changes = {"name": "seed", "clients.count": 2, "rounds": 2}
    assert preset("seed") == preset("mnist").override(changes)


def test_hundreds_of_actors_are_hundreds_but_for_their_placement():
    changes = {"name": "hundreds-actors", "placement.mode": "actor-per-client"}
    assert preset("hundreds-actors") == preset("hundreds").override(changes)


def test_hundreds_of_actors_fit_a_workstation():
    """Forked; as many plain ones do not."""
    config = preset("hundreds-actors")
    size = Size(300, 30, model_bytes=4 * 199_210, engine="stacked")
    node = Node(2, 0, 24 * 10**9, fork_obstacle="")
    plan = make_plan(config.placement, size, (node,))
    assert (plan.mode, plan.start, plan.num_actors, plan.or_plain) == ("actor-per-client", "fork", 300, False)
    assert plan.memory_bytes < 18 * 10**9
    assert 300 * plan.num_cpus <= 2
    with pytest.raises(PlanError, match=r"300 actors need about 120\.0 GB"):
        make_plan(config.placement, size, (replace(node, fork_obstacle="it is too old"),))
    assert make_plan(preset("hundreds").placement, size, (node,)).mode == "packed"


def test_an_unknown_preset_lists_all_and_the_closest():
    with pytest.raises(ConfigError) as caught:
        preset("2nn-sharts")
    message = str(caught.value)
    assert "'2nn-sharts'" in message
    assert ", ".join(PRESETS) in message
    assert "did you mean 2nn-shards?" in message
    assert len(message.splitlines()) == 1


def test_it_is_public():
    assert fedsim.preset("seed") == preset("seed")
    assert fedsim.Config is Config


# ---------------------------------------------------------------- a preset or a file


def test_experiment_takes_a_preset_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert experiment("seed") == preset("seed")
    (tmp_path / "mine.toml").write_text("rounds = 7\n")
    assert experiment("mine.toml") == experiment(str(tmp_path / "mine.toml")) == Config(name="mine", rounds=7)
    (tmp_path / "no-suffix").write_text("rounds = 8\n")
    assert experiment("no-suffix").rounds == 8


def test_a_preset_comes_before_a_file_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").write_text("rounds = 99\n")
    assert experiment("mnist") == preset("mnist")


def test_neither_a_preset_nor_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no preset 'mnits'; .*did you mean mnist\?.*no file of that name"):
        experiment("mnits")
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.toml"):
        experiment("absent.toml")


# ---------------------------------------------------------------- resolving


def test_resolve_fills_in_the_arguments_of_the_entries():
    config = Config().override({"data.partition.name": "shards", "strategy.name": "fedavgm"})
    resolved = resolve(config)
    assert resolved.data.partition.arguments == {"shards_per_client": 2}
    assert resolved.strategy.arguments == {"server_lr": 1.0, "server_momentum": 0.9}
    assert resolved.strategy.weighting == "examples"


def test_resolve_leaves_an_unset_address_unset():
    assert "address" not in resolve(Config()).placement.model_fields_set


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model.name": "resnet"}, r"model\.name = 'resnet' is not known; choose from .*mlp"),
        ({"data.dataset": "mnits"}, r"data\.dataset = 'mnits' .*did you mean mnist\?"),
        ({"data.partition.name": "shard"}, r"data\.partition\.name = 'shard' .*did you mean shards\?"),
        ({"data.partition.alpha": 0.5}, r"data\.partition\.alpha is not known; iid takes: none; dirichlet takes alpha"),
        ({"strategy.name": "fedsgd"}, r"strategy\.name = 'fedsgd' is not known"),
        ({"strategy.server_lr": 1.0}, r"strategy\.server_lr is not known; fedavg takes: none"),
        ({"strategy.name": "fedavgm", "strategy.server_momentum": 1.0}, r"strategy\.server_momentum = 1\.0: .*less"),
        ({"clients.sampler": "all"}, r"clients\.sampler = 'all' is not known; choose from uniform"),
    ],
    ids=str,
)
def test_resolve_refuses_what_the_tables_do_not_know(changes, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        resolve(Config().override(changes))
    assert len(str(caught.value).splitlines()) == 1


def test_an_own_strategy_needs_no_known_name():
    config = Config().override({"strategy.name": "mine"})
    assert resolve(config, own_strategy=True) == config
