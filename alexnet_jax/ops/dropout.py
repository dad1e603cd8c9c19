"""Dropout, with masks that do not depend on which device draws them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def keep_mask(
    key: Array, rows: Array, *, layer: int, towers: Array, shape: tuple[int, ...], rate: float
) -> Array:
    """Mask of the units that dropout keeps: a function of (key, row, layer, tower, unit) alone.

    Args:
      key: a PRNG key of the run's seed and step.
      rows: (b,) int32, places in the global batch.
      layer: a number for the layer.
      towers: (t,) int32, the towers this device holds.
      shape: (..., c), a tower's units of one image.
      rate: probability of being dropped.

    Returns:
      (b, ..., t * c) bool.
    """
    key = jax.random.fold_in(key, layer)

    def one(row: Array, tower: Array) -> Array:
        key_of_row = jax.random.fold_in(jax.random.fold_in(key, tower), row)
        return jax.random.bits(key_of_row, shape, jnp.uint32)  # with x64 they would have 64 bits

    over_towers = jax.vmap(one, in_axes=(None, 0), out_axes=-2)
    bits = jax.vmap(over_towers, in_axes=(0, None))(rows, towers)  # (b, ..., t, c)
    keep = bits >= np.uint32(int(rate * 2**32))
    return keep.reshape(*keep.shape[:-2], -1)


def dropout(x: Array, keep: Array | None, rate: float, rule: str) -> Array:
    """Drop the units where `keep` is False; `keep` None means evaluation.

    Rule `scale_at_test` (paper, section 4.2) leaves kept units as they are and multiplies by
    1 - rate when evaluating; `inverted` divides kept units by 1 - rate while training.
    """
    if rule == "scale_at_test":
        return x * (1 - rate) if keep is None else jnp.where(keep, x, 0)
    return x if keep is None else jnp.where(keep, x / (1 - rate), 0)
