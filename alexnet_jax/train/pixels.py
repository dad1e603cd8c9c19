"""Pixel operations on the device: test crops, and subtracting the mean."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from alexnet_jax.data.statistics import Statistics


def cut(squares: Array, crop: Array, size: int) -> Array:
    """Cut a row of `augment.test_crops`: (b, stored, stored, 3) -> (b, s, s, 3)."""
    top, left, mirror = crop
    start = (jnp.zeros_like(top), top, left, jnp.zeros_like(top))
    window = lax.dynamic_slice(squares, start, (squares.shape[0], size, size, 3))
    return jnp.where(mirror > 0, window[:, :, ::-1], window)


def normalise(
    images: Array, offset: Array, mirror: Array, statistics: Statistics, mean: str
) -> Array:
    """Pixels minus their mean.

    Args:
      images: (b, s, s, 3), on the scale 0..255, cropped and mirrored.
      offset: (b, 2) int32, where each was cut.
      mirror: (b,) bool.
      statistics: of the training split.
      mean: `central` subtracts the mean image's central crop from every image, wherever it was
        cut and mirrored or not, as the original did; `at_crop` the mean image's crop at the
        same place, mirrored with it, as Caffe; `channel` the channels' means, and divides by
        their standard deviations, as torchvision.

    Returns:
      (b, s, s, 3) float32.
    """
    pixels = images.astype(jnp.float32)
    size, stored = images.shape[1], statistics.stored_size
    if mean == "channel":
        means = jnp.mean(jnp.asarray(statistics.mean_image), axis=(0, 1))
        return (pixels - means) / statistics.channel_std
    if mean == "central":
        middle = (stored - size) // 2
        centre = slice(middle, middle + size)
        return pixels - jnp.asarray(statistics.mean_image)[centre, centre]

    def mean_at(place: Array, flip: Array) -> Array:
        window = lax.dynamic_slice(
            jnp.asarray(statistics.mean_image), (*place, np.int32(0)), (size, size, 3)
        )
        return jnp.where(flip, window[:, ::-1], window)

    return pixels - jax.vmap(mean_at)(offset, mirror)
