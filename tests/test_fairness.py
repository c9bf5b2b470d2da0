import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.fairness import Fairness, fairness

FRACTIONS = st.floats(0, 1)


@pytest.mark.parametrize(
    ("accuracies", "mean", "worst_decile", "variance"),
    [
        ([0.5], 0.5, 0.5, 0.0),
        ([1.0, 0.0], 0.5, 0.0, 0.25),
        ([0.25, 0.25, 0.25, 0.25], 0.25, 0.25, 0.0),
        ([0.75] * 9 + [0.25], 0.7, 0.25, 0.0225),  # ten clients: the worst one
        ([0.75] * 9 + [0.25, 0.5], 7.5 / 11, 0.375, None),  # eleven: the worst two
        ([1.0] * 18 + [0.0, 0.5], 0.925, 0.25, None),  # twenty: two still
        ([1.0] * 18 + [0.0, 0.5, 1.0], 19.5 / 21, 0.5, None),  # twenty-one: three
    ],
)
def test_by_hand(accuracies, mean, worst_decile, variance):
    found = fairness(accuracies)
    assert found.mean == pytest.approx(mean, rel=1e-15)
    assert found.worst_decile == worst_decile
    if variance is not None:
        assert found.variance == pytest.approx(variance, rel=1e-12)


def test_who_was_not_tested_is_left_out():
    assert fairness([None, 0.5, None, 1.0]) == fairness([0.5, 1.0]) == Fairness(0.75, 0.5, 0.0625)
    assert fairness([]) == fairness([None, None]) == Fairness(None, None, None)


@given(st.lists(FRACTIONS, min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_any_order_gives_the_same_bits_and_they_are_those_of_exact_arithmetic(accuracies, random):
    found = fairness(accuracies)
    shuffled = accuracies.copy()
    random.shuffle(shuffled)
    assert fairness(shuffled) == found
    exact = [Fraction(value) for value in accuracies]
    mean, size = sum(exact) / len(exact), math.ceil(len(exact) / 10)
    assert found.mean == pytest.approx(float(mean), rel=1e-15)
    assert found.worst_decile == pytest.approx(float(sum(sorted(exact)[:size]) / size), rel=1e-15)
    assert found.variance == pytest.approx(float(sum((v - mean) ** 2 for v in exact) / len(exact)), abs=1e-15)
    assert found.worst_decile <= found.mean * (1 + 1e-15)
