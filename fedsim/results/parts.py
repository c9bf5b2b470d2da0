"""The part files of a run's records: written whole, checked to the byte, and taken back where a run goes on earlier.

rounds.parquet/part-000012-000019.parquet     the rows of rounds 12 to 19
clients.parquet/part-000012-000019.parquet    those of their clients, published before
*/part-empty.parquet                          typed and without a row, so that the folders can be read from the start
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fedsim.errors import NewerVersionError, RunFolderError, first_line
from fedsim.files import publish
from fedsim.metrics import (
    CLIENT_COLUMNS,
    CLIENT_SCHEMA,
    ROUND_COLUMNS,
    ROUND_SCHEMA,
    SCHEMA_VERSION,
    VERSION_KEY,
    table,
)
from fedsim.targets import MEASURES

SCHEMAS = {"rounds": ROUND_SCHEMA, "clients": CLIENT_SCHEMA}
_COLUMNS = {"rounds": ROUND_COLUMNS, "clients": CLIENT_COLUMNS}
EMPTY = "part-empty.parquet"
_PART = re.compile(r"part-(\d{6})-(\d{6})\.parquet")
_EVALUATION = ("test_loss", "test_accuracy")


class Row(NamedTuple):
    """What going on with a run asks of a round's row."""

    weights_sha256: str
    is_evaluated: bool
    is_lost: bool
    """Clients were sampled, and not one of them completed."""
    num_dropped: int
    measures: dict[str, float | None]
    """The columns that can be a target."""


@dataclass
class Whole:
    """The records of a run that are whole: from round 0 on, with all clients of each round."""

    parts: dict[str, int] = field(default_factory=dict)
    """Name of a part of both folders -> its last round; ascending."""
    rounds: list[Row] = field(default_factory=list)
    """Of round 0, 1, ..."""
    names: set[str] = field(default_factory=set)
    """The run's name in the rows: one, if all is well."""
    damage: str | None = None
    """What is wrong with the first part that is not whole, and which it is; None where all are."""

    @property
    def last(self) -> int:
        """The last whole round; -1 where there is none."""
        return len(self.rounds) - 1


def write(folder: Path, kind: str, name: str, rows: pa.Table) -> Path:
    """Publishes a part of a run's `kind`, rounds or clients, with a checksum on every page of it."""
    buffer = io.BytesIO()
    # what serves large files costs a part of a few rows a third of its time, to be written and to be read
    pq.write_table(rows, buffer, use_dictionary=False, write_statistics=False, write_page_checksum=True)
    path = folder / f"{kind}.parquet" / name
    publish(path, buffer.getvalue())
    return path


def write_rows(folder: Path, kind: str, first: int, last: int, rows: list[dict[str, Any]]) -> Path:
    """Publishes the rows of rounds `first` to `last`."""
    return write(folder, kind, f"part-{first:06d}-{last:06d}.parquet", table(rows, SCHEMAS[kind]))


def write_empty(folder: Path) -> None:
    """Makes both folders where they are missing, and their parts without a row."""
    for kind, schema in SCHEMAS.items():
        (folder / f"{kind}.parquet").mkdir(exist_ok=True)
        write(folder, kind, EMPTY, table([], schema))


def read(folder: Path, kind: str) -> tuple[pa.Table, list[str]]:
    """The rows of a run's `kind` that can be read, as a table of the present schema, and what is wrong with the others.

    They are in part files that are damaged, or missing though later ones are there, or the same rounds' of the other
    kind. Columns that are younger than a part are null in its rows.

    Raises:
        NewerVersionError: a part is of a newer fedsim.
        RunFolderError: there is not a single part, or a file lies where the folder of one kind should.
    """
    tables = [SCHEMAS[kind].empty_table()]
    found, damage = _listed(folder, kind)
    for name in found:
        try:
            _check_ours(folder, kind, name)
            tables.append(_read(folder, kind, name))
        except NewerVersionError:
            raise
        except RunFolderError as error:
            damage.append(str(error))
    return pa.concat_tables(tables), damage


