"""Writing a run's folder while the run goes on: rows, checkpoints, status."""

from __future__ import annotations

import contextlib
import errno
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from torch import Tensor

from fedsim import checkpoint
from fedsim.config import Config
from fedsim.errors import RunFailedError
from fedsim.files import publish, sync
from fedsim.metrics import RoundRecord
from fedsim.results import parts

FLUSH_S = 1.0
"""Rows wait at most about this long before they are in a file, however long the next round takes."""


class RunWriter:
    """Writes rounds into a run's folder. As a context manager it ends the run with the status that fits.

    Args:
        folder: the run's folder, from `begin` or `go_on`.
        held: its lock; given back at the end.
        config: the whole resolved configuration.
        info: what run.json says.
        last_round: what the folder holds already; None for nothing.
        is_over: whether no round comes after it.
    """

    def __init__(
        self,
        folder: Path,
        held: BinaryIO,
        config: Config,
        info: dict[str, Any],
        *,
        last_round: int | None = None,
        is_over: bool = False,
    ) -> None:
        self.folder, self._lock, self._config, self._info = folder, held, config, info
        self._waiting: list[RoundRecord] = []  # not in a file yet; an interrupt finds a round here whole, or not
        self._flushing = threading.RLock()  # of the run's thread or the alarm's, whoever has the rows
        self._alarm: threading.Timer | None = None
        self._last_round = last_round  # that is in a file
        self._is_over = is_over or last_round == config.rounds
        self._unsaved: tuple[RoundRecord, Callable[[], dict[str, Tensor]], dict[str, Tensor]] | None = None
        self._unsynced: list[Path] = []
        self._flushed = self._checkpointed = time.monotonic()

    def update(self, **changes: Any) -> None:
        """Changes entries of run.json.

        Raises:
            OSError: it cannot be written.
        """
        self._info |= changes
        publish(self.folder / "run.json", json.dumps(self._info, indent=2).encode(), durable=True)

    def write(
        self,
        record: RoundRecord,
        tensors: Callable[[], dict[str, Tensor]],
        state: dict[str, Tensor],
        *,
        is_over: bool = False,
    ) -> None:
        """Takes a round's record, and a checkpoint where one is due.

        Args:
            record: the round.
            tensors: gives the model's tensors by name; called only for a checkpoint.
            state: the strategy's state after the round.
            is_over: whether the run is finished with it, before the last round of its configuration.

        Raises:
            RunFailedError: a file cannot be written.
        """
        # a round in which no client completed ends the run, which is to go on before it
        is_lost = record.num_sampled > 0 and record.num_completed == 0
        self._unsaved = None if is_lost else (record, tensors, state)
        with self._flushing, self._failing():
            self._waiting.append(record)
            if record.num_dropped:  # such a run is another one than if nothing had been lost: it says so
                self.update(num_dropped=self._info["num_dropped"] + record.num_dropped)
        now, settings = time.monotonic(), self._config.checkpoint
        self._is_over = is_over or record.round == self._config.rounds
        is_due = now - self._checkpointed >= settings.every_s or self._is_over
        with self._failing():
            if is_due or now - self._flushed >= FLUSH_S:
                self.flush()
            elif self._alarm is None:  # the next round may take long
                self._alarm = threading.Timer(FLUSH_S, self._flush_late)
                self._alarm.daemon = True
                self._alarm.start()
            if is_due:
                self._save_last()

    def flush(self) -> None:
        """Publishes the waiting rows as one part each: first the clients, so that a round's row comes last."""
        with self._flushing:
            if self._alarm is not None:
                self._alarm.cancel()
                self._alarm = None
            if not self._waiting:
                return
            name, first, last = self._info["name"], self._waiting[0].round, self._waiting[-1].round
            clients = [client.row(name) for record in self._waiting for client in record.clients]
            rounds = [record.row(name) for record in self._waiting]
            written = []
            try:
                for kind, rows in (("clients", clients), ("rounds", rounds)):
                    if rows:
                        written.append(parts.write_rows(self.folder, kind, first, last, rows))
            except OSError:
                for path in written:  # tried again, they may be in a part with the next round
                    path.unlink(missing_ok=True)
                raise
            self._unsynced += written
            self._waiting, self._last_round = [], last
            self._flushed = time.monotonic()

    def _flush_late(self) -> None:
        """What the alarm does, in a thread of its own; the next round tries again what could not be written."""
        with contextlib.suppress(OSError):
            self.flush()

    def _save_last(self) -> None:
        """Saves a checkpoint of the last round in a file, where it has none and may have one."""
        if self._unsaved is None or self._unsaved[0].round != self._last_round:
            return
        record, tensors, state = self._unsaved
        sync(self._unsynced)  # a checkpoint without the rows before it would be worth nothing
        self._unsynced = []
        folder = self.folder / "checkpoint"
        checkpoint.save(folder, record.round, tensors(), state, record.weights_sha256)
        checkpoint.prune(folder, self._config.checkpoint.keep)
        self._checkpointed = time.monotonic()
        self._unsaved = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        masked = (Exception,) if error else ()  # what went wrong first is what is told
        with self._lock, contextlib.suppress(*masked), self._failing():
            try:
                with self._failing():
                    self.flush()
                    self._save_last()
            except BaseException as own_error:
                error = error or own_error
                raise
            finally:
                with self._flushing:  # an alarm that writes just now comes to its end, a later one finds nothing
                    self._waiting = []
                self._end(error)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """What cannot be written fails the run: one line for a person, not a bug in the program around it."""
        try:
            yield
        except OSError as error:
            advice = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            reason = error.strerror or error
            raise RunFailedError(f"cannot write {error.filename or self.folder}: {reason}{advice}") from error

    def _end(self, error: BaseException | None) -> None:
        if isinstance(error, Exception):
            self.update(status="failed", ended_at=now(), error=f"{type(error).__name__}: {error}")
        elif error is None and self._is_over:
            self.update(status="finished", ended_at=now())
        else:  # Ctrl-C, SIGTERM, or an iteration left early
            self.update(status="interrupted", ended_at=now())


def now() -> str:
    """The time as run.json has it, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
