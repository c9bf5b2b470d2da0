"""Torch's settings that can change a bit: threads, denormals, default dtype, TF32. Set wherever something computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def numerics(threads: int) -> Iterator[None]:
    """Sets everything in this process that could change a bit; puts the caller's settings back at the end.

    That includes the modes a caller may be in: autocast, no_grad, inference_mode, another default device.
    """
    threads_before, dtype_before = torch.get_num_threads(), torch.get_default_dtype()
    flushes_before = bool(torch.tensor(1e-310, dtype=torch.float64, device="cpu").mul(1) == 0)
    precision_before = _Precision()
    cudnn_before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    with contextlib.ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            modes.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):  # only then: this mode slows every call down
            modes.enter_context(torch.device("cpu"))
        try:
            set_numerics(threads)
            yield
        finally:
            torch.set_num_threads(threads_before)
            torch.set_default_dtype(dtype_before)
            torch.set_flush_denormal(flushes_before)
            precision_before.restore()
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn_before


def set_numerics(threads: int) -> None:
    """As `numerics`, for good: what an actor does when it starts."""
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    torch.set_flush_denormal(False)
    # torch has an old and a new interface to the same settings, and fails where one reads what only the other has set
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for backend in _backends():
        backend.fp32_precision = "ieee"
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


class _Precision:
    """The settings that allow float32 to be computed in TF32 or bfloat16, in both of torch's interfaces."""

    def __init__(self) -> None:
        self._new = [backend.fp32_precision for backend in _backends()]
        self._old: tuple[str, bool] | None = None
        with contextlib.suppress(RuntimeError):  # set by the new interface: the old one cannot be read
            self._old = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def restore(self) -> None:
        if self._old is not None:
            torch.set_float32_matmul_precision(self._old[0])
            torch.backends.cudnn.allow_tf32 = self._old[1]
        for backend, precision in zip(_backends(), self._new, strict=True):
            backend.fp32_precision = precision


def _backends() -> list[Any]:
    backends: Any = torch.backends
    return [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.conv, backends.mkldnn.matmul]