def names(folder: Path, kind: str) -> list[str]:
    """Of all files that are a run's `kind`, or lie among them.

    Raises:
        RunFolderError: there is not a single one.
    """
    found = _visible(folder, kind)
    if not found:
        raise RunFolderError(f"{folder / f'{kind}.parquet'} is missing, or has lost all of its parts")
    return found


def find_whole(folder: Path) -> Whole:
    """Reads every part in a run's folder and says how far its records are whole; changes nothing.

    Parts of an older fedsim are whole too, and a run may go on after them: plain pandas then shows the columns of the
    first part, and no value is hidden, as a column that came later belongs to a key that the run could not have.

    Raises:
        NewerVersionError: a part is of a newer fedsim.
        RunFolderError: among the parts lies a file that is not fedsim's.
    """
    whole = Whole()
    for kind in SCHEMAS:
        for name in _visible(folder, kind):
            _check_ours(folder, kind, name)
    try:
        for name in sorted(name for name in _visible(folder, "rounds") if name != EMPTY):
            _read_pair(folder, name, whole)
        for kind in SCHEMAS:
            if _read(folder, kind, EMPTY).num_rows:
                raise RunFolderError(f"{folder / f'{kind}.parquet' / EMPTY} is not empty")
    except NewerVersionError:
        raise
    except RunFolderError as error:
        whole.damage = str(error)
    return whole


def take_back(folder: Path, keep: set[str]) -> None:
    """Removes all parts but some, newest first and rounds before clients: what a reader sees is always whole."""
    for kind in SCHEMAS:
        for name in sorted(_visible(folder, kind), reverse=True):
            if name not in keep and _PART.fullmatch(name):
                (folder / f"{kind}.parquet" / name).unlink()


def forget_evaluation(folder: Path, name: str, round: int) -> None:
    """Makes the test columns of a round null, as they are in a run that goes on after it."""
    rows = _read(folder, "rounds", name)
    place = rows["round"].to_pylist().index(round)
    for column in _EVALUATION:
        values = rows[column].to_pylist()
        values[place] = None
        index = rows.schema.get_field_index(column)
        rows = rows.set_column(index, rows.schema.field(index), pa.array(values, rows.schema.field(index).type))
    write(folder, "rounds", name, rows)


def _visible(folder: Path, kind: str) -> list[str]:
    path = folder / f"{kind}.parquet"
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path} is not a folder: move it elsewhere")
    return [file.name for file in path.glob("[!.]*")]


def _listed(folder: Path, kind: str) -> tuple[list[str], list[str]]:
    """The files of a run's `kind` in the order of their rounds, and which are missing."""
    for _ in range(2):  # of a run still going, a listing may have a new part and not the one before it
        of_rounds = _visible(folder, "rounds")  # before the clients, which are written first
        found = sorted(names(folder, kind))
        missing = _gaps(folder, found) if kind == "rounds" else _alone(folder, of_rounds, found)
        if not missing:
            break
    return found, missing


def _gaps(folder: Path, names: list[str]) -> list[str]:
    """Rounds that no part of `rounds` has, and a later one follows."""
    missing, expected = [], 0
    for first, last in (map(int, match.groups()) for match in map(_PART.fullmatch, names) if match):
        if first > expected:
            missing.append(lacking(folder, expected, first - 1))
        expected = max(expected, last + 1)
    return missing


def _alone(folder: Path, of_rounds: list[str], of_clients: list[str]) -> list[str]:
    """Parts of clients that are not there, though those of their rounds are; round 0 has none."""
    matches = [match for match in map(_PART.fullmatch, sorted(of_rounds)) if match]
    alone = [match[0] for match in matches if int(match[2]) > 0 and match[0] not in of_clients]
    return [f"{folder / 'clients.parquet' / name} is missing" for name in alone]


def lacking(folder: Path, first: int, last: int) -> str:
    """What is wrong with a run that has no rows of some rounds."""
    rounds = f"round {first}" if first == last else f"rounds {first} to {last}"
    return f"{folder / 'rounds.parquet'} lacks the part with {rounds}"


