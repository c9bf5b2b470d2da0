"""Contracts of every partitioner, their own definitions by hand, and what they refuse."""

import pickle
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.config.tables import arguments
from fedsim.errors import ConfigError
from fedsim.partition import PARTITIONERS, Partition, dirichlet, iid, quantity, sampled, shards
from fedsim.seeding import generator

SMALL = {"sampled": {"examples_per_client": 7}}
ARGUMENTS = {
    "iid": st.fixed_dictionaries({}),
    "shards": st.fixed_dictionaries({"shards_per_client": st.integers(1, 4)}),
    "dirichlet": st.fixed_dictionaries(
        {"alpha": st.sampled_from([1e-300, 1e-3, 0.1, 0.5, 10.0, 1e6, 1e9]), "min_examples": st.integers(1, 5)}
    ),
    "quantity": st.fixed_dictionaries({"sigma": st.sampled_from([0.0, 0.3, 1.0, 5.0, 100.0])}),
    "sampled": st.fixed_dictionaries({"examples_per_client": st.integers(1, 50)}),
}
every_partitioner = pytest.mark.parametrize("name", PARTITIONERS)
LABELS = generator("dataset", 0).integers(0, 10, size=60_000)  # about 6,000 of each, as in MNIST


def rng(seed=0):
    return generator("partition", seed)


def lists(parts):
    return [part.tolist() for part in parts]


def sizes(parts):
    return [len(part) for part in parts]


def num_labels(parts, labels=LABELS):
    return [len(np.unique(labels[part])) for part in parts]


def assert_contract(name, parts, labels, num_clients):
    assert len(parts) == num_clients
    for part in parts:
        assert part.dtype == np.int64
        assert part.ndim == 1
        assert len(part) > 0
        assert (np.diff(part) >= 0).all()
    everything = np.concatenate(parts)
    if name == "sampled":
        assert everything.min() >= 0
        assert everything.max() < len(labels)
    else:
        assert np.sort(everything).tolist() == list(range(len(labels)))


@every_partitioner
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_contract(name, data):
    given_arguments = data.draw(ARGUMENTS[name])
    num_clients = data.draw(st.integers(1, 40))
    least = max(given_arguments.get("shards_per_client", 1), given_arguments.get("min_examples", 1))
    num_examples = num_clients * least + data.draw(st.integers(0, 300))
    labels = rng(data.draw(st.integers(0, 9))).choice([0, 1, 2, 7], size=num_examples)  # classes 3 to 6 are empty
    parts = PARTITIONERS[name](labels, num_clients, rng(data.draw(st.integers(0, 9))), **given_arguments)
    assert_contract(name, parts, labels, num_clients)
    assert min(sizes(parts)) >= given_arguments.get("min_examples", 1)
    if name in ("iid", "shards"):
        leftover = num_examples % num_clients
        assert sizes(parts) == [num_examples // num_clients + (k < leftover) for k in range(num_clients)]


@every_partitioner
@pytest.mark.parametrize(("num_examples", "num_clients"), [(1, 1), (20, 1), (200, 200), (12, 5)])
def test_contract_at_the_edges_with_a_single_class(name, num_examples, num_clients):
    labels = np.full(num_examples, 3)
    own = {"shards": {"shards_per_client": 1}} | SMALL
    assert_contract(name, PARTITIONERS[name](labels, num_clients, rng(), **own.get(name, {})), labels, num_clients)


@every_partitioner
def test_the_stream_alone_decides(name):
    def parts(seed):
        return lists(PARTITIONERS[name](LABELS[:500], 10, rng(seed), **SMALL.get(name, {})))

    state = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    before = parts(0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002 - another library's doing
    random.seed(1)
    assert parts(0) == before
    assert parts(1) != before


@every_partitioner
def test_the_labels_are_not_modified(name):
    labels = LABELS[:500].copy()
    labels.setflags(write=False)
    PARTITIONERS[name](labels, 10, rng())


@every_partitioner
def test_arguments_can_be_checked_by_the_configuration(name):
    defaults = arguments(PARTITIONERS[name], {}, "data.partition")
    assert_contract(name, PARTITIONERS[name](LABELS, 10, rng(), **defaults), LABELS, 10)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("shards", {"shards_per_client": 0}),
        ("dirichlet", {"alpha": 0.0}),
        ("dirichlet", {"alpha": 1e10}),
        ("dirichlet", {"min_examples": 0}),
        ("quantity", {"sigma": -0.1}),
        ("sampled", {"examples_per_client": 0}),
        ("iid", {"alpha": 1.0}),
    ],
)
def test_arguments_out_of_range_are_refused(name, wrong):
    with pytest.raises(ConfigError, match=rf"data\.partition\.{next(iter(wrong))}"):
        arguments(PARTITIONERS[name], wrong, "data.partition")


