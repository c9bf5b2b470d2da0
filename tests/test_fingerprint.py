"""The fingerprint shows where two processes would not compute the same bits."""

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.fingerprint import fingerprint
from fedsim.numerics import numerics

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with numerics(1):
        yield


IN_A_NEW_PROCESS = """
import torch
from fedsim.fingerprint import fingerprint
from fedsim.numerics import set_numerics
torch.manual_seed(12345)
set_numerics(1)
print(fingerprint(torch.device("cpu")))
"""


@pytest.mark.long
def test_the_fingerprint_is_16_hex_digits_equal_in_all_processes():
    """That is: with the same packages, processor and threads."""
    first = fingerprint(CPU)
    assert re.fullmatch("[0-9a-f]{16}", first)
    torch.rand(3)
    assert fingerprint(CPU) == first
    answer = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == first


@pytest.mark.parametrize("function", [(F, "cross_entropy"), (torch, "baddbmm")], ids=["loop", "stacked"])
def test_the_fingerprint_shows_another_arithmetic(monkeypatch, function):
    """Of either engine: a difference in the last bits of a float32."""
    first = fingerprint(CPU)
    original = getattr(*function)

    def in_double(*args: Tensor) -> Tensor:
        return original(*(x.double() if x.is_floating_point() else x for x in args)).float()

    monkeypatch.setattr(*function, in_double)
    assert fingerprint(CPU) != first
