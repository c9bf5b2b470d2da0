"""Errors: what is said of others' errors, and of numbers of things."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.errors import counted, first_line


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("no room", "no room"),
        ("this is no file. Is it one?", "this is no file. Is it one?"),
        ("this is no file.", "this is no file"),
        ("\n first. \nsecond.", "first"),
        ("waiting...", "waiting..."),
        ("", "ValueError"),
        (" \n", "ValueError"),
    ],
)
def test_the_first_line_is_part_of_a_sentence(said, expected):
    assert first_line(ValueError(said)) == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, "0 runs"), (1, "1 run"), (2, "2 runs"), (1000, "1,000 runs"), (-1, "-1 runs"), (np.int64(1), "1 run")],
)
def test_things_are_counted(number, expected):
    assert counted(number, "run") == expected
