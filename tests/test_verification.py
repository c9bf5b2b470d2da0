"""Rounds computed again: equal under any placement, and a difference is found where it is."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import fedsim
from fedsim import checkpoint, environment, rerun
from fedsim import client as client_module
from fedsim.comparison import Difference, Recorded, round_differences
from fedsim.config import Config
from fedsim.datasets import Dataset
from fedsim.errors import ClientError, ConfigError, InputError, RunFailedError, RunFolderError
from fedsim.experiment import prepare
from fedsim.launch import connect, open_pool
from fedsim.metrics import CLIENT_COLUMNS, ROUND_COLUMNS
from fedsim.recording import Recording
from fedsim.rerun import plan_replay, plan_verify
from fedsim.results import load_run
from fedsim.simulation import federated_averaging
from fedsim.starts import restore
from fedsim.strategies import Strategy, fedavg
from fedsim.verification import recompute, replay, verify

CONFIG = Config().override(
    {
        "data.dataset": "synthetic",
        "data.partition.name": "quantity",
        "placement.mode": "serial",
        "model.name": "logistic",
        "strategy.name": "fedadam",
        "training.local_epochs": 1,
        "training.batch_size": 50,
        "clients.count": 6,
        "clients.per_round": 3,
        "rounds": 5,
        "evaluation.every": 2,
        "evaluation.clients": True,
        "checkpoint.every_s": 0.0,
        "checkpoint.keep": "all",
    }
)
SERIAL = {"mode": "serial"}
OWN_RESULTS = (
    *("status", "num_examples", "num_steps", "train_loss", "loss_before", "accuracy_before", "loss_after"),
    *("accuracy_after", "update_l2_norm", "update_sha256"),
)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A finished run with a checkpoint of every round."""
    return fedsim.run(CONFIG, results=tmp_path_factory.mktemp("results"), name="made").path


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it, to be tampered with."""
    return shutil.copytree(made, tmp_path / "copy")


def cohort(folder, round):
    clients = load_run(folder).clients
    return clients[clients["round"] == round]["client_id"].tolist()


def tamper(folder, kind, round, column, change, client_id=None):
    """Changes one recorded value, in whatever part it is; `change` gets the old value."""
    changed = 0
    for part in sorted((folder / f"{kind}.parquet").glob("*.parquet")):
        rows = pq.read_table(part)
        values = rows.to_pylist()
        for row in values:
            if row["round"] == round and (client_id is None or row["client_id"] == client_id):
                row[column] = change(row[column])
                changed += 1
        pq.write_table(pa.Table.from_pylist(values, schema=rows.schema), part)
    assert changed == 1


def edit_info(folder, **changes):
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | changes))


def keep_checkpoints(folder, *rounds):
    for round in set(checkpoint.rounds(folder / "checkpoint")) - set(rounds):
        (folder / "checkpoint" / f"{round:06d}.json").unlink()


def other(value):
    """Another value of the same type."""
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1] != "0" else "1")
    return value + 1 if isinstance(value, int) else float(np.nextafter(value, np.inf))


def tiny(pixel=0.0):
    """Two classes on 2 x 2 pixels."""
    images = np.linspace(0, 1, 240, dtype=np.float32).reshape(60, 1, 2, 2) + pixel
    labels = np.arange(60) % 2
    return Dataset("tiny", images[:40], labels[:40], images[40:], labels[40:], num_classes=2)


# --- The loop goes on from a checkpoint ------------------------------------------------------------------------------


@pytest.mark.parametrize("round", range(6))
def test_the_loop_goes_on_after_any_round_with_the_same_bits(made, round):
    x = prepare(CONFIG)
    with connect(x) as plan, open_pool(x, plan) as pool:
        later = list(federated_averaging(x, pool, restore(made, round, x)))
    assert [done.record.round for done in later] == list(range(round + 1, 6))
    recorded = Recorded(load_run(made))
    assert [difference for done in later for difference in round_differences(done.record, recorded)] == []


def test_a_checkpoint_of_another_model_is_refused(made):
    with pytest.raises(InputError, match=r"checkpoint of round 2 .* is of another model"):
        restore(made, 2, prepare(CONFIG.override({"model.name": "mlp"})))


# --- Equal -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "kept", "again"),
    [
        ("all", range(6), (1, 5)),  # a checkpoint of round 0 is as good as round 0
        ("all", [5], (1, 5)),
        (None, range(6), (5, 5)),  # the last round, from the checkpoint before it
        (None, [3, 5], (4, 5)),
        (None, [5], (1, 5)),  # its own checkpoint is no use
        (None, [], (1, 5)),
        (3, [1, 3, 5], (2, 3)),
        ("3", [2], (3, 3)),
        ("2..4", [0, 1, 2, 3], (2, 4)),
        ("2..4", [2, 3], (1, 4)),
    ],
)
def test_rounds_are_computed_again_from_the_nearest_checkpoint_and_are_equal(folder, monkeypatch, rounds, kept, again):
    keep_checkpoints(folder, *kept)
    fitted = watch_fits(monkeypatch)
    answer = verify(folder, rounds=rounds, placement=SERIAL)
    assert (answer.is_equal, answer.difference) == (True, None)
    assert answer.rounds == range(again[0], again[1] + 1)
    assert fitted == [(round, cohort(folder, round)) for round in answer.rounds]


def watch_fits(monkeypatch):
    """What a serial pool is asked to train from now on."""
    from fedsim.actors.serial import SerialPool

    fitted, fit = [], SerialPool.fit

    def watched(self, round, weights, cohort):
        fitted.append((round, list(cohort)))
        return fit(self, round, weights, cohort)

    monkeypatch.setattr(SerialPool, "fit", watched)
    return fitted


def test_nothing_in_the_folder_is_written(made):
    def content():
        return {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}

    before = content()
    verify(made, rounds="all", placement=SERIAL)
    replay(made, round=2, client=cohort(made, 2)[0])
    assert content() == before


@pytest.mark.parametrize("round", range(1, 6))
@pytest.mark.parametrize("kept", [(), (0, 1, 2, 3, 4, 5)], ids=["from round 0", "from checkpoints"])
def test_a_client_is_trained_again_to_its_recorded_row(folder, monkeypatch, round, kept):
    keep_checkpoints(folder, *kept)
    fitted = watch_fits(monkeypatch)
    client = cohort(folder, round)[1]
    answer = replay(folder, round=round, client=client)
    assert (answer.is_recorded, answer.differences) == (True, ())
    row = Recorded(load_run(folder)).clients(round)[client]
    assert {name: getattr(answer.client, name) for name in OWN_RESULTS} == {name: row[name] for name in OWN_RESULTS}
    before = [] if kept else range(1, round)
    assert fitted == [*((r, cohort(folder, r)) for r in before), (round, [client])]


def test_rejected_clients_and_a_round_without_an_update_are_equal_too(tmp_path):
    far = CONFIG.override({"training.lr": 1e38, "strategy.name": "fedavg"})
    with pytest.raises(RunFailedError, match="diverged"):
        fedsim.run(far, results=tmp_path, name="far")
    run = load_run(tmp_path / "far")
    assert set(run.clients["status"]) >= {"rejected"}
    assert run.status == "failed"
    assert verify(run.path, rounds="all", placement=SERIAL).is_equal
    for client in run.clients[run.clients["round"] == 1]["client_id"]:
        assert replay(run.path, round=1, client=client).differences == ()


def test_a_run_that_is_still_going_has_the_rounds_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("fedsim.results.writer.FLUSH_S", 0)
    with Recording.of(CONFIG, results=tmp_path, name="live") as recording:
        going = iter(recording)
        for _ in range(4):  # rounds 0 to 3
            next(going)
        assert load_run(recording.folder).status == "running"
        assert verify(recording.folder, placement=SERIAL).rounds == range(3, 4)
        assert verify(recording.folder, rounds="all", placement=SERIAL).is_equal
        assert replay(recording.folder, round=2, client=cohort(recording.folder, 2)[0]).differences == ()
        with pytest.raises(InputError, match=r"rounds = 5: .* has rounds 1 to 3"):
            verify(recording.folder, rounds=5)


def test_a_moved_and_renamed_run_is_equal(folder):
    assert verify(folder.rename(folder.with_name("other")), placement=SERIAL).is_equal


@pytest.mark.ray
def test_another_placement_gives_the_same_bits(shared_ray, made, tmp_path):
    assert verify(made, rounds="all", placement={"actors": 3}).is_equal
    packed = CONFIG.override({"placement.mode": "packed", "placement.actors": 2})
    run = fedsim.run(packed, results=tmp_path)
    assert plan_verify(run.path).experiment.config.placement.mode == "serial"
    assert verify(run.path, rounds="all").is_equal
    assert replay(run.path, round=4, client=cohort(run.path, 4)[0]).differences == ()
    assert verify(made).is_equal, "a serial run, on two actors"


def on_gpu(folder, monkeypatch, **placed):
    """What a run says that was computed on a GPU, and GPUs here."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    run = load_run(folder)
    info = run.info | {"device": "cuda (NVIDIA H200)", "placement": run.info["placement"] | placed}
    return SimpleNamespace(info=info, config=run.config)


