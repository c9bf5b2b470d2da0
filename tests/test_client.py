import hashlib
import math
import os
import pickle
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim import models
from fedsim.client import ClientHost, ClientSpec, ClientUpdate, FitTask, evaluation_chunks, total
from fedsim.config import TrainingConfig
from fedsim.datasets import Dataset
from fedsim.errors import ClientError, RunFailedError
from fedsim.fingerprint import fingerprint
from fedsim.numerics import numerics
from fedsim.seeding import generator, torch_seed
from fedsim.training import Evaluation
from fedsim.weights import Layout, Weights
from tests.helpers import TINY as DATA
from tests.helpers import TINY_PARTITION as PARTITION

SHAPE, CLASSES, SEED = DATA.input_shape, DATA.num_classes, 11
TRAINING = TrainingConfig(local_epochs=3, batch_size=5, lr=0.2, momentum=0.9, weight_decay=0.01)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with numerics(1):
        yield


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(16, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(x.flatten(1))))


class Dropped(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(F.relu(self.hidden(x.flatten(1))), 0.5, self.training))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).flatten(1))


class Fails(Plain):
    """A bug that shows in training only."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("a bug in the user's model")
        return super().forward(x)


class FailsInTests(Plain):
    """A bug that shows in evaluation only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x[:, :, 99]  # the user's line
        return super().forward(x)


def host(model: Callable[..., nn.Module] = Plain, seed: int = SEED, **changes: float) -> ClientHost:
    spec = ClientSpec(TRAINING.model_copy(update=changes), seed, model, SHAPE, CLASSES)
    made = ClientHost(spec)
    made.load(DATA, PARTITION)
    return made


def global_weights(model: Callable[..., nn.Module] = Plain) -> Weights:
    """Not those that a host is made with."""
    module = models.build(model, SHAPE, CLASSES, seed=77)
    return Layout.of(module).flatten(module)


def fit(on: ClientHost, client_id: int, round: int = 4) -> ClientUpdate:
    (update,) = on.fit(global_weights(on.spec.model), [FitTask(round, client_id)])
    return update


def result(update: ClientUpdate) -> dict:
    """Everything of an update that must be equal between equal runs, arrays as bytes."""
    values = vars(update) | {"update": update.update.tobytes(), "integers": update.integers.tobytes()}
    return {name: value for name, value in values.items() if name not in ("fit_s", "stack_size", "pid", "node")}


