"""Files that are either complete or absent."""

from __future__ import annotations

import os
from pathlib import Path


def publish(path: Path, content: bytes) -> None:
    """Writes a file under a hidden name beside it, then renames: readers see the old content or the new, never half.

    The hidden name starts with a dot, which readers of Parquet folders skip.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
