"""Cross-entropy and top-1, top-5 errors, exact over padded batches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Sums(NamedTuple):
    """Sums over examples, float32 scalars; add them over batches, then take `errors`."""

    loss: Array  # nats
    top1: Array  # examples whose best class is right
    top5: Array  # examples whose five best classes hold the right one
    count: Array  # examples


def log_probabilities(logits: Array) -> Array:
    """(..., classes) of any float dtype -> (..., classes) float32."""
    return jax.nn.log_softmax(logits.astype(jnp.float32))


def sums(log_probs: Array, labels: Array, valid: Array | None = None) -> Sums:
    """Loss and right answers of a batch.

    Args:
      log_probs: (b, classes) float32.
      labels: (b,) int, in 0..classes - 1.
      valid: (b,) bool; False for padding rows, ignored whatever they hold. None: all are valid.

    Returns:
      Sums. Of equal probabilities the lower class ranks first, as in a stable sort. A row with a
      NaN is never right.
    """
    right = jnp.take_along_axis(log_probs, labels[:, None], axis=1)  # (b, 1)
    classes = jnp.arange(log_probs.shape[1])
    ahead = (log_probs > right) | ((log_probs == right) & (classes < labels[:, None]))
    rank = jnp.sum(ahead, axis=1)  # (b,)
    rank = jnp.where(jnp.isnan(log_probs).any(axis=1), max(5, log_probs.shape[1]), rank)
    rows = (-right[:, 0], rank < 1, rank < 5, jnp.ones_like(rank))
    if valid is not None:
        rows = tuple(jnp.where(valid, row, jnp.zeros_like(row)) for row in rows)
    return Sums(*(jnp.sum(row.astype(jnp.float32)) for row in rows))


def added(parts: Sequence[Any]) -> Sums:
    """Add up the `Sums` of several batches; float64, on the host."""
    return Sums(*np.sum(np.array(parts, np.float64), axis=0))


def errors(total: Sums) -> dict[str, float]:
    """Mean loss (nats) and the errors as fractions in 0..1; with n < 5 classes top-5 is top-n."""
    count = float(total.count)
    return {
        "loss": float(total.loss) / count,
        "top1_error": (count - float(total.top1)) / count,
        "top5_error": (count - float(total.top5)) / count,
    }
