"""What several test files do with runs and processes."""

from __future__ import annotations

import time

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch

from fedsim.config import Config
from fedsim.datasets import Dataset
from fedsim.metrics import CLIENT_COLUMNS, CLIENT_SCHEMA, ROUND_COLUMNS, ROUND_SCHEMA, VERSION_KEY
from fedsim.partition import Partition

COLUMNS = {"rounds": ROUND_COLUMNS, "clients": CLIENT_COLUMNS}

_RNG = np.random.Generator(np.random.PCG64(0))
TINY = Dataset(
    name="tiny",
    train_images=_RNG.integers(256, size=(60, 1, 4, 4), dtype=np.uint8),
    train_labels=_RNG.integers(3, size=60),
    test_images=_RNG.integers(256, size=(40, 1, 4, 4), dtype=np.uint8),
    test_labels=_RNG.integers(3, size=40),
    num_classes=3,
)
TINY_PARTITION = Partition.of(np.split(_RNG.permutation(60), [13, 14, 40]))  # 13, 1, 26 and 20 examples

SERIAL = Config().override(
    {
        "data.dataset": "synthetic",
        "placement.mode": "serial",
        "model.name": "logistic",
        "training.local_epochs": 1,
        "training.batch_size": 100,
        "clients.count": 4,
        "clients.per_round": 3,
        "rounds": 3,
    }
)
"""A run of some hundredths of a second, in this process."""


def results_of(run):
    """The columns that must be equal between equal runs."""
    frames = []
    for frame, schema in ((run.rounds, ROUND_SCHEMA), (run.clients, CLIENT_SCHEMA)):
        names = [field.name for field in schema if field.metadata[b"kind"] == b"result" and field.name != "run"]
        frames.append(frame[names].to_dict("list"))
    return repr(frames)  # repr: NaN equals itself, floats to the last bit


def assert_same_results(one, other):
    """Two runs have equal bits: every result column, and the final weights."""
    assert results_of(one) == results_of(other)
    ours, theirs = one.weights(), other.weights()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def content(folder):
    """Every file below a folder, with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rewrite(part, change):
    """Writes a part again with another table."""
    pq.write_table(change(pq.read_table(part)), part, write_page_checksum=True)


def as_version(rows, version):
    return rows.replace_schema_metadata({VERSION_KEY: str(version).encode()})


def make_old(folder):
    """The folder as the first fedsim would have written it."""
    for kind, columns in COLUMNS.items():
        old = [column.name for column in columns if column.since == 1]
        assert len(old) < len(columns)
        for part in (folder / f"{kind}.parquet").glob("part-*"):
            rewrite(part, lambda rows, old=old: as_version(rows.select(old), 1))


def wait_until(condition, timeout_s=30.0):
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return found


def is_gone(pid):
    """Whether a process has ended; its parent may not have taken note."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
