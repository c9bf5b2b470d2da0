"""A run that goes on is the run that never stopped: the same bits, or a refusal that says why."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from helpers import SERIAL, assert_same_results, content, results_of
from torch import nn

import fedsim
from fedsim import checkpoint
from fedsim import client as client_module
from fedsim.config import Config
from fedsim.config.changes import changed
from fedsim.datasets import Dataset
from fedsim.errors import ClientError, ConfigError, FedsimWarning, InputError, RunFailedError, RunFolderError
from fedsim.recording import Recording
from fedsim.results import load_run
from fedsim.run_folder import is_live, lock
from fedsim.strategies import Strategy, fedadam, fedavg

CONFIG = SERIAL.override({"rounds": 4, "evaluation.every": 3, "checkpoint.every_s": 3600.0})


def config_of(**changes):
    return CONFIG.override({key.replace("__", "."): value for key, value in changes.items()})


def stop_after(round, config, results, **parts):
    """A run that is left after a round; gives its folder."""
    with Recording.of(config, results=results, **parts) as recording:
        for record in recording:
            if record.round == round:
                break
    return recording.folder


def info(folder):
    return json.loads((folder / "run.json").read_text())


def edit_info(folder, **changes):
    (folder / "run.json").write_text(json.dumps(info(folder) | changes))


def next_rounds(folder):
    """The first round of each time that the run went on."""
    return [part["from_round"] for part in info(folder).get("resumes", [])]


def refused(folder, match, **arguments):
    """Asserts that the run does not go on, for a reason, and that nothing in its folder is touched."""
    before = content(folder)
    with pytest.raises(InputError, match=match) as error:
        fedsim.resume(folder, **arguments)
    assert content(folder) == before
    assert not is_live(folder)
    assert len(str(error.value).splitlines()) <= 2
    return str(error.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happened to."""
    return fedsim.run(CONFIG, results=tmp_path_factory.mktemp("whole"))


@pytest.fixture
def stopped(tmp_path):
    """A run that was left after its second round."""
    return stop_after(2, CONFIG, tmp_path)


# --- Equal bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam"])
@pytest.mark.parametrize("round", range(5))
def test_a_run_that_stopped_after_any_round_is_the_one_that_did_not(tmp_path, strategy, round):
    config = config_of(strategy__name=strategy)
    folder = stop_after(round, config, tmp_path)
    resumed = fedsim.resume(folder)
    assert_same_results(resumed, fedsim.run(config, results=None))
    assert_same_results(load_run(folder), resumed)
    assert (load_run(folder).status, resumed.config) == ("finished", load_run(folder).config)
    assert next_rounds(folder) == ([round + 1] if round < 4 else [])


def test_it_may_stop_again_and_again(tmp_path, whole):
    folder = stop_after(0, CONFIG, tmp_path)
    for round in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            write = fedsim.results.RunWriter.write

            def stopping(self, record, *rest, at=round, write=write, **named):
                write(self, record, *rest, **named)
                if record.round == at:
                    raise KeyboardInterrupt

            patch.setattr(fedsim.results.RunWriter, "write", stopping)
            with pytest.raises(KeyboardInterrupt):
                fedsim.resume(folder)
        assert load_run(folder).status == "interrupted"
        assert load_run(folder).rounds["round"].tolist() == list(range(round + 1))
    assert_same_results(fedsim.resume(folder), whole)
    assert next_rounds(folder) == [1, 2, 3, 4]


def test_what_came_after_the_checkpoint_is_computed_again(tmp_path, whole):
    folder = fedsim.run(CONFIG.override({"checkpoint.every_s": 0, "checkpoint.keep": "all"}), results=tmp_path).path
    edit_info(folder, status="running")
    for round in (4, 3, 2):
        (folder / "checkpoint" / f"{round:06d}.json").unlink()
    assert_same_results(fedsim.resume(folder), whole)
    assert next_rounds(folder) == [2]


def test_without_a_checkpoint_it_starts_again(stopped, whole):
    shutil.rmtree(stopped / "checkpoint")
    assert_same_results(fedsim.resume(stopped), whole)
    assert next_rounds(stopped) == [0]


