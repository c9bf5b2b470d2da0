"""Files that are either complete or absent."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def publish(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Writes a file under a hidden name beside it, then renames: readers see the old content or the new, never half.

    The hidden name starts with a dot, which readers of Parquet folders skip.

    Args:
        path: the file.
        content: all of it.
        durable: comes back only when the file would outlast a power loss.

    Raises:
        OSError: the file could not be written; it is as it was, and `filename` is its own.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        if durable:
            _sync(temporary)
        temporary.replace(path)
        if durable:
            _sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # not the hidden name, of which nobody knows
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def sync(paths: Iterable[Path]) -> None:
    """Makes files outlast a power loss that were published without."""
    found = list(paths)
    for path in [*found, *sorted({path.parent for path in found})]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
