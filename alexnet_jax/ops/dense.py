"""The product of a fully connected layer."""

import jax
import jax.numpy as jnp
from jax import Array

import alexnet_jax.ops.native as native
from alexnet_jax.ops.varying import varying_alike


def dense(x: Array, kernel: Array) -> Array:
    """x (b, i) times the kernel (i, o), cast to x's dtype: (b, o) of x's dtype.

    As C++ on a CPU it can be differentiated once.
    """
    kernel = kernel.astype(x.dtype)
    return _dense(*varying_alike(x, kernel)) if native.available(x) else x @ kernel


@jax.custom_vjp
def _dense(x: Array, kernel: Array) -> Array:
    """For few rows: the kernel is read once, and packed while read (native/dense.h)."""
    return native.call("dense", jax.eval_shape(jnp.matmul, x, kernel).shape, x, kernel)


def _dense_forward(x, kernel):
    return _dense(x, kernel), (x, kernel)


def _dense_backward(residuals, dy):
    x, kernel = residuals
    dx = native.call("dense_input", x.shape, dy, kernel)
    return dx, native.call("dense_weights", kernel.shape, x, dy)


_dense.defvjp(_dense_forward, _dense_backward)