def test_a_run_that_failed_goes_on_once_its_cause_is_gone(tmp_path):
    broken = [True]

    class Fragile(nn.Linear):
        def forward(self, x):
            if self.training and broken and len(calls) > 30:
                raise KeyError("a bug in my model")
            calls.append(1)
            return super().forward(x.flatten(1))

    calls = []
    config = config_of(training__engine="loop")
    with pytest.raises(ClientError):
        fedsim.run(config, results=tmp_path, name="failed", model=lambda: Fragile(784, 10))
    folder = tmp_path / "failed"
    failed = load_run(folder)
    assert failed.status == "failed"
    assert 1 < len(failed.rounds) < 4, "in the middle"
    assert checkpoint.rounds(folder / "checkpoint")[-1] == failed.rounds["round"].max()
    broken.clear()
    resumed = fedsim.resume(folder, model=lambda: Fragile(784, 10))
    assert_same_results(resumed, fedsim.run(config, results=None, model=lambda: Fragile(784, 10)))
    assert info(folder)["error"] is None


def test_a_run_that_diverged_fails_again_in_the_same_round(tmp_path):
    config = config_of(training__lr=1e38, checkpoint__every_s=0)
    with pytest.raises(RunFailedError, match="round 1: nothing to average"):
        fedsim.run(config, results=tmp_path)
    folder = tmp_path / "mnist"
    before = results_of(load_run(folder))
    assert checkpoint.rounds(folder / "checkpoint") == [0], "a round without an update is none to go on from"
    with pytest.raises(RunFailedError, match="round 1: nothing to average"):
        fedsim.resume(folder)
    assert results_of(load_run(folder)) == before
    assert (load_run(folder).status, next_rounds(folder)) == ("failed", [1])


def test_a_finished_run_is_returned_as_it_is(tmp_path):
    folder = fedsim.run(CONFIG, results=tmp_path).path
    before = content(folder)
    again = fedsim.resume(folder, changes={"placement.stack_size": 1, "rounds": 4})
    assert content(folder) == before
    assert_same_results(again, load_run(folder))


def test_a_run_that_was_killed_after_its_last_round_is_only_ended(tmp_path, whole):
    folder = fedsim.run(CONFIG, results=tmp_path).path
    edit_info(folder, status="running")
    assert_same_results(fedsim.resume(folder), whole)
    assert load_run(folder).status == "finished"


# --- Further ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 3, 10])
@pytest.mark.parametrize(("before", "rounds"), [(0, 3), (1, 2), (3, 6), (4, 5)])
def test_a_longer_run_has_the_rounds_of_one_that_was_as_long_from_the_start(tmp_path, before, rounds, every):
    """Also in the round that was the last one, and evaluated for that reason alone."""
    folder = fedsim.run(config_of(rounds=before, evaluation__every=every), results=tmp_path).path
    longer = fedsim.resume(folder, changes={"rounds": rounds})
    expected = fedsim.run(config_of(rounds=rounds, evaluation__every=every), results=tmp_path / "longer")
    assert_same_results(longer, expected)
    assert load_run(folder).config == longer.config == expected.config
    assert (folder / "config.toml").read_bytes() == (expected.path / "config.toml").read_bytes()


def test_a_run_cannot_become_shorter_than_it_is(stopped):
    refused(stopped, r"rounds = 1, but .* has done 2 already", changes={"rounds": 1})
    shorter = fedsim.resume(stopped, changes={"rounds": 2})
    assert_same_results(shorter, fedsim.run(config_of(rounds=2), results=None))


