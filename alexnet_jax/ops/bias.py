"""Biases, with gradients summed over all pixels in float32."""

import jax
import jax.numpy as jnp
from jax import Array

from alexnet_jax.ops.varying import varying_alike


def add_bias(x: Array, bias: Array) -> Array:
    """x (..., o) plus one bias per map, (o,) float32 cast to x's dtype: x's shape and dtype.

    The bias's gradient is summed in float32: it goes over millions of pixels, and by default a GPU
    adds bfloat16 numbers in bfloat16.
    """
    return _add_bias(*varying_alike(x, bias))


@jax.custom_vjp
def _add_bias(x: Array, bias: Array) -> Array:
    return x + bias.astype(x.dtype)


def _forward(x: Array, bias: Array) -> tuple[Array, None]:
    return _add_bias(x, bias), None


def _backward(_: None, dy: Array) -> tuple[Array, Array]:
    return dy, jnp.sum(dy, range(dy.ndim - 1), jnp.float32)


_add_bias.defvjp(_forward, _backward)
