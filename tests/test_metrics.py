import dataclasses
import io
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsim.metrics import (
    CLIENT_COLUMNS,
    CLIENT_SCHEMA,
    ROUND_COLUMNS,
    ROUND_SCHEMA,
    SCHEMA_VERSION,
    ClientRecord,
    RoundRecord,
    is_of_clients_evaluation,
    table,
)

# The contract's columns in its order; those with a star are observations, the others results.
ROUNDS = (
    "run round started_at* num_sampled num_completed num_failed num_rejected num_dropped num_retries* num_examples "
    "train_loss test_loss test_accuracy accuracy_before_mean accuracy_before_worst_decile accuracy_before_variance "
    "accuracy_after_mean accuracy_after_worst_decile accuracy_after_variance update_l2_norm bytes_down bytes_up "
    "weights_sha256 round_s* fit_s* aggregate_s* evaluate_s*"
)
CLIENTS = (
    "run round client_id status num_examples num_steps train_loss loss_before accuracy_before loss_after "
    "accuracy_after update_l2_norm cosine_to_mean update_sha256 fit_s* stack_size* attempts* actor* pid* node* error*"
)
TABLES = [
    pytest.param(ROUNDS, ROUND_COLUMNS, ROUND_SCHEMA, RoundRecord, id="rounds"),
    pytest.param(CLIENTS, CLIENT_COLUMNS, CLIENT_SCHEMA, ClientRecord, id="clients"),
]
both = pytest.mark.parametrize(("contract", "columns", "schema", "record"), TABLES)

TYPES = {  # a name means the same type in both tables
    "run": pa.string(),
    "round": pa.int32(),
    "client_id": pa.int32(),
    "started_at": pa.timestamp("us", tz="UTC"),
    "status": pa.string(),
    "train_loss": pa.float64(),
    "loss_before": pa.float64(),
    "loss_after": pa.float64(),
    "test_loss": pa.float64(),
    "test_accuracy": pa.float64(),
    "update_l2_norm": pa.float64(),
    "cosine_to_mean": pa.float64(),
    "weights_sha256": pa.string(),
    "update_sha256": pa.string(),
    "stack_size": pa.int32(),
    "attempts": pa.int32(),
    "actor": pa.int32(),
    "node": pa.string(),
    "error": pa.string(),
}


def a_client(**changes) -> ClientRecord:
    values = {
        "round": 3,
        "client_id": 7,
        "status": "completed",
        "num_examples": 600,
        "num_steps": 60,
        "train_loss": 0.25,
        "loss_before": 0.375,
        "accuracy_before": 0.75,
        "loss_after": 0.125,
        "accuracy_after": 1.0,
        "update_l2_norm": 1.5,
        "cosine_to_mean": -0.5,
        "update_sha256": "ab" * 32,
        "fit_s": 0.125,
        "stack_size": 1,
        "attempts": 2,
        "actor": 4,
        "pid": 4_000_000_000,
        "node": "there",
        "error": None,
    }
    return ClientRecord(**{**values, **changes})


def a_round(**changes) -> RoundRecord:
    values = {
        "round": 3,
        "started_at": datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=UTC),
        "num_sampled": 10,
        "num_completed": 6,
        "num_failed": 1,
        "num_rejected": 2,
        "num_dropped": 1,
        "num_retries": 5,
        "num_examples": 5400,
        "train_loss": 0.5,
        "test_loss": 0.75,
        "test_accuracy": 0.875,
        "accuracy_before_mean": 0.5,
        "accuracy_before_worst_decile": 0.25,
        "accuracy_before_variance": 0.0625,
        "accuracy_after_mean": 0.75,
        "accuracy_after_worst_decile": 0.5,
        "accuracy_after_variance": 0.03125,
        "update_l2_norm": 2.5,
        "bytes_down": 10 * 2**40,
        "bytes_up": 9 * 2**40,
        "weights_sha256": "cd" * 32,
        "round_s": 1.5,
        "fit_s": 1.0,
        "aggregate_s": 0.25,
        "evaluate_s": 0.125,
        "clients": (a_client(),),
    }
    return RoundRecord(**{**values, **changes})


# ---------------------------------------------------------------- the schema


@both
def test_the_columns_are_those_of_the_contract_in_its_order(contract, columns, schema, record):
    assert " ".join(c.name + "*" * c.is_observation for c in columns) == contract
    assert schema.names == [name.rstrip("*") for name in contract.split()]


@both
def test_the_schema_carries_unit_kind_and_description_of_each_column(contract, columns, schema, record):
    for name, column, field in zip(contract.split(), columns, schema, strict=True):
        kind = b"observation" if name.endswith("*") else b"result"
        description, unit = column.description.encode(), column.unit.encode()
        assert field.metadata == {b"kind": kind, b"unit": unit, b"description": description}
        assert len(description) > 5
    assert schema.metadata == {b"fedsim_schema_version": str(SCHEMA_VERSION).encode()}


