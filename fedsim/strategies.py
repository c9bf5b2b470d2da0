"""What the server does with a round's updates: pairs of pure functions with explicit state.

`init(weights) -> state` and `aggregate(state, weights, updates, num_examples) -> (weights, state)`, where a state is
a dictionary of tensors, so that it can be saved with the weights. To add a strategy, write one builder and give it a
line in `STRATEGIES`; from Python, pass a `Strategy` to `fedsim.run(strategy=...)`.

Torch is not imported here, so that the table can be read without: tensors are made from those that are given.

Shape letters: K completed clients of the round in ascending client_id, D values of the model.

References:
    fedavg: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
        Algorithm 1. https://arxiv.org/abs/1602.05629
    fedavgm: Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
        Classification", 2019, section 4.3. https://arxiv.org/abs/1909.06335
    fedadam: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 2. https://arxiv.org/abs/2003.00295
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import Field

if TYPE_CHECKING:
    from torch import Tensor

State: TypeAlias = "dict[str, Tensor]"


@dataclass(frozen=True)
class Strategy:
    """A server algorithm.

    Attributes:
        init: weights [D] -> state before the first round.
        aggregate: (state, weights [D], updates [K, D] = w_k - w, num_examples [K] int64) -> new weights [D] of the
            same type, new state. Inputs are not modified; the loop gives copies all the same, contiguous and on the
            CPU, as after a resume. `num_examples` is all ones under uniform weighting.
    """

    init: Callable[[Tensor], State]
    aggregate: Callable[[State, Tensor, Tensor, Tensor], tuple[Tensor, State]]


def weighted_mean(updates: Tensor, num_examples: Tensor) -> Tensor:
    """sum_k n_k update_k / sum_k n_k, added in client order in float64.

    A float32 value times a count is exact in float64, so only the additions round: neither threads nor vector width
    change a bit.

    Args:
        updates: shape [K, D].
        num_examples: n_k, shape [K], int64.

    Returns:
        The mean, shape [D], float64.

    Example:
        >>> import torch
        >>> weighted_mean(torch.tensor([[1.0], [4.0]]), torch.tensor([2, 1]))
        tensor([2.], dtype=torch.float64)
    """
    total = updates.new_zeros(updates.shape[1]).double()
    for update, n in zip(updates, num_examples.tolist(), strict=True):
        total.add_(update, alpha=n)
    return total.div_(float(num_examples.sum()))


def fedavg() -> Strategy:
    """Federated averaging: w <- w + sum_k n_k update_k / sum_k n_k, rounded once to the weights' type."""

    def aggregate(state: State, weights: Tensor, updates: Tensor, num_examples: Tensor) -> tuple[Tensor, State]:
        return (weights.double() + weighted_mean(updates, num_examples)).to(weights.dtype), state

    return Strategy(init=lambda weights: {}, aggregate=aggregate)


def fedavgm(
    *,
    server_lr: Annotated[float, Field(gt=0, description="step of the server")] = 1.0,
    server_momentum: Annotated[float, Field(ge=0, lt=1, description="share of the last step that is kept")] = 0.9,
) -> Strategy:
    """Averaging with server momentum: v <- server_momentum v + mean update; w <- w + server_lr v."""

    def init(weights: Tensor) -> State:
        return {"velocity": weights.new_zeros(len(weights)).double()}

    def aggregate(state: State, weights: Tensor, updates: Tensor, num_examples: Tensor) -> tuple[Tensor, State]:
        velocity = server_momentum * state["velocity"] + weighted_mean(updates, num_examples)
        return (weights.double() + server_lr * velocity).to(weights.dtype), {"velocity": velocity}

    return Strategy(init, aggregate)


def fedadam(
    *,
    server_lr: Annotated[float, Field(gt=0, description="step of the server")] = 0.01,
    beta1: Annotated[float, Field(ge=0, lt=1, description="memory of the first moment")] = 0.9,
    beta2: Annotated[float, Field(ge=0, lt=1, description="memory of the second moment")] = 0.99,
    tau: Annotated[float, Field(gt=0, description="adaptivity: the floor of the second moment's root")] = 0.001,
) -> Strategy:
    """Adam on the server, the mean update as pseudo-gradient; no bias correction, second moment from tau^2.

    m <- beta1 m + (1 - beta1) u;  v <- beta2 v + (1 - beta2) u^2;  w <- w + server_lr m / (sqrt(v) + tau).
    """

    def init(weights: Tensor) -> State:
        zeros = weights.new_zeros(len(weights)).double()
        return {"first_moment": zeros, "second_moment": zeros + tau**2}

    def aggregate(state: State, weights: Tensor, updates: Tensor, num_examples: Tensor) -> tuple[Tensor, State]:
        update = weighted_mean(updates, num_examples)
        first = beta1 * state["first_moment"] + (1 - beta1) * update
        second = beta2 * state["second_moment"] + (1 - beta2) * update.square()
        stepped = weights.double() + server_lr * first / (second.sqrt() + tau)
        return stepped.to(weights.dtype), {"first_moment": first, "second_moment": second}

    return Strategy(init, aggregate)


STRATEGIES: dict[str, Callable[..., Strategy]] = {"fedavg": fedavg, "fedavgm": fedavgm, "fedadam": fedadam}
