"""Response normalisation and the gradient of max pooling as GPU kernels (Pallas, via Triton).

A thread holds eight or more adjacent maps, at one pixel or a few, in registers; the neighbours it
also needs were read by adjacent threads and come from the cache. XLA's fusions, with a thread per
number, recompute the neighbours of every number: on an H200 normalisation takes 3.5 to 5 times as
long as its memory traffic, the pools' gradients eight times. With these kernels normalisation takes
a tenth to a fifth longer than its memory traffic, the pools' gradients no longer.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

AT_ONCE = 8  # maps that a thread reads with one instruction
FORWARD, BACKWARD = 8, 16  # maps per thread at most; backward computes more for neighbours
THREADS = 128  # per program


class Rule(NamedTuple):
    """Parameters of normalisation, as in `ops.local_response_norm`, with a power of 3/4."""

    size: int
    k: float
    alpha: float
    groups: int
    rectify: bool  # max(x, 0) is normalised


def available(
    shape: tuple[int, ...], *, groups: int = 1, size: int = 1, beta: float = 0.75
) -> bool:
    """Whether the kernels can be used here for maps of shape (b, h, w, c) and this rule."""
    whole = shape[-1] % (groups * AT_ONCE) == 0 and math.prod(shape) < 2**31
    fits = size // 2 * 2 <= AT_ONCE and beta == 0.75
    return is_gpu() and whole and fits


def is_gpu() -> bool:
    return jax.default_backend() == "gpu"


def normalise(x: Array, rule: Rule) -> Array:
    """(b, h, w, c) -> x's shape and dtype; sums and powers in float32."""
    kernel = functools.partial(_normalise, rule=rule)
    places = math.prod(x.shape[:-1])
    return _over_maps(kernel, places, FORWARD, rule.groups, x.shape, x)


def normalise_gradient(x: Array, dy: Array, rule: Rule) -> Array:
    """The gradient of x, given dy, that of `normalise`'s output."""
    kernel = functools.partial(_normalise_gradient, rule=rule)
    places = math.prod(x.shape[:-1])
    return _over_maps(kernel, places, BACKWARD, rule.groups, x.shape, x, dy)


