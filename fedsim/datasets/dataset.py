"""The data set that a run trains and evaluates on: four numpy arrays, checked when they are put together.

Imports numpy only: every actor imports this module. Shapes: N examples, C channels, H height, W width.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from fedsim.errors import DataError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels, for training (to be split over the clients) and for testing.

    Attributes:
        name: what it is called in records and messages.
        train_images: [N, C, H, W], uint8 (the training code scales it to byte / 255) or float32 (used as it is).
        train_labels: [N] int64, 0 to num_classes - 1.
        test_images: as train_images, with the same C, H, W and dtype; its own N.
        test_labels: as train_labels.
        num_classes: number of classes, 2 or more; not every class has to occur.

    Raises:
        DataError: if an array has another type, shape or range than said above.

    Example:
        >>> images, labels = np.zeros((6, 1, 8, 8), np.float32), np.arange(6) % 3
        >>> Dataset("mine", images, labels, images[:3], labels[:3], num_classes=3).input_shape
        (1, 8, 8)
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int

    def __post_init__(self) -> None:
        if type(self.num_classes) is not int or self.num_classes < 2:
            raise DataError(
                f"data set {self.name!r}: num_classes must be an int of 2 or more; got {self.num_classes!r}"
            )
        for part in ("train", "test"):
            _check_images(f"data set {self.name!r}: {part}_images", getattr(self, f"{part}_images"))
            _check_labels(f"data set {self.name!r}: {part}_labels", getattr(self, f"{part}_labels"), self.num_classes)
            num_images, num_labels = len(getattr(self, f"{part}_images")), len(getattr(self, f"{part}_labels"))
            if num_images != num_labels:
                raise DataError(f"data set {self.name!r}: {num_images} {part}_images, but {num_labels} {part}_labels")
        train, test = self.train_images, self.test_images
        if (train.shape[1:], train.dtype) != (test.shape[1:], test.dtype):
            raise DataError(
                f"data set {self.name!r}: train_images and test_images must have the same C, H, W and dtype; "
                f"got {train.shape[1:]} {train.dtype} and {test.shape[1:]} {test.dtype}"
            )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one example: (C, H, W)."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width

    def sha256(self) -> str:
        """64 lower-case hex digits over the names, dtypes, shapes and little-endian bytes of the four arrays."""
        return self._sha256

    @functools.cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for name in ("train_images", "train_labels", "test_images", "test_labels"):
            array = getattr(self, name)
            little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            digest.update(f"{name} {little.dtype.str} {little.shape}\n".encode())
            digest.update(little.reshape(-1).data)
        return digest.hexdigest()


def _check_array(what: str, value: object) -> None:
    if not isinstance(value, np.ndarray):
        raise DataError(f"{what} must be a numpy array (of a torch tensor: tensor.numpy()); got {type(value).__name__}")


def _check_images(what: str, images: np.ndarray) -> None:
    _check_array(what, images)
    if images.ndim != 4 or 0 in images.shape:
        raise DataError(f"{what} must have the shape [N, C, H, W] with none of them 0; got {list(images.shape)}")
    if images.dtype not in (np.uint8, np.float32):
        raise DataError(f"{what} must be uint8 (0 to 255) or float32; got {images.dtype}")
    if images.dtype == np.float32 and not np.isfinite(images).all():
        raise DataError(f"{what} must be finite; got NaN or infinity in example {_first_not_finite(images)}")


def _check_labels(what: str, labels: np.ndarray, num_classes: int) -> None:
    _check_array(what, labels)
    if labels.ndim != 1 or len(labels) == 0:
        raise DataError(f"{what} must have the shape [N] with N above 0; got {list(labels.shape)}")
    if labels.dtype != np.int64:
        raise DataError(f"{what} must be int64 (labels.astype(np.int64)); got {labels.dtype}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"{what} must be 0 to {num_classes - 1}; got {labels.min()} to {labels.max()}")


def _first_not_finite(images: np.ndarray) -> int:
    return int(np.argmin(np.isfinite(images).all(axis=(1, 2, 3))))
