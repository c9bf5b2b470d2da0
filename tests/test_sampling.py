"""The size of a cohort, and who is in it."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.errors import ConfigError
from fedsim.sampling import SAMPLERS, cohort_size, uniform
from fedsim.seeding import generator

every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


@every_sampler
@given(st.data())
def test_a_cohort_is_distinct_clients_ascending(sampler, data):
    num_clients = data.draw(st.integers(1, 300))
    num_sampled = data.draw(st.integers(1, num_clients))
    cohort = sampler(num_clients, num_sampled, generator("cohort", data.draw(st.integers(0, 100))))
    assert cohort.dtype == np.int64
    assert cohort.shape == (num_sampled,)
    assert (np.diff(cohort) > 0).all()
    assert cohort[0] >= 0
    assert cohort[-1] < num_clients


@every_sampler
def test_all_clients_are_everyone(sampler):
    assert sampler(7, 7, generator("cohort", 0)).tolist() == list(range(7))


@every_sampler
def test_a_cohort_is_a_function_of_its_stream(sampler):
    def cohort(seed, round):
        return sampler(1000, 20, generator("cohort", seed, round=round)).tolist()

    before = cohort(0, 1)
    np.random.seed(1)  # noqa: NPY002 - another library's doing
    random.seed(1)
    assert cohort(0, 1) == before
    assert cohort(1, 1) != before
    assert cohort(0, 2) != before


@every_sampler
def test_the_global_generators_are_left_alone(sampler):
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    sampler(10, 3, generator("cohort", 0))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


def test_every_cohort_is_equally_likely():
    rounds = 6000
    drawn = Counter(tuple(uniform(5, 2, generator("cohort", 0, round=r)).tolist()) for r in range(rounds))
    assert set(drawn) == set(itertools.combinations(range(5), 2))
    expected = rounds / 10
    chi_square = sum((n - expected) ** 2 / expected for n in drawn.values())
    assert chi_square < 27.9  # 9 degrees of freedom: exceeded once in a thousand seeds


def test_a_large_population_is_sampled_without_listing_it():
    cohort = uniform(10_000_000, 100, generator("cohort", 0))
    assert len(np.unique(cohort)) == 100
    assert cohort.max() > 5_000_000


def test_pinned_cohorts():
    # Part of the promise of equal bits: a change here changes every published run.
    cohorts = [uniform(100, 5, generator("cohort", 0, round=r)).tolist() for r in (1, 2)]
    assert cohorts == [[18, 25, 34, 88, 93], [2, 56, 60, 80, 97]]


@pytest.mark.parametrize(
    ("per_round", "count", "size"),
    [
        ("all", 10, 10),
        (3, 10, 3),
        (10, 10, 10),
        (1, 1, 1),
        (0.1, 100, 10),
        (0.0, 100, 1),  # C = 0 is one client in the paper
        (0.001, 100, 1),
        (0.999, 100, 100),
        (0.25, 10, 2),  # 2.5: halves to even
        (0.29, 100, 29),  # 28.999... in float64: rounded, not cut
    ],
)
def test_cohort_size(per_round, count, size):
    assert cohort_size(per_round, count) == size


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 10_000_000))
def test_a_fraction_is_never_nobody_nor_too_many(fraction, count):
    assert 1 <= cohort_size(fraction, count) <= count


def test_a_count_above_the_clients_is_refused():
    with pytest.raises(ConfigError, match=r"clients\.per_round = 20 is more than clients\.count = 10"):
        cohort_size(20, 10)


@pytest.mark.parametrize("per_round", [0, -1, 1.0, -0.1, 2.5, float("nan"), True, "some"])
def test_other_values_are_refused(per_round):
    with pytest.raises(
        ConfigError, match=r'clients\.per_round = .* must be "all", a whole number from 1, or a fraction'
    ):
        cohort_size(per_round, 10)
