"""Convolution, overlapping pools, response normalisation. Pure functions on local arrays."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Padding = tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right), pixels


def conv(x: Array, kernel: Array, *, stride: int = 1, padding: Padding, groups: int = 1) -> Array:
    """Cross-correlation.

    Args:
      x: (b, h, w, groups * i).
      kernel: (kh, kw, i, o), cast to x's dtype; output channels in groups' order.
      stride: pixels, both ways.
      padding: zeros around the map.
      groups: input channels of group g reach output channels of group g only. Written as one
        convolution a group: XLA's own grouped form is twice as slow on the CPU, backward.

    Returns:
      (b, h', w', o) of x's dtype.
    """
    parts = zip(
        jnp.split(x, groups, axis=-1),
        jnp.split(kernel.astype(x.dtype), groups, axis=-1),
        strict=True,
    )
    few_maps = x.shape[-1] < 8 and stride == 1 and jax.default_backend() == "cpu"
    if few_maps:
        outputs: list[Any] = [_conv_of_few_maps(*_varying_alike(*part), padding) for part in parts]
    else:
        outputs = [_conv(*part, stride, padding) for part in parts]
    return outputs[0] if groups == 1 else jnp.concatenate(outputs, axis=-1)


def _conv(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _varying_alike(x: Array, kernel: Array) -> tuple[Array, Array]:
    """Both as different from device to device as either is, which a custom gradient asks for."""
    axes = [jax.typeof(array).manual_axis_type.varying for array in (x, kernel)]
    missing = [tuple((axes[0] | axes[1]) - own) for own in axes]
    x, kernel = (
        lax.pcast(array, names, to="varying") if names else array
        for array, names in zip((x, kernel), missing)
    )
    return x, kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_of_few_maps(x: Array, kernel: Array, padding: Padding) -> Any:
    """`_conv` in steps of 1, its weight gradient a product for each place in the window.

    XLA's own, a convolution over so few maps, takes three to four times as long on a CPU.
    """
    return _conv(x, kernel, 1, padding)


def _conv_of_few_maps_forward(x, kernel, padding):
    return _conv(x, kernel, 1, padding), (x, kernel)


def _conv_of_few_maps_backward(padding, residuals, dy):
    x, kernel = residuals
    tall, wide, _, _ = kernel.shape
    b, rows, columns, _ = dy.shape
    edges = [(0, 0, 0), *((*ends, 0) for ends in padding), (0, 0, 0)]
    padded = lax.pad(x, jnp.zeros((), x.dtype), edges)

    def at(i: int, j: int) -> Array:
        seen = lax.slice(padded, (0, i, j, 0), (b, i + rows, j + columns, x.shape[3]))
        return jnp.einsum("bhwi,bhwo->io", seen, dy)

    dkernel = jnp.stack([at(i, j) for i in range(tall) for j in range(wide)]).reshape(kernel.shape)
    (dx,) = jax.linear_transpose(lambda x: _conv(x, kernel, 1, padding), x)(dy)
    return dx, dkernel


_conv_of_few_maps.defvjp(_conv_of_few_maps_forward, _conv_of_few_maps_backward)


def pooled_size(size: int, window: int, stride: int) -> int:
    """Ceil((size - window) / stride) + 1, the original's rule: the last window may overhang."""
    return -((window - size) // stride) + 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def max_pool(x: Array, window: int, stride: int) -> Array:
    """Maximum over windows, which overlap where window > stride (paper, section 3.4).

    Args:
      x: (b, h, w, c), any float dtype.
      window, stride: pixels, both ways. The last windows are cut at the edge.

    Returns:
      (b, h', w', c) with h' = pooled_size(h, window, stride). The gradient goes to the first
      maximum of a window in row-major order, as XLA's own pooling gives it, and is built from
      strided slices: no select-and-scatter, which is slow on CPUs and not deterministic on GPUs.
    """
    return functools.reduce(jnp.maximum, _window_slices(x, window, stride))


def mean_pool(x: Array, window: int, stride: int) -> Array:
    """Mean over windows of the pixels that lie inside the map; shapes and dtype as `max_pool`.

    Source: cuda-convnet, which divides by the pixels a window has, also where it overhangs.
    """
    totals = _window_sums(_window_sums(x, window, stride, 1), window, stride, 2)
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    return totals / _window_sums(_window_sums(ones, window, stride, 1), window, stride, 2)


def _window_sums(x: Array, window: int, stride: int, axis: int) -> Array:
    """Sums over windows along one axis; nothing lies outside."""
    size = x.shape[axis]
    count = pooled_size(size, window, stride)
    reach = (count - 1) * stride
    edges = [(0, 0, 0)] * x.ndim
    edges[axis] = (0, reach + window - size, 0)
    padded = lax.pad(x, jnp.zeros((), x.dtype), edges)
    parts = [
        lax.slice_in_dim(padded, first, first + reach + 1, stride, axis) for first in range(window)
    ]
    return functools.reduce(jnp.add, parts)


def _window_slices(x: Array, window: int, stride: int) -> list[Array]:
    """Entry [i * window + j] holds, for every output, the pixel (i, j) of its window."""
    b, h, w, c = x.shape
    rows, columns = pooled_size(h, window, stride), pooled_size(w, window, stride)
    tall, wide = (rows - 1) * stride + window, (columns - 1) * stride + window
    padded = _fit(x, tall, wide, -jnp.inf)
    return [
        lax.slice(
            padded,
            (0, i, j, 0),
            (b, i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1, c),
            (1, stride, stride, 1),
        )
        for i in range(window)
        for j in range(window)
    ]


def _fit(x: Array, tall: int, wide: int, value: float) -> Array:
    """Cut or pad x with `value` on the bottom and right to (b, tall, wide, c)."""
    edges = [(0, 0, 0), (0, tall - x.shape[1], 0), (0, wide - x.shape[2], 0), (0, 0, 0)]
    return lax.pad(x, jnp.array(value, x.dtype), edges)


def _max_pool_forward(x, window, stride):
    y = max_pool(x, window, stride)
    return y, (x, y)


def _max_pool_backward(window, stride, residuals, dy):
    x, y = residuals
    _, h, w, _ = x.shape
    _, rows, columns, _ = y.shape
    tall, wide = (rows - 1) * stride + window, (columns - 1) * stride + window
    dx = jnp.zeros((x.shape[0], tall, wide, x.shape[3]), x.dtype)
    free = jnp.ones(y.shape, bool)
    for index, pixels in enumerate(_window_slices(x, window, stride)):
        i, j = divmod(index, window)
        first = free & (pixels == y)
        free &= ~first
        spread = lax.pad(  # each output's gradient back at pixel (i, j) of its window
            jnp.where(first, dy, jnp.zeros_like(dy)),
            jnp.array(0, dy.dtype),
            [
                (0, 0, 0),
                (i, tall - i - (rows - 1) * stride - 1, stride - 1),
                (j, wide - j - (columns - 1) * stride - 1, stride - 1),
                (0, 0, 0),
            ],
        )
        dx += spread
    return (_fit(dx, h, w, 0.0),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def local_response_norm(
    x: Array, *, size: int, k: float, alpha: float, beta: float, groups: int = 1
) -> Array:
    """Response normalisation across adjacent maps (paper, section 3.3).

        y[i] = x[i] * (k + alpha * sum_{|j - i| <= size // 2} x[j] ** 2) ** -beta

    Args:
      x: (b, h, w, c).
      alpha: multiplies the plain sum, which is not divided by `size`.
      groups: the sum stays within each of so many equal groups of maps.

    Returns:
      x's shape and dtype; sums and power in float32. The sum is a product with a banded matrix:
      faster than shifted adds on every platform measured, and groups are its blocks.
    """
    channels = np.arange(x.shape[-1])
    near = abs(channels[:, None] - channels) <= size // 2
    together = channels[:, None] * groups // len(channels) == channels * groups // len(channels)
    band = jnp.asarray(near & together, jnp.float32)
    x32 = x.astype(jnp.float32)
    sums = jnp.einsum("bhwj,ji->bhwi", x32 * x32, band, precision=lax.Precision.HIGHEST)
    return (x32 * _power(k + alpha * sums, beta)).astype(x.dtype)


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
    """sums ** -beta; for the .75 of the paper from square roots, which are faster than a power."""
    if beta == 0.75:
        return lax.rsqrt(sums) * lax.rsqrt(jnp.sqrt(sums))
    return sums**-beta


def keep_mask(
    key: Array, rows: Array, *, layer: int, towers: Array, shape: tuple[int, ...], rate: float
) -> Array:
    """Dropout's kept units: a function of (key, row, layer, tower, unit) and of nothing else.

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
        return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, tower), row), shape)

    over_towers = jax.vmap(one, in_axes=(None, 0), out_axes=-2)
    bits = jax.vmap(over_towers, in_axes=(0, None))(rows, towers)  # (b, ..., t, c)
    keep = bits >= np.uint32(int(rate * 2**32))
    return keep.reshape(*keep.shape[:-2], -1)


def dropout(x: Array, keep: Array | None, rate: float, rule: str) -> Array:
    """Drop the units that `keep` does not name; `keep` None means evaluation.

    Rule `scale_at_test` (paper, section 4.2) leaves kept units as they are and multiplies by
    1 - rate when evaluating; `inverted` divides kept units by 1 - rate while training.
    """
    if rule == "scale_at_test":
        return x * (1 - rate) if keep is None else jnp.where(keep, x, 0)
    return x if keep is None else jnp.where(keep, x / (1 - rate), 0)