def test_a_run_on_a_gpu_is_placed_as_it_was(folder, monkeypatch):
    packed = {"mode": "packed", "num_actors": 3, "num_gpus": 0.25, "stack_size": 4}
    run = on_gpu(folder, monkeypatch, **packed)
    again = rerun._other_placement(run)
    assert {"mode": "packed", "actors": 3, "num_gpus": 0.25, "stack_size": 4}.items() <= again.items()
    assert rerun._nearby_placement(run) == again, "a client in its stack"
    run = on_gpu(folder, monkeypatch, **packed | {"stack_size": 1})
    assert rerun._nearby_placement(run) == {"mode": "serial", "num_gpus": 1, "stack_size": 1}, "alone, as it was"
    run = on_gpu(folder, monkeypatch, mode="actor-per-client", num_actors=6, num_gpus=0.1, stack_size=1)
    assert rerun._other_placement(run)["actors"] == "auto"
    Config.from_dict({"placement": rerun._other_placement(run)})


def test_without_a_gpu_its_run_is_refused_for_its_arithmetic(folder):
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"device": "cuda (NVIDIA H200)"}))
    for again in (lambda **how: verify(folder, placement=SERIAL, **how), lambda **how: replayed(folder, **how)):
        with pytest.raises(InputError, match=r"device cuda \(NVIDIA H200\) in the run, cpu here"):
            again()
        again(anyway=True)


