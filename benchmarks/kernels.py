"""Normalisation and pools as kernels of a GPU, for where XLA's fusions move more than they must.

Each writes what it makes once and reads what it takes once, or, where windows overlap, from caches.
`forms.py` sets them beside the package's own, `check_ops.py` beside the oracle. Elsewhere than on a
GPU they are interpreted.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ops as rows_of
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from alexnet_jax import ops

ROWS = 32  # of a tower's maps at one pixel, in a program
PLACES = 1024  # of a row of pixels, some of their maps each, in a program
WARPS = 4


def of(row: rows_of.Row) -> Callable | None:
    """The kernel that does a row's operation, if there is one."""
    if row.name.startswith("normalisation"):
        return functools.partial(local_response_norm, **rows_of.LRN, groups=2)
    return (lambda x: max_pool(x, 3, 2)) if row.name.startswith("pool") else None


class Rule(NamedTuple):
    """Of normalisation, as in `ops.local_response_norm`."""

    size: int
    k: float
    alpha: float
    beta: float


def local_response_norm(
    x: Array, *, size: int, k: float, alpha: float, beta: float, groups: int
) -> Array:
    """`ops.local_response_norm`."""
    rows = x.reshape(-1, x.shape[-1] // groups)  # a tower's maps lie side by side
    return _normalised(rows, Rule(size, k, alpha, beta)).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _normalised(x: Array, rule: Rule) -> Array:
    return _over_rows(_normalise, rule, x)


_normalised.defvjp(
    lambda x, rule: (_normalised(x, rule), x),
    lambda rule, x, dy: (_over_rows(_normalise_gradient, rule, x, dy),),
)


def _over_rows(kernel: Callable, rule: Rule, *arrays: Array) -> Array:
    """What a kernel makes of arrays (rows, maps): one of the same shape and dtype."""
    rows, maps = arrays[0].shape
    return _call(
        functools.partial(kernel, rule=rule, shape=(rows, maps)),
        (pl.cdiv(rows, ROWS),),
        jax.ShapeDtypeStruct((rows, maps), arrays[0].dtype),
        arrays,
    )


def _call(kernel: Callable, grid: tuple[int, ...], out: Any, arrays: tuple[Array, ...]) -> Any:
    flat = [array.reshape(-1) for array in arrays]
    axes = jax.typeof(arrays[0]).manual_axis_type  # it differs from device to device as they do

    def like(one: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((math.prod(one.shape),), one.dtype, manual_axis_type=axes)

    outs = jax.tree.map(like, out)
    call = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=outs,
        compiler_params=triton.CompilerParams(num_warps=WARPS),
        interpret=jax.default_backend() != "gpu",
    )
    return jax.tree.map(lambda made, one: made.reshape(one.shape), call(*flat), out)


class _Tile:
    """Some rows of maps; lanes there are as many as the next power of two."""

    def __init__(self, shape: tuple[int, int]):
        rows, maps = shape
        self.lanes = max(16, 2 ** math.ceil(math.log2(maps)))
        row = pl.program_id(0) * ROWS + lax.broadcasted_iota(jnp.int32, (ROWS, self.lanes), 0)
        lane = lax.broadcasted_iota(jnp.int32, (ROWS, self.lanes), 1)
        self.place, self.inside = row * maps + lane, (lane < maps) & (row < rows)

    def load(self, ref: Any) -> Array:
        return triton.load(ref.at[self.place], mask=self.inside, other=0).astype(jnp.float32)

    def store(self, ref: Any, value: Array) -> None:
        triton.store(ref.at[self.place], value.astype(ref.dtype), mask=self.inside)

    def over_neighbours(self, x: Array, size: int) -> Array:
        """Sums over the maps at most size // 2 away: a product with a band of ones.

        Of float32 all bits: it is the sum of three bfloat16, and products with ones are exact.
        """
        i, j = (lax.broadcasted_iota(jnp.int32, (self.lanes, self.lanes), axis) for axis in (0, 1))
        band = (abs(i - j) <= size // 2).astype(jnp.bfloat16)
        total = jnp.zeros(x.shape, jnp.float32)
        for _ in range(3):
            part = x.astype(jnp.bfloat16)
            total += triton.dot(part, band)
            x -= part.astype(jnp.float32)
        return total


def _normalise(x_ref: Any, y_ref: Any, *, rule: Rule, shape: tuple[int, int]) -> None:
    tile = _Tile(shape)
    x = tile.load(x_ref)
    total = rule.k + rule.alpha * tile.over_neighbours(x * x, rule.size)
    tile.store(y_ref, x * _power(total, rule.beta))


def _normalise_gradient(
    x_ref: Any, dy_ref: Any, dx_ref: Any, *, rule: Rule, shape: tuple[int, int]
) -> None:
    tile = _Tile(shape)
    x, dy = tile.load(x_ref), tile.load(dy_ref)
    total = rule.k + rule.alpha * tile.over_neighbours(x * x, rule.size)
    power = _power(total, rule.beta)
    shares = tile.over_neighbours(dy * x * power / total, rule.size)
    tile.store(dx_ref, dy * power - (2 * rule.alpha * rule.beta) * x * shares)


def _power(total: Array, beta: float) -> Array:
    assert beta == 0.75
    return lax.rsqrt(total) * lax.rsqrt(jnp.sqrt(total))


class Pool(NamedTuple):
    """Windows, and the shapes of what they are laid over and of what they make."""

    window: int
    stride: int
    x: tuple[int, ...]
    y: tuple[int, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def max_pool(x: Array, window: int, stride: int) -> Array:
    """`ops.max_pool`."""
    return _max_pool_forward(x, window, stride)[0]


def _max_pool_forward(x: Array, window: int, stride: int) -> tuple[Array, tuple[Array, Array]]:
    b, h, w, c = x.shape
    sides = (ops.pooled_size(side, window, stride) for side in (h, w))
    pool = Pool(window, stride, x.shape, (b, *sides, c))
    out = tuple(jax.ShapeDtypeStruct(pool.y, dtype) for dtype in (x.dtype, jnp.int8))
    made, place = _over_columns(_max_pool, pool, out, pool.y, x)
    return made, (place, jnp.empty((*x.shape[1:3], 0)))


def _max_pool_backward(window: int, stride: int, residuals: tuple[Array, Array], dy: Array):
    place, size = residuals
    x = (dy.shape[0], *size.shape[:2], dy.shape[3])
    pool, out = Pool(window, stride, x, dy.shape), jax.ShapeDtypeStruct(x, dy.dtype)
    return (_over_columns(_max_pool_gradient, pool, out, x, place, dy),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _over_columns(
    kernel: Callable, pool: Pool, out: Any, shape: tuple[int, ...], *arrays: Array
) -> Any:
    """`out`, made by programs that each make some columns of a row of its `shape`."""
    b, h, w, c = shape
    columns, lanes = _tile(c)
    grid = (b * h, pl.cdiv(w, columns), c // lanes)
    return _call(functools.partial(kernel, pool=pool), grid, out, arrays)


def _tile(maps: int) -> tuple[int, int]:
    """Columns and maps of a program, powers of two; the maps are a part of them without a rest."""
    lanes = min(maps & -maps, 128)
    return PLACES // lanes, lanes


def _places(shape: tuple[int, ...]) -> tuple[Any, Any, Array, Array]:
    """Of a program: image, row, and its columns and maps."""
    _, h, _, c = shape
    columns, lanes = _tile(c)
    column = pl.program_id(1) * columns + lax.broadcasted_iota(jnp.int32, (columns, lanes), 0)
    one = pl.program_id(2) * lanes + lax.broadcasted_iota(jnp.int32, (columns, lanes), 1)
    return pl.program_id(0) // h, pl.program_id(0) % h, column, one


def _flat(shape: tuple[int, ...], image: Any, row: Any, column: Array, one: Array) -> Array:
    _, h, w, c = shape
    return ((image * h + row) * w + column) * c + one


def _max_pool(x_ref: Any, y_ref: Any, place_ref: Any, *, pool: Pool) -> None:
    """Maxima, and where in their windows the first one lies."""
    image, row, column, one = _places(pool.y)
    pixels = []
    for i in range(pool.window):
        for j in range(pool.window):
            y, x = row * pool.stride + i, column * pool.stride + j
            inside = (y < pool.x[1]) & (x < pool.x[2])
            found = triton.load(
                x_ref.at[_flat(pool.x, image, y, x, one)], mask=inside, other=-jnp.inf
            )
            pixels.append(found.astype(jnp.float32))
    most = functools.reduce(lambda a, b: jnp.where((a > b) | (a != a), a, b), pixels)
    first = jnp.full(most.shape, pool.window**2, jnp.int32)  # none, where one is no number
    for index, found in reversed([*enumerate(pixels)]):
        first = jnp.where(found == most, index, first)
    place, inside = _flat(pool.y, image, row, column, one), column < pool.y[2]
    triton.store(y_ref.at[place], most.astype(y_ref.dtype), mask=inside)
    triton.store(place_ref.at[place], first.astype(place_ref.dtype), mask=inside)


def _max_pool_gradient(place_ref: Any, dy_ref: Any, dx_ref: Any, *, pool: Pool) -> None:
    """Pixels' gradients, from the windows they lie in."""
    image, y, x, one = _places(pool.x)
    total = jnp.zeros(x.shape, jnp.float32)
    behind = range((pool.window - 1) // pool.stride + 1)
    for row in (y // pool.stride - back for back in behind):
        for column in (x // pool.stride - back for back in behind):
            i, j = y - row * pool.stride, x - column * pool.stride
            inside = (row >= 0) & (row < pool.y[1]) & (column >= 0) & (column < pool.y[2])
            inside &= (i < pool.window) & (j < pool.window)
            place = _flat(pool.y, image, row, column, one)
            first = triton.load(place_ref.at[place], mask=inside, other=-1).astype(jnp.int32)
            dy = triton.load(dy_ref.at[place], mask=inside, other=0).astype(jnp.float32)
            total += jnp.where(first == i * pool.window + j, dy, 0)
    place = _flat(pool.x, image, y, x, one)
    triton.store(dx_ref.at[place], total.astype(dx_ref.dtype), mask=x < pool.x[2])
