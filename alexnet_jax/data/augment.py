"""The paper's augmentation (section 4.1): crop, mirror, PCA colour noise; and the ten test crops.

Every draw is a function of (seed, position) alone, position being the image's place in the whole
training stream, so neither workers nor devices nor restarts change it. Crop and mirror
move uint8 bytes on the host (`images.crop`), or on the device where it holds the images
(`resident`); arithmetic is done on the device (`train.pixels`).
"""

from typing import NamedTuple

import numpy as np

from alexnet_jax.config import Data
from alexnet_jax.data.statistics import Statistics

CROP_STREAM, COLOUR_STREAM, ORDER_STREAM = 1, 2, 3  # independent random streams of one seed


class Draws(NamedTuple):
    """The random draws for n consecutive images."""

    offset: np.ndarray  # (n, 2) int32, the crop's top and left in the stored square
    mirror: np.ndarray  # (n,) bool
    colour: np.ndarray  # (n, 3) float64, standard normal


def random_blocks(seed: int, stream: int, start: int, count: int) -> np.ndarray:
    """(count, 4) uint64 random words: row i is a function of (seed, stream, start + i) alone.

    One Philox counter per row, so that any range of rows is drawn without those before it.
    """
    generator = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=start)
    return generator.random_raw(4 * count).reshape(count, 4)


def draw(seed: int, start: int, count: int, margin: int, data: Data) -> Draws:
    """The draws for positions start .. start + count - 1; offsets are 0..margin inclusive.

    With `data.crop_share` of 32, as the original had it, offset and mirror are drawn once for
    every 32 consecutive positions.
    """
    shared = np.arange(start, start + count) // data.crop_share
    blocks = random_blocks(seed, CROP_STREAM, int(shared[0]), int(shared[-1] - shared[0]) + 1)
    words = blocks[shared - shared[0]]
    if data.random_crop:
        offset = (words[:, :2] >> np.uint64(32)) * np.uint64(margin + 1) >> np.uint64(32)
    else:
        offset = np.full((count, 2), margin // 2)
    mirror = (words[:, 2] >> np.uint64(63)).astype(bool) & data.mirror
    return Draws(offset.astype(np.int32), mirror, _normals(seed, start, count))


def _normals(seed: int, start: int, count: int) -> np.ndarray:
    """(count, 3) float64 standard normal numbers by Box and Muller's transform."""
    words = random_blocks(seed, COLOUR_STREAM, start, count) >> np.uint64(11)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1), never 0
    radius = np.sqrt(-2 * np.log(uniform[:, :2]))  # (count, 2)
    angle = 2 * np.pi * uniform[:, 2:]
    first, second = radius * np.cos(angle), radius * np.sin(angle)
    return np.concatenate([first, second[:, :1]], axis=1)


def colour_shift(normals: np.ndarray, statistics: Statistics, sigma: float) -> np.ndarray:
    """The shift of the three channels: sigma * sum_i normal_i * sqrt(eigenvalue_i) * vector_i.

    (n, 3) -> (n, 3) float32. The square root is the original's: the paper's formula, taken
    literally on pixels of 0..255, would shift colours by a thousand or more.
    """
    scaled = sigma * normals * np.sqrt(statistics.eigenvalues)
    return (scaled @ statistics.eigenvectors.T).astype(np.float32)


def test_crops(margin: int, num_crops: int) -> np.ndarray:
    """(num_crops, 3) int32 rows of top, left and mirror: the centre, or corners and centre twice.

    Source: paper, section 4.1; places 0, margin // 2, margin.
    """
    middle = margin // 2
    places = [(0, 0), (0, margin), (middle, middle), (margin, 0), (margin, margin)]
    if num_crops == 1:
        return np.array([(middle, middle, 0)], np.int32)
    return np.array([(*place, mirror) for mirror in (0, 1) for place in places], np.int32)