def replayed(folder, **how):
    return replay(folder, round=2, client=cohort(folder, 2)[0], **how)


# --- Different -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", OWN_RESULTS)
def test_a_clients_row_that_differs_is_named(folder, column):
    client = cohort(folder, 3)[1]
    old = Recorded(load_run(folder)).clients(3)[client][column]
    tamper(folder, "clients", 3, column, other, client)
    expected = Difference(3, client, column, other(old), old)
    assert verify(folder, rounds="2..5", placement=SERIAL).difference == expected
    assert verify(folder, rounds="4..5", placement=SERIAL).is_equal, "the checkpoint lies after it"
    assert replay(folder, round=3, client=client).differences == (expected,)
    assert replay(folder, round=3, client=cohort(folder, 3)[0]).differences == ()


def test_what_a_client_does_not_do_alone_is_compared_after_all_clients(folder):
    """A cosine depends on every update: it would name a client for the difference of another."""
    first, second, third = cohort(folder, 2)
    tamper(folder, "clients", 2, "cosine_to_mean", other, first)
    difference = verify(folder, rounds="all", placement=SERIAL).difference
    assert (difference.round, difference.client_id, difference.column) == (2, first, "cosine_to_mean")
    tamper(folder, "clients", 2, "update_sha256", other, third)
    difference = verify(folder, rounds="all", placement=SERIAL).difference
    assert (difference.round, difference.client_id, difference.column) == (2, third, "update_sha256")
    tamper(folder, "clients", 2, "num_steps", other, second)
    difference = verify(folder, rounds="all", placement=SERIAL).difference
    assert (difference.round, difference.client_id, difference.column) == (2, second, "num_steps")


