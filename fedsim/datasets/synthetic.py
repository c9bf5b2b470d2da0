"""A small image set made in memory, for tests and for machines without a network.

Each class is a pattern of grey squares on black, like MNIST in its mean brightness; an example is its class's pattern,
moved by a few pixels, under noise. Integers only, so that every processor makes the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsim.datasets.dataset import Dataset
from fedsim.seeding import generator

_NUM_TRAIN, _NUM_TEST, _NUM_CLASSES = 2_000, 500, 10
_CELL = 4  # pixels: side of a square
_INK_ONE_IN = 4  # one square in this many is not black
_INK = 100  # of 255: its brightness
_MAX_SHIFT = 2  # pixels, up, down, left and right
_NOISE = 140  # of 255: how far noise reaches up and down, uniform


def synthetic(root: Path | None = None) -> Dataset:
    """2,000 + 500 examples, 1 x 28 x 28 uint8, 10 classes of equal size in random order; always the same bytes.

    Args:
        root: not used: nothing is read or written. Every entry of the table of data sets has it.
    """
    rng = generator("dataset", 0)
    num_examples = _NUM_TRAIN + _NUM_TEST
    squares = rng.integers(_INK_ONE_IN, size=(_NUM_CLASSES, 28 // _CELL, 28 // _CELL), dtype=np.int16) == 0
    patterns = _INK * squares.repeat(_CELL, axis=1).repeat(_CELL, axis=2).astype(np.int16)
    shifts = range(-_MAX_SHIFT, _MAX_SHIFT + 1)
    shifted = np.stack([np.roll(patterns, (dy, dx), axis=(1, 2)) for dy in shifts for dx in shifts])

    # Train and test are balanced each: their sizes are multiples of the number of classes.
    labels = np.concatenate([rng.permutation(np.arange(n) % _NUM_CLASSES) for n in (_NUM_TRAIN, _NUM_TEST)])
    noise = rng.integers(-_NOISE, _NOISE + 1, size=(num_examples, 28, 28), dtype=np.int16)
    images = shifted[rng.integers(len(shifted), size=num_examples), labels] + noise
    images = images.clip(0, 255).astype(np.uint8)[:, None]
    return Dataset(
        name="synthetic",
        train_images=images[:_NUM_TRAIN],
        train_labels=labels[:_NUM_TRAIN],
        test_images=images[_NUM_TRAIN:],
        test_labels=labels[_NUM_TRAIN:],
        num_classes=_NUM_CLASSES,
    )
