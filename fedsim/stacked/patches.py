"""The convolutions of a stack on a GPU, which one convolution a client would leave idle.

Shape letters: K clients, B examples of a client's batch, C channels in, O out, H x W pixels in, H' x W' out, h x w of
the kernel, P = h * w * C values of a patch, L = B * H' * W' patches of a client. Images have their channels innermost
in memory, so that a row of a patch is one piece of it.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.stacked.parameter import Parameter


class PatchedConv2d:
    """y = p W + b for the patches p of each client's images, as one batched product. A `layers.Layer`.

    Args:
        module: without groups, and padded by zeros.
        parameters: by name.
        padding: of the module, in numbers.
    """

    is_trained = True

    def __init__(self, module: nn.Conv2d, parameters: dict[str, Parameter], padding: tuple[int, int]) -> None:
        self.weight, self.bias = parameters["weight"], parameters.get("bias")
        self._padding = padding[1], padding[1], padding[0], padding[0]
        self._kernel, self._stride, self._dilation = module.kernel_size, module.stride, module.dilation

    def forward(self, x: Tensor) -> Tensor:
        """[K, B, C, H, W] -> [K, B, O, H', W']."""
        num_clients, batch = x.shape[:2]
        images = F.pad(x.flatten(0, 1).permute(0, 2, 3, 1), (0, 0, *self._padding)).contiguous()
        self._padded = images.shape  # [K * B, H + 2 padding, W + 2 padding, C]
        self._size = tuple(  # H', W'
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, dilation, stride in zip(
                images.shape[1:3], self._kernel, self._dilation, self._stride, strict=True
            )
        )
        of_image, *of_pixel, one = images.stride()
        steps = [
            pixel * by
            for by_axis in (self._stride, self._dilation)
            for pixel, by in zip(of_pixel, by_axis, strict=True)
        ]
        patches = images.as_strided(
            (len(images), *self._size, *self._kernel, images.shape[3]), (of_image, *steps, one)
        )  # [K * B, H', W', h, w, C]
        self._patches = patches.reshape(num_clients, -1, patches[0, 0, 0].numel())  # [K, L, P]
        self._weight = self.weight.value.permute(0, 1, 3, 4, 2).flatten(2)  # [K, O, P]
        if self.bias:
            y = torch.baddbmm(self.bias.value[:, None], self._patches, self._weight.mT)
        else:
            y = torch.bmm(self._patches, self._weight.mT)
        return y.view(num_clients, batch, *self._size, -1).permute(0, 1, 4, 2, 3)

    def backward(self, g: Tensor, *, needs_input: bool) -> Tensor:
        """See `Layer.backward`."""
        num_clients, batch, channels = g.shape[:3]
        g = g.permute(0, 1, 3, 4, 2).reshape(num_clients, -1, channels)  # [K, L, O]
        below = self._below(torch.bmm(g, self._weight), batch) if needs_input else g
        gradient = torch.bmm(g.mT, self._patches).view(num_clients, channels, *self._kernel, -1)
        self.weight.descend(gradient.permute(0, 1, 4, 2, 3), batch)
        if self.bias:
            self.bias.descend(g.sum(1), batch)
        return below

    def _below(self, patches: Tensor, batch: int) -> Tensor:
        """The gradient of the images [K, B, C, H, W] from that of their patches: a pixel has been in several."""
        patches = patches.view(-1, *self._size, *self._kernel, self._padded[3])
        images = patches.new_zeros(self._padded)
        for at in product(*map(range, self._kernel)):
            rows, columns = (
                slice(i * dilation, i * dilation + (size - 1) * stride + 1, stride)
                for i, dilation, size, stride in zip(at, self._dilation, self._size, self._stride, strict=True)
            )
            images[:, rows, columns] += patches[:, :, :, at[0], at[1]]
        left, _, top, _ = self._padding
        _, height, width, _ = self._padded
        images = images[:, top : height - top, left : width - left].permute(0, 3, 1, 2)
        return images.view(-1, batch, *images.shape[1:])