# --- What may change -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "seed = 1, but the run has 0"),
        ({"training.lr": 0.2, "rounds": 9}, r"training.lr = 0.2, but the run has 0.1"),
        ({"strategy.name": "fedadam"}, "strategy.name = 'fedadam', but the run has 'fedavg'"),
        ({"strategy.server_lr": 0.5}, "strategy.server_lr = 0.5, but the run has none"),
        ({"data.partition.alpha": 0.5}, "data.partition.alpha = 0.5, but the run has none"),
        ({"evaluation.every": 1}, "evaluation.every = 1, but the run has 3"),
        ({"placement.threads": 2}, "placement.threads = 2, but the run has 1"),
        ({"name": "other"}, "name = 'other', but the run has 'mnist'"),
        ({"training.lrs": 0.2}, "unknown key training.lrs"),
        ({"checkpoint.keep": 0}, "checkpoint.keep = 0"),
        ({"rounds": -1}, "rounds = -1"),
    ],
    ids=str,
)
def test_a_key_that_the_results_depend_on_may_not_change(stopped, changes, said):
    refused(stopped, said, changes=changes)


def test_what_results_do_not_depend_on_may_change(stopped, whole):
    changes = {
        "placement.stack_size": 1,
        "failures.max_retries": 7,
        "checkpoint.every_s": 0,
        "checkpoint.keep": "all",
        "training.lr": 0.1,  # as it is
    }
    assert_same_results(fedsim.resume(stopped, changes=changes), whole)
    assert load_run(stopped).config == CONFIG.override(changes | {"data.partition.name": "iid"})
    assert checkpoint.rounds(stopped / "checkpoint") == [2, 3, 4]


@pytest.mark.ray
def test_it_goes_on_with_actors_what_began_without_and_the_other_way_round(shared_ray, stopped, whole, tmp_path):
    packed = {"placement.mode": "packed", "placement.actors": 2}
    assert_same_results(fedsim.resume(stopped, changes=packed), whole)
    with_actors = stop_after(1, CONFIG.override(packed), tmp_path / "other")
    assert_same_results(fedsim.resume(with_actors, changes={"placement.mode": "serial"}), whole)
    assert info(with_actors)["resumes"][0]["placement"]["mode"] == "serial"


def test_an_address_that_nobody_gave_is_not_written_in_stone(monkeypatch):
    """The file of a run has every key; RAY_ADDRESS may have been meant."""
    written = Config.from_dict(CONFIG.to_dict())
    assert "address" in written.placement.model_fields_set
    assert "address" not in changed(written, {}).placement.model_fields_set
    assert changed(written, {}) == written
    elsewhere = CONFIG.override({"placement.address": "there:1"})
    assert changed(elsewhere, {}).placement.address == "there:1"


# --- What must be the same -------------------------------------------------------------------------------------------


def test_another_arithmetic_is_refused_before_anything_is_written(stopped, monkeypatch):
    monkeypatch.setattr(client_module, "fingerprint", lambda device: "0123456789abcdef")
    was = info(stopped)["numerics_fingerprint"]
    refused(stopped, f"numerics fingerprint {was} in the run, 0123456789abcdef here")
    fedsim.resume(stopped, anyway=True)
    (part,) = info(stopped)["resumes"]
    assert part["unlike"] == [f"numerics fingerprint {was} in the run, 0123456789abcdef here"]
    assert part["numerics_fingerprint"] == "0123456789abcdef"
    assert info(stopped)["numerics_fingerprint"] == was


def test_other_package_versions_are_refused(stopped, whole):
    edit_info(stopped, versions=info(stopped)["versions"] | {"torch": "1.0"})
    refused(stopped, r"torch 1\.0 in the run")
    assert_same_results(fedsim.resume(stopped, anyway=True), whole)
    assert info(stopped)["resumes"][0]["unlike"][0].startswith("torch 1.0 in the run")


def test_another_data_set_is_refused(stopped):
    edit_info(stopped, data=info(stopped)["data"] | {"sha256": "0" * 64})
    refused(stopped, r"data \(sha256\) 000000000000 in the run")


def test_the_engine_is_the_one_that_ran(tmp_path):
    folder = stop_after(2, config_of(training__engine="loop"), tmp_path)
    written = (folder / "config.toml").read_text()
    auto = written.replace('engine = "loop"', 'engine = "auto"')
    assert auto != written
    (folder / "config.toml").write_text(auto)
    stated = info(folder)
    del stated["config_sha256"]  # as an earlier fedsim left it
    (folder / "run.json").write_text(json.dumps(stated))
    resumed = fedsim.resume(folder)
    assert_same_results(resumed, fedsim.run(config_of(training__engine="loop"), results=None))
    assert resumed.config.training.engine == load_run(folder).config.training.engine == "auto"


