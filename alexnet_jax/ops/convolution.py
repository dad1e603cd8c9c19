"""Convolution, in forms that are fast on a CPU, gradients included, and on a GPU."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import alexnet_jax.ops.native as native
from alexnet_jax.ops.varying import varying_alike

# A block has at most so many pixels and images, but at least one image. Twice or half is about as
# fast, all images at once take up to six times as long. Blocks are equal in size, so that a larger
# prime number of images is taken one by one.
BLOCK_PLACES, BLOCK_IMAGES = 8192, 8

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
        and eight to twelve times backward.

    Returns:
      (b, h', w', o) of x's dtype. On a CPU it can be differentiated once.
    """
    kernel = kernel.astype(x.dtype)
    sides = kernel.shape[:2]
    if native.available(x):
        if stride == 1 and sides in ((3, 3), (5, 5)):
            return _conv_by_tiles(*varying_alike(x, kernel), padding, groups)
        if groups == 1:
            return _conv_by_runs(*varying_alike(x, kernel), stride, padding)
    one = _conv
    if jax.default_backend() == "cpu":
        one = _conv_by_blocks
    elif jax.default_backend() == "gpu" and stride > 1:
        one = conv_by_squares
    parts = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True)
    outputs: list[Any] = [one(*varying_alike(*part), stride, padding) for part in parts]
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_by_blocks(x: Array, kernel: Array, stride: int, padding: Padding) -> Any:
    """`_conv`, its weight gradient summed over blocks of images.

    With XLA's own gradient, a step of the full net without our kernels takes 1.1 times as long on a
    CPU at batch 32 and 1.4 times at 128.
    """
    return _conv(x, kernel, stride, padding)


def _conv_forward(x, kernel, stride, padding):
    return _conv(x, kernel, stride, padding), (x, kernel)


