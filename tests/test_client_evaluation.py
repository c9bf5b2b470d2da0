"""Each client's own loss and accuracy before and after its training: by hand, in any packing, and in the records."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SERIAL, assert_same_results, results_of
from torch import nn
from torch.nn import functional as F

import fedsim
from fedsim import client as client_module
from fedsim import models, training
from fedsim.client import ClientHost, ClientSpec, FitTask
from fedsim.config import TrainingConfig
from fedsim.datasets import Dataset
from fedsim.errors import ClientError, ConfigError
from fedsim.numerics import numerics
from fedsim.partition import Partition
from fedsim.recording import Recording
from fedsim.seeding import torch_seed
from fedsim.verification import replay, verify
from fedsim.weights import Layout, Weights
from tests.helpers import TINY as DATA
from tests.helpers import TINY_PARTITION as PARTITION

SHAPE, CLASSES, SEED = DATA.input_shape, DATA.num_classes, 11
TRAINING = TrainingConfig(local_epochs=2, batch_size=5, lr=0.2, momentum=0.9)
ENGINES = ["loop", "stacked"]
COLUMNS = ["loss_before", "accuracy_before", "loss_after", "accuracy_after"]
OF_ROUNDS = [f"accuracy_{when}_{what}" for when in ("before", "after") for what in ("mean", "worst_decile", "variance")]


@pytest.fixture(autouse=True)
def one_thread():
    with numerics(1):
        yield


def sequential():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def normed():
    """Its layers do another thing in training than in a test."""
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, CLASSES))


def host(model=sequential, engine="loop", *, evaluates=True, data=DATA, partition=PARTITION, stack_size=8, **changes):
    spec = ClientSpec(
        TRAINING.model_copy(update=changes),
        SEED,
        model,
        SHAPE,
        CLASSES,
        engine=engine,
        stack_size=stack_size,
        evaluates=evaluates,
    )
    made = ClientHost(spec)
    made.load(data, partition)
    return made


def start(model=sequential):
    """Not the weights that a host is made with."""
    module = models.build(model, SHAPE, CLASSES, seed=77)
    return Layout.of(module).flatten(module)


def fit(on, *clients, round=4):
    return on.fit(start(on.spec.model), [FitTask(round, client_id) for client_id in clients])


def sums(update):
    return update.before, update.after


def by_hand(model, weights, shard):
    """Mean loss and accuracy over a shard, in the module's own arithmetic."""
    module = models.build(model, SHAPE, CLASSES, seed=0)
    Layout.of(module).load(module, weights)
    module.eval()
    labels = torch.from_numpy(DATA.train_labels[shard])
    with torch.no_grad():
        logits = module(torch.from_numpy(DATA.train_images[shard]).float() / 255).double()
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


# ---------------------------------------------------------------- one client


@pytest.mark.parametrize(("model", "engine"), [(sequential, "loop"), (sequential, "stacked"), (normed, "loop")])
@pytest.mark.parametrize("client_id", range(4))
def test_before_is_the_global_and_after_the_local_weights_on_the_whole_shard(model, engine, client_id):
    (update,) = fit(host(model, engine), client_id)
    shard, given = PARTITION.shard(client_id), start(model)
    local = Weights(given.flat + torch.from_numpy(update.update), torch.from_numpy(update.integers))
    for found, weights in ((update.before, given), (update.after, local)):
        loss, accuracy = by_hand(model, weights, shard)
        assert found.num_examples == len(shard)
        assert found.loss == pytest.approx(loss, rel=1e-5)
        assert found.accuracy == accuracy
    assert update.before != update.after


@pytest.mark.parametrize(("model", "engine"), [(sequential, "loop"), (sequential, "stacked"), (normed, "loop")])
def test_nothing_else_of_an_update_depends_on_it(model, engine):
    def rest(update):
        values = vars(update) | {"update": update.update.tobytes(), "integers": update.integers.tobytes()}
        return {name: value for name, value in values.items() if name not in ("before", "after", "fit_s")}

    with_it, without = (fit(host(model, engine, evaluates=evaluates), *range(4)) for evaluates in (True, False))
    assert [rest(update) for update in with_it] == [rest(update) for update in without]
    assert [sums(update) for update in without] == [(None, None)] * 4


