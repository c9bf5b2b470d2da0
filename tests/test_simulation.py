"""The loop of federated averaging in this process, against plain torch and numpy."""

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fedsim
from fedsim import datasets, models
from fedsim.actors.serial import SerialPool
from fedsim.config import Config
from fedsim.datasets import Dataset
from fedsim.errors import ClientError, ConfigError, RunFailedError
from fedsim.metrics import CLIENT_SCHEMA, ROUND_SCHEMA
from fedsim.partition import PARTITIONERS
from fedsim.seeding import generator, torch_seed
from fedsim.strategies import Strategy, fedavg

SYNTHETIC = datasets.load("synthetic")
LOGISTIC_VALUES = 784 * 10 + 10

BASE = Config().override(
    {
        "data.dataset": "synthetic",
        "placement.mode": "serial",
        "model.name": "logistic",
        "training.local_epochs": 1,
        "clients.count": 4,
        "rounds": 2,
    }
)
UNEQUAL = {"data.partition.name": "quantity", "data.partition.sigma": 1.0, "clients.count": 3}


@pytest.fixture(autouse=True)
def callers_settings():
    """One thread for what the tests compute themselves; whatever a test changes is put back."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


def run(changes=(), **own):
    return fedsim.run(BASE.override(dict(changes)), results=None, **own)


def result_columns(frame, schema):
    """The columns that are equal between equal runs, by the schema's own mark."""
    kinds = {field.name: field.metadata[b"kind"] for field in schema}
    assert list(frame.columns) == list(kinds)
    return frame[[name for name, kind in kinds.items() if kind == b"result"]]


def assert_same_results(one, other):
    for kind, schema in (("rounds", ROUND_SCHEMA), ("clients", CLIENT_SCHEMA)):
        pd.testing.assert_frame_equal(
            result_columns(getattr(one, kind), schema), result_columns(getattr(other, kind), schema), check_exact=True
        )


def tiny(num_train=60, num_test=30, channels=1):
    """Four classes on 5 x 5 pixels: quick, and learnt at once."""
    rng = np.random.default_rng(5)
    patterns = rng.uniform(0, 1, (4, channels, 5, 5))
    parts = []
    for size in (num_train, num_test):
        labels = np.arange(size) % 4
        parts += [(patterns[labels] + rng.normal(0, 0.2, (size, channels, 5, 5))).astype(np.float32), labels]
    return Dataset("tiny", *parts, num_classes=4)


def shards_of(config, dataset):
    """Who has which examples, straight from the partitioner."""
    name, arguments = config.data.partition.name, config.data.partition.arguments
    rng = generator("partition", config.seed)
    return PARTITIONERS[name](dataset.train_labels, config.clients.count, rng, **arguments)


def poisoned(dataset, shards, value=1e38):
    """The data set with the examples of some clients so large that training on them overflows."""
    images = dataset.train_images.copy()
    for shard in shards:
        images[shard] = value
    return dataclasses.replace(dataset, train_images=images)


def watching(calls, strategy=None):
    """A strategy that notes what it is given and what it returns."""
    inner = strategy or fedavg()

    def aggregate(state, weights, updates, num_examples):
        answer = inner.aggregate(state, weights, updates, num_examples)
        calls.append((weights.clone(), updates.clone(), num_examples.clone(), answer[0].clone()))
        return answer

    return Strategy(inner.init, aggregate)


# --- Federated averaging, computed a second time ---------------------------------------------------------------------


def batch_of(images, labels, some):
    pixels = torch.from_numpy(images[some]).float()
    return pixels / 255 if images.dtype == np.uint8 else pixels, torch.from_numpy(labels[some])


def evaluated(model, dataset):
    """Mean loss and accuracy on the test set, in chunks of 1,000."""
    model.eval()
    loss, correct, size = 0.0, 0, len(dataset.test_labels)
    for start in range(0, size, 1000):
        some = np.arange(start, min(start + 1000, size))
        images, labels = batch_of(dataset.test_images, dataset.test_labels, some)
        with torch.no_grad():
            logits = model(images)
        loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
    return loss / size, correct / size