@pytest.mark.parametrize("column", [c.name for c in ROUND_COLUMNS if c.name not in ("run", "round")])
def test_a_round_is_compared_in_its_results_alone(folder, column):
    is_result = not next(c for c in ROUND_COLUMNS if c.name == column).is_observation
    keep_checkpoints(folder)
    change = other if column != "started_at" else (lambda value: value.replace(year=2000))
    tamper(folder, "rounds", 4, column, change)
    difference = verify(folder, rounds="all", placement=SERIAL).difference
    found = difference and (difference.round, difference.client_id, difference.column)
    assert found == ((4, None, column) if is_result else None)


@pytest.mark.parametrize(("round", "change"), [(3, lambda value: 0.5), (4, lambda value: None)])
def test_null_is_not_any_value(folder, round, change):
    """Of every second round there is no evaluation."""
    tamper(folder, "rounds", round, "test_accuracy", change)
    difference = verify(folder, rounds=round, placement=SERIAL).difference
    assert (difference.round, difference.column) == (round, "test_accuracy")


@pytest.mark.parametrize("column", [c.name for c in CLIENT_COLUMNS if c.is_observation])
def test_observations_of_a_client_are_not_compared(folder, column):
    tamper(
        folder,
        "clients",
        5,
        column,
        lambda value: "x" if isinstance(value, str | None) else value + 1,
        cohort(folder, 5)[0],
    )
    assert verify(folder, placement=SERIAL).is_equal


def test_the_first_difference_in_order_counts_and_nothing_is_computed_after_it(folder, monkeypatch):
    keep_checkpoints(folder)
    tamper(folder, "rounds", 4, "weights_sha256", other)
    tamper(folder, "rounds", 2, "weights_sha256", other)
    fitted = watch_fits(monkeypatch)
    answer = verify(folder, rounds="all", placement=SERIAL)
    assert (answer.difference.round, answer.difference.column) == (2, "weights_sha256")
    assert not answer.is_equal
    assert [round for round, _ in fitted] == [1, 2]


def test_round_0_is_compared_where_the_way_leads_past_it(folder):
    keep_checkpoints(folder)
    tamper(folder, "rounds", 0, "test_loss", other)
    difference = verify(folder, rounds=1, placement=SERIAL).difference
    assert (difference.round, difference.column) == (0, "test_loss")


def test_a_client_that_is_missing_or_too_many_is_named(folder):
    first = cohort(folder, 3)[0]
    absent = next(client for client in range(6) if client not in cohort(folder, 3))
    tamper(folder, "clients", 3, "client_id", lambda value: absent, first)
    difference = verify(folder, rounds=3, placement=SERIAL).difference
    expected = [Difference(3, first, "client_id", None, first), Difference(3, absent, "client_id", absent, None)]
    assert difference == min(expected, key=lambda d: d.client_id)


def test_a_round_whose_row_is_missing_is_named(folder):
    for part in (folder / "rounds.parquet").glob("part-0*"):
        rows = pq.read_table(part)
        pq.write_table(rows.filter(pa.compute.field("round") != 3), part)
    difference = verify(folder, rounds="3..4", placement=SERIAL).difference
    assert difference == Difference(3, None, "round", None, 3)


