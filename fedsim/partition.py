"""Who has which training examples: partitioners, and the `Partition` they make.

A partitioner takes the training set's labels [N], the number of clients K, a generator as its only source of
randomness, and keyword-only arguments of its own. It returns one array a client: the client's indices into the training
set, int64, ascending (training shuffles them anyway, and ascending reads run through the data set in one direction).
No client is left empty; all but `sampled` are disjoint and covering: each example belongs to exactly one client.

To add one, write a function and give it a line in `PARTITIONERS`. The annotations of its keyword-only arguments say
what they mean and what is allowed; `config.tables.arguments` checks the configuration against them.

Letters: N examples, K clients, n_k examples of client k, C classes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedsim.errors import ConfigError

Ints = npt.NDArray[np.int64]
Partitioner = Callable[..., list[Ints]]


@dataclass(frozen=True, eq=False)
class Partition:
    """The shards of all clients as two flat arrays: one object to put into a store, whatever the number of clients.

    Example:
        >>> partition = Partition.of([np.array([0, 3]), np.array([1, 2, 4])])
        >>> partition.shard(1), partition.num_examples, partition.num_clients
        (array([1, 2, 4]), array([2, 3]), 2)
    """

    indices: Ints
    """Shape [sum n_k]: the shards one after the other, in client order."""
    offsets: Ints
    """Shape [K + 1]: client k's shard is indices[offsets[k]:offsets[k + 1]]."""

    @classmethod
    def of(cls, shards: list[Ints]) -> Partition:
        """Packs what a partitioner returned."""
        ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)
        return cls(np.concatenate(shards, dtype=np.int64), np.concatenate([[0], ends], dtype=np.int64))

    def shard(self, client_id: int) -> Ints:
        """The client's indices into the training set, shape [n_k]: a view, not a copy."""
        return self.indices[self.offsets[client_id] : self.offsets[client_id + 1]]

    @property
    def num_examples(self) -> Ints:
        """n_k of each client, shape [K]."""
        return np.diff(self.offsets)

    @property
    def num_clients(self) -> int:
        """K."""
        return len(self.offsets) - 1


def iid(labels: Ints, num_clients: int, rng: np.random.Generator) -> list[Ints]:
    """Shuffles the examples and deals them out evenly; leftovers go one each to the first clients.

    Raises:
        ConfigError: more clients than examples.

    Example:
        >>> [len(shard) for shard in iid(np.zeros(11, np.int64), 3, np.random.default_rng(0))]
        [4, 4, 3]
    """
    _check_count(len(labels), num_clients)
    return _by_owner(_shuffled_owners(_evenly(len(labels), num_clients), rng), num_clients)


def shards(
    labels: Ints,
    num_clients: int,
    rng: np.random.Generator,
    *,
    shards_per_client: Annotated[int, Field(ge=1, description="pieces of the label-sorted training set a client")] = 2,
) -> list[Ints]:
    """Sorts the examples by label, cuts them into K * shards_per_client shards and deals these out at random.

    Clients have N // K examples, and the first N % K of them one more, as in `iid`. A client's examples are split as
    evenly over its shards, so a shard has N // (K * shards_per_client) examples or one more. A client has about
    shards_per_client labels: a shard may cross from one to the next. The sort is stable: equal labels keep their order.

    Raises:
        ConfigError: more clients, or more shards, than examples.

    Reference:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
        section 3, the pathological non-IID partition: K = 100, 2 shards of 300 each. https://arxiv.org/abs/1602.05629
    """
    _check_count(len(labels), num_clients)
    _check_minimum(len(labels), num_clients, shards_per_client, "shards_per_client")
    num_shards = num_clients * shards_per_client
    owner_of_shard, size_of_shard = np.empty((2, num_shards), np.int64)
    dealt = rng.permutation(num_shards).reshape(num_clients, shards_per_client)  # the shards of each client
    owner_of_shard[dealt] = np.arange(num_clients)[:, None]
    size_of_shard[dealt] = _evenly(_evenly(len(labels), num_clients), shards_per_client)
    owners = np.empty(len(labels), np.int64)
    owners[np.argsort(labels, kind="stable")] = np.repeat(owner_of_shard, size_of_shard)
    return _by_owner(owners, num_clients)


def dirichlet(
    labels: Ints,
    num_clients: int,
    rng: np.random.Generator,
    *,
    alpha: Annotated[float, Field(gt=0, le=1e9, description="small = few classes a client, large = equal mixes")] = 0.5,
    min_examples: Annotated[int, Field(ge=1, description="every client gets at least this many examples")] = 1,
) -> list[Ints]:
    """Splits each class over the clients in proportions drawn from Dir_K(alpha, ..., alpha): label skew, unequal sizes.

    This is the form of Yurochkin et al. that most of the field calls "Dir(alpha)"; unlike Hsu et al. it deals out every
    example once. With many clients and equally frequent classes it gives each client a class mix q ~ Dir_C(alpha, ...),
    the population of Hsu et al., q ~ Dir(alpha' p) with prior p, at alpha' = alpha * C. There all clients have the same
    number of examples; here sizes vary, the more the smaller alpha is. Counts are rounded by largest remainder.

    Clients left with fewer than `min_examples` are filled up one example at a time from the client that is then the
    largest, out of its most frequent class. The proportions are not drawn again, so this always ends.

    Raises:
        ConfigError: more clients than examples, or not enough examples for `min_examples` each.

    References:
        Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
            2019, section 3. https://arxiv.org/abs/1909.06335
        Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019.
            https://arxiv.org/abs/1905.12022
        Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study", ICDE 2022.
            https://arxiv.org/abs/2102.02079
    """
    _check_count(len(labels), num_clients)
    _check_minimum(len(labels), num_clients, min_examples, "min_examples")
    classes, num_of_class = np.unique(labels, return_counts=True)
    proportions = rng.dirichlet(np.full(num_clients, alpha), size=len(classes))
    counts = np.stack([_apportion(n, p) for n, p in zip(num_of_class, proportions, strict=True)])
    owners = np.empty(len(labels), np.int64)
    for label, row in zip(classes, _fill_up(counts, min_examples), strict=True):
        owners[labels == label] = _shuffled_owners(row, rng)
    return _by_owner(owners, num_clients)


