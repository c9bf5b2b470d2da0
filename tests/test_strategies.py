import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from fedsim.config.tables import arguments
from fedsim.strategies import STRATEGIES, Strategy, fedadam, fedavg, fedavgm, weighted_mean

every_strategy = pytest.mark.parametrize("name", STRATEGIES)


def made(name: str) -> Strategy:
    """A strategy with its default arguments, as a configuration makes it."""
    return STRATEGIES[name](**arguments(STRATEGIES[name], {}, "strategy"))


def a_round(num_clients: int = 4, size: int = 50, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [D], updates [K, D] and num_examples [K]."""
    rng = np.random.Generator(np.random.PCG64(seed))
    weights = torch.from_numpy(rng.standard_normal(size, dtype=np.float32))
    updates = torch.from_numpy(rng.standard_normal((num_clients, size), dtype=np.float32))
    return weights, updates, torch.from_numpy(rng.integers(1, 600, size=num_clients))


def bits(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


# ---------------------------------------------------------------- the contract of every strategy


@every_strategy
def test_a_strategy_is_two_functions(name):
    assert isinstance(made(name), Strategy)


@every_strategy
def test_updates_of_zero_leave_the_weights_as_they_are(name):
    weights, updates, counts = a_round()
    strategy = made(name)
    after, _ = strategy.aggregate(strategy.init(weights), weights, torch.zeros_like(updates), counts)
    assert torch.equal(after, weights)


@every_strategy
def test_inputs_are_not_changed(name):
    weights, updates, counts = a_round()
    strategy = made(name)
    state = strategy.init(weights)
    _, state = strategy.aggregate(state, weights, updates, counts)  # a state that is not all zeros
    inputs = {"weights": weights, "updates": updates, "counts": counts, **state}
    before = {key: bits(tensor) for key, tensor in inputs.items()}
    after, new_state = strategy.aggregate(state, weights, updates, counts)
    assert {key: bits(tensor) for key, tensor in inputs.items()} == before

    after.add_(1)
    for tensor in new_state.values():
        if not any(tensor is old for old in state.values()):
            tensor.add_(1)
    assert {key: bits(tensor) for key, tensor in inputs.items()} == before, "nor do the results share their memory"


@every_strategy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_keep_their_type_and_shape(name, dtype):
    weights, updates, counts = a_round(size=7)
    strategy = made(name)
    state = strategy.init(weights.to(dtype))
    for _ in range(2):
        after, state = strategy.aggregate(state, weights.to(dtype), updates.to(dtype), counts)
        assert (after.shape, after.dtype) == (weights.shape, dtype)
        assert torch.isfinite(after).all()


@every_strategy
def test_a_state_is_a_dictionary_of_tensors_of_the_same_names(name):
    weights, updates, counts = a_round()
    strategy = made(name)
    first = strategy.init(weights)
    _, second = strategy.aggregate(first, weights, updates, counts)
    for state in (first, second):
        assert isinstance(state, dict)
        assert all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())
        assert all(torch.isfinite(value).all() for value in state.values())
    kinds = [{key: (value.shape, value.dtype) for key, value in state.items()} for state in (first, second)]
    assert kinds[0] == kinds[1]


@every_strategy
@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(1, 1000), st.integers(0, 100))
def test_only_the_proportions_of_the_counts_matter(name, factor, seed):
    weights, updates, counts = a_round(seed=seed)
    strategy = made(name)
    once, _ = strategy.aggregate(strategy.init(weights), weights, updates, counts)
    scaled, _ = strategy.aggregate(strategy.init(weights), weights, updates, counts * factor)
    torch.testing.assert_close(once, scaled, rtol=1e-6, atol=1e-6)


@every_strategy
def test_the_counts_matter(name):
    weights, updates, counts = a_round()
    strategy = made(name)
    by_examples, _ = strategy.aggregate(strategy.init(weights), weights, updates, counts)
    uniform, _ = strategy.aggregate(strategy.init(weights), weights, updates, torch.ones_like(counts))
    assert not torch.equal(by_examples, uniform)


@every_strategy
def test_a_single_client_with_any_count(name):
    weights, updates, _ = a_round(num_clients=1)
    strategy = made(name)
    answers = [
        strategy.aggregate(strategy.init(weights), weights, updates, torch.tensor([count]))[0] for count in (1, 600)
    ]
    torch.testing.assert_close(*answers, rtol=1e-6, atol=1e-6)
    assert ((answers[0] - weights).sign() == updates[0].sign()).all(), "each value goes where the client went"


@every_strategy
def test_clients_that_agree_count_as_one(name):
    weights, updates, counts = a_round()
    strategy = made(name)
    one, _ = strategy.aggregate(strategy.init(weights), weights, updates[:1], counts[:1])
    same, _ = strategy.aggregate(strategy.init(weights), weights, updates[:1].expand(4, -1), counts)
    torch.testing.assert_close(one, same, rtol=1e-6, atol=1e-6)


@every_strategy
def test_the_order_of_clients_matters_by_rounding_at_most(name):
    """Addition in floating point has an order; equal bits come from ascending client_id, which the pools keep."""
    weights, updates, counts = a_round(num_clients=9)
    strategy = made(name)
    shuffled = torch.tensor([4, 8, 0, 2, 6, 1, 7, 3, 5])
    one, _ = strategy.aggregate(strategy.init(weights), weights, updates, counts)
    other, _ = strategy.aggregate(strategy.init(weights), weights, updates[shuffled], counts[shuffled])
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@every_strategy
def test_the_number_of_threads_changes_no_bit(name):
    weights, updates, counts = a_round(num_clients=3, size=200_003)
    strategy = made(name)
    threads, answers = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            after, state = strategy.aggregate(strategy.init(weights), weights, updates, counts)
            after, state = strategy.aggregate(state, after, updates, counts)
            answers.add((bits(after), *(bits(tensor) for tensor in state.values())))
    finally:
        torch.set_num_threads(threads)
    assert len(answers) == 1


@every_strategy
def test_pieces_of_the_vector_are_aggregated_as_the_whole(name):
    """Every value by itself: no vector width changes a bit."""
    weights, updates, counts = a_round(size=37)
    strategy = made(name)
    whole, _ = strategy.aggregate(strategy.init(weights), weights, updates, counts)
    pieces = [
        strategy.aggregate(strategy.init(weights[i : i + 1]), weights[i : i + 1], updates[:, i : i + 1], counts)[0]
        for i in range(37)
    ]
    assert bits(torch.cat(pieces)) == bits(whole)


# ---------------------------------------------------------------- the weighted mean


def test_the_weighted_mean_by_hand():
    updates = torch.tensor([[1.0, 0.0, -2.0], [4.0, 3.0, 2.0], [-1.0, 6.0, 0.5]])
    mean = weighted_mean(updates, torch.tensor([2, 1, 5]))
    assert mean.tolist() == [(2 + 4 - 5) / 8, (0 + 3 + 30) / 8, (-4 + 2 + 2.5) / 8]
    assert mean.dtype == torch.float64
    assert weighted_mean(updates, torch.ones(3, dtype=torch.int64)).tolist() == [4 / 3, 3.0, 0.5 / 3]


singles = st.floats(-1e6, 1e6, width=32)


@pytest.mark.long
@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.tuples(singles, st.integers(1, 60_000)), min_size=1, max_size=100))
def test_the_weighted_mean_is_exact_to_float64(clients):
    """Against rational arithmetic: the error is that of adding in float64, some 1e-16 of what is added."""
    updates = torch.tensor([[update] for update, _ in clients], dtype=torch.float32)
    counts = torch.tensor([count for _, count in clients])
    values = [Fraction(update.item()) for update in updates]
    exact = sum(n * value for value, (_, n) in zip(values, clients, strict=True)) / sum(n for _, n in clients)
    added = sum(n * abs(value) for value, (_, n) in zip(values, clients, strict=True)) / sum(n for _, n in clients)
    error = abs(Fraction(weighted_mean(updates, counts).item()) - exact)
    assert error <= len(clients) * Fraction(1, 2**52) * added


def test_a_mean_in_float32_would_not_do():
    """Many small updates after a large one are not lost."""
    updates = torch.tensor([[2.0**24]] + [[1.0]] * 1000)
    assert weighted_mean(updates, torch.ones(1001, dtype=torch.int64)).item() == (2**24 + 1000) / 1001


# ---------------------------------------------------------------- fedavg


def test_fedavg_of_two_clients_by_hand():
    weights = torch.tensor([1.0, -1.0, 0.5])
    updates = torch.tensor([[1.0, 2.0, 0.0], [-2.0, 0.5, 4.0]])
    after, state = fedavg().aggregate({}, weights, updates, torch.tensor([3, 1]))
    assert after.tolist() == [1 + (3 - 2) / 4, -1 + (6 + 0.5) / 4, 0.5 + 4 / 4]
    assert state == {}


def test_fedavg_of_three_clients_rounds_once():
    weights = torch.tensor([0.1, 0.2])
    updates = torch.tensor([[0.3, -0.1], [0.01, 0.7], [-0.2, 0.05]])
    counts = [600, 599, 1]
    after, _ = fedavg().aggregate({}, weights, updates, torch.tensor(counts))
    for i in range(2):
        step = sum(n * Fraction(updates[k, i].item()) for k, n in enumerate(counts)) / 1200
        assert after[i].item() == np.float32(float(Fraction(weights[i].item()) + step))


def test_fedavg_under_uniform_weighting_is_the_plain_mean():
    weights, updates = torch.zeros(2), torch.tensor([[1.0, -3.0], [2.0, 5.0], [6.0, 1.0]])
    after, _ = fedavg().aggregate({}, weights, updates, torch.ones(3, dtype=torch.int64))
    assert after.tolist() == [3.0, 1.0]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(hnp.arrays(np.float32, (2, 6), elements=st.floats(-100, 100, width=32)), st.integers(1, 60_000))
def test_fedavg_of_one_client_is_that_clients_weights_up_to_a_rounding(values, count):
    """The difference w_k - w is rounded in the client, and the sum once more."""
    start, trained = torch.from_numpy(values)
    after, _ = fedavg().aggregate({}, start, (trained - start)[None], torch.tensor([count]))
    largest = np.maximum(np.abs(values).max(axis=0), np.abs(values[1] - values[0]))
    assert (np.abs(after.numpy() - values[1]) <= np.spacing(largest)).all()


# ---------------------------------------------------------------- fedavgm and fedadam by hand

ROUNDS = [  # what each value's mean update is: (600 * a + 200 * b) / 800
    ([0.5, -1.0], [0.25, 3.0]),
    ([-0.125, 2.0], [1.5, 0.75]),
]


def play(strategy: Strategy) -> list[tuple[Tensor, dict[str, Tensor]]]:
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)  # float64, so that the last rounding hides nothing
    state, played = strategy.init(weights), []
    for updates in ROUNDS:
        updates_ = torch.tensor(updates, dtype=torch.float64)
        weights, state = strategy.aggregate(state, weights, updates_, torch.tensor([600, 200]))
        played.append((weights, state))
    return played


def means() -> list[list[float]]:
    return [[(600 * a + 200 * b) / 800 for a, b in zip(*updates, strict=True)] for updates in ROUNDS]


def test_fedavgm_over_two_rounds_by_hand():
    played = play(fedavgm(server_lr=0.5, server_momentum=0.9))
    for i, w in enumerate([1.0, -2.0]):
        v = 0.0
        for mean, (weights, state) in zip(means(), played, strict=True):
            v = 0.9 * v + mean[i]
            w = w + 0.5 * v
            assert weights[i].item() == pytest.approx(w, rel=1e-14)
            assert state["velocity"][i].item() == pytest.approx(v, rel=1e-14)


def test_fedadam_over_two_rounds_by_hand():
    played = play(fedadam(server_lr=0.1, beta1=0.8, beta2=0.95, tau=0.01))
    for i, w in enumerate([1.0, -2.0]):
        m, v = 0.0, 0.01**2
        for mean, (weights, state) in zip(means(), played, strict=True):
            m = 0.8 * m + (1 - 0.8) * mean[i]
            v = 0.95 * v + (1 - 0.95) * mean[i] ** 2
            w = w + 0.1 * m / (math.sqrt(v) + 0.01)
            assert weights[i].item() == pytest.approx(w, rel=1e-14)
            assert state["first_moment"][i].item() == pytest.approx(m, rel=1e-14)
            assert state["second_moment"][i].item() == pytest.approx(v, rel=1e-14)


def test_the_first_steps_with_default_arguments():
    weights, updates, counts = torch.zeros(1), torch.tensor([[2.0]]), torch.tensor([5])
    first = {}
    for name in STRATEGIES:
        after, _ = made(name).aggregate(made(name).init(weights), weights, updates, counts)
        first[name] = after.item()
    assert first["fedavg"] == first["fedavgm"] == 2.0
    adam = 0.01 * (0.1 * 2) / (math.sqrt(0.99 * 0.001**2 + 0.01 * 4) + 0.001)
    assert first["fedadam"] == pytest.approx(adam, rel=1e-6)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_fedavgm_without_momentum_is_fedavg_to_the_bit(seed, num_clients):
    plain, momentum = fedavg(), fedavgm(server_lr=1.0, server_momentum=0.0)
    weights, _, _ = a_round(seed=seed)
    state, other, ours = momentum.init(weights), weights, weights
    for round in range(3):
        _, updates, counts = a_round(num_clients, seed=seed + round)
        ours, state = momentum.aggregate(state, ours, updates, counts)
        other, _ = plain.aggregate({}, other, updates, counts)
        assert bits(ours) == bits(other)


def test_momentum_goes_on_when_the_updates_stop():
    weights, updates, counts = a_round()
    strategy = fedavgm(server_lr=1.0, server_momentum=0.5)
    first, state = strategy.aggregate(strategy.init(weights), weights, updates, counts)
    second, _ = strategy.aggregate(state, first, torch.zeros_like(updates), counts)
    torch.testing.assert_close(second - first, (first - weights) / 2, rtol=1e-5, atol=1e-6)
