"""The records of a run: what the columns of rounds.parquet and clients.parquet are called and mean.

This module is the one place for names, types, units and descriptions; the README's tables are made from it. Columns
are added, never renamed. A column is a *result* (equal between equal runs) or an *observation* (may differ).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

import pyarrow as pa

SCHEMA_VERSION = 2
"""Grows when columns are added: `Column.since`."""

VERSION_KEY = b"fedsim_schema_version"
"""Of the schema's metadata in every part."""

ClientStatus = Literal["completed", "failed", "rejected", "dropped"]


class Column(NamedTuple):
    """One column: its Arrow type, unit ("" for none), meaning, and whether equal runs may differ in it.

    `since` is the schema version that added it.
    """

    name: str
    type: pa.DataType
    unit: str
    description: str
    is_observation: bool = False
    since: int = 1


_COUNT, _FLOAT, _TEXT, _TIME = pa.int64(), pa.float64(), pa.string(), pa.timestamp("us", tz="UTC")

ROUND_COLUMNS = (
    Column("run", _TEXT, "", "name of the run"),
    Column("round", pa.int32(), "", "communication round; 0 is the initial weights"),
    Column("started_at", _TIME, "", "when the round began, UTC", True),
    Column("num_sampled", _COUNT, "clients", "cohort of the round"),
    Column("num_completed", _COUNT, "clients", "whose update was averaged"),
    Column("num_failed", _COUNT, "clients", "given up after all retries"),
    Column("num_rejected", _COUNT, "clients", "whose update was not finite"),
    Column("num_dropped", _COUNT, "clients", "left out"),
    Column("num_retries", _COUNT, "", "times a client's work was started again", True),
    Column("num_examples", _COUNT, "examples", "of the completed clients' shards"),
    Column("train_loss", _FLOAT, "nats", "example-weighted mean of the completed clients' train_loss"),
    Column("test_loss", _FLOAT, "nats", "mean on the test set after aggregation; null where not evaluated"),
    Column("test_accuracy", _FLOAT, "fraction", "on the test set after aggregation; null where not evaluated"),
    Column(
        "accuracy_before_mean",
        _FLOAT,
        "fraction",
        "mean of the completed clients' accuracy_before, each counting once",
        since=2,
    ),
    Column("accuracy_before_worst_decile", _FLOAT, "fraction", "mean of the worst tenth of them", since=2),
    Column(
        "accuracy_before_variance", _FLOAT, "", "population variance of the completed clients' accuracy_before", since=2
    ),
    Column(
        "accuracy_after_mean",
        _FLOAT,
        "fraction",
        "mean of the completed clients' accuracy_after, each counting once",
        since=2,
    ),
    Column("accuracy_after_worst_decile", _FLOAT, "fraction", "mean of the worst tenth of them", since=2),
    Column(
        "accuracy_after_variance", _FLOAT, "", "population variance of the completed clients' accuracy_after", since=2
    ),
    Column("update_l2_norm", _FLOAT, "", "length of the step the server took"),
    Column("bytes_down", _COUNT, "bytes", "weights sent to the sampled clients"),
    Column("bytes_up", _COUNT, "bytes", "updates received from the completed clients"),
    Column("weights_sha256", _TEXT, "", "hash of the weights after aggregation"),
    Column("round_s", _FLOAT, "s", "the whole round", True),
    Column("fit_s", _FLOAT, "s", "until the last client's answer", True),
    Column("aggregate_s", _FLOAT, "s", "the server's step", True),
    Column("evaluate_s", _FLOAT, "s", "test on the whole test set", True),
)

