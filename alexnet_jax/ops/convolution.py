"""Convolution, in forms that are fast on a CPU, gradients included, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

import alexnet_jax.ops.gpu as gpu
import alexnet_jax.ops.native as native
from alexnet_jax.ops.varying import varying_alike

Padding = tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right), pixels


def conv(x: Array, kernel: Array, *, stride: int = 1, padding: Padding, groups: int = 1) -> Array:
    """Cross-correlation.

    Args:
      x: (b, h, w, groups * i).
      kernel: (kh, kw, i, o), cast to x's dtype; output channels ordered by group.
      stride: pixels, in both directions.
      padding: zeros around the map.
      groups: input channels of group g reach output channels of group g only. Without a kernel of
        our own, one convolution per group: on a CPU, XLA's grouped form takes six times as long,
        and five to twelve times backward.

    Returns:
      (b, h', w', o) of x's dtype. As C++ on a CPU it can be differentiated once.
    """
    kernel = kernel.astype(x.dtype)
    sides = kernel.shape[:2]
    if native.available(x):
        if stride == 1 and sides in ((3, 3), (5, 5)):
            return _conv_by_tiles(*varying_alike(x, kernel), padding, groups)
        if groups == 1:
            return _conv_by_runs(*varying_alike(x, kernel), stride, padding)
    one = conv_space_to_depth if stride > 1 and gpu.is_gpu() else _conv
    parts = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True)
    outputs = [one(*part, stride, padding) for part in parts]
    return outputs[0] if groups == 1 else jnp.concatenate(outputs, axis=-1)


def groups_at_once(x: Array) -> bool:
    """Whether `conv` has its own form for groups; otherwise they are as fast one by one."""
    return native.available(x)


def _conv(x: Array, kernel: Array, stride: int, padding: Padding, groups: int = 1) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_by_tiles(x: Array, kernel: Array, padding: Padding, groups: int) -> Array:
    """A 3x3 or 5x5 kernel with stride 1, by Winograd's algorithm (native/winograd.h)."""
    (top, _), (left, _) = padding
    y = jax.eval_shape(lambda x, kernel: _conv(x, kernel, 1, padding, groups), x, kernel)
    place: dict[str, int] = {"groups": groups, "top": top, "left": left}
    return native.call("winograd", y.shape, x, kernel, turned=False, **place)


def _tiles_forward(x, kernel, padding, groups):
    return _conv_by_tiles(x, kernel, padding, groups), (x, kernel)


def _tiles_backward(padding, groups, residuals, dy):
    x, kernel = residuals
    (top, _), (left, _) = padding
    side = kernel.shape[0] - 1
    turned: dict[str, int] = {"groups": groups, "top": side - top, "left": side - left}
    dx = native.call("winograd", x.shape, dy, kernel, turned=True, **turned)
    place: dict[str, int] = {"groups": groups, "top": top, "left": left}
    return dx, native.call("winograd_weights", kernel.shape, x, dy, **place)


_conv_by_tiles.defvjp(_tiles_forward, _tiles_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_by_runs(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """For few channels: a row of the kernel covers one run of memory (native/strided.h)."""
    (top, _), (left, _) = padding
    y = jax.eval_shape(lambda x, kernel: _conv(x, kernel, stride, padding), x, kernel)
    return native.call("strided", y.shape, x, kernel, stride=stride, top=top, left=left)


def _runs_forward(x, kernel, stride, padding):
    return _conv_by_runs(x, kernel, stride, padding), (x, kernel)


def _runs_backward(stride, padding, residuals, dy):
    x, kernel = residuals
    (top, _), (left, _) = padding
    # Unused in the first layer, where it is then not computed.
    (dx,) = jax.linear_transpose(lambda x: _conv(x, kernel, stride, padding), x)(dy)
    place: dict[str, int] = {"stride": stride, "top": top, "left": left}
    return dx, native.call("strided_weights", kernel.shape, x, dy, **place)


_conv_by_runs.defvjp(_runs_forward, _runs_backward)


def conv_space_to_depth(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """`_conv` by space-to-depth, as a convolution with stride 1 over blocks of pixels.

    The `stride` x `stride` pixels of a block become maps: conv1's 11x11 kernel with stride 4 over 3
    maps is a 3x3 kernel over 48, whose twelfth row and column of pixels are zeros. For few maps:
    matrix units read eight or more at once. On an H200 conv1 takes a sixth of the time in bfloat16,
    half in TF32. On a CPU it takes three times as long.
    """
    b, h, w, maps = x.shape
    y = jax.eval_shape(lambda x, kernel: _conv(x, kernel, stride, padding), x, kernel)
    tall, wide = (-(-side // stride) for side in kernel.shape[:2])  # in blocks
    rows, columns = y.shape[1] + tall - 1, y.shape[2] + wide - 1
    edges = [
        (ends[0], count * stride - side - ends[0], 0)
        for ends, count, side in zip(padding, (rows, columns), (h, w))
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    x = x.reshape(b, rows, stride, columns, stride, maps).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, rows, columns, stride * stride * maps)
    more = [(0, count * stride - side) for count, side in zip((tall, wide), kernel.shape)]
    kernel = jnp.pad(kernel, [*more, (0, 0), (0, 0)])
    kernel = kernel.reshape(tall, stride, wide, stride, maps, -1).transpose(0, 2, 1, 3, 4, 5)
    kernel = kernel.reshape(tall, wide, stride * stride * maps, -1)
    return _conv(x, kernel, 1, ((0, 0), (0, 0)))
