"""Data sets kept as four IDX files, MNIST's format: fetched once, checked at every load.

Only bytes with the published MD5 are read or put into the cache. The files lie where torchvision keeps them, so a
folder that torchvision filled can be used, and the other way round. A file that is there but damaged is an error
that names it; it is never overwritten.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.datasets.dataset import Dataset
from fedsim.errors import DataError


class SourceError(Exception):
    """A source could not deliver; the message is the reason in one line. The next source is tried."""


@dataclass(frozen=True)
class Source:
    """One place that the files can come from."""

    name: str
    size: str
    """What is downloaded, for people: "12 MB"."""
    fill: Callable[[Path], None]
    """Puts the files under a given root, as torchvision would. Raises SourceError, or OSError if it is the disk."""


@dataclass(frozen=True)
class IdxFiles:
    """The four files of a data set, and where to get them."""

    name: str
    folder: str
    """Where torchvision keeps them under a root: "MNIST/raw"."""
    md5: dict[str, str]
    """Published MD5 by file name: train images, train labels, test images, test labels. A .gz is unpacked when read."""
    sources: tuple[Source, ...]
    num_classes: int = 10


def decode(data: bytes) -> NDArray[np.uint8]:
    """The array in an IDX file: two zero bytes, type 8 (unsigned byte), rank, sizes as big-endian uint32, bytes."""
    rank = data[3]
    shape = struct.unpack_from(f">{rank}I", data, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def encode(array: NDArray[np.uint8]) -> bytes:
    """An array of bytes as an IDX file; the inverse of `decode`."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def load(files: IdxFiles, root: Path) -> Dataset:
    """Read a data set from `root`, fetching first what is not there.

    Returns:
        Images [N, 1, H, W] uint8, labels [N] int64; new, writable arrays.

    Raises:
        DataError: if a file is damaged, or missing and cannot be fetched, or the folder cannot be used.
    """
    folder = root / files.folder
    with _disk_errors_explained(folder):
        if not all((folder / file).exists() for file in files.md5):
            fetch(files, root)
        arrays = []
        for file in files.md5:
            data = _checked_bytes(files, folder / file)
            arrays.append(decode(gzip.decompress(data) if file.endswith(".gz") else data))
    train_images, train_labels, test_images, test_labels = arrays
    return Dataset(
        name=files.name,
        train_images=train_images[:, None].copy(),  # `decode` gives read-only views, of which torch warns
        train_labels=train_labels.astype(np.int64),
        test_images=test_images[:, None].copy(),
        test_labels=test_labels.astype(np.int64),
        num_classes=files.num_classes,
    )


def fetch(files: IdxFiles, root: Path) -> Path:
    """Get the files that are not there from the first source that delivers, and check those that are.

    Each source fills a dot-prefixed folder of its own beside the files; they are checked there and renamed into
    place one by one. So a killed fetch leaves nothing that looks finished, and two at once are safe.

    Returns:
        The folder of the files.

    Raises:
        DataError: if a file is damaged, no source delivers, or the folder cannot be written.
    """
    folder = root / files.folder
    with _disk_errors_explained(folder):
        missing = []
        for file in files.md5:
            if (folder / file).exists():
                _checked_bytes(files, folder / file)
            else:
                missing.append(file)
        if not missing:
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        reasons = []
        for source in files.sources:
            print(f"fetching {files.name} from {source.name} ({source.size}) into {folder}", file=sys.stderr)
            try:
                _fetch_from(source, files, missing, folder)
            except SourceError as error:
                reasons.append(f"  {source.name}: {error}")
            else:
                print(f"fetched {files.name}: complete, checksums as published", file=sys.stderr)
                return folder
    raise DataError(
        f"{files.name} is not in {folder} and could not be fetched. Tried:\n" + "\n".join(reasons) + "\n"
        f"Set FEDSIM_DATA to a folder that has {files.folder}/{missing[0]} and the like ({len(files.md5)} files), "
        'or use data.dataset = "synthetic".'
    )


def state(files: IdxFiles, root: Path) -> tuple[str, int]:
    """What is in the cache, every byte checked: ("cached", "absent" or "damaged: <file>", bytes on disk)."""
    folder = root / files.folder
    with _disk_errors_explained(folder):
        present = [folder / file for file in files.md5 if (folder / file).exists()]
        size_bytes = sum(path.stat().st_size for path in present)
    for path in present:
        try:
            _checked_bytes(files, path)
        except (DataError, OSError):
            return f"damaged: {path.name}", size_bytes
    # A part of the files is as good as none: the rest is fetched at the next load.
    return ("cached" if len(present) == len(files.md5) else "absent"), size_bytes


def _fetch_from(source: Source, files: IdxFiles, missing: list[str], folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder, ignore_cleanup_errors=True) as root:
        source.fill(Path(root))
        fetched = Path(root) / files.folder
        for file in missing:
            found = _md5((fetched / file).read_bytes())
            if found != files.md5[file]:
                raise SourceError(f"delivered a {file} with MD5 {found}, expected {files.md5[file]}")
        for file in missing:
            (fetched / file).replace(folder / file)


def _checked_bytes(files: IdxFiles, path: Path) -> bytes:
    data = path.read_bytes()
    found, expected = _md5(data), files.md5[path.name]
    if found != expected:
        raise DataError(
            f"{path} is damaged: its MD5 is {found}, expected {expected}.\n"
            f"Delete it and run `fedsim data fetch {files.name}`."
        )
    return data


def _md5(data: bytes) -> str:
    # MD5 is what was published for these files; the flag lets machines that forbid it for cryptography compute it.
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def _disk_errors_explained(folder: Path) -> Iterator[None]:
    """Turn the disk's errors (full, read-only, no permission) into one line that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise DataError(
            f"the data cache {folder} cannot be used: {error.strerror or error}{where}.\n"
            "Free some space or give access to it, or set FEDSIM_DATA to another folder."
        ) from error