@both
def test_the_types(contract, columns, schema, record):
    for field in schema:
        is_seconds = field.name.endswith("_s")
        is_float = is_seconds or field.name.startswith("accuracy_")
        expected = TYPES.get(field.name, pa.float64() if is_float else pa.int64())
        assert field.type == expected, field.name


@both
def test_units_belong_to_names(contract, columns, schema, record):
    """Seconds, bytes, nats and fractions; counts say what they count."""
    units = {column.name: column.unit for column in columns}
    for name, unit in units.items():
        if name.endswith("_s"):
            assert unit == "s"
        elif name.startswith("bytes_"):
            assert unit == "bytes"
        elif name.endswith("_loss") or name.startswith("loss_"):
            assert unit == "nats"
        elif name.endswith("_variance"):
            assert unit == "", "a fraction squared"
        elif name.endswith("_accuracy") or name.startswith("accuracy_"):
            assert unit == "fraction"
        elif name == "num_examples":
            assert unit == "examples"
        elif name in ("num_sampled", "num_completed", "num_failed", "num_rejected", "num_dropped", "stack_size"):
            assert unit == "clients"
        elif name == "num_steps":
            assert unit == "steps"
        else:
            assert unit == ""


def test_what_the_clients_evaluation_records_came_with_the_second_version():
    columns = (*ROUND_COLUMNS, *CLIENT_COLUMNS)
    assert [c.name for c in columns if is_of_clients_evaluation(c.name)] == [c.name for c in columns if c.since == 2]


@both
def test_a_records_fields_are_the_columns(contract, columns, schema, record):
    fields = [field.name for field in dataclasses.fields(record) if field.name != "clients"]
    assert ["run", *fields] == [column.name for column in columns]


# ---------------------------------------------------------------- rows and tables


@pytest.mark.parametrize(
    ("record", "schema"), [(a_round(), ROUND_SCHEMA), (a_client(), CLIENT_SCHEMA)], ids=["round", "client"]
)
def test_a_row_keeps_every_value(record, schema):
    row = record.row("my-run")
    assert list(row) == schema.names
    assert row["run"] == "my-run"
    assert all(row[name] == getattr(record, name) for name in row if name != "run")
    rows = table([row, record.row("other")], schema)
    assert rows.schema.equals(schema, check_metadata=True)
    assert rows.to_pylist() == [row, {**row, "run": "other"}]


@pytest.mark.parametrize("schema", [ROUND_SCHEMA, CLIENT_SCHEMA], ids=["rounds", "clients"])
def test_no_rows_are_a_table_too(schema):
    rows = table([], schema)
    assert rows.num_rows == 0
    assert rows.schema.equals(schema, check_metadata=True)


@pytest.mark.parametrize(
    ("record", "schema"), [(a_round(), ROUND_SCHEMA), (a_client(), CLIENT_SCHEMA)], ids=["round", "client"]
)
def test_types_marks_and_values_survive_parquet(record, schema):
    file = io.BytesIO()
    pq.write_table(table([record.row("my-run")], schema), file)
    again = pq.read_table(file)
    assert again.schema.equals(schema, check_metadata=True)
    assert again.to_pylist() == [record.row("my-run")]


def test_round_zero_has_zero_counts_and_nulls():
    """Only the evaluation, the hash and the times are given for it."""
    first = RoundRecord(
        round=0,
        started_at=datetime.now(UTC),
        test_loss=2.3,
        test_accuracy=0.1,
        weights_sha256="0" * 64,
        round_s=0.5,
        evaluate_s=0.25,
    )
    row = table([first.row("r")], ROUND_SCHEMA).to_pylist()[0]
    assert {name for name, value in row.items() if value == 0} == {
        "round",
        "num_sampled",
        "num_completed",
        "num_failed",
        "num_rejected",
        "num_dropped",
        "num_retries",
        "num_examples",
        "bytes_down",
        "bytes_up",
    }
    assert {name for name, value in row.items() if value is None} == {
        "train_loss",
        "accuracy_before_mean",
        "accuracy_before_worst_decile",
        "accuracy_before_variance",
        "accuracy_after_mean",
        "accuracy_after_worst_decile",
        "accuracy_after_variance",
        "update_l2_norm",
        "fit_s",
        "aggregate_s",
    }
    assert first.clients == ()


@pytest.mark.parametrize("status", ["failed", "dropped"])
def test_a_client_without_an_answer_has_nulls(status):
    silent = a_client(
        status=status,
        num_steps=None,
        train_loss=None,
        loss_before=None,
        accuracy_before=None,
        loss_after=None,
        accuracy_after=None,
        update_l2_norm=None,
        cosine_to_mean=None,
        update_sha256=None,
        fit_s=None,
        stack_size=None,
        pid=None,
        node=None,
        error="the actor died",
    )
    assert table([silent.row("r")], CLIENT_SCHEMA).to_pylist() == [silent.row("r")]


def test_a_value_of_another_type_is_refused():
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        table([a_client(num_examples="many").row("r")], CLIENT_SCHEMA)


def test_records_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_round().round = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_client().round = 4
