"""Which clients take part in a round: samplers `(num_clients, num_sampled, rng) -> client_ids`.

A cohort is distinct clients in ascending order: the order in which their updates are handled and added. To add a
sampler, write a function and give it a line in `SAMPLERS`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fedsim.errors import ConfigError

Ints = npt.NDArray[np.int64]
Sampler = Callable[[int, int, np.random.Generator], Ints]


def cohort_size(per_round: str | int | float, num_clients: int) -> int:
    """How many clients a round has.

    Args:
        per_round: "all", a count, or a fraction C with 0 <= C < 1: max(1, round(C * num_clients)), halves to even.
        num_clients: K.

    Raises:
        ConfigError: another value, or a count above `num_clients`.

    Example:
        >>> cohort_size("all", 100), cohort_size(20, 100), cohort_size(0.1, 100), cohort_size(0.0, 100)
        (100, 20, 10, 1)

    Reference:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
        Algorithm 1: m <- max(C * K, 1). https://arxiv.org/abs/1602.05629
    """
    if per_round == "all":
        return num_clients
    if isinstance(per_round, float) and 0 <= per_round < 1:
        return max(1, round(per_round * num_clients))
    if not isinstance(per_round, int) or isinstance(per_round, bool) or per_round < 1:
        raise ConfigError(
            f'clients.per_round = {per_round!r} must be "all", a whole number from 1, or a fraction C with 0 <= C < 1'
        )
    if per_round > num_clients:
        raise ConfigError(f"clients.per_round = {per_round} is more than clients.count = {num_clients}")
    return per_round


def uniform(num_clients: int, num_sampled: int, rng: np.random.Generator) -> Ints:
    """Draws distinct clients, every cohort of that size equally likely.

    Args:
        num_clients: K.
        num_sampled: size of the cohort, from 1 to K; see `cohort_size`.
        rng: the only source of randomness, fresh for each round.

    Returns:
        client_ids, ascending, shape [num_sampled].
    """
    return np.sort(rng.choice(num_clients, size=num_sampled, replace=False, shuffle=False))


SAMPLERS: dict[str, Sampler] = {"uniform": uniform}
