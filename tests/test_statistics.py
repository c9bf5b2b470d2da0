"""Means and their confidence intervals."""

import math

import numpy as np
import pytest

from fedsim.statistics import interval


def test_by_hand():
    """Mean 4, deviation 2, three values: 4.302653 * 2 / sqrt(3), with the quantile from a table."""
    found = interval([2.0, 4.0, 6.0])
    assert found.mean == 4.0
    assert found.high - found.mean == pytest.approx(4.302653 * 2 / math.sqrt(3), rel=1e-6)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert found.number == 3


def test_equal_values_have_no_width():
    assert interval([0.5] * 4)[:3] == (0.5, 0.5, 0.5)


def test_one_value_has_no_interval():
    found = interval([0.5])
    assert found.mean == 0.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert str(found) == "0.5"


def test_no_value_has_no_mean():
    assert math.isnan(interval([]).mean)
    assert interval([]).number == 0


def test_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [interval(rng.normal(1.0, 2.0, size=3).tolist()) for _ in range(2000)]
    share = sum(each.low <= 1.0 <= each.high for each in found) / len(found)
    assert 0.93 < share < 0.97  # 0.95, and its own deviation is 0.005
