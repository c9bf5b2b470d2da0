"""Runs that nobody computed: a folder with rows that a test has thought up."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

from helpers import SERIAL

from fedsim import datasets
from fedsim.results import parts

START = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)


def round_row(round, **changes):
    """A round of 1 s, of which 0.5 s went to training; three clients with 500 examples each."""
    row = {
        "run": "made",
        "round": round,
        "started_at": START + timedelta(seconds=round),
        "num_sampled": 3,
        "num_completed": 3,
        "num_failed": 0,
        "num_rejected": 0,
        "num_dropped": 0,
        "num_retries": 0,
        "num_examples": 1500,
        "train_loss": 2.0 / round if round else None,
        "test_loss": 2.0 / (round + 1),
        "test_accuracy": 1 - 0.9 / (round + 1),
        "update_l2_norm": 0.5,
        "bytes_down": 3000,
        "bytes_up": 3000,
        "weights_sha256": "0" * 64,
        "round_s": 1.0,
        "fit_s": 0.5,
        "aggregate_s": 0.125,
        "evaluate_s": 0.25,
    }
    if not round:
        counts = [name for name in row if name.startswith(("num_", "bytes_"))]
        row |= dict.fromkeys(counts, 0) | dict.fromkeys(("fit_s", "aggregate_s", "update_l2_norm"))
    return row | changes


def client_row(round, client, **changes):
    """A client that completed: its loss is its number and a tenth of the round's."""
    return {
        "run": "made",
        "round": round,
        "client_id": client,
        "status": "completed",
        "num_examples": 500,
        "num_steps": 5,
        "train_loss": client + round / 10,
        "update_l2_norm": 1.0 + client,
        "cosine_to_mean": 0.5,
        "update_sha256": "0" * 64,
        "fit_s": 0.25,
        "stack_size": 1,
        "attempts": 1,
        "actor": -1,
        "pid": 1,
        "node": "here",
    } | changes


def make(folder, rounds=None, clients=None, config=SERIAL, status="finished", **info):
    """Writes a run's folder: four clients, of which 0 to 2 take part in each of three rounds, unless said otherwise."""
    rounds = [round_row(round) for round in range(4)] if rounds is None else rounds
    if clients is None:
        clients = [client_row(row["round"], client) for row in rounds if row["round"] for client in range(3)]
    data = datasets.load("synthetic")
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    last = rounds[-1]["round"] if rounds else -1
    said = {
        "fedsim_run": 1,
        "name": "made",
        "status": status,
        "started_at": START.isoformat(),
        "ended_at": None,
        "error": None,
        "own": {},
        "data": {"name": data.name, "sha256": data.sha256(), "input_shape": data.input_shape, "num_classes": 10},
        "versions": {"python": "3.11.7"},
        "stop_at": ["test_accuracy=0.9999"] if status == "finished" and last < config.rounds else [],
        **info,
    }
    (folder / "run.json").write_text(json.dumps(said))
    parts.write_empty(folder)
    if last > 0:
        parts.write_rows(folder, "clients", rounds[0]["round"], last, clients)
    if rounds:
        parts.write_rows(folder, "rounds", rounds[0]["round"], last, rounds)
    return folder


def make_damaged(folder, kind="rounds", content=b"PAR1 but no more"):
    """Writes a run of rounds 0 to 3, and damages the part of `kind` with the rows of round 2; gives that part."""
    make(folder, [round_row(0), round_row(1)])
    for round in (2, 3):
        parts.write_rows(folder, "clients", round, round, [client_row(round, client) for client in range(3)])
        parts.write_rows(folder, "rounds", round, round, [round_row(round)])
    part = folder / f"{kind}.parquet" / "part-000002-000002.parquet"
    part.write_bytes(content)
    return part
