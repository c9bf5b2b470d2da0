"""Where rounds part from the recorded ones: results are compared, observations are not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedsim.errors import RunFolderError
from fedsim.metrics import CLIENT_COLUMNS, ROUND_COLUMNS, ClientRecord, RoundRecord
from fedsim.results import Run, read

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

    def __str__(self) -> str:
        where = f"round {self.round}" + ("" if self.client_id is None else f", client {self.client_id}")
        return f"{where}: {self.column} was {_shown(self.recorded)} in the run and is {_shown(self.computed)} here"


class Recorded:
    """The rows of a run that are on disk now.

    Attributes:
        rounds: round -> its row.

    Raises:
        RunFolderError: a file is missing, damaged, or of a newer fedsim.
    """

    def __init__(self, run: Run) -> None:
        assert run.path is not None, "it is on disk"
        frames = []
        for kind in ("rounds", "clients"):  # in this order: a round's row is written last
            rows, damage = read(run.path, kind)
            if damage:
                raise RunFolderError(f"the records of {run.path} cannot be compared: {damage[0]}")
            frames.append(rows.to_pandas(use_threads=False))
        rounds, self._clients = frames
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
    rows, computed = recorded.clients(record.round), {client.client_id: client for client in record.clients}
    for client_id in sorted(rows.keys() | computed.keys()):
        if client_id in rows and client_id in computed:
            yield from client_differences(computed[client_id], rows[client_id])
        else:
            there = [client_id if client_id in cohort else None for cohort in (rows, computed)]
            yield Difference(record.round, client_id, "client_id", *there)
    for client_id in sorted(rows.keys() & computed.keys()):
        yield from _differences(record.round, client_id, [_OF_ALL], rows[client_id], vars(computed[client_id]))
    row = recorded.rounds.get(record.round)
    if row is None:
        yield Difference(record.round, None, "round", None, record.round)
    else:
        yield from _differences(record.round, None, _ROUND_RESULTS, row, vars(record))


def client_differences(record: ClientRecord, row: Mapping[str, Any]) -> Iterator[Difference]:
    """What differs in what a client did by itself: everything but its `cosine_to_mean`."""
    yield from _differences(record.round, record.client_id, _CLIENT_RESULTS, row, vars(record))


def _differences(
    round: int, client_id: int | None, columns: Iterable[str], row: Mapping[str, Any], computed: Mapping[str, Any]
) -> Iterator[Difference]:
    for column in columns:
        if column in row and not _is_same(row[column], computed[column]):  # columns are added: an old run has fewer
            yield Difference(round, client_id, column, row[column], computed[column])


def _is_same(one: Any, other: Any) -> bool:
    return bool(one == other) or (_is_null(one) and _is_null(other))


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # pandas has NaN for both


def _named(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in row.items()}


def _shown(value: Any) -> str:
    if _is_null(value):
        return "null"
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 20 else str(value)