def test_a_difference_on_the_way_to_a_replayed_round_is_told_first(folder):
    keep_checkpoints(folder)
    tamper(folder, "rounds", 1, "weights_sha256", other)
    tamper(folder, "rounds", 2, "weights_sha256", other)
    client = cohort(folder, 4)[0]
    tamper(folder, "clients", 4, "num_steps", other, client)
    differences = replay(folder, round=4, client=client).differences
    assert [(d.round, d.client_id, d.column) for d in differences] == [
        (1, None, "weights_sha256"),
        (4, client, "num_steps"),
    ]


def test_a_difference_is_told_in_a_line():
    text = str(Difference(3, 7, "update_sha256", "a" * 64, None))
    assert text == "round 3, client 7: update_sha256 was aaaaaaaaaaaa... in the run and is null here"
    assert str(Difference(3, None, "num_examples", 5, 6)) == "round 3: num_examples was 5 in the run and is 6 here"


# --- The cost --------------------------------------------------------------------------------------------------------


def test_the_cost_is_told_before_anything_is_computed(folder, monkeypatch):
    fitted = watch_fits(monkeypatch)
    rounds = load_run(folder).rounds.set_index("round")["round_s"]
    keep_checkpoints(folder, 3)
    said = plan_verify(folder, placement={"actors": 3}).cost
    assert said == (
        f"{folder}: computes rounds 4 to 5 again from the checkpoint of round 3, packed with 3 actors where the run "
        f"was serial; about {rounds[4] + rounds[5]:.1f} s at the pace of the run"
    )
    tamper(folder, "rounds", 1, "round_s", lambda value: 100.0)
    said = plan_verify(folder, rounds=2).cost
    assert "rounds 1 to 2 again from round 0, packed with 2 actors where the run was serial; about 100." in said
    client = cohort(folder, 4)[0]
    tamper(folder, "clients", 4, "fit_s", lambda value: 7.0, client)
    said = plan_replay(folder, round=4, client=client).cost
    assert said == (
        f"{folder}: trains client {client} of round 4 in this process, from the checkpoint of round 3; "
        "about 7.0 s at the pace of the run"
    )
    said = plan_replay(folder, round=3, client=cohort(folder, 3)[0]).cost
    assert "in this process, after rounds 1 to 2 again from round 0; about 100." in said
    assert fitted == []


# --- What cannot be compared -----------------------------------------------------------------------------------------


@pytest.fixture(params=["verify", "replay"])
def again(request):
    """Either of the two, of a run's third round."""

    def call(folder, **more):
        if request.param == "verify":
            return verify(folder, rounds=3, placement=SERIAL, **more)
        return replay(folder, round=3, client=cohort(folder, 3)[0], **more)

    return call


def test_other_package_versions_are_refused_with_both(folder, again):
    versions = environment.versions()
    edit_info(folder, versions=versions | {"torch": "1.0", "numpy": "2.0.1", "gone": "3"})
    with pytest.raises(InputError) as refused:
        again(folder)
    said = str(refused.value)
    for package, was, now in [("torch", "1.0", versions["torch"]), ("numpy", "2.0.1", versions["numpy"])]:
        assert f"{package} {was} in the run, {now} here" in said
    assert "gone 3 in the run, None here" in said
    assert "pandas" not in said
    assert "--anyway" in said
    assert len(said.splitlines()) == 2
    again(folder, anyway=True)


def test_another_data_set_is_refused(folder, again):
    info = json.loads((folder / "run.json").read_text())
    sha256 = info["data"]["sha256"]
    edit_info(folder, data=info["data"] | {"sha256": other(sha256)[::-1]})
    with pytest.raises(InputError, match=rf"data \(sha256\) {other(sha256)[::-1][:12]} in the run, {sha256[:12]} here"):
        again(folder)
    again(folder, anyway=True)


def test_another_arithmetic_is_refused(folder, again, monkeypatch):
    fingerprint = json.loads((folder / "run.json").read_text())["numerics_fingerprint"]
    monkeypatch.setattr(client_module, "fingerprint", lambda device: "0123456789abcdef")
    fitted = watch_fits(monkeypatch)
    with pytest.raises(InputError, match=f"numerics fingerprint {fingerprint} in the run, 0123456789abcdef here"):
        again(folder)
    assert fitted == []
    again(folder, anyway=True)