def _check_ours(folder: Path, kind: str, name: str) -> None:
    if name != EMPTY and not _PART.fullmatch(name):
        raise RunFolderError(f"{folder / f'{kind}.parquet' / name} is not fedsim's: move it elsewhere")


def _read(folder: Path, kind: str, name: str) -> pa.Table:
    """A part with all its checksums compared, as a table of the present schema.

    Raises:
        NewerVersionError: it is of a newer fedsim.
        RunFolderError: it is missing, damaged, or has other columns.
    """
    path = folder / f"{kind}.parquet" / name
    try:
        # On threads of its own, pyarrow now and then aborts a process that ends soon after ("terminate called ...").
        file = pq.ParquetFile(pa.BufferReader(path.read_bytes()), pre_buffer=False, page_checksum_verification=True)
        rows = file.read(use_threads=False)
    except FileNotFoundError:
        raise RunFolderError(f"{path} is missing") from None
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise RunFolderError(f"{path} is damaged: {first_line(error)}") from None
    version = (rows.schema.metadata or {}).get(VERSION_KEY, b"")
    if version.isdigit() and int(version) > SCHEMA_VERSION:
        raise NewerVersionError(
            f"{path} is of schema version {int(version)}, this fedsim reads {SCHEMA_VERSION}; update fedsim"
        )
    if rows.schema.equals(SCHEMAS[kind]):
        return rows
    if not rows.schema.equals(_schema_of(kind, version)):
        raise RunFolderError(f"{path} is damaged: its columns are not those of a run's {kind}")
    return pa.concat_tables([SCHEMAS[kind].empty_table(), rows], promote_options="default")


def _schema_of(kind: str, version: bytes) -> pa.Schema:
    """The columns that a kind had in an earlier schema version; none where it is no version."""
    number = int(version) if version.isdigit() else 0
    return pa.schema([SCHEMAS[kind].field(column.name) for column in _COLUMNS[kind] if column.since <= number])


def _read_pair(folder: Path, name: str, whole: Whole) -> None:
    """Adds a part of rounds to what is whole, once it and its clients' part are.

    Raises:
        RunFolderError: they are not.
    """
    match = _PART.fullmatch(name)
    assert match is not None
    first, last = int(match[1]), int(match[2])
    path, expected = folder / "rounds.parquet" / name, whole.last + 1
    if first != expected:
        raise RunFolderError(f"{path} does not follow on: a part from round {expected} on is missing")
    rounds = _read(folder, "rounds", name)
    if rounds["round"].to_pylist() != list(range(first, last + 1)):
        raise RunFolderError(f"{path} is damaged: it does not have one row for each of its rounds")
    needed = ["round", "num_sampled", "num_completed", "num_dropped", "weights_sha256", *MEASURES]
    rows = rounds.select(needed).to_pylist()
    sampled = {row["round"]: row["num_sampled"] for row in rows if row["num_sampled"]}
    names = set(rounds["run"].unique().to_pylist())
    if sampled:
        clients = _read(folder, "clients", name)
        names |= set(clients["run"].unique().to_pylist())
        counts = clients.group_by("round").aggregate([("client_id", "count"), ("client_id", "count_distinct")])
        found = {row["round"]: (row["client_id_count"], row["client_id_count_distinct"]) for row in counts.to_pylist()}
        if found != {round: (number, number) for round, number in sampled.items()}:
            raise RunFolderError(
                f"{folder / 'clients.parquet' / name} is damaged: it does not have one row for each sampled client"
            )
    for row in rows:
        is_evaluated = any(row[column] is not None for column in _EVALUATION)
        is_lost = row["num_sampled"] > 0 and row["num_completed"] == 0
        measures = {column: row[column] for column in MEASURES}
        whole.rounds.append(Row(row["weights_sha256"], is_evaluated, is_lost, row["num_dropped"], measures))
    whole.names |= names
    whole.parts[name] = last