def test_iid_mixes_the_labels():
    for part in iid(LABELS, 10, rng()):
        assert np.abs(np.bincount(LABELS[part], minlength=10) / len(part) - 0.1).max() < 0.02


def test_shards_by_hand():
    labels = np.array([1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1])  # sorted stably: 1 3 5 7 9 | 0 2 4 6 8 10
    # 11 examples, 2 clients of 6 and 5, 2 shards each: the owners' sizes 3 + 3 and 3 + 2 in the order of the deal
    expected = {
        ((0, 1), (2, 3)): [[0, 1, 3, 5, 7, 9], [2, 4, 6, 8, 10]],
        ((2, 3), (0, 1)): [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9]],
    }
    met = set()
    for seed in range(100):
        dealt = tuple(tuple(sorted(pair)) for pair in rng(seed).permutation(4).reshape(2, 2).tolist())
        if dealt in expected:
            met.add(dealt)
            assert lists(shards(labels, 2, rng(seed), shards_per_client=2)) == expected[dealt]
    assert met == set(expected)


def test_shards_of_one_client_each_are_runs_of_the_sorted_labels():
    labels = np.array([2, 0, 1, 0, 2, 1, 0])  # sorted stably: 1 3 6 2 5 0 4
    parts = shards(labels, 7, rng(), shards_per_client=1)
    assert [part.item() for part in np.array(parts)[np.argsort(rng().permutation(7))]] == [1, 3, 6, 2, 5, 0, 4]


def test_mcmahan_setting():
    parts = shards(LABELS, 100, rng())
    assert sizes(parts) == [600] * 100
    assert max(num_labels(parts)) <= 4
    assert np.mean(num_labels(parts)) < 2.3
    balanced = np.repeat(np.arange(10), 6000)
    assert max(num_labels(shards(balanced, 100, rng()), balanced)) == 2


def skew(parts):
    """Mean total variation distance between a client's labels and all labels: 0 = the same mix."""
    return np.mean([np.abs(np.bincount(LABELS[p], minlength=10) / len(p) - 0.1).sum() / 2 for p in parts])


