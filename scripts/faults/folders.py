"""Files of a run's folder that are cut short, changed in a byte, emptied or gone: resumed, or refused by name."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import fedsim
from faults.drivers import SERIAL, SMALL
from faults.outcome import Outcome, compared, stopwatch
from fedsim.errors import FedsimError, FedsimWarning


def _cut(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    length = int(rng.integers(0, len(content)))
    return content[:length], f"cut to {length} of {len(content)} bytes"


def _flip(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    place, bit = int(rng.integers(0, len(content))), int(rng.integers(0, 8))
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[
        place + 1 :
    ], f"bit {bit} of byte {place} flipped"


DAMAGES: dict[str, Callable[[bytes, np.random.Generator], tuple[bytes | None, str]]] = {
    "cut": _cut,
    "flip": _flip,
    "flip again": _flip,
    "remove": lambda content, rng: (None, "removed"),
}


def damaged(seed: int, folder: Path) -> list[Outcome]:
    """Every file of an interrupted run's folder, damaged in four ways, then the run is resumed."""
    rng = np.random.default_rng(seed)
    config = SMALL.override({**SERIAL, "rounds": 12, "checkpoint.every_s": 0, "checkpoint.keep": 3})
    reference = fedsim.run(config, results=None)
    with fedsim.recording.Recording.of(config, results=folder, name="whole") as recording:
        for record in recording:
            if record.round == 8:
                break
    outcomes = []
    files = sorted(path for path in (folder / "whole").rglob("*") if path.is_file() and path.stat().st_size)
    for path in files:
        for name, damage in DAMAGES.items():
            content, point = damage(path.read_bytes(), rng)
            copy = folder / "damaged"
            shutil.copytree(folder / "whole", copy)
            target = copy / path.relative_to(folder / "whole")
            if content is None:
                target.unlink()
            else:
                target.write_bytes(content)
            with stopwatch() as watch:
                outcome = _resumed(copy, reference, target)
            outcomes.append(
                Outcome(f"file damaged: {name}", f"{target.relative_to(copy)}: {point}", outcome, watch.seconds)
            )
            shutil.rmtree(copy)
    return outcomes


def _resumed(folder: Path, reference: fedsim.Run, target: Path) -> str:
    before = _contents(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FedsimWarning)
            run = fedsim.resume(folder)
    except FedsimError as error:
        if error.exit_code != 2 or not {target.name, str(folder)} & set(_words(str(error))):
            return f"not a clear refusal: {type(error).__name__}: {error}"
        said = str(error).replace(str(folder), "RUN")  # this machine's paths are nobody else's
        return f"refused: {said}" if _contents(folder) == before else f"refused, but not as it was: {said}"
    return compared(run, reference)


def _words(message: str) -> list[str]:
    return [part.strip(":;,()'\"") for word in message.split() for part in (word, Path(word.strip(":;,()'\"")).name)]


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def full_disk(seed: int, folder: Path) -> list[Outcome]:
    """The disk is full at one write of a run, for each of its writes; then there is room again."""
    config = SMALL.override({**SERIAL, "rounds": 6, "checkpoint.every_s": 0})
    reference, number, write_bytes = fedsim.run(config, results=None), 0, Path.write_bytes
    outcomes: list[Outcome] = []
    while not outcomes or "not reached" not in outcomes[-1].outcome:
        calls = iter(range(10**9))

        def fails(path: Path, data: bytes, calls: Iterator[int] = calls, number: int = number) -> int:
            if next(calls) == number:
                write_bytes(path, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return write_bytes(path, data)

        with stopwatch() as watch:
            Path.write_bytes = fails  # type: ignore[assignment,method-assign]
            try:
                fedsim.run(config, results=folder, name=f"run-{number}")
                outcome = "not reached, or not told"
            except FedsimError as error:
                outcome = "" if "No space left on device" in str(error) else f"not a clear error: {error}"
            finally:
                Path.write_bytes = write_bytes  # type: ignore[method-assign]
            if not outcome:
                again = folder / f"run-{number}"
                run = fedsim.resume(again) if again.exists() else fedsim.run(config, results=folder, name=again.name)
                outcome = compared(run, reference)
        outcomes.append(Outcome("disk full", f"write {number + 1}", outcome, watch.seconds))
        number += 1
    return outcomes[:-1]