def trained(model, dataset, shard, config, round, client):
    """A client's model after its round, its steps, and its mean loss; nothing but torch."""
    model = copy.deepcopy(model).train()
    batch_size = config.training.batch_size or len(shard)
    num_steps, losses = 0, []
    for epoch in range(config.training.local_epochs):
        order = generator("shuffle", config.seed, round=round, client=client, epoch=epoch).permutation(shard)
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            images, labels = batch_of(dataset.train_images, dataset.train_labels, some)
            model.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(parameter.grad, alpha=-config.training.lr)
            num_steps += 1
            losses += [loss.item()] * len(some)
    return model, num_steps, math.fsum(losses) / len(losses)


def tensors_of(model):
    """Name -> array: parameters, floating buffers, integer buffers, as the wire has them."""
    arrays = {name: p.detach().numpy() for name, p in model.named_parameters()}
    buffers = {name: b.numpy() for name, b in model.named_buffers()}
    arrays |= {name: b for name, b in buffers.items() if b.dtype.kind == "f"}
    return arrays | {name: b.astype(np.int64) for name, b in buffers.items() if b.dtype.kind != "f"}


def hash_of(arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())).hexdigest()


def plain_federated_averaging(make, dataset, config, cohort_of=None):
    """Yields (model, evaluation, clients) of each round; clients: id -> (update, n, steps, loss)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed("init", config.seed))
        model = make()
    yield model, evaluated(model, dataset), {}
    shards = shards_of(config, dataset)
    for round in range(1, config.rounds + 1):
        before, clients, local_of = tensors_of(copy.deepcopy(model)), {}, {}
        for k in cohort_of(round) if cohort_of else range(config.clients.count):
            local, num_steps, loss = trained(model, dataset, shards[k], config, round, k)
            after = local_of[k] = tensors_of(local)
            update = {name: after[name] - before[name] for name in before if before[name].dtype.kind == "f"}
            clients[k] = (update, len(shards[k]), num_steps, loss)
        is_weighted = config.strategy.weighting == "examples"
        weights = {k: n if is_weighted else 1 for k, (_, n, _, _) in clients.items()}
        averaged = dict(local_of[min(local_of)])  # integer buffers: of the lowest client
        for name in next(iter(clients.values()))[0]:
            mean = np.zeros(before[name].shape)
            for k, (update, *_) in clients.items():
                mean += weights[k] * update[name].astype(np.float64)
            mean /= sum(weights.values())
            averaged[name] = (before[name].astype(np.float64) + mean).astype(np.float32)
        model.load_state_dict({name: torch.from_numpy(np.asarray(array)) for name, array in averaged.items()})
        yield model, evaluated(model, dataset), clients


def plain_mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def plain_logistic():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def assert_is_plain_federated_averaging(run, make, dataset, cohort_of=None):
    """Every bit of the weights, and every result column, as computed a second time."""
    rounds, clients = run.rounds, run.clients
    num_bytes = sum(array.nbytes for array in run.weights().values())
    model = None
    for r, (model, (loss, accuracy), cohort) in enumerate(
        plain_federated_averaging(make, dataset, run.config, cohort_of)
    ):
        row = rounds.iloc[r]
        assert row["round"] == r
        assert row["weights_sha256"] == hash_of(tensors_of(model))
        assert row["test_loss"] == pytest.approx(loss, rel=1e-12)
        assert row["test_accuracy"] == accuracy
        assert row["num_sampled"] == row["num_completed"] == len(cohort)
        assert row["num_examples"] == sum(n for _, n, _, _ in cohort.values())
        assert row["bytes_down"] == row["bytes_up"] == num_bytes * len(cohort)
        rows = clients[clients["round"] == r]
        assert rows["client_id"].tolist() == list(cohort)
        if not cohort:
            continue
        flat = {k: np.concatenate([part.ravel() for part in update.values()]) for k, (update, *_) in cohort.items()}
        is_weighted = run.config.strategy.weighting == "examples"
        counts = {k: n if is_weighted else 1 for k, (_, n, _, _) in cohort.items()}
        mean = sum(counts[k] * flat[k].astype(float) for k in cohort) / sum(counts.values())
        for (k, (_, n, num_steps, loss)), (_, client) in zip(cohort.items(), rows.iterrows(), strict=True):
            update = flat[k].astype(float)
            assert (client["status"], client["num_examples"], client["num_steps"]) == ("completed", n, num_steps)
            assert client["train_loss"] == pytest.approx(loss, rel=1e-12)
            assert client["update_l2_norm"] == pytest.approx(np.sqrt((update**2).sum()), rel=1e-12)
            cosine = (update @ mean) / np.sqrt((update**2).sum() * (mean**2).sum())
            assert client["cosine_to_mean"] == pytest.approx(cosine, rel=1e-9)
        losses = [n * loss for _, n, _, loss in cohort.values()]
        assert row["train_loss"] == pytest.approx(sum(losses) / row["num_examples"], rel=1e-12)
        assert row["update_l2_norm"] == pytest.approx(np.sqrt((mean**2).sum()), rel=1e-5)  # the step was rounded
    saved = run.weights()
    assert set(saved) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert saved[name].dtype == tensor.dtype
        assert torch.equal(saved[name], tensor), name


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (plain_mlp, {"model.name": "mlp", "training.local_epochs": 2, "rounds": 3}),
        (plain_logistic, {"strategy.weighting": "uniform"}),
        (plain_logistic, {"training.batch_size": 0, "training.local_epochs": 3}),
        (plain_logistic, {"training.batch_size": 7, "seed": 11, "rounds": 1}),
        (plain_logistic, {"training.batch_size": 5_000, "rounds": 1}),
    ],
    ids=["by examples", "uniform", "whole shard as a batch", "odd batches", "batch above the shard"],
)
def test_the_loop_is_federated_averaging_bit_for_bit(make, changes):
    result = run({**UNEQUAL, **changes, "training.engine": "loop"})
    assert result.clients["num_examples"].nunique() == 3  # else the weights of the mean would not be tested
    assert_is_plain_federated_averaging(result, make, SYNTHETIC)


def test_partial_participation_is_the_same_over_the_drawn_clients():
    result = run({**UNEQUAL, "clients.count": 5, "clients.per_round": 2, "rounds": 3, "training.engine": "loop"})

    def cohort_of(round):
        return sorted(generator("cohort", 0, round=round).choice(5, size=2, replace=False, shuffle=False).tolist())

    assert len({tuple(cohort_of(round)) for round in (1, 2, 3)}) > 1
    assert_is_plain_federated_averaging(result, plain_logistic, SYNTHETIC, cohort_of)


def test_an_own_model_and_data_set_have_their_buffers_averaged_and_their_integers_kept():
    def normalised():
        return nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))

    data = tiny(num_train=90, channels=2)
    result = run({**UNEQUAL, "training.batch_size": 8, "training.local_epochs": 2}, model=normalised, dataset=data)
    steps = result.clients["num_steps"]
    assert steps.nunique() > 1  # else the clients' counters would agree
    assert result.weights()["1.num_batches_tracked"] == steps[result.clients["client_id"] == 0].sum()
    assert result.weights()["1.running_mean"].abs().min() > 0
    assert_is_plain_federated_averaging(result, normalised, data)


# --- Rows ------------------------------------------------------------------------------------------------------------


def test_round_0_is_the_evaluation_of_the_initial_weights():
    result = run({"seed": 4})
    initial = models.build(models.logistic, SYNTHETIC.input_shape, 10, seed=4)
    first, loss_and_accuracy = result.rounds.iloc[0], evaluated(initial, SYNTHETIC)
    assert (first["test_loss"], first["test_accuracy"]) == pytest.approx(loss_and_accuracy, rel=1e-7)
    assert first["weights_sha256"] == hash_of(tensors_of(initial))
    counts = [name for name in result.rounds if name.startswith(("num_", "bytes_"))]
    assert len(counts) == 9
    assert (first[counts] == 0).all()
    assert first[["train_loss", "update_l2_norm", "fit_s", "aggregate_s"]].isna().all()
    assert first["evaluate_s"] >= 0
    assert (result.clients["round"] > 0).all()


def test_no_rounds_at_all():
    result = run({"rounds": 0})
    assert result.rounds["round"].tolist() == [0]
    assert len(result.clients) == 0
    initial = models.build(models.logistic, SYNTHETIC.input_shape, 10, seed=0)
    assert all(torch.equal(result.weights()[name], tensor) for name, tensor in initial.state_dict().items())


def test_rounds_between_evaluations_have_nulls_and_the_same_weights():
    often, seldom = run({"rounds": 5}), run({"rounds": 5, "evaluation.every": 2})
    assert often.rounds["test_accuracy"].notna().all()
    is_evaluated = [True, False, True, False, True, True]  # the last one always
    for column in ("test_loss", "test_accuracy", "evaluate_s"):
        assert seldom.rounds[column].notna().tolist() == is_evaluated
    assert seldom.rounds["weights_sha256"].equals(often.rounds["weights_sha256"])
    assert seldom.rounds["test_loss"][is_evaluated].equals(often.rounds["test_loss"][is_evaluated])


def test_the_last_round_is_evaluated_even_where_no_other_is():
    evaluated_rounds = run({"rounds": 3, "evaluation.every": 100}).rounds["test_accuracy"].notna()
    assert evaluated_rounds.tolist() == [True, False, False, True]


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 2345])
def test_a_test_set_of_any_size_is_tested_whole(size):
    data = tiny(num_test=size)
    row = run({"rounds": 0, "training.engine": "loop"}, dataset=data).rounds.iloc[0]
    model = models.build(models.logistic, data.input_shape, 4, seed=0)
    loss, accuracy = evaluated(model, data)
    assert row["test_accuracy"] == accuracy
    assert row["test_loss"] == pytest.approx(loss, rel=1e-12)


def test_bytes_count_the_encoded_weights_of_the_sampled_clients():
    result = run({"clients.per_round": 3})
    assert result.rounds["bytes_down"].tolist() == [0, 3 * 4 * LOGISTIC_VALUES, 3 * 4 * LOGISTIC_VALUES]
    assert result.rounds["bytes_up"].equals(result.rounds["bytes_down"])


def test_client_rows_say_where_they_come_from():
    clients = run().clients
    assert (clients["actor"] == -1).all()
    assert (clients["attempts"] == 1).all()
    assert (clients["stack_size"] == 4).all()
    assert (clients["fit_s"] > 0).all()
    assert clients["error"].isna().all()
    assert clients["update_sha256"].str.fullmatch("[0-9a-f]{64}").all()
    assert clients["update_sha256"].is_unique


# --- Cohorts ---------------------------------------------------------------------------------------------------------


def cohorts(result):
    return [rows["client_id"].tolist() for _, rows in result.clients.groupby("round")]


@pytest.mark.parametrize(
    ("per_round", "size"), [("all", 7), (3, 3), (1, 1), (0.5, 4), (0.3, 2), (0.0, 1)], ids=lambda value: f"{value}"
)
def test_a_round_has_so_many_clients(per_round, size):
    result = run({"clients.count": 7, "clients.per_round": per_round})
    assert [len(cohort) for cohort in cohorts(result)] == [size, size]
    assert result.rounds["num_sampled"].tolist() == [0, size, size]


def test_a_cohort_is_distinct_ascending_and_a_function_of_seed_and_round():
    changes = {"clients.count": 20, "clients.per_round": 5, "rounds": 4}
    drawn = cohorts(run(changes))
    assert all(cohort == sorted(set(cohort)) for cohort in drawn)
    assert len({tuple(cohort) for cohort in drawn}) == 4
    assert cohorts(run({**changes, "seed": 1})) != drawn
    others = {"rounds": 2, "training.lr": 0.5, "model.name": "mlp", "data.partition.name": "dirichlet"}
    assert cohorts(run({**changes, **others})) == drawn[:2]


# --- The same again --------------------------------------------------------------------------------------------------


def test_the_same_configuration_gives_the_same_results():
    changes = {"clients.count": 6, "clients.per_round": 3, "data.partition.name": "dirichlet"}
    assert_same_results(run(changes), run(changes))


def test_another_seed_gives_other_results():
    one, other = run({**UNEQUAL, "seed": 1}), run({**UNEQUAL, "seed": 2})
    assert set(one.rounds["weights_sha256"]).isdisjoint(other.rounds["weights_sha256"])
    assert set(one.clients["num_examples"]) != set(other.clients["num_examples"])


def test_more_rounds_go_on_where_fewer_end():
    short, long = run({"rounds": 2}), run({"rounds": 4})
    assert long.rounds["weights_sha256"][:3].equals(short.rounds["weights_sha256"])
    assert long.rounds["weights_sha256"].is_unique


@pytest.mark.long
def test_each_strategy_is_deterministic_and_its_own():
    names = ("fedavg", "fedavgm", "fedadam")
    once, again = ([run({"strategy.name": name}).rounds["weights_sha256"][2] for name in names] for _ in range(2))
    assert once == again
    assert len(set(once)) == 3


def test_momentum_on_the_server_begins_with_the_second_round():
    average, momentum = run().rounds, run({"strategy.name": "fedavgm"}).rounds
    assert (average["weights_sha256"] == momentum["weights_sha256"]).tolist() == [True, True, False]


def test_the_arguments_of_a_strategy_reach_it():
    slow = run({"strategy.name": "fedavgm", "strategy.server_lr": 0.5, "rounds": 1}).rounds.iloc[-1]
    full = run({"rounds": 1}).rounds.iloc[-1]
    assert slow["update_l2_norm"] == pytest.approx(full["update_l2_norm"] / 2, rel=1e-5)


@pytest.mark.long
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_run_adds_up(data):
    count = data.draw(st.integers(1, 8))
    is_fraction = data.draw(st.booleans())
    changes = {
        "clients.count": count,
        "clients.per_round": data.draw(st.floats(0, 0.99) if is_fraction else st.integers(1, count)),
        "data.partition.name": data.draw(st.sampled_from(sorted(PARTITIONERS))),
        "strategy.name": data.draw(st.sampled_from(["fedavg", "fedavgm", "fedadam"])),
        "training.batch_size": data.draw(st.integers(0, 20)),
        "seed": data.draw(st.integers(0, 2**63 - 1)),
        "rounds": data.draw(st.integers(0, 2)),
    }
    config, dataset = BASE.override(changes), tiny()
    result = fedsim.run(config, results=None, dataset=dataset)
    sizes = [len(shard) for shard in shards_of(config, dataset)]
    for _, row in result.rounds.iterrows():
        rows = result.clients[result.clients["round"] == row["round"]]
        parts = row[["num_completed", "num_failed", "num_rejected", "num_dropped"]]
        assert row["num_sampled"] == parts.sum() == len(rows)
        assert row["num_examples"] == rows["num_examples"].sum()
        assert rows["num_examples"].tolist() == [sizes[k] for k in rows["client_id"]]
        assert rows["client_id"].is_monotonic_increasing
        assert rows["client_id"].is_unique
        assert 0 <= row["test_accuracy"] <= 1
    assert result.rounds["round"].tolist() == list(range(config.rounds + 1))


# --- Updates and strategies that are not finite ----------------------------------------------------------------------

FOUR = {"clients.count": 4, "data.partition.name": "quantity", "training.batch_size": 4}


def test_a_client_whose_update_is_not_finite_is_rejected_and_the_others_are_averaged():
    config = BASE.override(FOUR)
    shards = shards_of(config, tiny())
    calls = []
    records = list(fedsim.rounds(config, dataset=poisoned(tiny(), [shards[1]]), strategy=watching(calls)))
    values = 25 * 4 + 4
    for record, (weights, updates, counts, answer) in zip(records[1:], calls, strict=True):
        assert [client.status for client in record.clients] == ["completed", "rejected", "completed", "completed"]
        counted = (record.num_sampled, record.num_completed, record.num_rejected, record.num_failed, record.num_dropped)
        assert counted == (4, 3, 1, 0, 0)
        assert counts.tolist() == [len(shards[k]) for k in (0, 2, 3)]
        assert record.num_examples == sum(counts.tolist())
        assert (record.bytes_down, record.bytes_up) == (4 * 4 * values, 3 * 4 * values)
        mean = sum(n * u.double() for n, u in zip(counts.tolist(), updates, strict=True)) / counts.sum()
        assert torch.equal(answer, (weights.double() + mean).float())
        completed, rejected = [record.clients[k] for k in (0, 2, 3)], record.clients[1]
        losses = [client.num_examples * client.train_loss for client in completed]
        assert record.train_loss == pytest.approx(sum(losses) / record.num_examples, rel=1e-12)
        assert rejected.cosine_to_mean is None
        assert "not finite" in rejected.error
        assert rejected.num_examples == len(shards[1])
        assert all(client.error is None and -1 <= client.cosine_to_mean <= 1 for client in completed)
        assert math.isfinite(record.test_loss)


def test_an_update_that_is_infinite_without_a_nan_is_rejected_too():
    config = BASE.override({**FOUR, "training.batch_size": 0, "training.lr": 1e4, "rounds": 1})
    data = poisoned(tiny(), shards_of(config, tiny())[3:], value=1e36)  # one step: lr x gradient overflows
    record = list(fedsim.rounds(config, dataset=data))[1]
    assert [client.status for client in record.clients] == ["completed", "completed", "completed", "rejected"]
    assert record.clients[3].update_l2_norm == math.inf
    assert record.clients[3].cosine_to_mean is None


def test_integer_buffers_come_from_the_lowest_client_that_completed():
    def normalised():
        return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(25, 4))

    config = BASE.override({**FOUR, "rounds": 1, "seed": 23})
    data = poisoned(tiny(), shards_of(config, tiny())[:1])
    result = fedsim.run(config, results=None, dataset=data, model=normalised)
    assert result.clients["status"].tolist() == ["rejected", "completed", "completed", "completed"]
    assert result.clients["num_steps"].is_unique  # else the clients' counters would agree
    assert result.weights()["0.num_batches_tracked"] == result.clients["num_steps"][1]
    assert all(torch.isfinite(tensor).all() for tensor in result.weights().values())


def test_uniform_weighting_gives_a_strategy_ones_but_records_the_examples():
    calls, config = [], BASE.override({**FOUR, "strategy.weighting": "uniform"})
    records = list(fedsim.rounds(config, dataset=tiny(), strategy=watching(calls)))
    assert [counts.tolist() for _, _, counts, _ in calls] == [[1, 1, 1, 1]] * 2
    assert all(counts.dtype == torch.int64 for _, _, counts, _ in calls)
    assert records[1].num_examples == 60


def test_a_round_without_a_finite_update_fails_and_keeps_the_rounds_before(tmp_path):
    with pytest.raises(RunFailedError, match="round 1") as caught:
        fedsim.run(BASE.override({"training.lr": 1e38}), results=tmp_path)
    assert "1e+38" in str(caught.value)  # what to change
    failed = fedsim.load_run(tmp_path / "mnist")
    assert failed.status == "failed"
    assert failed.rounds["round"].tolist() == [0, 1]  # the failed round says why
    assert failed.rounds["num_rejected"].tolist() == [0, failed.rounds["num_sampled"].iloc[1]]
    assert failed.rounds["weights_sha256"].nunique() == 1
    assert failed.rounds["update_l2_norm"].isna().all()
    assert set(failed.clients["status"]) == {"rejected"}

    def throws_far(state, weights, updates, num_examples):  # finite, but too far out to train on
        return torch.full_like(weights, 1e38), state

    far = Strategy(lambda weights: {}, throws_far)
    with pytest.raises(RunFailedError, match="round 2"):
        fedsim.run(BASE, results=tmp_path, name="later", strategy=far)
    failed = fedsim.load_run(tmp_path / "later")
    assert failed.status == "failed"
    assert failed.rounds["round"].tolist() == [0, 1, 2]
    assert failed.rounds["num_completed"].tolist()[2] == 0
    assert sorted(failed.clients["round"].unique().tolist()) == [1, 2]


@pytest.mark.parametrize(
    "answer",
    [
        lambda w: torch.full_like(w, torch.nan),
        lambda w: torch.where(torch.arange(len(w)) == 7, torch.inf, w),
        lambda w: w[:-1],
        lambda w: w[None],
        lambda w: w.double(),
        lambda w: w.half(),
        lambda w: w.to_sparse(),
        lambda w: None,
    ],
    ids=["nan", "one infinity", "short", "matrix", "float64", "float16", "sparse", "nothing"],
)
def test_a_strategy_that_returns_no_weights_fails_the_run(answer):
    def aggregate(state, weights, updates, num_examples):
        return (weights.clone() if len(seen) < 2 else answer(weights)), state

    seen = []
    records = fedsim.rounds(BASE, strategy=Strategy(lambda weights: {}, aggregate))
    for _ in range(2):
        seen.append(next(records).round)
    with pytest.raises(RunFailedError, match="round 2"):
        next(records)
    assert seen == [0, 1]


def test_an_error_of_a_strategy_is_the_users_own():
    def aggregate(state, weights, updates, num_examples):
        raise ZeroDivisionError("a bug in the user's strategy")

    with pytest.raises(ZeroDivisionError, match="a bug in the user's strategy"):
        run(strategy=Strategy(lambda weights: {}, aggregate))


def test_an_own_strategy_carries_its_state_from_round_to_round():
    seen = []

    def aggregate(state, weights, updates, num_examples):
        seen.append((float(state["rounds"]), tuple(updates.shape), updates.dtype, num_examples.tolist()))
        return weights + updates.mean(0), {"rounds": state["rounds"] + 1}

    own = Strategy(lambda weights: {"rounds": torch.tensor(float(len(weights)))}, aggregate)
    result = run({"rounds": 3}, strategy=own)
    shape = (4, LOGISTIC_VALUES)
    assert seen == [(LOGISTIC_VALUES + r, shape, torch.float32, [500] * 4) for r in range(3)]
    uniform = run({"rounds": 3}).rounds
    assert result.rounds["test_loss"].tolist() == pytest.approx(uniform["test_loss"].tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"strategy": "fedavg"}, "strategy must be"),
        ({"dataset": "mnist"}, "dataset must be"),
        ({"model": lambda: {}}, "Module"),
    ],
    ids=["strategy", "dataset", "model"],
)
def test_a_part_of_the_wrong_kind_is_an_input_error(own, message):
    with pytest.raises(ConfigError, match=message):
        run(**own)


# --- Errors of a model -----------------------------------------------------------------------------------------------


def test_a_model_that_raises_stops_the_run_with_its_client_round_and_traceback(tmp_path):
    config = BASE.override({**FOUR, "rounds": 5})
    data = tiny()
    data = poisoned(data, [shards_of(config, data)[2]])
    is_broken = []

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(25, 4)

        def forward(self, x):
            if self.training and x.max() > 1e30 and is_broken:
                raise KeyError("a bug in the user's model")
            return self.head(x.clamp(max=1).flatten(1))

    def breaks_after_two_rounds(state, weights, updates, num_examples):
        state = {"rounds": state["rounds"] + 1}
        if state["rounds"] == 2:
            is_broken.append(True)
        return weights + updates.mean(0), state

    strategy = Strategy(lambda weights: {"rounds": torch.zeros(())}, breaks_after_two_rounds)
    with pytest.raises(ClientError) as caught:
        fedsim.run(config, results=tmp_path, model=Broken, dataset=data, strategy=strategy)
    error = caught.value
    assert (error.round, error.client_id) == (3, 2)
    assert "a bug in the user's model" in error.client_traceback
    assert "test_simulation.py" in error.client_traceback
    assert "in forward" in error.client_traceback
    assert "client 2" in str(error)
    assert "round 3" in str(error)
    failed = fedsim.load_run(tmp_path / "mnist")
    assert failed.rounds["round"].tolist() == [0, 1, 2]
    assert failed.status == "failed"
    assert "a bug in the user's model" in failed.info["error"]


def test_a_model_that_raises_in_the_evaluation_names_no_client():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(784, 10)

        def forward(self, x):
            if not self.training:
                raise ValueError("cannot be tested")
            return self.head(x.flatten(1))

    with pytest.raises(ClientError, match="cannot be tested") as caught:
        run(model=Broken)
    assert (caught.value.round, caught.value.client_id) == (0, -1)


# --- The iterator, and the caller's process --------------------------------------------------------------------------


@pytest.fixture
def closed(monkeypatch):
    """The serial pools that were closed."""
    pools, close = [], SerialPool.close

    def noting(self):
        pools.append(self)
        close(self)

    monkeypatch.setattr(SerialPool, "close", noting)
    return pools


def noisy():
    """A model that draws from torch's global generator while it trains."""
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 10))


