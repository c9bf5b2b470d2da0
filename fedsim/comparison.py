"""Where rounds part from the recorded ones, or two runs from each other: results are compared, observations are not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from fedsim.errors import RunFolderError
from fedsim.metrics import CLIENT_COLUMNS, ROUND_COLUMNS, ClientRecord, RoundRecord, is_of_clients_evaluation
from fedsim.results import Run

_Rows = Mapping[int, Mapping[str, Any]]
_KEYS = ("run", "round", "client_id")
_OF_ALL = "cosine_to_mean"  # of a client and all others: compared later, as it would blame one for another's difference
_ROUND_RESULTS = [c.name for c in ROUND_COLUMNS if not c.is_observation and c.name not in _KEYS]
_CLIENT_RESULTS = [c.name for c in CLIENT_COLUMNS if not c.is_observation and c.name not in (*_KEYS, _OF_ALL)]


@dataclass(frozen=True)
class Difference:
    """A result that is not the recorded one."""

    round: int
    client_id: int | None
    """None in the round's own row."""
    column: str
    recorded: Any
    computed: Any
    """By verify and replay; of two runs, what the other one recorded."""

    def __str__(self) -> str:
        was, now = map(shown, (self.recorded, self.computed))
        return f"{self.where}: {self.column} was {was} in the run and is {now} here"

    @property
    def where(self) -> str:
        """The round, and the client if it is one's."""
        return f"round {self.round}" + ("" if self.client_id is None else f", client {self.client_id}")


class Recorded:
    """The rows of a run, as they are on disk now.

    Attributes:
        rounds: round -> its row.

    Raises:
        RunFolderError: a file is missing, damaged, or of a newer fedsim.
    """

    def __init__(self, run: Run) -> None:
        rounds, damage = run.read("rounds")  # in this order: a round's row is written last
        self._clients, more = run.read("clients")
        if damage or more:
            raise RunFolderError(f"the records of {run.path or run.name} cannot be compared: {[*damage, *more][0]}")
        self.rounds: dict[int, dict[str, Any]] = {row["round"]: _named(row) for row in rounds.to_dict("records")}

    @property
    def last(self) -> int:
        """The last round; -1 where there is none."""
        return max(self.rounds, default=-1)

    def clients(self, round: int) -> dict[int, dict[str, Any]]:
        """client_id -> its row, of one round."""
        rows = self._clients[self._clients["round"] == round].to_dict("records")
        return {row["client_id"]: _named(row) for row in rows}


def round_differences(record: RoundRecord, recorded: Recorded) -> Iterator[Difference]:
    """What differs in a round: first what each client did, in ascending client_id, then what was made of it."""
    computed = {client.client_id: vars(client) for client in record.clients}
    yield from _in_round(record.round, recorded.clients(record.round), computed)
    row = recorded.rounds.get(record.round)
    if row is None:
        yield Difference(record.round, None, "round", None, record.round)
    else:
        yield from _differences(record.round, None, _ROUND_RESULTS, row, vars(record))


def parting(one: Run, other: Run) -> Difference | None:
    """Where two runs part: the first round that differs, and in it the first client and result.

    Returns:
        None where all rounds that both have are equal.

    Raises:
        RunFolderError: the records of one cannot be read.
    """
    first, second = Recorded(one), Recorded(other)
    of_one: set[str] = set()
    """What only one of the two recorded: no difference in what both did."""
    if one.config.evaluation.clients != other.config.evaluation.clients:
        of_one = {name for name in (*_ROUND_RESULTS, *_CLIENT_RESULTS) if is_of_clients_evaluation(name)}
    for round in sorted(first.rounds.keys() & second.rounds.keys()):
        row, other_row = first.rounds[round], second.rounds[round]
        is_tested_once = _is_null(row["test_accuracy"]) != _is_null(other_row["test_accuracy"])
        without = of_one | ({"test_accuracy", "test_loss"} if is_tested_once else set())
        differences = itertools.chain(
            _in_round(round, first.clients(round), second.clients(round), without),
            _differences(round, None, _ROUND_RESULTS, row, other_row, without),
        )
        if found := next(differences, None):
            return found
    return None


def _in_round(round: int, rows: _Rows, others: _Rows, without: Set[str] = frozenset()) -> Iterator[Difference]:
    """What differs between the clients of a round, by client_id; some columns left out."""
    for client_id in sorted(rows.keys() | others.keys()):
        if client_id in rows and client_id in others:
            yield from _differences(round, client_id, _CLIENT_RESULTS, rows[client_id], others[client_id], without)
        else:
            there = [client_id if client_id in cohort else None for cohort in (rows, others)]
            yield Difference(round, client_id, "client_id", *there)
    for client_id in sorted(rows.keys() & others.keys()):
        yield from _differences(round, client_id, [_OF_ALL], rows[client_id], others[client_id])


def client_differences(record: ClientRecord, row: Mapping[str, Any]) -> Iterator[Difference]:
    """What differs in what a client did by itself: everything but its `cosine_to_mean`."""
    yield from _differences(record.round, record.client_id, _CLIENT_RESULTS, row, vars(record))


def _differences(
    round: int,
    client_id: int | None,
    columns: Iterable[str],
    row: Mapping[str, Any],
    computed: Mapping[str, Any],
    without: Set[str] = frozenset(),
) -> Iterator[Difference]:
    for column in columns:
        if column not in without and not _is_same(row[column], computed[column]):
            yield Difference(round, client_id, column, row[column], computed[column])


def _is_same(one: Any, other: Any) -> bool:
    return bool(one == other) or (_is_null(one) and _is_null(other))


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # pandas has NaN for both


def _named(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in row.items()}


def shown(value: Any) -> str:
    """A value for a person; of a hash, its beginning."""
    if _is_null(value):
        return "null"
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 20 else str(value)