def _conv_backward(stride, padding, residuals, dy):
    x, kernel = residuals
    (dx,) = jax.linear_transpose(lambda x: _conv(x, kernel, stride, padding), x)(dy)
    if stride == 1:
        return dx, _weight_gradient(x, dy, kernel.shape, padding).astype(kernel.dtype)
    squares, back = _space_to_depth(x, dy.shape, kernel.shape, stride, padding)
    shape = (*(-(-side // stride) for side in kernel.shape[:2]), squares.shape[3], dy.shape[3])
    return dx, back(_weight_gradient(squares, dy, shape, ((0, 0), (0, 0)))).astype(kernel.dtype)


_conv_by_blocks.defvjp(_conv_forward, _conv_backward)


def conv_by_squares(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """`_conv` as a convolution with stride 1 over squares of `stride` x `stride` pixels.

    For few channels: matrix units read eight or more at once. On an H200 conv1 takes a sixth of
    the time in bfloat16, half in TF32. On a CPU it takes three times as long.
    """
    y = jax.eval_shape(lambda x, kernel: _conv(x, kernel, stride, padding), x, kernel)
    squares, _ = _space_to_depth(x, y.shape, kernel.shape, stride, padding)
    tall, wide = (-(-side // stride) for side in kernel.shape[:2])  # in squares
    more = [(0, count * stride - side) for count, side in zip((tall, wide), kernel.shape)]
    kernel = jnp.pad(kernel, [*more, (0, 0), (0, 0)])
    kernel = kernel.reshape(tall, stride, wide, stride, *kernel.shape[2:])
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(tall, wide, -1, kernel.shape[-1])
    return _conv(squares, kernel, 1, ((0, 0), (0, 0)))


def _space_to_depth(
    x: Array, output: tuple[int, ...], kernel: tuple[int, ...], stride: int, padding: Padding
) -> tuple[Array, Callable[[Array], Array]]:
    """The input with which a convolution with stride 1, without padding, has the same output.

    Squares of `stride` x `stride` pixels become maps: conv1's 11x11 kernel with stride 4 over 3
    maps is a 3x3 kernel over 48, whose twelfth row and column of pixels have no effect.

    Returns:
      x's squares, and a function that turns a kernel over them into the original shape `kernel`.
    """
    b, h, w, maps = x.shape
    tall, wide = (-(-side // stride) for side in kernel[:2])  # in squares
    rows, columns = output[1] + tall - 1, output[2] + wide - 1
    edges = [
        (ends[0], count * stride - side - ends[0], 0)
        for ends, count, side in zip(padding, (rows, columns), (h, w))
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    x = x.reshape(b, rows, stride, columns, stride, maps).transpose(0, 1, 3, 2, 4, 5)

    def back(squares: Array) -> Array:
        pixels = squares.reshape(tall, wide, stride, stride, maps, -1).transpose(0, 2, 1, 3, 4, 5)
        pixels = pixels.reshape(tall * stride, wide * stride, maps, -1)
        return pixels[: kernel[0], : kernel[1]]

    return x.reshape(b, rows, columns, stride * stride * maps), back


def _weight_gradient(x: Array, dy: Array, shape: tuple[int, ...], padding: Padding) -> Array:
    """The gradient of a kernel of `shape`, float32: a sum over blocks of images that fit caches."""

    def add(totals: list[Array], images: tuple[Array, Array]) -> tuple[list[Array], None]:
        return _add_block(totals, *images, shape, padding), None

    row = jnp.zeros((shape[1] * shape[2], shape[3]), jnp.float32)
    axes = tuple(jax.typeof(dy).manual_axis_type.varying)
    row = lax.pcast(row, axes, to="varying") if axes else row
    most = min(BLOCK_IMAGES, max(1, BLOCK_PLACES // (x.shape[1] * x.shape[2])))
    block = next(size for size in range(most, 0, -1) if x.shape[0] % size == 0)
    blocks = tuple(array.reshape(-1, block, *array.shape[1:]) for array in (x, dy))
    totals, _ = lax.scan(add, [row] * shape[0], (blocks[0], blocks[1]))
    return jnp.stack(totals).reshape(shape)


def _add_block(
    totals: list[Array], x: Array, dy: Array, shape: tuple[int, ...], padding: Padding
) -> list[Array]:
    """Adds one block's share to each of the kernel's rows, (kw * i, o).

    All are products of long runs of memory, without im2col. Maps are stored as one sequence of
    pixels, with as many zeros between rows and between images as a window reaches over an edge.
    Then pixel (i, j) of all windows is one run of pixels, and kw adjacent pixels, of every kw-th
    window, are the rows of a matrix that exists in memory already.
    """
    tall, wide, maps, outputs = shape
    (top, bottom), (left, right) = padding
    b, h, w, _ = x.shape
    rows, columns = dy.shape[1:3]
    height, pitch = max(h + max(top, bottom), rows), max(w + max(left, right), columns)
    count = b * height * pitch
    turns = -(-count // wide)

    def spread(array: Array, first: int, last: int) -> Array:
        """One sequence of pixels, `first` zeros before and `last` after: (pixels, c)."""
        ends = [(0, height - array.shape[1], 0), (0, pitch - array.shape[2], 0)]
        array = lax.pad(array, jnp.zeros((), array.dtype), [(0, 0, 0), *ends, (0, 0, 0)])
        array = array.reshape(count, -1)
        return lax.pad(array, jnp.zeros((), array.dtype), [(first, last, 0), (0, 0, 0)])

    more = turns * wide - count
    pixels = spread(x, top * pitch + left, (tall - 1) * pitch + wide + more)
    gradients = spread(dy, 0, more).reshape(turns, wide, outputs)

    def share(i: int, turn: int) -> Array:
        first = i * pitch + turn
        windows = pixels[first : first + turns * wide].reshape(turns, wide * maps)
        return jnp.matmul(windows.T, gradients[:, turn], preferred_element_type=jnp.float32)

    return [sum((share(i, turn) for turn in range(wide)), totals[i]) for i in range(tall)]
