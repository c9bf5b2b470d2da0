"""A strategy's state between two rounds: what may be one, and how the strategy gets it back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedsim.errors import RunFailedError
from fedsim.strategies import State


def check_state(state: Any, origin: str) -> State:
    """The state, if a checkpoint can hold it: a dictionary from names to dense tensors, {} for none.

    Args:
        state: what a strategy gave.
        origin: which round and function gave it, for the message.

    Raises:
        RunFailedError: it is something else.
    """
    allowed = "a state is a dict from names to dense tensors, {} for none"
    if not isinstance(state, dict):
        raise RunFailedError(f"{origin} gave {type(state).__name__} as its state; {allowed}")
    for name, value in state.items():
        if not isinstance(name, str) or name == "__metadata__":  # the one name that safetensors keeps for itself
            raise RunFailedError(f"{origin} gave a state with the key {name!r}; {allowed}")
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            given = f"a {value.layout} tensor" if isinstance(value, Tensor) else type(value).__name__
            raise RunFailedError(f"{origin} gave a state whose {name!r} is {given}; {allowed}")
    return state


def copied(state: State) -> State:
    """A copy that shares no memory, each tensor contiguous and on the CPU: what a checkpoint gives back.

    The strategy gets its state like this in every round, so that a resumed run gives it nothing else, and so that
    what it changes in place is its own, not what a checkpoint is yet to hold.
    """
    return {name: own_memory(tensor) for name, tensor in state.items()}


def own_memory(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU, without a gradient."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