def pool_gradient(
    dy: Array, argmax: Array, window: int, stride: int, sides: tuple[int, int]
) -> Array:
    """The gradient of a max pool's input, (b, *sides, c), given dy, that of its output.

    Args:
      dy: (b, h', w', c).
      argmax: (b, h', w', c), i * window + j for the pixel (i, j) of its window that dy goes to.
    """
    kernel = functools.partial(
        _pool_gradient, window=window, stride=stride, sides=sides, pooled=(dy.shape[1], dy.shape[2])
    )
    squares = dy.shape[0] * math.prod(-(-side // stride) for side in sides)
    shape = (dy.shape[0], *sides, dy.shape[3])
    return _over_maps(kernel, squares, AT_ONCE, 1, shape, dy, argmax)


def _over_maps(
    kernel: functools.partial,
    places: int,
    most: int,
    groups: int,
    shape: tuple[int, ...],
    *arrays: Array,
) -> Array:
    """Run a kernel whose threads have at most `most` maps each, at one of the places.

    The result has shape `shape`, (b, h, w, c), and the first array's dtype.
    """
    first, all_maps = arrays[0], shape[-1]
    axes = jax.typeof(first).manual_axis_type  # the result varies across devices as the input does
    maps = next(n for n in range(most, 0, -AT_ONCE) if all_maps // groups % n == 0)
    call = pl.pallas_call(
        lambda *refs: kernel(_Share(places, all_maps, maps, groups), *refs),
        grid=(pl.cdiv(places * (all_maps // maps), THREADS),),
        out_shape=jax.ShapeDtypeStruct((math.prod(shape),), first.dtype, manual_axis_type=axes),
        compiler_params=triton.CompilerParams(num_warps=THREADS // 32),
        name=kernel.func.__name__[1:],  # in profiles
        interpret=jax.default_backend() != "gpu",
    )
    return call(*(array.reshape(-1) for array in arrays)).reshape(shape)


class _Share:
    """The maps that each of a program's threads has; indices are (threads, 1).

    Block b is maps 8 * b to 8 * b + 7 of a thread; block -1 and the one after the last belong to
    adjacent threads, and are 0 where those have another tower.
    """

    def __init__(self, places: int, all_maps: int, maps: int, groups: int):
        self.all_maps, self.maps = all_maps, maps
        parts = all_maps // maps
        number = pl.program_id(0) * THREADS + lax.broadcasted_iota(jnp.int32, (THREADS, 1), 0)
        self.place, part = number // parts, number % parts
        self.first = part * maps
        self.inside = number < places * parts
        each = parts // groups  # parts of a tower
        self.alone, self.begins, self.ends = each == 1, part % each > 0, part % each < each - 1

    def blocks(self) -> range:
        return range(self.maps // AT_ONCE)

    def load(self, ref: Any, block: int, pixel: Array, inside: Array) -> Array:
        """A block at a pixel, (threads, 8); 0 where the pixel is not `inside`."""
        if block < 0:
            inside &= self.begins
        if block * AT_ONCE >= self.maps:
            inside &= self.ends
        place = self._place(block, pixel)
        return triton.load(ref.at[place], mask=jnp.broadcast_to(inside, place.shape), other=0)

    def store(self, ref: Any, block: int, pixel: Array, inside: Array, values: Array) -> None:
        place = self._place(block, pixel)
        inside = jnp.broadcast_to(inside, place.shape)
        triton.store(ref.at[place], values.astype(ref.dtype), mask=inside)

    def _place(self, block: int, pixel: Array) -> Array:
        one = lax.broadcasted_iota(jnp.int32, (THREADS, AT_ONCE), 1)
        return pixel * self.all_maps + (self.first + block * AT_ONCE) + one


class _Line:
    """What each thread computes from its maps at a pixel, each value once, on first use."""

    def __init__(self, share: _Share, rule: Rule, x_ref: Any, dy_ref: Any = None):
        self.share, self.rule = share, rule
        self._x = functools.cache(functools.partial(self._columns, x_ref))
        self._dy = functools.cache(functools.partial(self._columns, dy_ref))
        self.square = functools.cache(lambda one: self.x(one) * self.x(one))
        self.powers = functools.cache(self._powers)
        self.part = functools.cache(self._part)

    def _columns(self, ref: Any, block: int) -> list[Array]:
        """A block's eight maps, (threads,) float32 each."""
        found = self.share.load(ref, block, self.share.place, self.share.inside)
        columns = lax.split(found.astype(jnp.float32), (1,) * AT_ONCE, axis=1)
        return [column.reshape(THREADS) for column in columns]

    def store(self, ref: Any, of: Callable[[int], Array]) -> None:
        """Write `y` or `dx`."""
        for block in self.share.blocks():
            columns = [of(block * AT_ONCE + one) for one in range(AT_ONCE)]
            while len(columns) > 1:  # pair by pair: each stack adds the next lower bit of the index
                half = len(columns) // 2
                columns = [jnp.stack(pair, axis=-1) for pair in zip(columns[:half], columns[half:])]
            values = columns[0].reshape(THREADS, AT_ONCE)
            self.share.store(ref, block, self.share.place, self.share.inside, values)

    def x(self, one: int) -> Array:
        x = self._x(one // AT_ONCE)[one % AT_ONCE]
        # Not a maximum: Triton's is 0 where x is NaN.
        return jnp.where(x < 0, 0, x) if self.rule.rectify else x

    def dy(self, one: int) -> Array:
        return self._dy(one // AT_ONCE)[one % AT_ONCE]

    def sum(self, of: Callable[[int], Array], one: int) -> Array:
        """The sum of `of` over the maps at most size // 2 away."""
        reach, around = self.rule.size // 2, 0 if self.share.alone else AT_ONCE
        near = range(max(-around, one - reach), min(self.share.maps + around, one + reach + 1))
        return functools.reduce(jnp.add, map(of, near))

    def _powers(self, one: int) -> tuple[Array, Array]:
        """The powers -3/4 and -7/4 of k + alpha * the sum of squares."""
        total = self.rule.k + self.rule.alpha * self.sum(self.square, one)
        root = lax.rsqrt(total)
        power = root * lax.rsqrt(total * root)
        return power, power * root * root

    def _part(self, one: int) -> Array:
        return self.dy(one) * self.x(one) * self.powers(one)[1]

    def y(self, one: int) -> Array:
        return self.x(one) * self.powers(one)[0]

    def dx(self, one: int) -> Array:
        far = (1.5 * self.rule.alpha) * self.x(one) * self.sum(self.part, one)
        dx = self.dy(one) * self.powers(one)[0] - far
        return jnp.where(self.x(one) > 0, dx, 0) if self.rule.rectify else dx


def _normalise(share: _Share, x_ref: Any, y_ref: Any, *, rule: Rule) -> None:
    line = _Line(share, rule, x_ref)
    line.store(y_ref, line.y)


def _normalise_gradient(share: _Share, x_ref: Any, dy_ref: Any, dx_ref: Any, *, rule: Rule) -> None:
    line = _Line(share, rule, x_ref, dy_ref)
    line.store(dx_ref, line.dx)


def _pool_gradient(
    share: _Share,
    dy_ref: Any,
    argmax_ref: Any,
    dx_ref: Any,
    *,
    window: int,
    stride: int,
    sides: tuple[int, int],
    pooled: tuple[int, int],
) -> None:
    """A thread has a square of `stride` x `stride` pixels, each gathering from windows over it."""
    rows, columns = (-(-side // stride) for side in sides)
    image, row, column = (
        share.place // (rows * columns),
        share.place // columns % rows,
        share.place % columns,
    )
    behind = range((window - 1) // stride + 1)  # how many squares earlier a window may begin
    (block,) = share.blocks()
    windows = []
    for up in behind:
        for left in behind:
            y, x = row - up, column - left
            inside = share.inside & (y >= 0) & (y < pooled[0]) & (x >= 0) & (x < pooled[1])
            pixel = (image * pooled[0] + y) * pooled[1] + x
            argmax = share.load(argmax_ref, block, pixel, inside).astype(jnp.int32)
            dy = share.load(dy_ref, block, pixel, inside).astype(jnp.float32)
            windows.append((up * stride, left * stride, argmax, dy))
    for u in range(stride):
        for v in range(stride):
            total = jnp.zeros((THREADS, AT_ONCE), jnp.float32)
            for up, left, argmax, dy in windows:
                if u + up < window and v + left < window:
                    total += jnp.where(argmax == (u + up) * window + (v + left), dy, 0)
            y, x = row * stride + u, column * stride + v
            inside = share.inside & (y < sides[0]) & (x < sides[1])
            pixel = (image * sides[0] + y) * sides[1] + x
            share.store(dx_ref, block, pixel, inside, total)