# --- Parts from Python -----------------------------------------------------------------------------------------------


def tiny(pixel=0.0):
    images = np.linspace(0, 1, 240, dtype=np.float32).reshape(60, 1, 2, 2) + np.float32(pixel)
    labels = np.arange(60) % 2
    return Dataset("tiny", images[:40], labels[:40], images[40:], labels[40:], num_classes=2)


def two_layers():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 2))


def half_step():
    average = fedavg()

    def aggregate(state, weights, updates, num_examples):
        return average.aggregate({}, weights, updates / state["divisor"], num_examples)[0], state

    return Strategy(lambda weights: {"divisor": torch.tensor(2.0)}, aggregate)


OWN = {"model": two_layers, "strategy": half_step(), "dataset": tiny()}
OWN_CONFIG = config_of(training__batch_size=5)


@pytest.fixture
def own_run(tmp_path):
    return stop_after(2, OWN_CONFIG, tmp_path, **OWN)


def test_own_parts_are_given_again(own_run):
    assert_same_results(fedsim.resume(own_run, **OWN), fedsim.run(OWN_CONFIG, results=None, **OWN))


@pytest.mark.parametrize("part", OWN)
def test_a_part_that_is_not_given_again_is_named(own_run, part):
    refused(own_run, rf"must be given again: {part} .*{part}=\.\.\.", **{p: v for p, v in OWN.items() if p != part})


@pytest.mark.parametrize("part", OWN)
def test_a_part_that_the_run_did_not_have_is_refused(stopped, part):
    refused(stopped, f"no part of its own for {part}=", **{part: OWN[part]})


