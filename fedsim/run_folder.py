"""A run's folder before it is opened: which one a new run gets, what is there already, who is writing it.

Needs neither torch nor pyarrow, so that a name that is taken is refused at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fedsim.config import RUN_NAME, Config
from fedsim.config.changes import changed
from fedsim.errors import NewerVersionError, RunFolderError

RUN_VERSION = 1

_NEEDED = {"name": str, "status": str, "own": dict, "data": dict}
_IF_THERE = {"versions": dict, "placement": dict, "model": dict, "resumes": list, "stop_at": list, "stopped_by": list}
_OF_DATA = {"sha256": str, "input_shape": list, "num_classes": int}


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
    check_usable(results)
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


def check_usable(results: Path) -> None:
    """Lets pass a folder in which runs can be made, be it there or not; before anything is started.

    Raises:
        RunFolderError: it is not one.
    """
    nearest = next(path for path in (results, *results.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise RunFolderError(f"{results} cannot be used: {nearest} is not a folder; name another with --results")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunFolderError(f"{results} cannot be used: {nearest} is read-only; name another with --results")


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


def name_of(folder: Path) -> str:
    """What a run in a folder is called."""
    return Path(as_text(Path(os.path.abspath(folder)))).name  # noqa: PTH100 - Path.absolute keeps `..`


def as_text(path: Path) -> str:
    """A path for a person, or for a file of text: what is no text in it is replaced."""
    return os.fsencode(path).decode(errors="replace")


def check_replaceable(folder: Path) -> None:
    """Lets pass what `--overwrite` may replace: a run's folder that nobody is writing.

    Raises:
        RunFolderError: it is something else, or live.
    """
    if folder.is_symlink() or not folder.is_dir() or read_info(folder) is None:
        raise RunFolderError(f"{folder} is not a run of fedsim, so --overwrite leaves it alone; choose another --name")
    if is_live(folder):
        raise RunFolderError(f"{folder} is being written by a running fedsim; wait for it, or choose another --name")


def path_of(run: str, results: Path) -> Path:
    """The folder of a run that is named by its path, or by its name in a results folder.

    Raises:
        RunFolderError: it is neither.
    """
    folders = Path(run), results / run
    for folder in folders:
        if (folder / "run.json").is_file():
            return folder
    for folder in folders:
        if inside := find_runs(folder):
            raise RunFolderError(
                f"{folder} is not a run, it holds runs: name one, such as {inside[0]}; "
                "a sweep goes on when its command is repeated"
            )
    raise RunFolderError(
        f"{run!r} is not a run: neither a run's folder nor a name in {results}; `fedsim runs` lists them"
    )


def paths_of(runs: Sequence[str], results: Path) -> list[Path]:
    """The folders of runs, each named as in `path_of`, or all at once by a folder that holds them: a sweep's.

    Raises:
        RunFolderError: one is neither.
    """
    found: list[Path] = []
    for run in runs:
        for folder in (Path(run), results / run):
            inside = find_runs(folder)
            if inside and not (folder / "run.json").exists():
                found += inside
                break
        else:
            found.append(path_of(run, results))
    unique: dict[Path, Path] = {}
    for path in found:
        unique.setdefault(path.resolve(), path)
    return list(unique.values())


def read_run(folder: Path) -> tuple[dict[str, Any], Config, str | None]:
    """What run.json and config.toml say, and what is wrong with the second: None where it is as fedsim wrote it.

    Raises:
        NewerVersionError: the run is of a newer fedsim.
        RunFolderError: the folder is not a run of fedsim, or its run.json is damaged.
        ConfigError: config.toml cannot be read.
    """
    info, path = read_info(folder), folder / "config.toml"
    if info is None and is_run(folder):
        raise RunFolderError(f"{folder / 'run.json'} is damaged: it cannot be read")
    if info is None:
        raise RunFolderError(f"{folder} is not a run: it has no run.json of fedsim's")
    version = info["fedsim_run"]
    if not isinstance(version, int) or version > RUN_VERSION:
        raise NewerVersionError(f"{folder} is of run version {version}, this fedsim reads {RUN_VERSION}; update fedsim")
    kinds = _NEEDED | {key: kind for key, kind in _IF_THERE.items() if key in info}
    wrong = [f"{key} is {info.get(key)!r}" for key, kind in kinds.items() if not isinstance(info.get(key), kind)]
    if not wrong:
        wrong += [f"own has {part} = {name!r}" for part, name in info["own"].items() if not isinstance(name, str)]
        wrong += [f"stop_at has {text!r}" for text in info.get("stop_at", []) if not isinstance(text, str)]
        data = [(key, info["data"].get(key), kind) for key, kind in _OF_DATA.items()]
        wrong += [f"data has {key} = {value!r}" for key, value, kind in data if not isinstance(value, kind)]
    if wrong:
        raise RunFolderError(f"{folder / 'run.json'} is damaged: {', '.join(wrong)}")
    config = Config.from_toml(path)
    known = [info.get("config_sha256"), info.get("config_sha256_before")]  # two while a resume changes it
    if known[0] is None or sha256(path) in known:  # a run of an earlier fedsim has none
        return info, config, None
    return info, config, f"{path} is not as fedsim wrote it, by what run.json says: one was edited or is damaged"


@dataclass(frozen=True)
class Stopped:
    """A run that nobody writes now, and nobody else can while this is open."""

    folder: Path
    held: BinaryIO
    """Its lock."""
    info: dict[str, Any]
    """What run.json says."""
    config: Config
    """With what is to change."""
    changes: Mapping[str, Any]
    """That: dotted keys."""


@contextlib.contextmanager
def stopped(folder: Path, changes: Mapping[str, Any]) -> Iterator[Stopped]:
    """Opens a run that is to go on, and holds its lock.

    Args:
        folder: the run's folder.
        changes: dotted keys of its configuration, see `config.changes`.

    Raises:
        RunFolderError: it is no run, damaged, or being written.
        ConfigError: the configuration cannot be read, or a change is not allowed.
    """
    if not (folder / "run.json").is_file():
        raise RunFolderError(f"{folder} is not a run: it has no run.json")
    try:
        held = lock(folder)
    except OSError as error:
        raise RunFolderError(f"cannot write to the run's folder {folder}: {error}") from None
    with held:
        info, config, damage = read_run(folder)
        if damage:
            raise RunFolderError(f"{damage}; what may change is given with --set (from Python: changes={{...}})")
        yield Stopped(folder, held, info, changed(config, changes), changes)


def sha256(path: Path) -> str:
    """64 hex digits over a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lock(folder: Path) -> BinaryIO:
    """Takes the lock of a run's folder until the file is closed, or the process ends in whatever way.

    Raises:
        RunFolderError: another process writes the run.
        OSError: the folder cannot be written.
    """
    held = (folder / ".lock").open("wb")
    for attempt in range(20):  # a reader that asks whether the run is live holds it for a moment
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05 * (attempt < 19))
        else:
            return held
    held.close()
    raise RunFolderError(f"{folder} is being written by a running fedsim; wait until that ends")


def read_info(folder: Path) -> dict[str, Any] | None:
    """The content of a run's run.json; None where there is none of fedsim's, or a damaged one."""
    try:
        return _ours(folder)
    except (OSError, ValueError):
        return None


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, be it a damaged one: its run.json is fedsim's, or cannot be read."""
    try:
        return _ours(folder) is not None
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True


def find_runs(results: Path) -> list[Path]:
    """The runs' folders in a folder, by name, damaged ones too; what is no run is skipped."""
    return [folder for folder in sorted(results.glob("[!.]*")) if is_run(folder)]


def _ours(folder: Path) -> dict[str, Any] | None:
    """The content of a run.json; None where it is another program's.

    Raises:
        OSError: there is none that can be read.
        ValueError: it is damaged.
    """
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
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
