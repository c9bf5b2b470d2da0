"""Sweeps: the runs are those of `run` to the bit, on actors that stay; what is there is not run again."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil

import numpy as np
import psutil
import pytest
from torch import nn

import fedsim
from fedsim import cli
from fedsim.compatibility import NOTHING
from fedsim.errors import ClientError, ConfigError, InputError, RunExistsError, RunFolderError
from fedsim.grid import members
from fedsim.launch import Warm
from fedsim.recording import Recording
from fedsim.results import load_runs
from fedsim.run_folder import lock
from fedsim.sweeps import recordings
from tests.helpers import SERIAL, assert_same_results, content

GRID = {"training.lr": [0.05, 0.1], "strategy.name": ["fedavg", "fedavgm"]}


def names(runs):
    return [run.name for run in runs]


@pytest.mark.long
def test_every_combination_with_every_seed(tmp_path):
    runs = fedsim.sweep(SERIAL, GRID, [0, 7], results=tmp_path)
    assert names(runs) == [
        f"lr-{lr}_name-{name}_seed-{seed}" for lr in (0.05, 0.1) for name in ("fedavg", "fedavgm") for seed in (0, 7)
    ]
    assert sorted(path.name for path in (tmp_path / "mnist-sweep").iterdir()) == sorted(names(runs))
    for run in runs:
        assert_same_results(run, fedsim.run(run.config, results=None))
    assert set(load_runs(f"{tmp_path}/mnist-sweep/*").rounds["run"]) == set(names(runs))


def test_without_a_grid_and_seeds_it_is_one_run(tmp_path):
    runs = fedsim.sweep(SERIAL.override({"seed": 3}), results=tmp_path, name="one")
    assert [run.path for run in runs] == [tmp_path / "one" / "seed-3"]


def test_again_runs_nothing_and_more_runs_only_what_is_new(tmp_path):
    fedsim.sweep(SERIAL, {"training.lr": [0.1]}, [0, 1], results=tmp_path)
    before = content(tmp_path)
    fedsim.sweep(SERIAL, {"training.lr": [0.1]}, [0, 1], results=tmp_path)
    assert content(tmp_path) == before
    runs = fedsim.sweep(SERIAL, {"training.lr": [0.1, 0.2]}, [0, 1], results=tmp_path)
    assert len(runs) == 4
    assert before.items() <= content(tmp_path).items()


@pytest.mark.long
def test_what_was_interrupted_goes_on(tmp_path, monkeypatch):
    whole = fedsim.sweep(SERIAL, {"training.lr": [0.1, 0.2]}, [0, 1], results=tmp_path, name="whole")
    write, rounds = fedsim.results.RunWriter.write, []

    def stopping(self, record, *rest, **named):
        write(self, record, *rest, **named)
        rounds.append(record.round)
        if len(rounds) == 6:  # in the second run's round 1
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fedsim.results.RunWriter, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            fedsim.sweep(SERIAL, {"training.lr": [0.1, 0.2]}, [0, 1], results=tmp_path, name="broken")
    assert [run.status for run in load_runs(f"{tmp_path}/broken/*")] == ["finished", "interrupted"]
    runs = fedsim.sweep(SERIAL, {"training.lr": [0.1, 0.2]}, [0, 1], results=tmp_path, name="broken")
    for one, other in zip(runs, whole, strict=True):
        assert one.status == "finished"
        assert_same_results(one, other)


def test_on_other_packages_it_goes_on_only_when_asked_to(tmp_path, monkeypatch, capsys):
    def stopping(self, record, *rest, **named):
        write(self, record, *rest, **named)
        if record.round == 1:
            raise KeyboardInterrupt

    write = fedsim.results.RunWriter.write
    with monkeypatch.context() as patch:
        patch.setattr(fedsim.results.RunWriter, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            fedsim.sweep(SERIAL, results=tmp_path, name="s")
    path = tmp_path / "s" / "seed-0" / "run.json"
    info = json.loads(path.read_text())
    info["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"torch 1\.0 in the run"):
        fedsim.sweep(SERIAL, results=tmp_path, name="s")
    (tmp_path / "small.toml").write_text(SERIAL.to_toml())
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", str(tmp_path / "small.toml"), "--results", str(tmp_path), "--name", "s", "--anyway"])
    assert ended.value.code == 0, capsys.readouterr().err
    (run,) = fedsim.sweep(SERIAL, results=tmp_path, name="s")
    assert_same_results(run, fedsim.run(SERIAL, results=None))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training.batch_size": 50}, "training.batch_size = 100, not 50"),
        ({"rounds": 4}, "rounds = 3, not 4"),
        ({"strategy.name": "fedadam"}, "strategy.name = fedavg, not fedadam"),
    ],
)
def test_other_runs_are_refused_before_anything_starts(tmp_path, changes, said):
    fedsim.sweep(SERIAL, seeds=[1], results=tmp_path)
    before = content(tmp_path)
    with pytest.raises(RunFolderError, match=said):
        fedsim.sweep(SERIAL.override(changes), seeds=[0, 1], results=tmp_path)
    assert content(tmp_path) == before


def test_another_stop_is_another_sweep(tmp_path):
    fedsim.sweep(SERIAL, results=tmp_path, stop_at={"test_accuracy": 0.1})
    with pytest.raises(RunFolderError, match=r"stop_at = test_accuracy=0\.1, not none"):
        fedsim.sweep(SERIAL, results=tmp_path)


def test_the_same_targets_in_another_order_are_the_same_sweep(tmp_path):
    words = ["sweep", str(tmp_path / "small.toml"), "--results", str(tmp_path), "--name", "s"]
    (tmp_path / "small.toml").write_text(SERIAL.to_toml())
    targets = ["--stop-at", "test_accuracy=0.9", "--stop-at", "test_loss=0.1"]
    for given in (targets, targets[2:] + targets[:2] + targets[2:]):
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, *given])
        assert ended.value.code == 0


def test_a_run_that_was_resumed_for_more_rounds_is_still_the_sweeps(tmp_path):
    goal = {"test_accuracy": 0.1}
    before = fedsim.sweep(SERIAL, seeds=[0, 1], results=tmp_path, stop_at=goal)
    fedsim.resume(before[0].path, changes={"rounds": 5})
    after = fedsim.sweep(SERIAL, seeds=[0, 1, 2], results=tmp_path, stop_at=goal)
    rounds = after.summary()["rounds"].tolist()
    assert rounds[0] == 5
    assert max(rounds[1:]) < 3, "these stopped"


@pytest.mark.parametrize("rounds", [2, 3])
def test_so_is_one_that_went_on_to_the_sweeps_own_last_round_or_not_as_far(tmp_path, rounds):
    """Its target had ended it before, and it is asked for no more."""
    goal = {"test_accuracy": 0.1}
    before = fedsim.sweep(SERIAL, seeds=[0, 1], results=tmp_path, stop_at=goal)
    assert len(before[0].rounds) - 1 < rounds
    fedsim.resume(before[0].path, changes={"rounds": rounds})
    after = fedsim.sweep(SERIAL, seeds=[0, 1, 2], results=tmp_path, stop_at=goal)
    assert after.summary()["rounds"].iloc[0] == rounds
    other = "rounds = 2, not 3" if rounds == 2 else r"stop_at = none, not test_accuracy=0\.2"
    with pytest.raises(RunFolderError, match=f"seed-0 is there with {other}"):
        fedsim.sweep(SERIAL, seeds=[0, 1], results=tmp_path, stop_at={"test_accuracy": 0.2})


def test_one_that_went_on_without_having_been_there_is_not_enough(tmp_path):
    goal = {"test_accuracy": 0.9999}
    (run,) = fedsim.sweep(SERIAL.override({"rounds": 2}), results=tmp_path, stop_at=goal)
    fedsim.resume(run.path, changes={"rounds": 4})
    with pytest.raises(RunFolderError, match="rounds = 4, not 8"):
        fedsim.sweep(SERIAL.override({"rounds": 8}), results=tmp_path, stop_at=goal)


@pytest.mark.parametrize("grid", [["training.lr"], "training.lr", 0.1])
def test_a_grid_is_a_dictionary(tmp_path, grid):
    with pytest.raises(ConfigError, match="give a dictionary of keys and their values"):
        fedsim.sweep(SERIAL, grid, results=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_broken_link_in_the_way_is_seen_before_the_first_run(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "seed-1").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match="seed-1 is not a run"):
        fedsim.sweep(SERIAL, seeds=[0, 1], results=tmp_path, name="s")
    assert not (tmp_path / "s" / "seed-0").exists()


def test_booleans_are_named_as_in_a_file(tmp_path):
    runs = fedsim.sweep(SERIAL, {"evaluation.clients": [True, False]}, results=tmp_path)
    assert [run.name for run in runs] == ["clients-true_seed-0", "clients-false_seed-0"]


def test_where_it_runs_is_nothing_to_it(tmp_path):
    before = fedsim.sweep(SERIAL, results=tmp_path)
    after = fedsim.sweep(SERIAL.override({"placement.stack_size": 1, "checkpoint.keep": 5}), results=tmp_path)
    assert after[0].config == before[0].config


def test_runs_stop_where_they_are_to(tmp_path):
    whole = fedsim.run(SERIAL, results=None).rounds["test_accuracy"]
    (run,) = fedsim.sweep(SERIAL, results=tmp_path, stop_at={"test_accuracy": float(whole[1])})
    assert len(run.rounds) == 2
    assert run.status == "finished"


def test_a_rate_that_diverges_is_an_answer(tmp_path):
    config = SERIAL.override({"model.name": "mlp", "training.batch_size": 10, "training.momentum": 0.9})
    grid = {"training.lr": [1e30, 0.05]}
    runs = fedsim.sweep(config, grid, results=tmp_path)
    assert [run.status for run in runs] == ["failed", "finished"]
    before = content(tmp_path)
    fedsim.sweep(config, grid, results=tmp_path)
    assert content(tmp_path) == before


def test_which_diverged_is_said_again(tmp_path, capsys):
    (tmp_path / "fast.toml").write_text(SERIAL.override({"model.name": "mlp", "training.momentum": 0.9}).to_toml())
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            cli.main(
                ["sweep", str(tmp_path / "fast.toml"), "--grid", "training.lr=1e30,0.05", "--results", str(tmp_path)]
            )
        assert ended.value.code == 0
        assert "2 runs, of which 1 diverged" in capsys.readouterr().out.splitlines()[-2]


def test_so_is_a_server_that_does(tmp_path):
    grid = {"strategy.server_lr": [1e45, 1.0]}
    config = SERIAL.override({"strategy.name": "fedavgm"})
    for _ in range(2):
        runs = fedsim.sweep(config, grid, results=tmp_path)
        assert [run.status for run in runs] == ["failed", "finished"]


def test_runs_of_other_own_parts_are_refused(tmp_path):
    def narrow():
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    def wide():
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10))

    fedsim.sweep(SERIAL, results=tmp_path, model=narrow)
    assert len(fedsim.sweep(SERIAL, seeds=[0, 1], results=tmp_path, model=narrow)) == 2
    for other in (wide, None):
        with pytest.raises(RunFolderError, match="own model = "):
            fedsim.sweep(SERIAL, seeds=[0, 1], results=tmp_path, model=other)


def hidden(width):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))


def step(share):
    def aggregate(state, weights, updates, num_examples):
        return (weights + share * updates.double().mean(0)).float(), state

    return fedsim.Strategy(init=lambda weights: {}, aggregate=aggregate)


def other_data(first):
    labels = (np.arange(200) + first) % 10
    images = np.random.default_rng(0).integers(0, 256, (200, 1, 28, 28), dtype=np.uint8)
    return fedsim.Dataset("mine", images, labels, images, labels, num_classes=10)


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    ("part", "one", "other", "said"),
    [
        ("model", functools.partial(hidden, 8), functools.partial(hidden, 16), "own model = "),
        ("model", lambda: hidden(8), lambda: hidden(16), "other initial weights"),
        ("strategy", step(0.5), step(1.0), "own strategy = "),
        ("dataset", other_data(0), other_data(1), "other data"),
    ],
)
def test_own_parts_of_one_name_are_not_taken_for_each_other(tmp_path, part, one, other, said, is_finished):
    fedsim.sweep(SERIAL, results=tmp_path, **{part: one})
    if not is_finished:
        (tmp_path / "mnist-sweep" / "seed-0" / "checkpoint").rename(tmp_path / "gone")
    before = content(tmp_path)
    with pytest.raises(RunFolderError, match=said):
        fedsim.sweep(SERIAL, seeds=[0, 1], results=tmp_path, **{part: other})
    assert content(tmp_path) == before
    assert len(fedsim.sweep(SERIAL, seeds=[0, 1], results=tmp_path, **{part: one})) == 2


@pytest.mark.parametrize(
    ("part", "key"),
    [("model", "model.name"), ("strategy", "strategy.name"), ("strategy", "strategy.mu"), ("dataset", "data.dataset")],
)
def test_what_an_own_part_replaces_cannot_be_swept(tmp_path, part, key):
    with pytest.raises(ConfigError, match=f"{key} is nothing to a sweep with a {part} of its own"):
        members(SERIAL, {key: ["a", "b"]}, [0], tmp_path / "x", [], {part: "mine"})
    grid = {"strategy.weighting": ["uniform", "examples"]}
    assert len(members(SERIAL, grid, [0], tmp_path / "x", [], {"strategy": "mine"})) == 2


def test_numbers_of_numpy_are_numbers(tmp_path):
    runs = found(tmp_path, {"clients.count": np.arange(4, 6)}, np.arange(2))
    assert [(run.config.clients.count, run.config.seed) for run in runs] == [(4, 0), (4, 1), (5, 0), (5, 1)]


def test_a_bug_ends_it_and_shows_itself(tmp_path):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(784, 10)

        def forward(self, x):
            if self.training:
                raise ValueError("my own bug")
            return self.layer(x.flatten(1))

    with pytest.raises(ClientError, match="my own bug"):
        fedsim.sweep(SERIAL, seeds=[0, 1], results=tmp_path, model=Broken)
    assert [run.status for run in load_runs(f"{tmp_path}/mnist-sweep/*")] == ["failed"]


def test_own_parts_are_in_all_runs(tmp_path):
    def half_step(state, weights, updates, num_examples):
        shares = num_examples.double() / num_examples.sum()
        return (weights + 0.5 * (shares @ updates.double())).float(), state

    strategy = fedsim.Strategy(init=lambda weights: {}, aggregate=half_step)
    runs = fedsim.sweep(SERIAL, seeds=[0, 1], results=tmp_path, strategy=strategy)
    for run in runs:
        assert_same_results(run, fedsim.run(run.config, results=None, strategy=strategy))


def found(tmp_path, grid, seeds=(0,), config=SERIAL):
    return members(config, grid, seeds, tmp_path / "x", [], {})


@pytest.mark.parametrize(
    ("grid", "seeds", "said"),
    [
        ({"training.lr": []}, [0], "no values for training.lr"),
        ({"training.lr": "0.1"}, [0], "give a list of values"),
        ({"training.lr": 0.1}, [0], "give a list of values"),
        ({}, [], "no seeds"),
        ({"seed": [0]}, [0], "seed cannot be in the grid: give seeds"),
        ({"name": ["a"]}, [0], "name cannot be in the grid"),
        ({"training.lr": [0.1, 0.1]}, [0], "two runs would be called lr-0.1_seed-0"),
        ({}, [1, 1], "two runs would be called seed-1"),
        ({"training.rate": [0.1]}, [0], "training.rate"),
        ({"training.lr": [0.1, "high"]}, [0], "training.lr"),
        ({"data.partition.name": ["iid", "idd"]}, [0], "idd"),
        ({"data.partition.alpha": [0.1]}, [0], "alpha"),
        ({"data.dataset": ["x" * 100]}, [0], "x" * 100),
        ({}, [-1], "seed"),
        ({}, 5, "seeds = 5: give a list"),
        ({"training.lr": {"a": 1}}, [0], "give a list of values"),
        ({"training.lr": np.ones((2, 2))}, [0], "training.lr"),
        ({"training.lr": np.array(0.1)}, [0], "give a list of values"),
        ({"trainng lr": [0.1]}, [0], "trainng lr"),
        ({3: [0.1]}, [0], "3"),
    ],
)
def test_what_is_no_sweep(tmp_path, grid, seeds, said):
    with pytest.raises(ConfigError, match=said):
        found(tmp_path, grid, seeds)


def test_names_tell_keys_apart(tmp_path):
    config = SERIAL.override({"strategy.name": "fedadam"})
    grid = {"strategy.name": ["fedadam"], "data.partition.name": ["iid"], "training.lr": [0.1]}
    (member,) = found(tmp_path, grid, config=config)
    assert member.folder.name == "strategy.name-fedadam_partition.name-iid_lr-0.1_seed-0"


def test_a_value_is_made_a_name(tmp_path):
    runs = found(tmp_path, {"clients.per_round": ["all", 2, 0.5], "training.weight_decay": [1e-05]})
    near = found(tmp_path, {"training.lr": [0.1234567, 0.1234568]})
    assert [member.folder.name for member in near] == ["lr-0.1234567_seed-0", "lr-0.1234568_seed-0"]
    (big,) = found(tmp_path, {"training.lr": [1e30]})
    assert big.folder.name == "lr-1e30_seed-0"
    assert [member.folder.name for member in runs] == [
        f"per_round-{cohort}_weight_decay-1e-05_seed-0" for cohort in ("all", "2", "0.5")
    ]


def test_a_run_is_no_place_for_a_sweep(tmp_path):
    fedsim.run(SERIAL, results=tmp_path, name="taken")
    with pytest.raises(RunFolderError, match="is a run, so it cannot hold"):
        fedsim.sweep(SERIAL, results=tmp_path, name="taken")
    with pytest.raises(RunFolderError, match="cannot be a run's name"):
        fedsim.sweep(SERIAL, results=tmp_path, name="../out")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "mnist-sweep" / "seed-0").mkdir(parents=True)
    with pytest.raises(RunFolderError, match="is not a run"):
        fedsim.sweep(SERIAL, results=tmp_path)


@pytest.mark.parametrize(
    ("changes", "grid", "said"),
    [
        ({}, {"clients.count": [4, 1_000_000]}, "1000000"),
        ({"data.partition.name": "shards"}, {"data.partition.shards_per_client": [2, 100_000]}, "shards"),
        ({"placement.mode": "packed"}, {"placement.num_cpus": [0.1, 100_000]}, "of 100000 CPU"),
    ],
)
def test_what_only_data_or_machine_refuse_is_refused_before_the_first_run(tmp_path, changes, grid, said):
    with pytest.raises(InputError, match=said):
        fedsim.sweep(SERIAL.override(changes), grid, results=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="is not a folder; name another with --results"):
        found(tmp_path / "file", {})


@pytest.mark.parametrize("part", ["rounds.parquet", "clients.parquet", "checkpoint"])
@pytest.mark.filterwarnings("ignore::fedsim.errors.FedsimWarning")
def test_a_run_that_lost_its_records_is_made_again(tmp_path, part):
    before = fedsim.sweep(SERIAL, results=tmp_path)[0].rounds
    shutil.rmtree(tmp_path / "mnist-sweep" / "seed-0" / part)
    (again,) = fedsim.sweep(SERIAL, results=tmp_path)
    assert again.rounds["weights_sha256"].equals(before["weights_sha256"])
    assert len(again.clients) == 3 * again.rounds["num_sampled"].max()
    assert again.weights()


@pytest.mark.parametrize(("key", "value"), [("stop_at", [1]), ("error", None)])
def test_an_edited_run_json_is_no_bug(tmp_path, key, value):
    (run,) = fedsim.sweep(SERIAL, results=tmp_path)
    info = json.loads((run.path / "run.json").read_text())
    if value is None:
        del info[key]
    info |= {"status": "interrupted"} | ({key: value} if value else {})
    (run.path / "run.json").write_text(json.dumps(info))
    if value is None:
        assert fedsim.sweep(SERIAL, results=tmp_path)[0].status == "finished"
    else:
        with pytest.raises(RunFolderError, match="stop_at has 1"):
            fedsim.sweep(SERIAL, results=tmp_path)


def test_a_run_that_another_fedsim_writes_is_waited_for(tmp_path):
    (run,) = fedsim.sweep(SERIAL, results=tmp_path)
    (run.path / "checkpoint").rename(tmp_path / "gone")  # so it has to go on
    with lock(run.path), pytest.raises(RunFolderError, match="is being written by a running fedsim; wait"):
        fedsim.sweep(SERIAL, results=tmp_path)


def test_a_run_that_another_sweep_made_meanwhile_is_not_replaced(tmp_path):
    both = found(tmp_path, {}, [0, 1])
    with contextlib.closing(recordings(both, [], NOTHING)) as unfinished:
        with next(unfinished) as recording:
            list(recording)
        other = fedsim.sweep(SERIAL, seeds=[1], results=tmp_path, name="x")
        before = content(other[0].path)
        with pytest.raises(RunExistsError, match="has come up meanwhile"), next(unfinished):
            pass
    assert content(other[0].path) == before


def test_on_the_command_line(tmp_path, capsys):
    (tmp_path / "small.toml").write_text(SERIAL.to_toml())
    words = ["sweep", str(tmp_path / "small.toml"), "--results", str(tmp_path), "--name", "s"]
    words += ["--grid", "training.lr=0.1, 0.2", "--seeds", "0..1"]
    for expected in (["4 runs", "1/4 lr-0.1_seed-0: test accuracy 0", "4/4 "], ["4 runs, of which 4 are finished"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        said = capsys.readouterr().out
        assert ended.value.code == 0
        assert all(part in said for part in expected), said
    assert "1/4" not in said
    line = said.splitlines()[-1]
    assert line == f"import fedsim; fedsim.load_runs('{tmp_path}/s').rounds"
    assert len(eval(line.partition("; ")[2], {"fedsim": fedsim})) == 16


def test_one_run_is_called_one(tmp_path, capsys):
    (tmp_path / "small.toml").write_text(SERIAL.to_toml())
    for _ in range(2):
        with pytest.raises(SystemExit):
            cli.main(["sweep", str(tmp_path / "small.toml"), "--results", str(tmp_path), "--name", "s"])
    lines = capsys.readouterr().out.splitlines()
    folder = tmp_path / "s"
    counts = [line for line in lines if line.startswith(f"{folder}: ")]
    assert counts == [f"{folder}: 1 run", f"{folder}: 1 run", f"{folder}: 1 run, of which 1 is finished", counts[0]]


def test_runs_lists_it_with_how_far_it_is(tmp_path, capsys):
    fedsim.run(SERIAL, results=tmp_path, name="alone")
    fedsim.sweep(SERIAL, seeds=[0, 1], results=tmp_path, name="swept")
    with pytest.raises(SystemExit):
        cli.main(["runs", "--results", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "alone", "swept/"]
    assert "2 of 2 runs finished" in lines[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grid", "training.lr"], "write it as key=a,b,c"),
        (["--grid", "training.lr="], "write it as key=a,b,c"),
        (["--grid", "training.lr=,"], "write it as key=a,b,c"),
        (["--grid", "training.lr=1", "--grid", "training.lr=2"], "is there twice"),
        (
            ["--grid", "training.lr=0.1,0.2", "--set", "training.lr=0.3"],
            "training.lr is in --set and in --grid training.lr: leave out one of the two",
        ),
        (["--seeds", "0..1", "--set", "seed=3"], "seed is in --set and in --seeds: leave out one of the two"),
        (["--seeds", "3..1"], "write a range such as 0..4"),
        (["--seeds", "a"], "write a range such as 0..4"),
        (["--seeds", "0..99999999"], "write a range such as 0..4"),
        (["--seeds", "1,,2"], "write a range such as 0..4"),
        (["--seeds", "1" * 4400], "write a range such as 0..4"),
        (["--stop-at", "accuracy=1"], "cannot be a target"),
    ],
)
def test_bad_input_is_answered(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", "mnist", "--results", str(tmp_path / "r"), *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


PACKED = SERIAL.override({"placement.mode": "packed", "placement.actors": 2, "model.name": "mlp"})


@pytest.mark.ray
def test_the_actors_stay_and_the_bits_are_the_same(tmp_path):
    """Also where the size of the model, of the cohort or the engine changes, and where runs stop in mid-work."""
    grid = {"model.name": ["mlp", "logistic"], "clients.per_round": [3, 4], "training.engine": ["loop", "stacked"]}
    runs = fedsim.sweep(PACKED, grid, [5], results=tmp_path, stop_at={"train_loss": 2.0})
    for run in runs:
        config = run.config.override({"placement.mode": "serial"})
        assert_same_results(run, fedsim.run(config, results=None, stop_at={"train_loss": 2.0}))
    pids = {pid for run in runs for pid in run.clients["pid"]}
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.ray
def test_a_stopped_run_goes_on_where_the_sweep_is_now(tmp_path, monkeypatch):
    """Not where it was stopped: there may be no room any more."""
    whole = fedsim.sweep(SERIAL, results=tmp_path, name="whole")
    with monkeypatch.context() as patch:
        patch.setattr(fedsim.results.RunWriter, "write", stop_in_round_1(fedsim.results.RunWriter.write))
        with pytest.raises(KeyboardInterrupt):
            fedsim.sweep(SERIAL, results=tmp_path, name="moved")
    actors = SERIAL.override({"placement.mode": "packed", "placement.actors": 1, "placement.num_cpus": 0.5})
    (run,) = fedsim.sweep(actors, results=tmp_path, name="moved")
    assert run.clients["actor"].tolist()[-1] == 0
    assert run.config.placement.actors == 1
    assert_same_results(run, whole[0])


def stop_in_round_1(write):
    def stopping(self, record, *rest, **named):
        write(self, record, *rest, **named)
        if record.round == 1:
            raise KeyboardInterrupt

    return stopping


@pytest.mark.ray
def test_a_run_that_diverges_leaves_its_actors_to_the_next(tmp_path):
    config = PACKED.override({"training.batch_size": 10, "training.momentum": 0.9})
    runs = fedsim.sweep(config, {"training.lr": [1e30, 0.05]}, results=tmp_path)
    assert [run.status for run in runs] == ["failed", "finished"]
    assert set(runs[0].clients["pid"]) == set(runs[1].clients["pid"])


@pytest.mark.ray
def test_other_actors_are_started_where_they_do_not_fit(tmp_path):
    runs = fedsim.sweep(PACKED, {"placement.actors": [1, 2], "training.lr": [0.1, 0.2]}, results=tmp_path)
    pids = [set(run.clients["pid"]) for run in runs]
    assert [len(some) for some in pids] == [1, 1, 2, 2]
    assert pids[0] == pids[1]
    assert pids[2] == pids[3]
    assert_same_results(runs[0], runs[2])


@pytest.mark.ray
def test_a_failed_run_leaves_no_actor_behind():
    """Who knows what they were at: the next run gets others."""
    warm, config = Warm(), PACKED.override({"rounds": 50})
    pids = set()

    def stumble():
        with Recording.of(config, results=None, launch=warm) as recording:
            for record in recording:
                pids.update(client.pid for client in record.clients)
                if record.round == 1:
                    raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stumble()
    assert pids
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with Recording.of(PACKED, results=None, launch=warm) as recording:
        assert [record.round for record in recording] == [0, 1, 2, 3]
    warm.close()
    assert_same_results(recording.run, fedsim.run(PACKED.override({"placement.mode": "serial"}), results=None))
