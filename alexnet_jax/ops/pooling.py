"""Pooling over windows that may overlap, and overhang the edge."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

import alexnet_jax.ops.gpu as gpu


def pooled_size(size: int, window: int, stride: int) -> int:
    """Ceil((size - window) / stride) + 1, the original's rule: the last window may overhang.

    But it begins inside the map, even where stride > window.
    """
    return min(-((window - size) // stride) + 1, -(-size // stride))


def max_pool(x: Array, window: int, stride: int) -> Array:
    """Maximum over windows, which overlap where window > stride (paper, section 3.4).

    Args:
      x: (b, h, w, c), any float dtype.
      window, stride: pixels, in both directions. The last windows are cut off at the edge.

    Returns:
      (b, h', w', c) with h' = pooled_size(h, window, stride). The gradient goes to the first
      maximum of a window in row-major order. A TPU uses XLA's own pooling; elsewhere its
      gradient, a select-and-scatter, is slow (CPUs) or not deterministic (GPUs).
    """
    if jax.default_backend() != "tpu":
        return _max_pool(x, window, stride)
    reach = [(pooled_size(side, window, stride) - 1) * stride + window for side in x.shape[1:3]]
    ends = [(0, max(0, last - side)) for last, side in zip(reach, x.shape[1:3])]
    sides, strides = (1, window, window, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, sides, strides, ((0, 0), *ends, (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x: Array, window: int, stride: int) -> Array:
    """`max_pool` from strided slices."""
    return max_pool_with_argmax(x, window, stride)[0]


def mean_pool(x: Array, window: int, stride: int) -> Array:
    """Mean over windows of the pixels that lie inside the map; shapes and dtype as `max_pool`.

    Source: cuda-convnet, which divides by the pixels a window has, even where it overhangs.
    """
    totals = _window_sums(_window_sums(x, window, stride, 1), window, stride, 2)
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    return totals / _window_sums(_window_sums(ones, window, stride, 1), window, stride, 2)


def _window_sums(x: Array, window: int, stride: int, axis: int) -> Array:
    """Sums over windows along one axis, padded with zeros."""
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
    edges = [(0, 0, 0), (0, tall - h, 0), (0, wide - w, 0), (0, 0, 0)]
    padded = lax.pad(x, jnp.array(-jnp.inf, x.dtype), edges)
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


def max_pool_with_argmax(x: Array, window: int, stride: int) -> tuple[Array, Array]:
    """`max_pool`, and for each window i * window + j of its first maximum, or window ** 2."""
    slices = _window_slices(x, window, stride)
    y = functools.reduce(jnp.maximum, slices)
    argmax = jnp.full(y.shape, window * window, jnp.uint8 if window < 16 else jnp.uint32)
    for index, pixels in reversed([*enumerate(slices)]):
        argmax = jnp.where(pixels == y, jnp.asarray(index, argmax.dtype), argmax)
    return y, argmax


def _max_pool_forward(x, window, stride):
    y, argmax = max_pool_with_argmax(x, window, stride)
    return y, (argmax, jnp.empty((*x.shape[1:3], 0)))  # empty: it only carries x's sides


def _max_pool_backward(window, stride, residuals, dy):
    """Every pixel gathers from the windows it lies in.

    Pixels at the same place in their square of `stride` x `stride` pixels have the same places in
    the same number of windows: they are summed together, and the squares are assembled at the end.
    """
    argmax, size = residuals
    h, w, _ = size.shape
    if gpu.available((dy.shape[0], h, w, dy.shape[3])):
        return (gpu.pool_gradient(dy, argmax, window, stride, (h, w)),)
    reach = (window - 1) // stride  # how many squares before a pixel's own its windows may begin
    rows, columns = -(-h // stride), -(-w // stride)

    def around(array: Array, value: int) -> Array:
        """Padded with empty windows: `reach` before the first, and one per square that has none."""
        ends = [(reach, count - side, 0) for count, side in zip((rows, columns), array.shape[1:3])]
        return lax.pad(array, jnp.asarray(value, array.dtype), [(0, 0, 0), *ends, (0, 0, 0)])

    argmax, dy = around(argmax, window * window), around(dy, 0)

    def gathered(u: int, v: int) -> Array:
        """The gradient of the pixels (u, v) of all squares: (b, rows, columns, c)."""
        total = jnp.zeros((dy.shape[0], rows, columns, dy.shape[3]), dy.dtype)
        for i in range(u, window, stride):
            for j in range(v, window, stride):
                top, left = reach - i // stride, reach - j // stride
                own = (slice(None), slice(top, top + rows), slice(left, left + columns))
                total += jnp.where(argmax[own] == i * window + j, dy[own], 0)
        return total

    squares = [jnp.stack([gathered(u, v) for v in range(stride)], 3) for u in range(stride)]
    dx = jnp.stack(squares, 2).reshape(dy.shape[0], rows * stride, columns * stride, -1)
    return (dx[:, :h, :w],)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
