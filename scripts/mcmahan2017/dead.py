"""Runs that have nothing to learn with any more, as a rate that is too high may leave them."""

from __future__ import annotations

import torch
from torch import nn

import fedsim
from fedsim import datasets
from fedsim.training import pixels

DEAD = "dead"
"""Status of such a run in runs.parquet."""
_ONE_LABEL = 0.2
"""An accuracy above what the same answer to all of MNIST's images can have; spares most runs the trial."""
_MARGIN = 1e-3
"""What a ReLU's inputs are below zero at least: in other batches they round differently."""
_AT_ONCE = 500


def is_dead(run: fedsim.Run) -> bool:
    """Whether a ReLU gives zero for every image of the training and test sets; reads all of them, a minute for the CNN.

    Nothing above that layer sees an image, and nothing below it has a gradient. So it stays, in every client's training
    (by plain SGD) and in their mean: in each later round one label is the answer to all images.
    """
    last = run.rounds["test_accuracy"].iloc[-1:]
    if run.status == "failed" or not (last <= _ONE_LABEL).all():
        return False
    dataset, layers = datasets.load(run.config.data.dataset), list(run.model().children())
    is_zero = [isinstance(layer, nn.ReLU) for layer in layers]
    with torch.inference_mode():
        for images in (dataset.test_images, dataset.train_images):
            for start in range(0, len(images), _AT_ONCE):
                x = pixels(torch.from_numpy(images[start : start + _AT_ONCE]), torch.float32)
                for place, layer in enumerate(layers):
                    is_zero[place] = is_zero[place] and bool(x.max() < -_MARGIN)
                    x = layer(x)
                if not any(is_zero):
                    return False
    return True