def by_hand(model: Callable[..., nn.Module], client_id: int, round: int, config: TrainingConfig) -> tuple:
    """What a client is: the global weights, SGD over its shard in the order of its own stream, the difference."""
    module = models.build(model, SHAPE, CLASSES, seed=0)
    layout, start = Layout.of(module), global_weights(model)
    layout.load(module, start)
    optimizer = torch.optim.SGD(
        module.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, foreach=False
    )
    shard, losses = PARTITION.shard(client_id), []
    module.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed("model", SEED, round=round, client=client_id))
        for epoch in range(config.local_epochs):
            order = generator("shuffle", SEED, round=round, client=client_id, epoch=epoch).permutation(shard)
            for at in range(0, len(order), config.batch_size or len(order)):
                some = order[at : at + (config.batch_size or len(order))]
                images = torch.from_numpy(DATA.train_images[some]).float() / 255
                loss = F.cross_entropy(module(images), torch.from_numpy(DATA.train_labels[some]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append((len(some), loss.item()))
    trained = layout.flatten(module)
    train_loss = sum(n * loss for n, loss in losses) / sum(n for n, _ in losses)
    return (trained.flat - start.flat).numpy(), trained.integers.numpy(), train_loss, len(losses)


# ---------------------------------------------------------------- fit


@pytest.mark.parametrize("batch_size", [5, 1, 0, 1000])
@pytest.mark.parametrize("client_id", [0, 2])
@pytest.mark.parametrize("model", [Plain, Dropped, Normed])
def test_fit_is_training_by_hand(model, client_id, batch_size):
    answer = fit(host(model, batch_size=batch_size), client_id)
    config = TRAINING.model_copy(update={"batch_size": batch_size})
    update, integers, train_loss, num_steps = by_hand(model, client_id, 4, config)
    assert answer.update.tobytes() == update.tobytes()
    assert answer.integers.tolist() == integers.tolist()
    assert (answer.train_loss, answer.num_steps) == (train_loss, num_steps)
    assert np.abs(answer.update).max() > 0.01


@pytest.mark.parametrize(("client_id", "num_examples", "num_steps"), [(0, 13, 9), (1, 1, 3), (2, 26, 18), (3, 20, 12)])
def test_the_fields_of_an_update(client_id, num_examples, num_steps):
    answer = fit(host(), client_id)
    assert answer.client_id == client_id
    assert answer.num_examples == num_examples, "examples, not examples times epochs"
    assert answer.num_steps == num_steps
    assert (answer.update.shape, answer.update.dtype) == ((163,), np.float32)
    assert (answer.integers.shape, answer.integers.dtype) == ((0,), np.int64)
    assert answer.update_l2_norm == pytest.approx(np.linalg.norm(answer.update.astype(np.float64)), rel=1e-12)
    assert answer.update_sha256 == hashlib.sha256(answer.update.tobytes()).hexdigest()
    assert answer.is_finite is True
    assert 0 < answer.train_loss < 10
    assert 0 < answer.fit_s < 60
    assert (answer.stack_size, answer.pid, answer.node) == (1, os.getpid(), platform.node())


def test_the_hash_of_an_update_covers_the_integer_buffers():
    answer = fit(host(Normed), 0)
    assert answer.integers.tolist() == [9], "batches tracked"
    by_definition = answer.update.astype("<f4").tobytes() + answer.integers.astype("<i8").tobytes()
    assert answer.update_sha256 == hashlib.sha256(by_definition).hexdigest()


def test_a_fit_depends_on_seed_round_and_client():
    updates = {
        fit(host(), 0).update_sha256,
        fit(host(), 0, round=5).update_sha256,
        fit(host(), 3).update_sha256,
        fit(host(seed=SEED + 1), 0).update_sha256,
    }
    assert len(updates) == 4


def test_several_clients_are_answered_in_the_order_asked_for():
    answers = host().fit(global_weights(), [FitTask(4, client_id) for client_id in (3, 0, 2)])
    assert [answer.client_id for answer in answers] == [3, 0, 2]
    assert [result(answer) for answer in answers] == [result(fit(host(), client_id)) for client_id in (3, 0, 2)]


def test_the_weights_given_are_not_changed():
    weights = global_weights(Normed)
    before = weights.sha256()
    trainer = host(Normed)
    trainer.fit(weights, [FitTask(1, 0)])
    trainer.evaluate(1, weights, [(0, 40)])
    assert weights.sha256() == before


def test_read_only_weights_and_data_will_do():
    """In an object store nothing can be written."""
    arrays = tuple(array.copy() for array in global_weights().arrays())
    images, labels = DATA.train_images.copy(), DATA.train_labels.copy()
    for array in (*arrays, images, labels):
        array.flags.writeable = False
    trainer = ClientHost(host().spec)
    trainer.load(Dataset("read-only", images, labels, images[:40], labels[:40], CLASSES), PARTITION)
    (answer,) = trainer.fit(Weights.of_arrays(arrays), [FitTask(4, 2)])
    assert result(answer) == result(fit(host(), 2))
    assert len(trainer.evaluate(4, Weights.of_arrays(arrays), [(0, 40)])) == 1


# ---------------------------------------------------------------- no state leaks


@pytest.mark.parametrize("model", [Plain, Dropped, Normed])
def test_an_update_is_the_same_whatever_the_host_did_before(model):
    fresh = result(fit(host(model), 2))
    used = host(model)
    for client_id in (0, 1, 2, 3, 2):
        fit(used, client_id, round=1)
    assert result(fit(used, 2)) == fresh
    used.evaluate(3, global_weights(model), [(0, 40)])
    assert result(fit(used, 2)) == fresh
    diverged = Weights(torch.full_like(global_weights(model).flat, math.nan), global_weights(model).integers)
    used.fit(diverged, [FitTask(2, 0)])
    assert result(fit(used, 2)) == fresh
    assert result(used.fit(global_weights(model), [FitTask(4, 0), FitTask(4, 2)])[1]) == fresh


@pytest.mark.parametrize("model", [Plain, Dropped, Normed])
def test_an_evaluation_is_the_same_whatever_the_host_did_before(model):
    fresh = host(model).evaluate(1, global_weights(model), [(0, 25), (25, 40)])
    used = host(model)
    fit(used, 0)
    assert used.evaluate(1, global_weights(model), [(0, 25), (25, 40)]) == fresh
    (second,) = used.evaluate(1, global_weights(model), [(25, 40)])
    assert second == fresh[1]


def relu() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def relu_of_doubles() -> nn.Module:
    return relu().double()


def drawn_activation() -> nn.Module:
    """Another one for every seed."""
    activation = nn.ReLU() if torch.rand(1) < 0.5 else nn.Tanh()
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), activation, nn.Linear(8, CLASSES))


