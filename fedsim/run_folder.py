"""A run's folder before it is opened: which one a new run gets, what is there already, who is writing it.

Needs neither torch nor pyarrow, so that a name that is taken is refused at once.
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

from fedsim.config import RUN_NAME
from fedsim.errors import RunFolderError


def target(results: Path, name: str | None, default_name: str, overwrite: bool) -> Path:
    """The folder a new run will have; nothing is made yet.

    Args:
        results: the results folder.
        name: the user's name for the run, or None: then `default_name`, or the next free `-2`, `-3`, ... .
        default_name: the configuration's name.
        overwrite: whether a run of that name may be replaced.

    Raises:
        RunFolderError: the name is not one, or is taken.
    """
    chosen = check_name(name if name is not None else default_name)
    if results.exists() and not results.is_dir():
        raise RunFolderError(f"{results} is not a folder; name another with --results")
    folder = results / chosen
    if overwrite:
        if folder.exists() or folder.is_symlink():
            check_replaceable(folder)
        return folder
    if name is None:
        number = 2
        while folder.exists() or folder.is_symlink():
            folder = results / f"{chosen[: 99 - len(str(number))]}-{number}"
            number += 1
    elif folder.exists() or folder.is_symlink():
        raise RunFolderError(f"{folder} exists already; choose another --name, or replace it with --overwrite")
    return folder


def check_name(name: str) -> str:
    """The name, if a run may have it: it cannot leave the results folder.

    Raises:
        RunFolderError: it may not.
    """
    if RUN_NAME.fullmatch(name):
        return name
    raise RunFolderError(
        f"{name!r} cannot be a run's name: up to 100 letters, digits, '.', '_' and '-', starting with a letter or digit"
    )


def check_replaceable(folder: Path) -> None:
    """Lets pass what `--overwrite` may replace: a run's folder that nobody is writing.

    Raises:
        RunFolderError: it is something else, or live.
    """
    if folder.is_symlink() or not folder.is_dir() or read_info(folder) is None:
        raise RunFolderError(f"{folder} is not a run of fedsim, so --overwrite leaves it alone; choose another --name")
    if is_live(folder):
        raise RunFolderError(f"{folder} is being written by a running fedsim; wait for it, or choose another --name")


def read_info(folder: Path) -> dict[str, Any] | None:
    """The content of a run's run.json; None where there is none of fedsim's."""
    try:
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) and "fedsim_run" in info else None


def is_live(folder: Path) -> bool:
    """Whether some process is writing the run: it holds the lock."""
    try:
        with (folder / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