@pytest.mark.long
@pytest.mark.parametrize(("model", "engine"), [(sequential, "loop"), (sequential, "stacked"), (normed, "loop")])
def test_any_packing_and_any_past_of_the_host_give_the_same_bits(model, engine):
    alone = [sums(fit(host(model, engine, stack_size=1), client_id)[0]) for client_id in range(4)]
    for stack_size in (1, 2, 3, 4):
        on = host(model, engine, stack_size=stack_size)
        for clients in ((0, 1, 2, 3), (3, 1), (2,), (0, 1, 2, 3)):
            assert [sums(update) for update in fit(on, *clients)] == [alone[client_id] for client_id in clients]
            on.evaluate(4, start(model), [(0, 40)])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_test_set_that_was_tested_before_is_not_taken_for_a_shard(engine):
    """The stacked engine keeps images by their places."""
    on = host(engine=engine, partition=Partition.of([np.arange(40), np.arange(40, 60)]))
    test = on.evaluate(4, start(), [(0, 40)])
    (update,) = fit(on, 0)
    assert on.evaluate(4, start(), [(0, 40)]) == test
    loss, _ = by_hand(sequential, start(), np.arange(40))
    assert update.before.loss == pytest.approx(loss, rel=1e-5)
    assert update.before.loss != pytest.approx(test[0].loss, rel=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_large_shard_is_tested_in_fixed_pieces_added_in_order(engine, monkeypatch):
    whole = fit(host(engine=engine), 2)[0].before
    monkeypatch.setattr(training, "EVALUATION_CHUNK", 10)
    (update,) = fit(host(engine=engine), 2)  # 26 examples
    shard, tested = PARTITION.shard(2), host(engine=engine)._engine
    images = torch.from_numpy(DATA.train_images[shard])
    examples = training.Examples(images, torch.from_numpy(DATA.train_labels[shard]))
    pieces = tested.evaluate(start(), examples, [(0, 10), (10, 20), (20, 26)], [0, 0, 0])
    assert update.before == pieces[0] + pieces[1] + pieces[2]
    assert update.before.num_correct == whole.num_correct
    assert update.before.loss == pytest.approx(whole.loss, rel=1e-6)


def test_the_seconds_of_the_training_are_those_of_the_training_alone(monkeypatch):
    """By a clock that only a model moves: by 1 in training, by 1,000 in a test."""
    now = 0

    class Slow(nn.Linear):
        def forward(self, x):
            nonlocal now
            now += 1 if self.training else 1000
            return super().forward(x.flatten(1))

    monkeypatch.setattr(client_module, "time", SimpleNamespace(perf_counter=lambda: now))
    (update,) = fit(host(lambda: Slow(16, CLASSES)), 3)
    assert update.fit_s == update.num_steps == 8


# ---------------------------------------------------------------- draws, errors, values that are not finite


def test_a_model_that_draws_in_a_test_draws_the_same_before_and_after(monkeypatch):
    """From the stream of its client, its round and the piece of the shard; the caller's generator stays as it was."""
    seen = []

    class Draws(nn.Linear):
        def forward(self, x):
            if not self.training:
                seen.append(torch.rand(()).item())
            return super().forward(x.flatten(1))

    def draws(client_id, round):
        seen.clear()
        fit(host(lambda: Draws(16, CLASSES)), client_id, round=round)
        return seen.copy()

    def drawn(client_id, round, start):
        seed = torch_seed("client_evaluation", SEED, round=round, client=client_id, epoch=start)
        return torch.rand((), generator=torch.Generator().manual_seed(seed)).item()

    monkeypatch.setattr(training, "EVALUATION_CHUNK", 20)
    before = torch.get_rng_state()
    assert draws(2, 4) == [drawn(2, 4, 0), drawn(2, 4, 20)] * 2
    assert draws(3, 5) == [drawn(3, 5, 0)] * 2
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("which", ["before", "after"])
def test_an_error_in_the_test_is_its_clients(which):
    class Fails(nn.Linear):
        def forward(self, x):
            if not self.training and len(x) == 20 and (which == "before" or not torch.equal(self.weight, given)):
                raise ValueError("a bug in the user's model")
            return super().forward(x.flatten(1))

    def model():
        return Fails(16, CLASSES)

    given = start(model).flat[: 16 * CLASSES].view(CLASSES, 16)
    with pytest.raises(ClientError) as caught:
        fit(host(model), 0, 2, 3, round=7)  # client 3 has the 20 examples
    assert (caught.value.round, caught.value.client_id) == (7, 3)
    assert str(caught.value).startswith("client 3 failed in round 7:\n")
    assert str(caught.value).endswith("ValueError: a bug in the user's model")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_update_that_is_not_finite_has_no_after(engine):
    """Its model is not even asked."""
    tested = host(engine=engine, lr=1e38)
    asked, evaluate = [], tested._engine.evaluate
    tested._engine.evaluate = lambda weights, *rest: asked.append(weights) or evaluate(weights, *rest)
    (update,) = fit(tested, 2)
    assert not update.is_finite
    assert update.before == fit(host(engine=engine), 2)[0].before
    assert update.after is None
    assert [torch.isfinite(weights.flat).all().item() for weights in asked] == [True]


# ---------------------------------------------------------------- the records


CLIENTS = SERIAL.override({"evaluation.clients": True})


def test_the_columns_are_null_unless_asked_for():
    run = fedsim.run(SERIAL, results=None)
    assert run.clients[COLUMNS].isna().all(axis=None)
    assert run.rounds[OF_ROUNDS].isna().all(axis=None)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_round_has_them_and_nothing_else_changes(engine):
    config = CLIENTS.override({"training.engine": engine, "evaluation.every": 100})
    run, without = (fedsim.run(c, results=None) for c in (config, config.override({"evaluation.clients": False})))
    assert run.clients[COLUMNS].notna().all(axis=None)
    assert run.rounds[OF_ROUNDS].iloc[0].isna().all()
    assert run.rounds[OF_ROUNDS].iloc[1:].notna().all(axis=None)
    assert run.clients["update_sha256"].equals(without.clients["update_sha256"])
    assert run.rounds["weights_sha256"].equals(without.rounds["weights_sha256"])
    assert (run.clients["loss_after"] < run.clients["loss_before"]).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_columns_of_the_rounds_are_made_of_those_of_the_clients(engine):
    config = CLIENTS.override(
        {"clients.count": 23, "clients.per_round": "all", "data.partition.name": "quantity", "training.engine": engine}
    )
    run = fedsim.run(config, results=None)
    for round, clients in run.clients.groupby("round"):
        for when in ("before", "after"):
            accuracies = np.sort(clients[f"accuracy_{when}"])
            expected = accuracies.mean(), accuracies[:3].mean(), accuracies.var()  # ceil(23 / 10)
            row = run.rounds.loc[round, [f"accuracy_{when}_{what}" for what in ("mean", "worst_decile", "variance")]]
            assert row.tolist() == pytest.approx(expected, rel=1e-12)
            assert expected[2] > 0


def test_before_is_what_the_global_weights_of_the_last_round_give():
    """All clients together hold the training set, so their sums are those of the weights on it."""
    config = CLIENTS.override({"clients.per_round": "all", "rounds": 2})
    run, first = fedsim.run(config, results=None), fedsim.run(config.override({"rounds": 1}), results=None)
    dataset = fedsim.datasets.load("synthetic")
    module = first.model().eval()
    with torch.no_grad():
        logits = module(torch.from_numpy(dataset.train_images).float() / 255)
    correct = (logits.argmax(1).numpy() == dataset.train_labels).sum()
    second = run.clients[run.clients["round"] == 2]
    assert round((second["accuracy_before"] * second["num_examples"]).sum()) == correct


def test_a_rejected_client_has_a_before_and_counts_in_no_mean():
    dataset = fedsim.datasets.load("synthetic")
    images = dataset.train_images.astype(np.float32) / 255
    images[dataset.train_labels == 3] = 1e38  # finite, and its gradient is not
    far = Dataset("far", images, dataset.train_labels, dataset.test_images / np.float32(255), dataset.test_labels, 10)
    config = CLIENTS.override(
        {"data.partition.name": "shards", "clients.count": 5, "clients.per_round": "all", "rounds": 1}
    )
    run = fedsim.run(config, results=None, dataset=far)
    rejected, completed = (run.clients[run.clients["status"] == status] for status in ("rejected", "completed"))
    assert len(rejected) > 0
    assert len(completed) > 0
    assert rejected["accuracy_before"].notna().all()
    assert rejected[["loss_after", "accuracy_after"]].isna().all(axis=None)
    row = run.rounds.iloc[1]
    assert row["accuracy_before_mean"] == pytest.approx(completed["accuracy_before"].mean(), rel=1e-12)
    assert row["accuracy_after_worst_decile"] == completed["accuracy_after"].min()


def test_a_loss_that_is_not_finite_is_null_and_its_accuracy_is_kept():
    """The weights of a completed client may still overflow in a test."""

    class Overflows(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)) * (1 if self.training else math.inf)

    run = fedsim.run(CLIENTS, results=None, model=lambda: Overflows(784, 10))
    assert (run.clients["status"] == "completed").all()
    assert run.clients[["loss_before", "loss_after"]].isna().all(axis=None)
    assert run.clients[["accuracy_before", "accuracy_after"]].notna().all(axis=None)
    (record,) = (
        record
        for record in fedsim.rounds(CLIENTS.override({"rounds": 1}), model=lambda: Overflows(784, 10))
        if record.round
    )
    assert {client.loss_after for client in record.clients} == {None}