CHANGES = st.sampled_from(
    [
        *({"training": TRAINING.model_copy(update={"lr": lr, "batch_size": b})} for lr in (0.1, 0.2) for b in (0, 5)),
        {"training": TRAINING.model_copy(update={"momentum": 0.0, "weight_decay": 0.0})},
        *({"model": model} for model in (relu, relu_of_doubles, drawn_activation)),
        *({"engine": engine} for engine in ("stacked", "loop")),
        *({"seed": seed} for seed in range(3)),
    ]
)


@pytest.mark.long
@given(changes=st.lists(CHANGES, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_host_after_others_trains_as_one_by_itself(changes):
    """What one takes over from those before is what makes no difference."""

    def does(host: ClientHost) -> tuple:
        host.load(DATA, PARTITION)
        weights = global_weights(host.spec.model)
        updates = host.fit(weights, [FitTask(1, 0), FitTask(1, 1)])
        return [result(update) for update in updates], host.evaluate(1, weights, evaluation_chunks(DATA))

    spec = ClientSpec(TRAINING, 0, drawn_activation, SHAPE, CLASSES, engine="stacked", stack_size=2)
    before = ClientHost(spec)
    does(before)
    for change in changes:
        spec = replace(spec, **change)
        after = ClientHost(spec, after=before)
        assert does(after) == does(ClientHost(spec))
        before = after


def test_a_host_after_one_of_another_seed_need_not_find_out_anew_what_may_be_stacked():
    """A tenth of a second for each run of a sweep."""
    spec = ClientSpec(TRAINING, SEED, relu, SHAPE, CLASSES, engine="stacked", stack_size=2)
    first = ClientHost(spec)
    assert ClientHost(replace(spec, seed=SEED + 1), after=first)._engine is first._engine
    other = replace(spec, training=TRAINING.model_copy(update={"lr": 0.5}))
    assert ClientHost(other, after=first)._engine is not first._engine
    loop = ClientHost(replace(spec, engine="loop"))
    assert ClientHost(loop.spec, after=loop)._engine is not loop._engine, "its module may hold more than the weights"


def pooled() -> nn.Module:
    """Its text does not show the divisor, which comes from the seed."""
    pool = nn.AvgPool2d(2, divisor_override=int(torch.randint(1, 1000, ())))
    return nn.Sequential(pool, nn.Flatten(), nn.Linear(4, CLASSES))


def test_a_host_after_one_of_another_seed_has_all_the_settings_of_its_own_layers():
    def layers(host: ClientHost) -> object:
        return host._engine._module[0].divisor_override

    spec = ClientSpec(TRAINING, SEED, pooled, SHAPE, CLASSES, engine="stacked")
    specs = [replace(spec, seed=seed) for seed in (SEED, SEED + 1)]
    first = ClientHost(specs[0])
    assert layers(ClientHost(specs[1], after=first)) == layers(ClientHost(specs[1])) != layers(first)


def test_an_update_is_kept_when_the_host_goes_on():
    trainer = host(Normed)
    first = fit(trainer, 2)
    kept = result(first)
    fit(trainer, 0)
    assert result(first) == kept


def test_a_fit_after_a_failed_one_is_as_if_nothing_had_happened():
    class Moody(Dropped):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            answer = super().forward(x)
            if Moody.fails:
                raise RuntimeError("not now")
            return answer

    fresh = result(fit(host(Moody), 2))
    used = host(Moody)
    Moody.fails = True
    with pytest.raises(ClientError):
        fit(used, 0)
    Moody.fails = False
    assert result(fit(used, 2)) == fresh


# ---------------------------------------------------------------- torch's global generator


@pytest.mark.parametrize("model", [Plain, Dropped])
def test_a_fit_neither_reads_nor_moves_the_global_generator(model):
    kept = torch.get_rng_state()
    try:
        trainer, answers = host(model), []
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            answers.append(result(fit(trainer, 2)))
            trainer.evaluate(1, global_weights(model), [(0, 40)])
            assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_rng_state(kept)
    assert answers[0] == answers[1]


def test_the_global_generator_is_put_back_after_an_error():
    trainer = host(Fails)
    before = torch.get_rng_state()
    with pytest.raises(ClientError):
        fit(trainer, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_draws_from_the_stream_of_its_client_and_round():
    """The draws made visible, one a batch."""

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.rand(()).item())
            return self.weight.expand(len(x), CLASSES)

    seen: list[float] = []

    def draws(client_id: int, round: int) -> list[float]:
        seen.clear()
        fit(host(Draws), client_id, round)
        return seen.copy()

    by_definition = torch.Generator().manual_seed(torch_seed("model", SEED, round=4, client=1))
    assert draws(1, 4) == torch.rand(3, generator=by_definition).tolist()
    assert draws(1, 4) == draws(1, 4)
    assert len({tuple(draws(client_id, round)[:3]) for client_id in (0, 1, 2) for round in (1, 2)}) == 6


# ---------------------------------------------------------------- what goes wrong


def test_an_exception_in_the_model_carries_the_client_the_round_and_the_users_line():
    with pytest.raises(ClientError) as caught:
        fit(host(Fails), 3, round=7)
    error = caught.value
    assert (error.round, error.client_id) == (7, 3)
    assert isinstance(error, RunFailedError)
    assert error.exit_code == 1
    assert 'raise ValueError("a bug in the user\'s model")' in error.client_traceback
    assert "ValueError: a bug in the user's model" in error.client_traceback
    assert re.search(r"test_client\.py\", line \d+, in forward", error.client_traceback)
    assert str(error).startswith("client 3 failed in round 7:\n")
    assert str(error).endswith("ValueError: a bug in the user's model")
    assert host(Fails).evaluate(0, global_weights(), [(0, 40)]), "this one can be tested"


def test_an_exception_in_the_evaluation_is_no_clients():
    with pytest.raises(ClientError) as caught:
        host(FailsInTests).evaluate(5, global_weights(), [(0, 40)])
    error = caught.value
    assert (error.round, error.client_id) == (5, -1)
    assert "return x[:, :, 99]  # the user's line" in error.client_traceback
    assert str(error).startswith("the evaluation failed in round 5:\n")


def test_a_client_error_survives_pickling():
    with pytest.raises(ClientError) as caught:
        fit(host(Fails), 3, round=7)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(caught.value, protocol))  # noqa: S301 - our own
        assert type(again) is ClientError
        assert (again.round, again.client_id, again.client_traceback) == (7, 3, caught.value.client_traceback)
        assert str(again) == str(caught.value)


def test_labels_the_model_does_not_have_are_the_clients_error():
    def too_few() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 1))

    with pytest.raises(ClientError, match="client 2 failed in round 4"):
        fit(host(too_few), 2)