CLIENT_COLUMNS = (
    Column("run", _TEXT, "", "name of the run"),
    Column("round", pa.int32(), "", "communication round, from 1"),
    Column("client_id", pa.int32(), "", "client, from 0"),
    Column("status", _TEXT, "", "completed, failed, rejected (update not finite), dropped"),
    Column("num_examples", _COUNT, "examples", "of the client's shard"),
    Column("num_steps", _COUNT, "steps", "of local SGD"),
    Column("train_loss", _FLOAT, "nats", "mean over the examples processed, each before its step"),
    Column("loss_before", _FLOAT, "nats", "on its own shard, before training; null where not finite", since=2),
    Column("accuracy_before", _FLOAT, "fraction", "on its own shard, before training", since=2),
    Column("loss_after", _FLOAT, "nats", "on its own shard, after training; null where not finite", since=2),
    Column("accuracy_after", _FLOAT, "fraction", "on its own shard, after training; null where rejected", since=2),
    Column("update_l2_norm", _FLOAT, "", "length of the client's update"),
    Column("cosine_to_mean", _FLOAT, "", "between the client's update and the round's weighted mean, -1 to 1"),
    Column("update_sha256", _TEXT, "", "hash of the client's update"),
    Column("fit_s", _FLOAT, "s", "local training; of the whole stack where clients share one", True),
    Column("stack_size", pa.int32(), "clients", "trained together in one computation", True),
    Column("attempts", pa.int32(), "", "times the client's work was started", True),
    Column("actor", pa.int32(), "", "number of the actor that trained it; -1 without Ray", True),
    Column("pid", _COUNT, "", "process that trained it", True),
    Column("node", _TEXT, "", "machine that trained it", True),
    Column("error", _TEXT, "", "why it did not complete", True),
)


def is_of_clients_evaluation(column: str) -> bool:
    """Whether a column of either table is recorded with `evaluation.clients=true` only."""
    return column.startswith(("accuracy_before", "accuracy_after", "loss_before", "loss_after"))


def _schema(columns: tuple[Column, ...]) -> pa.Schema:
    fields = []
    for column in columns:
        kind = "observation" if column.is_observation else "result"
        metadata = {"unit": column.unit, "kind": kind, "description": column.description}
        fields.append(pa.field(column.name, column.type, metadata=metadata))
    return pa.schema(fields, metadata={VERSION_KEY: str(SCHEMA_VERSION)})


ROUND_SCHEMA = _schema(ROUND_COLUMNS)
CLIENT_SCHEMA = _schema(CLIENT_COLUMNS)


@dataclass(frozen=True, kw_only=True)
class ClientRecord:
    """One row of clients.parquet: a sampled client in a round. Units and meanings: `CLIENT_COLUMNS`."""

    round: int
    client_id: int
    status: ClientStatus
    num_examples: int
    num_steps: int | None
    train_loss: float | None
    loss_before: float | None
    accuracy_before: float | None
    loss_after: float | None
    accuracy_after: float | None
    update_l2_norm: float | None
    cosine_to_mean: float | None
    update_sha256: str | None
    fit_s: float | None
    stack_size: int | None
    attempts: int
    actor: int
    pid: int | None
    node: str | None
    error: str | None

    def row(self, run: str) -> dict[str, Any]:
        """The record as a row of the table, named after its run."""
        return {"run": run, **vars(self)}


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One row of rounds.parquet, with the round's client rows. Units and meanings: `ROUND_COLUMNS`."""

    round: int
    started_at: datetime
    num_sampled: int = 0
    num_completed: int = 0
    num_failed: int = 0
    num_rejected: int = 0
    num_dropped: int = 0
    num_retries: int = 0
    num_examples: int = 0
    train_loss: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    accuracy_before_mean: float | None = None
    accuracy_before_worst_decile: float | None = None
    accuracy_before_variance: float | None = None
    accuracy_after_mean: float | None = None
    accuracy_after_worst_decile: float | None = None
    accuracy_after_variance: float | None = None
    update_l2_norm: float | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    weights_sha256: str
    round_s: float
    fit_s: float | None = None
    aggregate_s: float | None = None
    evaluate_s: float | None = None
    clients: tuple[ClientRecord, ...] = ()

    def row(self, run: str) -> dict[str, Any]:
        """The record as a row of the table, named after its run; without the client rows."""
        return {"run": run, **{name: value for name, value in vars(self).items() if name != "clients"}}


def table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as an Arrow table of the fixed schema."""
    return pa.Table.from_pylist(rows, schema=schema)
