"""One tensor of a model for all clients of a stack, and the step of SGD on it. K clients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.training import Sgd


@dataclass(frozen=True)
class Parameter:
    """One tensor of a layer, for every client of a stack."""

    value: Tensor
    """Shape [K, ...]: a view into the weights of the stack, changed in place."""
    velocity: Tensor | None
    """Likewise, of the momentum; None without."""
    sgd: Sgd

    def descend(self, gradient: Tensor, batch: int) -> None:
        """A step along a gradient [K, ...] that is summed over the `batch` examples."""
        sgd, velocity = self.sgd, self.velocity
        if velocity is None:
            if sgd.weight_decay:
                self.value.mul_(1 - sgd.lr * sgd.weight_decay)
            self.value.add_(gradient, alpha=-sgd.lr / batch)
        else:
            self._roll(velocity.mul_(sgd.momentum).add_(gradient, alpha=1 / batch))

    def descend_along(self, a: Tensor, b: Tensor, batch: int) -> None:
        """A step along the gradient a @ b, never formed: the product is added to the weights as it is computed."""
        sgd, velocity = self.sgd, self.velocity
        if velocity is None:
            self.value.baddbmm_(a, b, beta=1 - sgd.lr * sgd.weight_decay, alpha=-sgd.lr / batch)
        else:
            self._roll(velocity.baddbmm_(a, b, beta=sgd.momentum, alpha=1 / batch))

    def _roll(self, velocity: Tensor) -> None:
        if self.sgd.weight_decay:
            velocity.add_(self.value, alpha=self.sgd.weight_decay)
        self.value.add_(velocity, alpha=-self.sgd.lr)
