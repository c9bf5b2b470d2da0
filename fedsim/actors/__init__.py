"""Where clients are hosted: a pool of Ray actors, or this process. Both have the interface `Pool`.

Only `private`, `handshake`, `cluster`, `connection`, `host` and `ray_pool` import ray, and they are imported only when
a plan asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fedsim.client import ClientSpec, ClientUpdate
    from fedsim.config import FailuresConfig
    from fedsim.datasets import Dataset
    from fedsim.partition import Partition
    from fedsim.placement import Plan
    from fedsim.training import Evaluation
    from fedsim.weights import Weights


@dataclass(frozen=True, eq=False)
class Assignment:
    """What the hosts of a pool are to do."""

    spec: ClientSpec
    dataset: Dataset
    partition: Partition
    cohort_size: int
    weights: Weights
    """Of the size and type of those to come."""
    failures: FailuresConfig
    replan: Callable[[], Plan | None]
    """Gives a plan for the nodes that there are by now; None if they are not fit for it."""


@dataclass(frozen=True)
class PoolInfo:
    """What is known of a pool once it is up."""

    device: str
    fingerprint: str
    """Of the arithmetic: equal on all actors."""
    num_forked: int = 0
    """Of its actors, those that were forked from a process that had torch loaded."""


@dataclass(frozen=True)
class FitResult:
    """What became of one client's work, and how."""

    client_id: int
    num_examples: int
    """Of its shard."""
    update: ClientUpdate | None
    """None where the client was left out."""
    actor: int
    """Number of the actor; -1 without Ray."""
    attempts: int
    error: str | None = None
    """Why it was left out."""


class Pool(Protocol):
    """Hosts of clients. Answers never depend on which host gave them, nor on their order."""

    @property
    def info(self) -> PoolInfo:
        """Device and fingerprint."""
        ...

    def fit(self, round: int, weights: Weights, cohort: Sequence[int]) -> list[FitResult]:
        """Trains the clients of a round from the same weights; answers in ascending client_id.

        Raises:
            ClientError: a client's own code raised.
            RunFailedError: a client's work could not be finished.
        """
        ...

    def evaluate(self, round: int, weights: Weights, then: Sequence[int] = ()) -> Evaluation:
        """Tests the weights on the whole test set, in fixed chunks added in chunk order.

        Args:
            round: whose weights they are.
            weights: after the round's aggregation.
            then: the cohort that `fit` will be asked to train from them next: it may begin at once.
        """
        ...

    def close(self) -> None:
        """Frees what the pool holds."""
        ...
