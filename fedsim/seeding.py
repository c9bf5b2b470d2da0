"""Every random stream of fedsim, derived from (seed, purpose, round, client, epoch).

A stream is a function of what it is for, never of when or where it is drawn: so actors, packing, retries and resumes
cannot change a draw. No global generator is read or written here.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Purpose = Literal["init", "partition", "cohort", "shuffle", "dataset", "model", "evaluation", "client_evaluation"]

# Part of the results: a code is never changed or used again. Four seed torch's generator: "init" while the model is
# built, "model" during a client's training (dropout), "evaluation" for a chunk of the test set, "client_evaluation" for
# one of a client's shard.
_CODES: dict[Purpose, int] = {
    "init": 1,
    "partition": 2,
    "cohort": 3,
    "shuffle": 4,
    "dataset": 5,
    "model": 6,
    "evaluation": 7,
    "client_evaluation": 8,
}


def _sequence(purpose: Purpose, seed: int, round: int, client: int, epoch: int) -> np.random.SeedSequence:
    # The seed comes last: numpy's rule for lists of which one part is chosen by a person.
    return np.random.SeedSequence([_CODES[purpose], round, client, epoch, seed])


def generator(purpose: Purpose, seed: int, *, round: int = 0, client: int = 0, epoch: int = 0) -> np.random.Generator:
    """A fresh numpy generator (PCG64) for one purpose at one point of a run.

    Args:
        purpose: what the draw is for; streams of different purposes are independent.
        seed: the run's seed, 0 or more.
        round: communication round, where the draw belongs to one.
        client: client_id, where the draw belongs to one.
        epoch: local epoch, where the draw belongs to one.

    Example:
        >>> first = generator("shuffle", seed=0, round=3, client=7).permutation(5)
        >>> again = generator("shuffle", seed=0, round=3, client=7).permutation(5)
        >>> bool((first == again).all())
        True
    """
    return np.random.Generator(np.random.PCG64(_sequence(purpose, seed, round, client, epoch)))


def torch_seed(purpose: Purpose, seed: int, *, round: int = 0, client: int = 0, epoch: int = 0) -> int:
    """A seed in [0, 2**63) for a torch generator, from the same streams as `generator`."""
    state = _sequence(purpose, seed, round, client, epoch).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