def test_other_threads_are_refused(folder):
    with pytest.raises(InputError, match=r"placement.threads 1 in the run, 2 here"):
        verify(folder, placement={"mode": "serial", "threads": 2})


def test_a_run_keeps_its_own_threads(tmp_path):
    run = fedsim.run(CONFIG.override({"placement.threads": 2}), results=tmp_path)
    assert plan_verify(run.path).experiment.config.placement.threads == 2
    assert verify(run.path, placement=SERIAL).is_equal


def test_what_differs_is_known_where_the_user_goes_on_anyway(folder, monkeypatch):
    edit_info(folder, versions=environment.versions() | {"torch": "1.0"})
    monkeypatch.setattr(client_module, "fingerprint", lambda device: "0123456789abcdef")
    rerun = plan_verify(folder, placement=SERIAL, anyway=True)
    assert [unlike.split()[0] for unlike in rerun.unlike] == ["torch"]
    assert [difference for _, difference in recompute(rerun)] == [None]
    assert [unlike.split()[0] for unlike in rerun.unlike] == ["torch", "numerics"]


def test_the_engine_is_the_one_that_ran(folder):
    """Whatever the configuration's auto would choose here."""
    assert plan_verify(folder).experiment.config.training.engine == "stacked"
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**info, "engine": "loop"}))
    assert plan_verify(folder).experiment.config.training.engine == "loop"


@pytest.mark.parametrize("rounds", ["0", 0, 6, -1, "-1", "3..9", "4..3", "0..2", "", "2..", "x", "1,2", "ALL", True])
def test_an_unknown_round_is_wrong_input(made, rounds):
    with pytest.raises(
        InputError, match=r"rounds = .*: .*made has rounds 1 to 5; write a round such as 1, a range such"
    ):
        verify(made, rounds=rounds, placement=SERIAL)


@pytest.mark.parametrize("round", [0, -1, 6])
def test_a_round_that_is_not_there_cannot_be_replayed(made, round):
    with pytest.raises(InputError, match=rf"round {round} cannot be replayed: .*made has rounds 1 to 5"):
        replay(made, round=round, client=0)


@pytest.mark.parametrize("client", [-1, 6, "absent"])
def test_a_client_that_had_no_part_is_wrong_input(made, client):
    there = cohort(made, 2)
    if client == "absent":
        client = next(client for client in range(6) if client not in there)
    named = ", ".join(map(str, there))
    with pytest.raises(InputError, match=rf"client {client} had no part in round 2 of .*made; its cohort: {named}$"):
        replay(made, round=2, client=client)


def test_a_large_cohort_is_not_listed_whole(tmp_path):
    run = fedsim.run(CONFIG.override({"clients.count": 60, "clients.per_round": 50, "rounds": 1}), results=tmp_path)
    with pytest.raises(InputError, match=r"its cohort: (\d+, ){20}\.\.\. \(50 clients\)$"):
        replay(run.path, round=1, client=99)


def test_a_run_without_a_round_has_none_to_compare(tmp_path):
    run = fedsim.run(CONFIG.override({"rounds": 0}), results=tmp_path)
    with pytest.raises(InputError, match="has no finished round to verify yet"):
        verify(run.path)
    with pytest.raises(InputError, match=r"round 1 cannot be replayed: .* has no round but 0"):
        replay(run.path, round=1, client=0)


def test_what_is_no_run_is_wrong_input(tmp_path):
    with pytest.raises(RunFolderError, match="is not a run"):
        verify(tmp_path)
    with pytest.raises(RunFolderError, match="is not a run"):
        replay(tmp_path / "nothing", round=1, client=0)