def test_dirichlet_is_more_skewed_at_small_alpha():
    skews = [skew(dirichlet(LABELS, 20, rng(), alpha=alpha)) for alpha in (1e-3, 0.1, 1.0, 10.0, 1e6)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.8
    assert skews[-1] < 0.01


def test_dirichlet_gives_many_clients_the_population_of_hsu():
    # q ~ Dir(0.5, ..., 0.5) over 10 classes: the variance of a class's share is 0.1 * 0.9 / (10 * 0.5 + 1)
    labels = np.tile(np.arange(10), 60_000)
    mixes = [np.bincount(labels[p], minlength=10) / len(p) for p in dirichlet(labels, 1000, rng(), alpha=0.5)]
    assert np.mean(mixes, axis=0) == pytest.approx(np.full(10, 0.1), abs=0.02)
    assert np.mean(np.var(mixes, axis=0)) == pytest.approx(0.015, rel=0.05)


@pytest.mark.parametrize("min_examples", [1, 50, 600])
def test_dirichlet_fills_up_from_the_largest(min_examples):
    free = sizes(dirichlet(LABELS, 100, rng(), alpha=0.01))
    filled = sizes(dirichlet(LABELS, 100, rng(), alpha=0.01, min_examples=min_examples))
    assert min(filled) == min_examples
    givers = [after for before, after in zip(free, filled, strict=True) if after < before]
    keepers = [after for before, after in zip(free, filled, strict=True) if after == before]
    if min_examples > 1:
        assert (
            max(givers) - min(givers) <= 1
        )  # all were lowered to one level, and none below a client that kept its own
        assert max(keepers, default=0) <= max(givers)


def test_quantity_spreads_the_sizes_not_the_labels():
    spreads = [np.std(np.log(sizes(quantity(LABELS, 100, rng(), sigma=sigma)))) for sigma in (0.0, 0.5, 1.0, 2.0)]
    assert spreads == pytest.approx([0.0, 0.5, 1.0, 2.0], rel=0.3, abs=1e-9)
    assert sizes(quantity(LABELS, 7, rng(), sigma=0.0)) == sizes(iid(LABELS, 7, rng()))
    largest = max(quantity(LABELS, 100, rng()), key=len)
    assert skew([largest]) < 0.05


def test_sampled_overlaps_and_scales():
    parts = sampled(LABELS, 10_000, rng(), examples_per_client=600)
    assert sizes(parts) == [600] * 10_000
    assert len(np.unique(np.concatenate(parts[:100]))) < 60_000
    assert len(sampled(LABELS[:3], 5, rng(), examples_per_client=600)[0]) == 600  # more than there are


@pytest.mark.parametrize("name", [name for name in PARTITIONERS if name != "sampled"])
def test_more_clients_than_examples_are_refused(name):
    message = r"clients\.count = 70000 clients cannot share 60000 training examples: at most 60000"
    with pytest.raises(ConfigError, match=message):
        PARTITIONERS[name](LABELS, 70_000, rng())


@pytest.mark.parametrize(
    ("name", "key", "value", "num_clients", "numbers"),
    [
        ("shards", "shards_per_client", 2, 40_000, "needs 80000 training examples, and there are 60000: at most 1"),
        ("dirichlet", "min_examples", 601, 100, "needs 60100 training examples, and there are 60000: at most 600"),
    ],
)
def test_what_the_examples_cannot_give_is_refused(name, key, value, num_clients, numbers):
    with pytest.raises(ConfigError) as refused:
        PARTITIONERS[name](LABELS, num_clients, rng(), **{key: value})
    assert str(refused.value) == f"data.partition.{key} = {value} with clients.count = {num_clients} {numbers}"


def test_an_empty_training_set_is_refused():
    for partitioner in PARTITIONERS.values():
        with pytest.raises(ConfigError, match=r"clients\.count = 1 .*0 training examples"):
            partitioner(LABELS[:0], 1, rng())


def test_pinned_partitions():
    # Part of the promise of equal bits: a change here changes every published run.
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])
    own = {"sampled": {"examples_per_client": 4}}
    assert {name: lists(p(labels, 3, rng(), **own.get(name, {}))) for name, p in PARTITIONERS.items()} == {
        "iid": [[2, 5, 9, 10], [0, 4, 7, 8], [1, 3, 6]],
        "shards": [[2, 6, 9, 10], [0, 3, 4, 7], [1, 5, 8]],
        "dirichlet": [[0, 3, 8, 9], [4], [1, 2, 5, 6, 7, 10]],
        "quantity": [[0, 8], [1, 2, 5, 7, 9], [3, 4, 6, 10]],
        "sampled": [[1, 2, 5, 10], [2, 4, 6, 7], [0, 5, 8, 8]],
    }


def test_partition_packs_the_shards():
    parts = dirichlet(LABELS, 20, rng())
    partition = Partition.of(parts)
    assert partition.num_clients == 20
    assert partition.num_examples.tolist() == sizes(parts)
    assert partition.indices.dtype == partition.offsets.dtype == partition.num_examples.dtype == np.int64
    assert [partition.shard(k).tolist() for k in range(20)] == lists(parts)
    assert np.shares_memory(partition.shard(3), partition.indices)
    again = pickle.loads(pickle.dumps(partition))  # noqa: S301
    assert again.indices.tolist() == partition.indices.tolist()