def test_rounds_is_lazy(closed):
    passes = []

    class Counting(nn.Linear):
        def forward(self, x):
            passes.append("train" if self.training else "test")
            return super().forward(x.flatten(1))

    records = fedsim.rounds(BASE, model=lambda: Counting(784, 10))
    assert inspect.isgenerator(records)
    assert passes == []
    assert next(records).round == 0
    assert passes == ["test"]
    assert next(records).round == 1
    assert passes.count("train") == 4 * 16  # clients x steps: round 2 has not begun
    assert closed == []
    assert [record.round for record in records] == [2]
    assert len(closed) == 1


@pytest.mark.parametrize("leave", ["close", "break", "exception"])
def test_leaving_the_iteration_early_closes_the_pool(closed, leave):
    records = fedsim.rounds(BASE)
    if leave == "exception":
        with pytest.raises(ZeroDivisionError), contextlib.closing(records):
            1 / next(records).round
    elif leave == "close":
        next(records)
        assert closed == []
        records.close()
    else:
        for _ in records:
            break
        assert closed == []
        del records  # the last reference to the generator
    assert len(closed) == 1


def test_the_pool_is_closed_after_an_error(closed):
    with pytest.raises(RunFailedError):
        run({"training.lr": 1e38})
    assert len(closed) == 1


