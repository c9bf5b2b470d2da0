"""The serial pool: every client in this process, one after another. The debugger, the test double, the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedsim.actors import FitResult, PoolInfo
from fedsim.client import ClientHost, ClientSpec, FitTask, evaluation_chunks, total
from fedsim.datasets import Dataset
from fedsim.errors import PlanError, first_line
from fedsim.numerics import numerics
from fedsim.partition import Partition
from fedsim.training import Evaluation
from fedsim.weights import Weights


class SerialPool:
    """A `Pool` of this process alone. After each call torch's settings are the caller's again.

    Args:
        spec: what the clients do.
        dataset: all examples.
        partition: who has which.
        device: where they are trained; "cpu" or "cuda".

    Raises:
        PlanError: CUDA does not start.
    """

    def __init__(self, spec: ClientSpec, dataset: Dataset, partition: Partition, device: str = "cpu") -> None:
        self._threads = spec.threads
        self._chunks = evaluation_chunks(dataset)
        if device == "cuda":
            _start_cuda()
        with numerics(self._threads):
            self._host = ClientHost(spec, device)
            info = self._host.load(dataset, partition)
        self.info = PoolInfo(info.device, info.fingerprint)

    def fit(self, round: int, weights: Weights, cohort: Sequence[int]) -> list[FitResult]:
        """See `Pool.fit`."""
        with numerics(self._threads):
            updates = self._host.fit(weights, [FitTask(round, client_id) for client_id in sorted(cohort)])
        return [FitResult(u.client_id, u.num_examples, u, actor=-1, attempts=1) for u in updates]

    def evaluate(self, round: int, weights: Weights, then: Sequence[int] = ()) -> Evaluation:
        """See `Pool.evaluate`."""
        with numerics(self._threads):
            return total(self._host.evaluate(round, weights, self._chunks))

    def close(self) -> None:
        """See `Pool.close`."""
        is_on_gpu = self._host.device.type == "cuda"
        del self._host
        if is_on_gpu:
            torch.cuda.empty_cache()  # for whoever uses it next


def _start_cuda() -> None:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        raise PlanError(f"CUDA does not start here: {first_line(error)}; set placement.num_gpus=0") from error