def test_an_interrupt_is_not_a_clients_error():
    class Interrupted(Plain):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(host(Interrupted), 0)


@pytest.mark.parametrize("lr", [1e38, 1e20])
def test_an_update_that_is_not_finite_is_flagged_not_raised(lr):
    answer = fit(host(lr=lr), 2)
    assert answer.is_finite is False
    assert not np.isfinite(answer.update).all()
    assert not math.isfinite(answer.update_l2_norm)
    assert answer.update_sha256 == hashlib.sha256(answer.update.tobytes()).hexdigest()


def test_one_value_that_is_not_finite_is_enough():
    class Rooted(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.root = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * self.root.sqrt()  # a gradient of 0 * infinity

    on = host(Rooted, local_epochs=1, batch_size=0)
    start = on.layout.flatten(models.build(Rooted, SHAPE, CLASSES, SEED))
    (answer,) = on.fit(start, [FitTask(1, 2)])
    assert np.isnan(answer.update).sum() == 1
    assert answer.is_finite is False


# ---------------------------------------------------------------- evaluation


def test_an_evaluation_is_that_of_the_weights_given():
    module = models.build(Plain, SHAPE, CLASSES, seed=77)
    with torch.no_grad():
        logits = module(torch.from_numpy(DATA.test_images).float() / 255).double()
    labels = torch.from_numpy(DATA.test_labels)
    (answer,) = host().evaluate(2, global_weights(), [(0, 40)])
    assert answer.loss_sum == pytest.approx(F.cross_entropy(logits, labels, reduction="sum").item(), rel=1e-12)
    assert answer.num_correct == (logits.argmax(1) == labels).sum()
    assert answer.num_examples == 40


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(1, 12_345))
def test_evaluation_chunks_cover_the_test_set_in_pieces_of_a_thousand(size):
    class Sized:
        test_labels = range(size)

    chunks = evaluation_chunks(Sized())
    assert [i for start, stop in chunks for i in range(start, stop)] == list(range(size))
    assert [stop - start for start, stop in chunks[:-1]] == [1000] * ((size - 1) // 1000)
    assert chunks[-1][1] - chunks[-1][0] <= 1000


def test_a_total_adds_in_the_order_given():
    parts = [Evaluation(1e16, 1, 2), Evaluation(1.0, 3, 4), Evaluation(-1e16, 5, 6)]
    assert total(parts) == Evaluation(1e16 + 1.0 - 1e16, 9, 12)
    assert total([parts[0], parts[2], parts[1]]) == Evaluation(1.0, 9, 12)
    assert total(parts[:1]) == parts[0]


def test_loading_says_where_the_host_is():
    trainer = ClientHost(host().spec)
    info = trainer.load(DATA, PARTITION)
    assert (info.pid, info.node, info.device) == (os.getpid(), platform.node(), "cpu")
    assert info.fingerprint == fingerprint(torch.device("cpu"))


class TooMuch:
    """An engine that fails for more than one client, as where memory ends."""

    def __init__(self, engine):
        self.engine = engine

    def train(self, weights, examples, work):
        if len(work) > 1:
            raise MemoryError("no room for a stack")
        return self.engine.train(weights, examples, work)


def test_a_stack_that_fails_is_trained_one_by_one_only_where_the_bits_are_the_same():
    spec = ClientSpec(TRAINING, SEED, models.mlp, SHAPE, CLASSES, engine="stacked", stack_size=3)
    host = ClientHost(spec)
    host.load(DATA, PARTITION)
    weights = host.layout.flatten(models.build(models.mlp, SHAPE, CLASSES, SEED))
    tasks = [FitTask(2, client) for client in range(3)]
    expected = [update.update_sha256 for update in host.fit(weights, tasks)]
    host._engine = TooMuch(host._engine)
    assert [update.update_sha256 for update in host.fit(weights, tasks)] == expected
    real, host.device = host.device, torch.device("cuda")  # where a stack takes other kernels than a client alone
    host._work = lambda task: ClientHost._work(SimpleNamespace(partition=PARTITION, spec=spec, device=real), task)
    with pytest.raises(ClientError, match="no room for a stack") as caught:
        host.fit(weights, tasks)
    assert "in a stack of 3 clients, not alone; set a smaller placement.stack_size" in str(caught.value)