def test_a_wrong_configuration_starts_nothing(closed, monkeypatch):
    monkeypatch.setattr(SerialPool, "__init__", None)
    with pytest.raises(ConfigError, match="2001 clients"):
        next(fedsim.rounds(BASE.override({"clients.count": 2001})))


def settings_now():
    """What a run may change in this process only while it is inside a round."""
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global generator is what is watched
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
        random.getstate(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        float(torch.tensor(1e-310, dtype=torch.float64).mul(1)) != 0,  # denormals are flushed
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_settings_and_generators_of_the_caller_are_untouched(dtype):
    torch.set_num_threads(3)
    torch.set_default_dtype(dtype)
    before = settings_now()
    config = BASE.override({"strategy.name": "fedadam", "placement.threads": 2, "clients.per_round": 2})
    for _ in fedsim.rounds(config, model=noisy):
        assert settings_now() == before
    assert settings_now() == before


def test_the_generator_of_torch_is_left_to_the_caller():
    before = torch.get_rng_state()
    for _ in fedsim.rounds(BASE, model=noisy):
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)


def test_settings_of_the_caller_are_put_back_after_an_error():
    torch.set_num_threads(3)
    with pytest.raises(RunFailedError):
        run({"training.lr": 1e38})
    assert torch.get_num_threads() == 3


