"""The serial pool: every client in this process, one after another. The debugger, the test double, the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from fedsim import training
from fedsim.actors import FitResult, PoolInfo
from fedsim.client import ClientHost, ClientSpec, Evaluation, FitTask, evaluation_chunks, total
from fedsim.datasets import Dataset
from fedsim.partition import Partition
from fedsim.weights import Weights


class SerialPool:
    """A `Pool` of this process alone. Torch's settings are put back when it closes."""

    def __init__(self, spec: ClientSpec, dataset: Dataset, partition: Partition) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(training.numerics(spec.threads))
            self._host = ClientHost(spec)
            info = self._host.load(dataset, partition)
            self._cleanup = stack.pop_all()
        self._chunks = evaluation_chunks(dataset)
        self.info = PoolInfo(info.device, info.fingerprint)

    def fit(self, round: int, weights: Weights, cohort: Sequence[int]) -> list[FitResult]:
        """See `Pool.fit`."""
        updates = self._host.fit(weights, [FitTask(round, client_id) for client_id in sorted(cohort)])
        return [FitResult(update, actor=-1, attempts=1) for update in updates]

    def evaluate(self, round: int, weights: Weights) -> Evaluation:
        """See `Pool.evaluate`."""
        return total(self._host.evaluate(round, weights, self._chunks))

    def close(self) -> None:
        """See `Pool.close`."""
        self._cleanup.close()