@pytest.mark.parametrize("placement", [{"mods": 1}, {"mode": "parallel"}, {"actors": 0}])
def test_a_placement_is_checked(made, placement):
    with pytest.raises(ConfigError, match=rf"placement\.{next(iter(placement))}"):
        verify(made, placement=placement)


# --- Damaged checkpoints ---------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_named(folder, again):
    path = folder / "checkpoint" / "000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(RunFolderError, match=r"000002\.safetensors is damaged"):
        again(folder)


def test_a_checkpoint_of_other_weights_is_refused(folder, again):
    tensors, state = checkpoint.load(folder / "checkpoint", 2)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1
    checkpoint.save(folder / "checkpoint", 2, tensors, state, "0" * 64)
    with pytest.raises(
        RunFolderError, match=r"checkpoint .*000002\.json does not hold the weights of that round's row"
    ):
        again(folder)
    (folder / "checkpoint" / "000002.json").unlink()  # as the message says
    again(folder)


def test_a_state_of_the_server_that_was_changed_is_found(folder):
    tensors, state = checkpoint.load(folder / "checkpoint", 2)
    state["first_moment"] *= 2
    weights_sha256 = load_run(folder).rounds["weights_sha256"][2]
    checkpoint.save(folder / "checkpoint", 2, tensors, state, weights_sha256)
    difference = verify(folder, rounds=3, placement=SERIAL).difference
    assert (difference.round, difference.client_id) == (3, None)


# --- Parts from Python -----------------------------------------------------------------------------------------------


def two_layers():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 2))


def half_step():
    average = fedavg()

    def aggregate(state, weights, updates, num_examples):
        return average.aggregate({}, weights, updates / 2, num_examples)[0], {"steps": state["steps"] + 1}

    return Strategy(lambda weights: {"steps": torch.zeros(())}, aggregate)


OWN = {"model": two_layers, "strategy": half_step(), "dataset": tiny()}


@pytest.fixture
def own_run(tmp_path):
    config = CONFIG.override({"data.partition.name": "iid"})
    return fedsim.run(config, results=tmp_path, name="own", **OWN).path


def test_a_run_of_own_parts_is_compared_with_them_given_again(own_run, again):
    assert verify(own_run, rounds="all", placement=SERIAL, **OWN).is_equal
    assert again(own_run, **OWN)


@pytest.mark.parametrize("part", OWN)
def test_a_part_that_is_not_given_again_is_named(own_run, again, part):
    given = {name: value for name, value in OWN.items() if name != part}
    with pytest.raises(
        InputError, match=rf"own has parts from Python, .* again: {part} \(.*\.\w+(\(.*\))?\); .*{part}=\.\.\.$"
    ):
        again(own_run, **given)


@pytest.mark.parametrize("part", OWN)
def test_a_part_that_the_run_did_not_have_is_refused(made, again, part):
    with pytest.raises(InputError, match=rf"made has no part of its own for {part}=: leave it out"):
        again(made, **{part: OWN[part]})