def quantity(
    labels: Ints,
    num_clients: int,
    rng: np.random.Generator,
    *,
    sigma: Annotated[float, Field(ge=0, le=100, description="deviation of the sizes' logarithm; 0 = equal")] = 1.0,
) -> list[Ints]:
    """Shuffles the examples and deals them out in log-normal sizes: quantity skew, IID labels.

    Sizes are N * s_k / sum s with log s_k ~ Normal(0, sigma), rounded by largest remainder; a client that would be left
    without an example gets one from the largest. At sigma = 1 two thirds of the sizes are within a factor e of the
    median; 0 gives the sizes of `iid`.

    Raises:
        ConfigError: more clients than examples.

    Reference:
        Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021 (unbalanced data).
        https://arxiv.org/abs/2111.04263
    """
    _check_count(len(labels), num_clients)
    logs = sigma * rng.standard_normal(num_clients)
    sizes = _apportion(len(labels), np.exp(logs - logs.max()))  # the largest is 1: exp cannot overflow
    return _by_owner(_shuffled_owners(_fill_up(sizes[None], 1)[0], rng), num_clients)


def sampled(
    labels: Ints,
    num_clients: int,
    rng: np.random.Generator,
    *,
    examples_per_client: Annotated[int, Field(ge=1, description="examples each client draws, with replacement")] = 600,
) -> list[Ints]:
    """Each client draws its examples uniformly with replacement: for scale studies with more clients than data.

    Clients overlap, an example may come twice within a client, and some may belong to nobody.

    Raises:
        ConfigError: there is no example to draw.
    """
    if len(labels) == 0:
        raise ConfigError(f"clients.count = {num_clients} clients cannot draw from 0 training examples")
    return list(np.sort(rng.integers(len(labels), size=(num_clients, examples_per_client), dtype=np.int64), axis=1))


def _check_count(num_examples: int, num_clients: int) -> None:
    if num_clients > num_examples:
        raise ConfigError(
            f"clients.count = {num_clients} clients cannot share {num_examples} training examples: at most "
            f'{num_examples} (or let them overlap with data.partition.name = "sampled")'
        )


def _check_minimum(num_examples: int, num_clients: int, minimum: int, key: str) -> None:
    if minimum * num_clients > num_examples:
        raise ConfigError(
            f"data.partition.{key} = {minimum} with clients.count = {num_clients} needs {minimum * num_clients} "
            f"training examples, and there are {num_examples}: at most {num_examples // num_clients}"
        )


def _evenly(total: int | Ints, num_parts: int) -> Ints:
    """Whole parts of each total, shape [..., num_parts], the first ones one larger where it does not divide."""
    totals: Ints = np.asarray(total, np.int64)[..., None]
    return totals // num_parts + (np.arange(num_parts) < totals % num_parts)


def _apportion(total: int, shares: npt.NDArray[np.float64]) -> Ints:
    """`total` in whole parts in proportion to `shares`, by largest remainder, the first among equals."""
    exact: npt.NDArray[np.float64] = shares / shares.sum() * total
    parts = np.floor(exact).astype(np.int64)
    parts[np.argsort(parts - exact, kind="stable")[: total - parts.sum()]] += 1
    return parts


def _fill_up(counts: Ints, minimum: int) -> Ints:
    """Examples of each class and client [C, K], moved until every client has `minimum`; the largest clients give.

    One example at a time goes from the client that is then the largest, out of its most frequent class.
    """
    counts = counts.copy()
    sizes = counts.sum(axis=0)
    largest = [(-size, k) for k, size in enumerate(sizes.tolist())]
    heapq.heapify(largest)
    for small in np.flatnonzero(sizes < minimum):
        for _ in range(minimum - sizes[small]):  # its own entry stays too low: a giver always has more than `minimum`
            size, k = largest[0]
            label = counts[:, k].argmax()
            counts[label, k] -= 1
            counts[label, small] += 1
            heapq.heapreplace(largest, (size + 1, k))
    return counts


def _shuffled_owners(sizes: Ints, rng: np.random.Generator) -> Ints:
    """The client of each example, client k for sizes[k] of them, at random; shape [sum of sizes]."""
    return rng.permutation(np.repeat(np.arange(len(sizes)), sizes))


def _by_owner(owners: Ints, num_clients: int) -> list[Ints]:
    """From the client of each example to the examples of each client, ascending."""
    ends = np.cumsum(np.bincount(owners, minlength=num_clients))
    return np.split(np.argsort(owners, kind="stable"), ends[:-1])


PARTITIONERS: dict[str, Partitioner] = {
    "iid": iid,
    "shards": shards,
    "dirichlet": dirichlet,
    "quantity": quantity,
    "sampled": sampled,
}
