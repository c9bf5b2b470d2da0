"""Writing a run's folder: lock, rows, checkpoints, status."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from fedsim import checkpoint
from fedsim.config import Config
from fedsim.errors import RunExistsError, RunFolderError
from fedsim.files import publish
from fedsim.metrics import CLIENT_SCHEMA, ROUND_SCHEMA, RoundRecord, table
from fedsim.run_folder import check_replaceable

RUN_VERSION = 1
FLUSH_S = 1.0
"""Rows wait at most about this long before they are in a file."""

_OURS = ("rounds.parquet", "clients.parquet", "checkpoint", "report.html", "config.toml", "run.json")


def _remove_ours(folder: Path) -> None:
    """Empties a run's folder of what fedsim wrote; whatever else lies there stays."""
    for name in _OURS:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _locked(folder: Path) -> BinaryIO:
    """Takes the lock of a run's folder; a reader that asks whether the run is live holds it for a moment."""
    lock = (folder / ".lock").open("wb")
    for attempt in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05 * (attempt < 19))
        else:
            return lock
    lock.close()
    raise RunFolderError(f"{folder} is being written by a running fedsim; wait for it, or choose another --name")


class RunWriter:
    """Writes one run's folder. As a context manager it ends the run with the status that fits.

    Args:
        folder: from `target`.
        config: the whole resolved configuration.
        info: what run.json says besides status and times.

    Raises:
        RunFolderError: the folder cannot be made.
    """

    def __init__(self, folder: Path, config: Config, info: dict[str, Any], *, overwrite: bool = False) -> None:
        self.folder, self._config = folder, config
        self._rows: dict[str, list[dict[str, Any]]] = {"rounds": [], "clients": []}
        self._first_round: int | None = None  # of the rows that wait
        self._last_round: int | None = None
        self._info = {
            "fedsim_run": RUN_VERSION,
            "name": folder.name,
            "status": "running",
            "started_at": _now(),
            "ended_at": None,
            "error": None,
            **info,
        }
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            is_replaced = overwrite and folder.exists()
            if is_replaced:
                check_replaceable(folder)
            else:
                folder.mkdir()
            self._lock = _locked(folder)
        except FileExistsError:
            raise RunExistsError(f"{folder} exists already; choose another --name") from None
        except OSError as error:
            raise RunFolderError(f"cannot make the run's folder {folder}: {error}") from None
        try:
            if is_replaced:
                _remove_ours(folder)
            publish(folder / "config.toml", config.to_toml().encode())
            for kind, schema in SCHEMAS.items():  # an empty typed part: the folders can be read from the start
                (folder / f"{kind}.parquet").mkdir()
                self._write_part(kind, "part-empty", table([], schema))
            self.update()
        except BaseException as error:  # a full disk, Ctrl-C: as if nothing had been
            _remove_ours(folder)
            (folder / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what others put there stays
                folder.rmdir()
            if isinstance(error, OSError):
                raise RunFolderError(f"cannot write to the run's folder {folder}: {error}") from None
            raise
        self._flushed = self._checkpointed = time.monotonic()

    def update(self, **changes: Any) -> None:
        """Changes entries of run.json."""
        self._info |= changes
        publish(self.folder / "run.json", json.dumps(self._info, indent=2).encode())

    def write(self, record: RoundRecord, tensors: Callable[[], dict[str, Tensor]], state: dict[str, Tensor]) -> None:
        """Takes a round's record, and a checkpoint where one is due.

        Args:
            record: the round.
            tensors: gives the model's tensors by name; called only for a checkpoint.
            state: the strategy's state after the round.
        """
        if self._first_round is None:
            self._first_round = record.round
        self._last_round = record.round
        self._rows["rounds"].append(record.row(self.folder.name))
        self._rows["clients"] += [client.row(self.folder.name) for client in record.clients]
        now, settings = time.monotonic(), self._config.checkpoint
        is_due = now - self._checkpointed >= settings.every_s or record.round == self._config.rounds
        if is_due or now + record.round_s - self._flushed >= FLUSH_S:  # the next round may take as long as this one
            self.flush()
        if is_due:
            folder = self.folder / "checkpoint"
            checkpoint.save(folder, record.round, tensors(), state, record.weights_sha256)
            checkpoint.prune(folder, settings.keep)
            self._checkpointed = now

    def flush(self) -> None:
        """Publishes the waiting rows as one part each: first the clients, so that a round's row comes last."""
        if self._first_round is None:
            return
        part = f"part-{self._first_round:06d}-{self._last_round:06d}"
        for kind in ("clients", "rounds"):
            if self._rows[kind]:
                self._write_part(kind, part, table(self._rows[kind], SCHEMAS[kind]))
                self._rows[kind] = []
        self._first_round = None
        self._flushed = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            try:
                self.flush()
            except Exception as own_error:
                error = error or own_error
                raise
            finally:
                self._end(error)
        finally:
            self._lock.close()

    def _end(self, error: BaseException | None) -> None:
        if isinstance(error, Exception):
            self.update(status="failed", ended_at=_now(), error=f"{type(error).__name__}: {error}")
        elif error is None and self._last_round == self._config.rounds:
            self.update(status="finished", ended_at=_now())
        else:  # Ctrl-C, SIGTERM, or an iteration left early
            self.update(status="interrupted", ended_at=_now())

    def _write_part(self, kind: str, name: str, rows: pa.Table) -> None:
        buffer = io.BytesIO()
        pq.write_table(rows, buffer)
        publish(self.folder / f"{kind}.parquet" / f"{name}.parquet", buffer.getvalue())


SCHEMAS = {"rounds": ROUND_SCHEMA, "clients": CLIENT_SCHEMA}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