def test_another_model_or_data_set_than_the_runs_own_is_refused(own_run):
    def others():  # of the same shapes
        model = two_layers()
        nn.init.zeros_(model[1].weight)
        return model

    refused(own_run, "initial weights", **OWN | {"model": others})
    refused(own_run, "initial weights", **OWN | {"model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2))})
    smaller = {"model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "anyway": True}
    refused(own_run, "checkpoint of round 2 .* is of another model", **OWN | smaller)
    refused(own_run, r"data \(sha256\)", **OWN | {"dataset": tiny(0.5)})


def test_another_strategy_than_the_runs_own_is_refused_where_it_is_fedsims(tmp_path, own_run):
    refused(
        own_run,
        r"strategy test_resume\.half_step\(.*\) in the run, fedsim\.strategies\.fedavg here",
        **OWN | {"strategy": fedavg()},
    )
    folder = stop_after(2, CONFIG, tmp_path / "adam", strategy=fedadam())
    for other in (fedavg(), half_step()):
        refused(folder, r"strategy fedsim\.strategies\.fedadam\(.*\) in the run, .* here", strategy=other)
    resumed = fedsim.resume(folder, strategy=fedadam())
    assert_same_results(resumed, fedsim.run(config_of(strategy__name="fedadam"), results=None))


def test_nor_is_one_that_was_made_with_other_values_taken_for_it(tmp_path):
    def step(share):
        def aggregate(state, weights, updates, num_examples):
            return (weights + share * updates.double().mean(0)).float(), state

        return Strategy(lambda weights: {}, aggregate)

    folder = stop_after(2, CONFIG, tmp_path / "step", strategy=step(0.5))
    refused(folder, r"strategy .*step\(share=0\.5\) in the run, .*step\(share=1\.0\) here", strategy=step(1.0))
    resumed = fedsim.resume(folder, strategy=step(0.5))
    assert_same_results(resumed, fedsim.run(CONFIG, results=None, strategy=step(0.5)))


@pytest.mark.parametrize("called", ["fedsim.strategies.Strategy", "where_it_was_before.half_step"])
def test_an_own_strategy_may_be_called_otherwise(own_run, called):
    """An earlier fedsim called every one of them Strategy."""
    edit_info(own_run, own=info(own_run)["own"] | {"strategy": called})
    assert_same_results(fedsim.resume(own_run, **OWN), fedsim.run(OWN_CONFIG, results=None, **OWN))


# --- Damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path):
    """A stopped run with a part and a checkpoint of every round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsim.results.writer.FLUSH_S", 0)
        return stop_after(3, config_of(checkpoint__every_s=0, checkpoint__keep="all"), tmp_path)


def flip(path, place=-30):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["000003.json", "000003.safetensors"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(many, whole, file):
    flip(many / "checkpoint" / file)
    with pytest.warns(FedsimWarning, match=r"000003\..*; going on with round 3"):
        resumed = fedsim.resume(many)
    assert_same_results(resumed, whole)
    assert next_rounds(many) == [3]


def test_with_every_checkpoint_damaged_it_starts_again(many, whole):
    for path in (many / "checkpoint").glob("*.safetensors"):
        flip(path)
    with pytest.warns(FedsimWarning) as said:
        resumed = fedsim.resume(many)
    assert len(said) == 4
    assert all("going on with round 0" in str(warning.message) for warning in said)
    assert_same_results(resumed, whole)


def test_a_checkpoint_of_rounds_that_are_taken_back_goes_with_them(many, monkeypatch):
    """Else it would be the newest one, and `checkpoint.keep` would cost the new ones."""
    flip(many / "rounds.parquet" / "part-000002-000002.parquet", 200)
    write = fedsim.results.RunWriter.write

    def stopping(self, record, *rest, **named):
        write(self, record, *rest, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(fedsim.results.RunWriter, "write", stopping)
    with pytest.warns(FedsimWarning, match="going on with round 2"), pytest.raises(KeyboardInterrupt):
        fedsim.resume(many, changes={"checkpoint.keep": 2})
    assert checkpoint.rounds(many / "checkpoint") == [1, 2]


def test_a_checkpoint_of_other_weights_is_damaged(many, whole):
    tensors, state = checkpoint.load(many / "checkpoint", 2)
    checkpoint.save(many / "checkpoint", 3, tensors, state, load_run(many).rounds["weights_sha256"][3])
    with pytest.warns(FedsimWarning, match=r"000003\.json does not hold the weights"):
        assert_same_results(fedsim.resume(many), whole)


@pytest.mark.parametrize("kind", ["rounds", "clients"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "of another round"])
def test_from_a_damaged_part_on_all_is_computed_again(many, whole, kind, damage):
    part = many / f"{kind}.parquet" / "part-000002-000002.parquet"
    if damage == "flipped":
        flip(part, 200)
    elif damage == "cut":
        part.write_bytes(part.read_bytes()[:-100])
    elif damage == "missing":
        part.unlink()
    else:
        shutil.copyfile(part.with_name("part-000003-000003.parquet"), part)
    with pytest.warns(
        FedsimWarning, match=rf"part-00000[23].*{'missing' if damage == 'missing' else 'damaged'}.*round 2"
    ):
        resumed = fedsim.resume(many)
    assert_same_results(resumed, whole)
    assert next_rounds(many) == [2]


def test_what_a_crash_leaves_is_cleared_away_without_a_word(many, whole):
    """Temporary files, and clients whose round was not written any more."""
    (many / "clients.parquet" / "part-000004-000004.parquet").write_bytes(b"torn")
    for place in (".", "rounds.parquet", "checkpoint"):
        (many / place / ".half.123.tmp").write_bytes(b"half")
    (many / "notes.txt").write_text("mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_results(fedsim.resume(many), whole)
    assert not list(many.rglob(".*.tmp"))
    assert (many / "notes.txt").read_text() == "mine"


def test_a_file_among_the_parts_that_is_not_fedsims_is_named(many):
    (many / "rounds.parquet" / "mine.parquet").write_bytes(b"mine")
    refused(many, r"rounds\.parquet/mine\.parquet is not fedsim's: move it")


def test_a_configuration_that_was_edited_is_refused_with_what_to_do(stopped):
    path = stopped / "config.toml"
    path.write_text(path.read_text().replace("lr = 0.1", "lr = 0.2"))
    refused(stopped, r"config\.toml is not as fedsim wrote it, by what run\.json says.*--set")
    with pytest.warns(FedsimWarning, match=r"config\.toml is not as fedsim wrote it"):
        assert load_run(stopped).config.training.lr == 0.2


def test_a_run_json_with_another_name_is_refused(stopped):
    edit_info(stopped, name="other")
    refused(stopped, r"run\.json calls the run other, its rows mnist")


@pytest.mark.parametrize("key", ["name", "status", "own", "data"])
def test_a_run_json_without_what_it_must_say_is_named(stopped, key):
    stated = info(stopped)
    del stated[key]
    (stopped / "run.json").write_text(json.dumps(stated))
    refused(stopped, rf"run\.json is damaged: {key} is None")
    with pytest.raises(RunFolderError, match=rf"run\.json is damaged: {key} is None"):
        load_run(stopped)


WRONG = [
    *[(key, value) for key in ("name", "status") for value in (None, 1, [], {})],
    *[(key, value) for key in ("own", "data", "versions", "placement") for value in (None, 1, "x", [])],
    *[("resumes", value) for value in (None, 1, "x", {})],
    ("own", {"strategy": None}),
    ("data", {"sha256": 1, "input_shape": [2], "num_classes": 2}),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_what_a_run_json_says_in_another_way_is_named(stopped, key, value):
    edit_info(stopped, **{key: value})
    said = rf"run\.json is damaged: {key} (is|has) "
    refused(stopped, said)
    with pytest.raises(RunFolderError, match=said):
        load_run(stopped)


def test_a_run_json_with_half_of_the_data_is_named(stopped):
    edit_info(stopped, data={"sha256": info(stopped)["data"]["sha256"]})
    refused(stopped, r"run\.json is damaged: data has input_shape = None, data has num_classes = None")


def test_a_renamed_and_moved_run_goes_on_under_its_name(stopped, tmp_path, whole):
    moved = stopped.rename(tmp_path / "moved")
    resumed = fedsim.resume(moved)
    assert_same_results(resumed, whole)
    assert set(resumed.rounds["run"]) == set(resumed.clients["run"]) == {"mnist"}


# --- What is no run --------------------------------------------------------------------------------------------------


def test_what_is_no_run_is_refused_and_left_alone(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.json").write_text('{"status": "running"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("missing", "foreign", "empty", "file"):
        with pytest.raises(RunFolderError, match=f"{name} is not a run"):
            fedsim.resume(tmp_path / name)
    assert content(tmp_path / "empty") == {}


def test_a_run_of_a_newer_fedsim_is_refused(stopped):
    edit_info(stopped, fedsim_run=999)
    refused(stopped, "version 999.*update fedsim")


@pytest.mark.long
def test_a_run_that_is_being_written_is_refused(stopped, whole):
    with lock(stopped):
        before = content(stopped)
        with pytest.raises(RunFolderError, match="is being written by a running fedsim"):
            fedsim.resume(stopped)
        assert content(stopped) == before
    assert_same_results(fedsim.resume(stopped), whole)


@pytest.mark.long
def test_while_it_goes_on_nobody_else_can(stopped, monkeypatch):
    write, seen = fedsim.results.RunWriter.write, []

    def looking(self, *arguments, **named):
        write(self, *arguments, **named)
        assert load_run(stopped).status == "running"
        with pytest.raises(RunFolderError, match="is being written"):
            fedsim.resume(stopped)
        seen.append(1)

    monkeypatch.setattr(fedsim.results.RunWriter, "write", looking)
    fedsim.resume(stopped)
    assert len(seen) == 2


def test_a_key_with_its_own_value_is_no_change():
    assert changed(CONFIG, {"seed": 0, "rounds": 9}) == CONFIG.override({"rounds": 9})
    with pytest.raises(ConfigError, match="a run that goes on may change rounds"):
        changed(CONFIG, {"seed": 1})
