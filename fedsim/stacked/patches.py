"""The convolutions of a stack on a GPU, which one convolution a client would leave idle.

Shape letters: K clients, B examples of a client's batch, C channels in, O out, H x W pixels in, H' x W' out,
P values of a patch, L = H' * W' patches of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.stacked.parameter import Parameter


class PatchedConv2d:
    """y = W p + b for every patch p of every client's images, as one batched product. A `layers.Layer`.

    Args:
        module: without groups, and padded by zeros.
        parameters: by name.
        padding: of the module, in numbers.
    """

    is_trained = True

    def __init__(self, module: nn.Conv2d, parameters: dict[str, Parameter], padding: tuple[int, int]) -> None:
        self.weight, self.bias = parameters["weight"], parameters.get("bias")
        self._options = module.kernel_size, module.dilation, padding, module.stride

    def forward(self, x: Tensor) -> Tensor:
        """[K, B, C, H, W] -> [K, B, O, H', W']."""
        num_clients, batch = x.shape[:2]
        self._image = x.shape[3:]
        self._patches = F.unfold(x.flatten(0, 1), *self._options)  # [K * B, P, L]
        weight = self.weight.value.flatten(2)  # [K, O, P]
        self._weight = weight[:, None].expand(-1, batch, -1, -1).flatten(0, 1)  # [K * B, O, P]
        y = torch.bmm(self._weight, self._patches).view(num_clients, batch, -1, *self._outputs())
        return y if self.bias is None else y.add_(self.bias.value[:, None, :, None, None])

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        """See `Layer.backward`."""
        num_clients, batch = g.shape[:2]
        by_image = g.reshape(num_clients * batch, g.shape[2], -1)  # [K * B, O, L]
        gradient = torch.bmm(by_image, self._patches.mT).view(num_clients, batch, -1).sum(1)
        below = g
        if needs_input:
            patches = torch.bmm(self._weight.mT, by_image)
            images = F.fold(patches, self._image, *self._options)
            below = images.view(num_clients, batch, *images.shape[1:])
        self.weight.descend(gradient.view_as(self.weight.value), batch)
        if self.bias:
            self.bias.descend(g.sum((1, 3, 4)), batch)
        return below

    def _outputs(self) -> tuple[int, int]:
        """H', W'."""
        height, width = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, dilation, padding, stride in zip(self._image, *self._options, strict=True)
        )
        return height, width
