"""Sums over pixels, and what follows from them: mean image, deviations, principal colours."""

import pathlib
from typing import NamedTuple

import numpy as np

from alexnet_jax.data import native
from alexnet_jax.files import read_arrays


class Statistics(NamedTuple):
    """Of the training split's stored squares, on the scale 0..255."""

    mean_image: np.ndarray  # (stored, stored, 3) float32
    channel_std: np.ndarray  # (3,) float32
    eigenvalues: np.ndarray  # (3,) float32, ascending, of the covariance of RGB pixel values
    eigenvectors: np.ndarray  # (3, 3) float32, in columns

    @property
    def stored_size(self) -> int:
        """Pixels a side of the squares."""
        return self.mean_image.shape[0]


def read_statistics(path: pathlib.Path, size: int) -> Statistics:
    """The statistics of an .npz file, for squares of `size` pixels a side.

    Raises:
      ValueError: it holds none for that size.
    """
    found = Statistics(**read_arrays(path, Statistics._fields))
    shapes = ((size, size, 3), (3,), (3,), (3, 3))
    for name, array, shape in zip(Statistics._fields, found, shapes):
        if array.dtype != np.float32 or array.shape != shape or not np.isfinite(array).all():
            raise ValueError(f"{name} is not {shape} finite float32")
    return found


class Sums:
    """Exact integer sums, so that the order of adding does not change the result."""

    def __init__(self, size: int):
        self.count = 0  # images
        self.pixels = np.zeros((size, size, 3), np.int64)  # summed over images
        self.products = np.zeros((3, 3), np.int64)  # of channels, over images and pixels

    def add(self, square: np.ndarray) -> None:
        """Add an image, (size, size, 3) uint8."""
        self.count += 1
        if native.available():
            native.add(square, self.pixels, self.products)
        else:
            self.pixels += square
            flat = square.reshape(-1, 3).astype(np.float64)
            self.products += (flat.T @ flat).astype(np.int64)  # exact: below 2**53

    def merge(self, other: "Sums") -> None:
        self.count += other.count
        self.pixels += other.pixels
        self.products += other.products

    def statistics(self) -> Statistics:
        """The statistics of the images added, of which there must be at least one."""
        mean_image = self.pixels / self.count
        num_pixels = self.count * mean_image.shape[0] ** 2
        mean = self.pixels.sum(axis=(0, 1)) / num_pixels
        covariance = self.products / num_pixels - np.outer(mean, mean)
        eigenvalues, eigenvectors = np.linalg.eigh(covariance)
        # A constant channel would divide by zero; deviations are at least half a grey level.
        std = np.sqrt(np.maximum(np.diag(covariance), 0.25))
        return Statistics(
            mean_image=mean_image.astype(np.float32),
            channel_std=std.astype(np.float32),
            eigenvalues=np.maximum(eigenvalues, 0).astype(np.float32),
            eigenvectors=eigenvectors.astype(np.float32),
        )