def test_own_parts_that_are_others_are_found(own_run):
    with pytest.raises(InputError, match=r"data \(sha256\)"):
        verify(own_run, placement=SERIAL, **OWN | {"dataset": tiny(0.25)})
    other_strategy = verify(own_run, placement=SERIAL, **OWN | {"strategy": fedavg()})
    assert (other_strategy.difference.round, other_strategy.difference.client_id) == (5, None)
    with pytest.raises(InputError, match="is of another model"):
        verify(own_run, placement=SERIAL, **OWN | {"model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2))})


# --- A client that fails ---------------------------------------------------------------------------------------------


def fragile(when):
    """A model that raises in the training steps for which `when` is true; they are counted."""
    steps = []

    class Fragile(nn.Linear):
        def forward(self, x):
            if self.training:
                steps.append(1)
                if when(len(steps)):
                    raise KeyError("a bug in my model")
            return super().forward(x.flatten(1))

    return lambda: Fragile(4, 2)


FRAGILE = CONFIG.override(  # a step is a client's whole work, and the only checkpoint is that of the failure
    {"data.partition.name": "iid", "training.batch_size": 0, "checkpoint.every_s": 3600.0}
)


@pytest.fixture
def failed(tmp_path):
    with pytest.raises(ClientError) as failed:
        fedsim.run(FRAGILE, results=tmp_path, name="failed", model=fragile(lambda n: n == 8), dataset=tiny())
    return tmp_path / "failed", failed.value


def test_the_error_of_a_client_says_how_to_replay_it(failed):
    folder, error = failed
    assert error.round == 3
    (note,) = error.__notes__
    assert note == (
        f"fedsim.replay({str(folder)!r}, round=3, client={error.client_id}, model=..., dataset=...) "
        "re-trains it in this process"
    )


def test_the_client_of_the_round_that_failed_is_replayed_with_its_traceback(failed):
    folder, error = failed
    with pytest.raises(ClientError) as again:
        replay(folder, round=3, client=error.client_id, model=fragile(lambda n: n == 1), dataset=tiny())
    assert (again.value.round, again.value.client_id) == (3, error.client_id)
    assert "in forward" in str(again.value)
    assert "KeyError: 'a bug in my model'" in str(again.value)


def test_without_a_row_there_is_nothing_to_compare_with(failed):
    folder, error = failed
    answer = replay(folder, round=3, client=error.client_id, model=fragile(lambda n: False), dataset=tiny())
    assert (answer.is_recorded, answer.differences) == (False, ())
    assert (answer.client.round, answer.client.client_id, answer.client.num_steps) == (3, error.client_id, 1)
    with pytest.raises(InputError, match=r"round 4 cannot be replayed: .* has rounds 1 to 3"):
        replay(folder, round=4, client=0, model=fragile(lambda n: False), dataset=tiny())
    assert verify(folder, placement=SERIAL, model=fragile(lambda n: False), dataset=tiny()).rounds == range(1, 3)


def test_an_error_of_the_evaluation_or_of_a_run_in_memory_names_no_replay(tmp_path):
    with pytest.raises(ClientError) as failed:
        fedsim.run(FRAGILE, results=None, model=fragile(lambda n: True), dataset=tiny())
    assert not hasattr(failed.value, "__notes__")

    class Untestable(nn.Linear):
        def forward(self, x):
            if not self.training:
                raise KeyError("a bug in my model")
            return super().forward(x.flatten(1))

    with pytest.raises(ClientError) as failed:
        fedsim.run(FRAGILE, results=tmp_path, model=lambda: Untestable(4, 2), dataset=tiny())
    assert not hasattr(failed.value, "__notes__")


@pytest.mark.parametrize("damage", ["missing", "garbage"])
@pytest.mark.parametrize("kind", ["rounds", "clients"])
def test_damaged_records_are_named(folder, kind, damage):
    parts = sorted((folder / f"{kind}.parquet").iterdir())
    for part in parts:
        if damage == "missing":
            part.unlink()
        else:
            part.write_bytes(b"not Parquet")
    with pytest.raises(InputError, match=rf"{kind}\.parquet(/part-\S+ is damaged| is missing)") as caught:
        verify(folder, placement=SERIAL)
    assert len(str(caught.value).splitlines()) == 1


def test_a_round_that_never_began_cannot_be_replayed(tmp_path):
    """After one in which every update was rejected there is none."""
    far = CONFIG.override({"training.lr": 1e38, "strategy.name": "fedavg"})
    with pytest.raises(RunFailedError):
        fedsim.run(far, results=tmp_path, name="diverged")
    last = int(load_run(tmp_path / "diverged").rounds["round"].iloc[-1])
    with pytest.raises(InputError, match=rf"round {last + 1} cannot be replayed: .*diverged has rounds? .*{last}$"):
        replay(tmp_path / "diverged", round=last + 1, client=0)
    client = int(load_run(tmp_path / "diverged").clients["client_id"].iloc[-1])
    assert replay(tmp_path / "diverged", round=last, client=client).differences == ()