# ---------------------------------------------------------------- verify, replay, resume


def test_verify_and_replay_compare_them(tmp_path):
    run = fedsim.run(CLIENTS.override({"data.partition.name": "quantity"}), results=tmp_path)
    assert verify(run.path, rounds="all", placement={"mode": "serial", "stack_size": 1}).is_equal
    client_id = int(run.clients["client_id"].iloc[-1])
    replayed = replay(run.path, round=3, client=client_id)
    assert replayed.differences == ()
    assert replayed.client.accuracy_after == run.clients["accuracy_after"].iloc[-1]


def test_an_evaluation_that_is_another_one_is_found(tmp_path, monkeypatch):
    run = fedsim.run(CLIENTS, results=tmp_path)
    evaluated = ClientHost._evaluate_on

    def other(self, shard, task, tested):
        found = evaluated(self, shard, task, tested)
        return training.Evaluation(found.loss_sum, found.num_correct - (task.round == 2), found.num_examples)

    monkeypatch.setattr(ClientHost, "_evaluate_on", other)
    difference = verify(run.path, rounds="all", placement={"mode": "serial"}).difference
    assert (difference.round, difference.column) == (2, "accuracy_before")


@pytest.mark.long
def test_a_run_goes_on_with_them(tmp_path):
    config = CLIENTS.override({"checkpoint.every_s": 0})
    with Recording.of(config, results=tmp_path) as recording:
        for record in recording:
            if record.round == 1:
                break
    resumed = fedsim.resume(recording.folder)
    assert_same_results(resumed, fedsim.run(config, results=None))
    assert resumed.clients[COLUMNS].notna().all(axis=None)
    with pytest.raises(ConfigError, match=r"evaluation\.clients = False, but the run has True"):
        fedsim.resume(recording.folder, changes={"evaluation.clients": False, "rounds": 4})
    assert results_of(fedsim.resume(recording.folder, changes={"rounds": 4})) == results_of(
        fedsim.run(config.override({"rounds": 4}), results=None)
    )