def test_threads_set_by_the_caller_change_no_bit():
    expected = run({"model.name": "2nn"})
    torch.set_num_threads(4)
    assert_same_results(run({"model.name": "2nn"}), expected)


def test_the_random_state_of_the_caller_changes_no_bit():
    torch.manual_seed(1)
    expected = run(model=noisy)
    torch.manual_seed(2)
    result = run(model=noisy)
    assert_same_results(result, expected)
    assert result.rounds["weights_sha256"].iloc[-1] != run().rounds["weights_sha256"].iloc[-1]  # it did drop out


def test_a_model_that_draws_in_its_evaluation_gives_the_same_bits_too():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(F.dropout(x.flatten(1), 0.5, training=True))

    torch.manual_seed(1)
    expected = run(model=lambda: Noisy(784, 10))
    torch.manual_seed(2)
    assert_same_results(run(model=lambda: Noisy(784, 10)), expected)


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_the_default_dtype_of_the_caller_changes_no_bit(strategy):
    expected = run({"strategy.name": strategy})
    torch.set_default_dtype(torch.float64)
    result = run({"strategy.name": strategy})
    assert_same_results(result, expected)
    assert all(tensor.dtype == torch.float32 for tensor in result.weights().values())


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")],
    ids=["no_grad", "inference_mode", "autocast", "default device"],
)
def test_the_mode_of_the_caller_changes_no_bit(mode):
    expected = run()
    with mode():
        result = run()
    assert_same_results(result, expected)


def test_the_model_of_a_run_has_the_dtype_of_its_weights():
    result = run({"rounds": 0})
    torch.set_default_dtype(torch.float64)
    assert all(tensor.dtype == torch.float32 for tensor in result.model().state_dict().values())


def test_the_model_of_a_run_in_memory_reproduces_its_accuracy():
    result = run()
    assert evaluated(result.model(), SYNTHETIC)[1] == result.rounds["test_accuracy"].iloc[-1]
    assert result.path is None
    assert result.status == "finished"


def test_an_evaluation_of_a_round_belongs_to_the_weights_after_it():
    rounds = run({"rounds": 3}).rounds
    for r in range(4):
        shorter = run({"rounds": r})
        loss, accuracy = evaluated(shorter.model(), SYNTHETIC)
        assert rounds["test_accuracy"][r] == accuracy
        assert rounds["test_loss"][r] == pytest.approx(loss, rel=1e-7)
    assert rounds["test_loss"].is_monotonic_decreasing
