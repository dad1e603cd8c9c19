"""Response normalisation, across maps and across pixels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import alexnet_jax.ops.gpu as gpu
import alexnet_jax.ops.native as native


def local_response_norm(
    x: Array, *, size: int, k: float, alpha: float, beta: float, groups: int = 1
) -> Array:
    """Response normalisation across adjacent maps (paper, section 3.3).

        y[i] = x[i] * (k + alpha * sum_{|j - i| <= size // 2} x[j] ** 2) ** -beta

    Args:
      x: (b, h, w, c).
      alpha: multiplies the plain sum, which is not divided by `size`.
      groups: number of equal groups of maps; a sum stays within its group.

    Returns:
      x's shape and dtype; sums and power in float32. As C++ on a CPU, or by a GPU's kernel, it can
      be differentiated once.
    """
    if beta == 0.75 and x.shape[-1] % groups == 0 and native.available(x):
        return _normalised_by_lines(x, native.Rule(groups, size, float(k), float(alpha)))
    if gpu.available(x.shape, groups=groups, size=size, beta=beta):
        return _normalised_by_pixels(x, gpu.Rule(size, k, alpha, groups, rectify=False))
    return _normalised(x, size, k, alpha, beta, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _normalised_by_lines(x: Array, rule: native.Rule) -> Array:
    """With a power of 3/4, pixel by pixel."""
    return native.call("normalise", x.shape, x, **rule._asdict())


_normalised_by_lines.defvjp(
    lambda x, rule: (_normalised_by_lines(x, rule), x),
    lambda rule, x, dy: (native.call("normalise_gradient", x.shape, x, dy, **rule._asdict()),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _normalised_by_pixels(x: Array, rule: gpu.Rule) -> Array:
    return gpu.normalise(x, rule)


_normalised_by_pixels.defvjp(
    lambda x, rule: (gpu.normalise(x, rule), x),
    lambda rule, x, dy: (gpu.normalise_gradient(x, dy, rule),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def _normalised(x, size, k, alpha, beta, groups):
    x32 = x.astype(jnp.float32)
    total = k + alpha * _over_neighbours(x32 * x32, size, groups)
    return (x32 * _power(total, beta)).astype(x.dtype)


def _normalised_forward(x, size, k, alpha, beta, groups):
    return _normalised(x, size, k, alpha, beta, groups), x


def _normalised_backward(size, k, alpha, beta, groups, x, dy):
    """dx[i] = dy[i] s[i]**-beta - 2 alpha beta x[i] * sum_j dy[j] x[j] s[j]**(-beta - 1)

    over the same neighbours j, since being neighbours is symmetric; s is the sum including k. To
    save a GPU memory traffic, only x is kept from the forward pass, and the terms summed here are
    stored in x's dtype. The barriers enforce both.
    """
    x = lax.optimization_barrier(x)
    x32, dy32 = x.astype(jnp.float32), dy.astype(jnp.float32)
    total = k + alpha * _over_neighbours(x32 * x32, size, groups)
    power = _power(total, beta)
    shares = lax.optimization_barrier((dy32 * x32 * power / total).astype(x.dtype))
    through = _over_neighbours(shares.astype(jnp.float32), size, groups)
    return ((dy32 * power - (2 * alpha * beta) * x32 * through).astype(x.dtype),)


_normalised.defvjp(_normalised_forward, _normalised_backward)


def _over_neighbours(x: Array, size: int, groups: int) -> Array:
    """Sums over the maps at most size // 2 away in the same group: (b, h, w, c) float32.

    On a TPU a number that is not finite makes every map of its pixel NaN.
    """
    maps, reach = x.shape[-1], size // 2
    if jax.default_backend() == "tpu":  # which moves maps slowly, but multiplies fast
        place, group = np.arange(maps), np.arange(maps) * groups // maps
        near = abs(place[:, None] - place) <= reach
        near &= group[:, None] == group
        return jnp.matmul(x, near.astype(np.float32), precision=lax.Precision.HIGHEST)
    padded = jnp.pad(x, [(0, 0), (0, 0), (0, 0), (reach, reach)])
    group = np.arange(-reach, maps + reach) * groups // maps
    total = jnp.zeros_like(x)
    for first in range(2 * reach + 1):
        near = lax.slice_in_dim(padded, first, first + maps, axis=3)
        together = group[first : first + maps] == group[reach : reach + maps]
        total += jnp.where(together, near, 0)
    return total


def spatial_response_norm(x: Array, *, size: int, k: float, alpha: float, beta: float) -> Array:
    """Response normalisation over the size x size neighbours in the same map, clipped at the edge.

    Source: layers-145.cfg of the original; not in the paper. Shapes and dtypes as in
    `local_response_norm`.
    """
    x32 = x.astype(jnp.float32)
    reach = size // 2
    sums = lax.reduce_window(
        x32 * x32,
        0.0,
        lax.add,
        (1, size, size, 1),
        (1, 1, 1, 1),
        ((0, 0), (reach, reach), (reach, reach), (0, 0)),
    )
    return (x32 * _power(k + alpha * sums, beta)).astype(x.dtype)


def _power(sums: Array, beta: float) -> Array:
    """sums ** -beta; for the .75 of the paper by roots, which are faster than a power."""
    if beta == 0.75:
        root = lax.rsqrt(sums)
        return root * lax.rsqrt(sums * root)
    return sums**-beta
