"""A run's folder when writing begins: made for a new run, or put right for one that goes on."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, BinaryIO

from fedsim import checkpoint
from fedsim.config import RUN_NAME, Config
from fedsim.errors import RunExistsError, RunFolderError
from fedsim.files import publish
from fedsim.results import parts
from fedsim.results.parts import Whole
from fedsim.results.writer import RunWriter, now
from fedsim.run_folder import RUN_VERSION, check_replaceable, is_live, lock, sha256

_OURS = ("rounds.parquet", "clients.parquet", "checkpoint", "report.html", "config.toml", "run.json")
_MADE_AT_FIRST = {".lock", "config.toml", "run.json", "rounds.parquet", "clients.parquet", parts.EMPTY}


def begin(folder: Path, config: Config, info: dict[str, Any], *, overwrite: bool = False) -> RunWriter:
    """Makes the folder of a new run.

    Args:
        folder: from `target`.
        config: the whole resolved configuration.
        info: what run.json says besides status and times.
        overwrite: replaces a run that is there.

    Raises:
        RunFolderError: the folder cannot be made; nothing is left of it.
    """
    text = config.to_toml().encode()
    info = {
        "fedsim_run": RUN_VERSION,
        "name": folder.name,
        "status": "running",
        "started_at": now(),
        "ended_at": None,
        "error": None,
        "num_dropped": 0,
        "config_sha256": hashlib.sha256(text).hexdigest(),
        **info,
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if overwrite and folder.exists():
            check_replaceable(folder)
            return _replace(folder, config, info, text)
        _sweep(folder.parent)
        return _make(folder, config, info, text)
    except OSError as error:
        raise RunFolderError(f"cannot make the run's folder {folder}: {error.strerror or error}") from None


def _make(folder: Path, config: Config, info: dict[str, Any], text: bytes) -> RunWriter:
    """A new folder: made under a hidden name, so that it is there as a whole or not at all."""
    new = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    new.mkdir()
    held = None
    try:
        held = lock(new)
        writer = RunWriter(new, held, config, info)
        publish(new / "config.toml", text, durable=True)
        parts.write_empty(new)
        writer.update()
        if folder.exists() or folder.is_symlink():
            raise FileExistsError
        new.rename(folder)  # fails where another run's folder has come in between: that is not empty
    except BaseException as error:  # a full disk, Ctrl-C: as if nothing had been
        shutil.rmtree(new)
        if held:
            held.close()
        if isinstance(error, OSError) and error.errno in (None, errno.ENOTEMPTY, errno.EEXIST):
            raise RunExistsError(f"{folder} exists already; choose another --name") from None
        raise
    writer.folder = folder
    return writer


def _replace(folder: Path, config: Config, info: dict[str, Any], text: bytes) -> RunWriter:
    """A run's folder made anew; whatever else lies there stays. It is a run's in every moment, to be replaced again."""
    held = lock(folder)
    try:
        writer = RunWriter(folder, held, config, info)
        writer.update()
        _remove_ours(folder, but="run.json")
        publish(folder / "config.toml", text, durable=True)
        parts.write_empty(folder)
    except BaseException:
        _remove_ours(folder)
        (folder / ".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what others put there stays
            folder.rmdir()
        held.close()
        raise
    return writer


def _sweep(results: Path) -> None:
    """Removes what processes that were killed just then have left of folders to be."""
    for new in results.glob(".*.new"):
        with contextlib.suppress(OSError):
            if time.time() - new.stat().st_mtime > 60 and _is_to_be(new) and not is_live(new):
                shutil.rmtree(new)


def _is_to_be(new: Path) -> bool:
    """Whether a folder is what `_make` was making: by its name, and by all that lies in it."""
    is_named = re.fullmatch(rf"\.{RUN_NAME.pattern}\.\d+\.new", new.name)
    names = [path.name for path in new.rglob("*")]
    return bool(is_named) and all(name in _MADE_AT_FIRST or re.fullmatch(r"\..+\.tmp", name) for name in names)


def go_on(
    folder: Path,
    held: BinaryIO,
    config: Config,
    info: dict[str, Any],
    whole: Whole,
    round: int | None,
    *,
    is_over: bool = False,
) -> RunWriter:
    """Puts the folder of a run right, so that it is as the run left it after a round.

    Every step leaves a folder that can be gone on with, and that readers find whole.

    Args:
        folder: the run's folder.
        held: its lock.
        config: its configuration from now on.
        info: what run.json is to say besides the status.
        whole: its records that are whole.
        round: of the checkpoint to go on from; None for none: round 0 comes next.
        is_over: whether no round comes next.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    text, before = config.to_toml().encode(), sha256(folder / "config.toml")
    digest = hashlib.sha256(text).hexdigest()
    last = -1 if round is None else round
    kept = [name for name, end in whole.parts.items() if end <= last]
    try:
        writer = RunWriter(folder, held, config, info, last_round=round, is_over=is_over)
        was = {"config_sha256_before": before} if digest != before else {}  # there is a moment when both may be there
        num_dropped = sum(row.num_dropped for row in whole.rounds[: last + 1])
        again = {"status": "running", "ended_at": None, "error": None, "num_dropped": num_dropped}
        writer.update(**again, config_sha256=digest, **was)
        if was:
            publish(folder / "config.toml", text, durable=True)
            writer.update(config_sha256_before=None)
        parts.take_back(folder, {*kept})
        checkpoint.remove_after(folder / "checkpoint", last)
        for place in (folder, folder / "rounds.parquet", folder / "clients.parquet", folder / "checkpoint"):
            for path in place.glob(".*.tmp"):
                path.unlink()
        is_last = is_over or last == config.rounds
        if kept and whole.rounds[last].is_evaluated and last % config.evaluation.every and not is_last:
            parts.forget_evaluation(folder, kept[-1], last)  # it was the last round, and is no longer
        parts.write_empty(folder)
    except OSError as error:
        raise RunFolderError(f"cannot write to the run's folder {folder}: {error}") from None
    return writer


def _remove_ours(folder: Path, but: str = "") -> None:
    """Empties a run's folder of what fedsim wrote; whatever else lies there stays."""
    for name in _OURS:
        if name == but:
            continue
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
