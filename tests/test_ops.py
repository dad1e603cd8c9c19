"""Pool, convolution, normalisation and dropout against the oracle and formulas spelled out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from alexnet_jax import ops
from alexnet_jax.ops import convolution

PAPER = {"size": 5, "k": 2.0, "alpha": 1e-4, "beta": 0.75}
CAFFE = {"size": 5, "k": 1.0, "alpha": 2e-5, "beta": 0.75}  # 1e-4 over the window of 5
SHAPES = ((4, 8, 8, 3), (5, 5, 3, 6))  # of maps and a kernel
OTHER = {"size": 3, "k": 1.5, "alpha": 1e-3, "beta": 0.5}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def with_gradient(function, *arguments, dy):
    """The value and the gradients of sum(value * dy), as numpy arrays."""

    def both(*inputs):
        y, back = jax.vjp(function, *inputs)
        return y, back(dy)

    return jax.tree.map(np.asarray, jax.jit(both)(*arguments))


# -------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("window", "stride"), [(3, 2), (2, 2), (3, 1), (3, 3)])
@pytest.mark.parametrize(("height", "width"), [(8, 5), (3, 4)])
def test_max_pool_and_its_gradient_are_exactly_the_oracles(
    height, width, window, stride, dtype, kernels
):
    """Whole numbers of a small range: many ties, and sums that bfloat16 holds exactly."""
    rng = np.random.default_rng(height)
    x = rng.integers(-2, 3, (2, height, width, 3))
    expected = oracle.max_pool(x, window, stride)
    dy = rng.integers(-4, 5, expected.shape)
    y, (dx,) = with_gradient(
        lambda x: ops.max_pool(x, window, stride), jnp.asarray(x, dtype), dy=jnp.asarray(dy, dtype)
    )
    assert y.dtype == dx.dtype == dtype
    assert y.shape[1:3] == tuple(ops.pooled_size(n, window, stride) for n in (height, width))
    np.testing.assert_array_equal(y.astype(float), expected)
    np.testing.assert_array_equal(dx.astype(float), oracle.max_pool_grad(x, dy, window, stride))


@pytest.mark.parametrize(("window", "stride"), [(3, 2), (2, 2)])
def test_max_pool_of_numbers_without_ties_is_exactly_the_oracles(window, stride, kernels):
    x = normal(1, 2, 9, 9, 4).astype(np.float32)
    dy = normal(2, *oracle.max_pool(x, window, stride).shape).astype(np.float32)
    y, (dx,) = with_gradient(lambda x: ops.max_pool(x, window, stride), x, dy=dy)
    np.testing.assert_array_equal(y, oracle.max_pool(x, window, stride))
    # A pixel that wins four windows sums four gradients, in whatever order.
    np.testing.assert_allclose(dx, oracle.max_pool_grad(x, dy, window, stride), atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(16, 5), (7, 8), (2, 3)])
@pytest.mark.parametrize(("window", "stride"), [(3, 2), (2, 2), (3, 1)])
def test_mean_pool_and_its_gradient_are_those_of_a_loop(height, width, window, stride):
    x = normal(1, 2, height, width, 3).astype(np.float32)
    rows, columns = (oracle.pooled_side(n, window, stride) for n in (height, width))
    dy = normal(2, 2, rows, columns, 3).astype(np.float32)
    expected, wanted = np.empty(dy.shape), np.zeros(x.shape)
    for i in range(rows):
        for j in range(columns):
            place = np.s_[:, stride * i : stride * i + window, stride * j : stride * j + window]
            expected[:, i, j] = x[place].mean((1, 2))
            pixels = x[place].shape[1] * x[place].shape[2]  # fewer where the window overhangs
            wanted[place] += dy[:, i, j, None, None] / pixels
    y, (dx,) = with_gradient(lambda x: ops.mean_pool(x, window, stride), x, dy=dy)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_allclose(dx, wanted, atol=1e-6)


def test_a_map_smaller_than_the_window_is_pooled_to_its_maximum(kernels):
    x = normal(1, 1, 2, 2, 3).astype(np.float32)
    np.testing.assert_array_equal(ops.max_pool(x, 3, 2), x.max((1, 2), keepdims=True))


@pytest.mark.parametrize("size", range(3, 12))
@pytest.mark.parametrize(("window", "stride"), [(1, 3), (2, 3), (1, 4), (2, 5)])
def test_windows_that_lie_apart_all_begin_inside_the_map(size, window, stride, kernels):
    expected = [min(start + window, size) - 1 for start in range(0, size, stride)]
    x = jnp.arange(size, dtype=jnp.float32).reshape(1, 1, size, 1)
    y, (dx,) = with_gradient(
        lambda x: ops.max_pool(x, window, stride).ravel(), x, dy=jnp.ones(len(expected))
    )
    assert y.tolist() == expected
    assert np.flatnonzero(dx).tolist() == expected


def test_the_max_pools_gradient_has_no_select_and_scatter():
    def total(pool):
        return jax.jit(jax.grad(lambda x: jnp.sum(pool(x) ** 2)))

    def xlas_own(x):
        strides = (1, 2, 2, 1)
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), strides, "VALID")

    x = jnp.zeros((1, 7, 7, 2))
    ours, theirs = (
        total(pool).lower(x).as_text() for pool in (lambda x: ops.max_pool(x, 3, 2), xlas_own)
    )
    assert "select_and_scatter" in theirs  # this is how it would look
    assert "select_and_scatter" not in ours


# ---------------------------------------------------------------------------------- convolution


@pytest.mark.parametrize("batch", [1, 6, 11, 17])  # at most 16 parts
@pytest.mark.parametrize(
    ("sides", "maps", "window", "stride", "padding", "groups"),
    [
        ((19, 19), 8, (11, 11), 4, ((0, 3), (0, 3)), 1),
        ((19, 22), 3, (11, 11), 4, ((0, 3), (0, 3)), 1),
        ((9, 10), 6, (4, 3), 3, ((2, 1), (0, 3)), 2),
        ((9, 9), 8, (5, 5), 1, ((2, 2), (2, 2)), 2),
        ((7, 6), 8, (3, 3), 1, ((1, 1), (1, 1)), 1),
        ((8, 8), 3, (5, 5), 1, ((2, 2), (2, 2)), 1),
        ((7, 9), 4, (5, 2), 1, ((0, 1), (2, 3)), 2),
        ((4, 5), 2, (4, 1), 1, ((3, 3), (0, 0)), 1),
    ],
)
def test_convolution_and_its_gradients_are_the_oracles(
    batch, sides, maps, window, stride, padding, groups, kernels
):
    x = normal(1, batch, *sides, maps).astype(np.float32)
    kernel = normal(2, *window, maps // groups, 6).astype(np.float32)
    expected = oracle.conv(x, kernel, np.zeros(6), stride, padding, groups)
    dy = normal(3, *expected.shape).astype(np.float32)
    y, (dx, dkernel) = with_gradient(
        lambda x, kernel: ops.conv(x, kernel, stride=stride, padding=padding, groups=groups),
        x,
        kernel,
        dy=dy,
    )
    wanted = oracle.conv_grad(x, kernel, dy, stride, padding, groups)
    if kernels == "native" and stride == 1 and window in ((3, 3), (5, 5)):
        assert_winograd((y, dx, dkernel), (expected, *wanted))
        return
    # Sums of at most 968 products of numbers near 1: 30 in size, 1e-6 of that in error.
    np.testing.assert_allclose(y, expected, atol=1e-4)
    np.testing.assert_allclose(dx, wanted[0], atol=1e-4)
    np.testing.assert_allclose(dkernel, wanted[1], atol=1e-4)


@pytest.mark.parametrize(
    ("sides", "maps", "window", "stride", "padding"),
    [
        ((19, 22), 3, (11, 11), 4, ((0, 3), (0, 3))),
        ((17, 17), 3, (11, 11), 4, ((2, 2), (2, 2))),
        ((9, 10), 6, (4, 3), 3, ((2, 1), (0, 3))),
        ((8, 8), 1, (4, 4), 2, ((0, 0), (0, 0))),
    ],
)
def test_a_convolution_over_squares_is_the_oracles(sides, maps, window, stride, padding):
    """What a GPU is given for conv1."""
    x = normal(1, 3, *sides, maps).astype(np.float32)
    kernel = normal(2, *window, maps, 6).astype(np.float32)
    expected = oracle.conv(x, kernel, np.zeros(6), stride, padding)
    dy = normal(3, *expected.shape).astype(np.float32)
    y, (dx, dkernel) = with_gradient(
        lambda *xk: convolution.conv_space_to_depth(*xk, stride, padding), x, kernel, dy=dy
    )
    wanted = oracle.conv_grad(x, kernel, dy, stride, padding)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    np.testing.assert_allclose(dx, wanted[0], atol=1e-4)
    np.testing.assert_allclose(dkernel, wanted[1], atol=1e-4)


def assert_winograd(found, wanted):
    """Six products for what else takes 12 or 10, of sums whose parts partly cancel.

    They round 64 times as much as the numbers themselves at most, in float32: 4e-6 of the largest.
    """
    for array, expected in zip(found, wanted):
        np.testing.assert_allclose(array, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


@pytest.mark.parametrize("window", [3, 5])
@pytest.mark.parametrize(
    ("batch", "sides", "maps", "outputs", "padding", "groups"),
    [
        (1, (1, 1), 1, 1, ((2, 2), (2, 2)), 1),  # less than a tile
        (2, (13, 11), 130, 66, ((1, 1), (1, 1)), 2),  # rests of vectors and of parts
        (3, (6, 17), 48, 144, ((2, 2), (2, 2)), 1),  # panels of three vectors
        (1, (9, 8), 80, 17, ((0, 4), (3, 1)), 1),  # ends that differ
        (2, (5, 6), 16, 32, ((7, 6), (5, 8)), 2),  # windows that see zeros alone
        (40, (7, 7), 8, 24, ((2, 2), (2, 2)), 2),  # more tiles than a block
    ],
)
def test_convolutions_by_tiles_are_the_oracles(
    batch, sides, maps, outputs, padding, groups, window
):
    x = normal(1, batch, *sides, maps).astype(np.float32)
    kernel = normal(2, window, window, maps // groups, outputs).astype(np.float32)
    expected = oracle.conv(x, kernel, np.zeros(outputs), 1, padding, groups)
    dy = normal(3, *expected.shape).astype(np.float32)
    y, gradients = with_gradient(
        lambda x, kernel: ops.conv(x, kernel, padding=padding, groups=groups), x, kernel, dy=dy
    )
    wanted = oracle.conv_grad(x, kernel, dy, 1, padding, groups)
    assert_winograd((y, *gradients), (expected, *wanted))


@pytest.mark.parametrize(
    ("sides", "window", "stride", "padding"),
    [
        ((2, 2), 3, 7, ((1, 4), (4, 1))),  # wider than what the windows reach
        ((19, 19), 4, 2, ((-1, 0), (-2, 1))),  # which cuts
        ((9, 9), 3, 1, ((-1, 2), (-2, 3))),
    ],
)
def test_convolutions_with_paddings_nobody_asks_for_are_xlas(sides, window, stride, padding):
    """Against XLA's own, in float64 but for what it gets."""
    x, kernel = (normal(n, *s) for n, s in enumerate([(2, *sides, 3), (window, window, 3, 8)]))

    def plain(x, kernel):
        form = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, None, None, form)

    given = [array.astype(np.float32) for array in (x, kernel)]
    with jax.enable_x64(True):
        wide = [array.astype(np.float64) for array in given]
        dy = normal(3, *jax.eval_shape(plain, *wide).shape)
        expected, back = jax.vjp(plain, *wide)
        wanted = jax.tree.map(np.asarray, (expected, back(dy)))
    y, gradients = with_gradient(
        lambda x, kernel: ops.conv(x, kernel, stride=stride, padding=padding),
        *given,
        dy=dy.astype(np.float32),
    )
    for array, exact in zip((y, *gradients), (wanted[0], *wanted[1])):
        np.testing.assert_allclose(array, exact, atol=1e-4)


def test_shapes_that_do_not_fit_are_refused_and_empty_ones_give_zeros(kernels):
    x, kernel, padding = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 5, 8)), ((1, 1), (1, 1))
    for groups in (1, 2):
        with pytest.raises((ValueError, TypeError)):
            ops.conv(x, kernel, padding=padding, groups=groups)
    with pytest.raises((ValueError, TypeError)):
        ops.conv(x, jnp.ones((3, 3, 2, 9)), padding=padding, groups=2)
    with pytest.raises((ValueError, TypeError)):
        ops.conv(x, jnp.ones((11, 11, 5, 8)), stride=4, padding=padding)
    with pytest.raises((ValueError, TypeError)):
        ops.dense(jnp.ones((4, 40)), jnp.ones((5, 16)))

    def convolved(x, kernel):
        return ops.conv(x, kernel, padding=padding)

    bad = jnp.full((2, 8, 8, 4), jnp.nan)  # what memory that is used again may hold
    with_gradient(convolved, bad, jnp.ones((3, 3, 4, 8)), dy=jnp.full((2, 8, 8, 8), jnp.nan))
    shapes = (0, 8, 8, 4), (3, 3, 4, 8), (0, 8, 8, 8)
    *given, dy = (jnp.ones(shape) for shape in shapes)
    _, (_, gradient) = with_gradient(convolved, *given, dy=dy)
    np.testing.assert_array_equal(gradient, np.zeros((3, 3, 4, 8)))
    for inner in (40, 0):
        given = [jnp.full(shape, jnp.nan) for shape in ((4, inner), (inner, 16))]
        y, _ = with_gradient(ops.dense, *given, dy=jnp.ones((4, 16)))
    np.testing.assert_array_equal(y, np.zeros((4, 16)))
    given = jnp.ones((0, 40)), jnp.ones((40, 16))
    _, (_, gradient) = with_gradient(ops.dense, *given, dy=jnp.ones((0, 16)))
    np.testing.assert_array_equal(gradient, np.zeros((40, 16)))


@pytest.mark.parametrize(
    ("batch", "inputs", "outputs"), [(1, 1, 1), (3, 70, 130), (37, 130, 515), (131, 33, 70)]
)
def test_a_dense_product_and_its_gradients_are_numpys(batch, inputs, outputs, kernels):
    x, kernel, dy = normal(1, batch, inputs), normal(2, inputs, outputs), normal(3, batch, outputs)
    given = (array.astype(np.float32) for array in (x, kernel))
    y, (dx, dkernel) = with_gradient(ops.dense, *given, dy=dy.astype(np.float32))
    np.testing.assert_allclose(y, x @ kernel, atol=1e-4)
    np.testing.assert_allclose(dx, dy @ kernel.T, atol=1e-4)
    np.testing.assert_allclose(dkernel, x.T @ dy, atol=1e-4)


@pytest.mark.parametrize(("maps", "window", "stride"), [(3, 5, 2), (4, 3, 1)])
def test_gradients_of_a_bfloat16_convolution_are_those_of_the_numbers_it_holds(
    maps, window, stride
):
    """Sums of small whole numbers are exact; what is left is one rounding to 8 bits."""
    rng = np.random.default_rng(5)
    padding = ((1, 1), (1, 1))
    x = rng.integers(-3, 4, (6, 9, 9, maps)).astype(float)
    kernel = rng.integers(-3, 4, (window, window, maps, 5)).astype(float)
    shape = oracle.conv(x, kernel, np.zeros(5), stride, padding).shape
    dy = rng.integers(-3, 4, shape).astype(float)
    _, found = with_gradient(
        lambda x, kernel: ops.conv(x, kernel, stride=stride, padding=padding),
        jnp.asarray(x, jnp.bfloat16),
        jnp.asarray(kernel, jnp.bfloat16),
        dy=jnp.asarray(dy, jnp.bfloat16),
    )
    for gradient, wanted in zip(found, oracle.conv_grad(x, kernel, dy, stride, padding)):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_allclose(gradient.astype(float), wanted, rtol=2**-8)


def test_gradients_are_the_slopes_of_what_they_belong_to(kernels):
    """Finite differences, of odd sizes and unequal sides; pixels of a pool lie wide apart."""
    x = normal(1, 3, 7, 6, 5).astype(np.float32)
    kernel = normal(2, 3, 2, 5, 4).astype(np.float32)
    square = normal(3, 3, 3, 5, 14).astype(np.float32)
    apart = np.random.default_rng(3).permutation(x.size).reshape(x.shape).astype(np.float32)

    def convolved(x, kernel):
        return ops.conv(x, kernel, stride=2, padding=((1, 0), (0, 2)))

    for function, arguments in [
        (convolved, (x, kernel)),
        (lambda x, kernel: ops.conv(x, kernel, padding=((1, 0), (0, 2))), (x, square)),
        (ops.dense, (x.reshape(3, -1), square.reshape(210, -1))),
        (lambda x: ops.max_pool(x, 3, 2), (apart,)),
        (lambda x: ops.local_response_norm(x, **OTHER, groups=1), (x,)),
        (lambda x: ops.spatial_response_norm(x, **OTHER), (x,)),
    ]:
        check_grads(function, arguments, order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=1e-2)


def test_a_convolution_has_the_same_gradients_on_four_devices(kernels):
    """Rows split over `data`, output maps over `model`."""
    padding = ((2, 2), (2, 2))
    x, kernel = (normal(n, *shape).astype(np.float32) for n, shape in enumerate(SHAPES))
    bias = normal(4, 6).astype(np.float32)
    dy = normal(3, 4, 8, 8, 6).astype(np.float32)
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    shares = (P("data"), P(None, None, None, "model"), P("model"))
    split = jax.shard_map(
        lambda x, kernel, bias: ops.add_bias(ops.conv(x, kernel, padding=padding), bias),
        mesh=mesh,
        in_specs=shares,
        out_specs=P("data", None, None, "model"),
    )
    y, gradients = with_gradient(split, x, kernel, bias, dy=dy)
    np.testing.assert_allclose(y, oracle.conv(x, kernel, bias, 1, padding), atol=1e-4)
    wanted = (*oracle.conv_grad(x, kernel, dy, 1, padding)[:2], dy.sum((0, 1, 2)))
    for found, gradient in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(found, gradient, atol=1e-4)


# -------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("constants", [PAPER, CAFFE, OTHER])
def test_response_normalisation_and_its_gradient_are_the_oracles(constants, groups, kernels):
    """Numbers near 50, as after conv1: the paper's constants then change them noticeably."""
    x = (50 * normal(1, 2, 3, 3, 12)).astype(np.float32)
    dy = normal(2, *x.shape).astype(np.float32)
    y, (dx,) = with_gradient(
        lambda x: ops.local_response_norm(x, **constants, groups=groups), x, dy=dy
    )
    numbers = (*constants.values(), groups)
    np.testing.assert_allclose(y, oracle.lrn(x, *numbers), rtol=2e-6)
    wanted = oracle.lrn_grad(x, dy, *numbers)
    np.testing.assert_allclose(dx, wanted, atol=2e-6 * np.abs(wanted).max())


def test_response_normalisation_is_the_equation_of_the_paper_word_for_word():
    a, (k, n, alpha, beta) = 60 * normal(3, 9), (2, 5, 1e-4, 0.75)  # one pixel of N maps
    maps = len(a)
    b = []
    for i in range(maps):
        total = 0.0
        for j in range(max(0, i - n // 2), min(maps - 1, i + n // 2) + 1):
            total += a[j] ** 2
        b.append(a[i] / (k + alpha * total) ** beta)
    found = ops.local_response_norm(jnp.asarray(a.reshape(1, 1, 1, -1), jnp.float32), **PAPER)
    np.testing.assert_allclose(found[0, 0, 0], b, rtol=2e-6)


@pytest.mark.parametrize("constants", [{**PAPER, "k": 1.0, "alpha": 4e-5}, OTHER])
def test_spatial_normalisation_and_its_gradient_are_the_oracles(constants):
    x = (50 * normal(1, 2, 6, 7, 3)).astype(np.float32)
    dy = normal(2, *x.shape).astype(np.float32)
    y, (dx,) = with_gradient(lambda x: ops.spatial_response_norm(x, **constants), x, dy=dy)
    np.testing.assert_allclose(y, oracle.spatial_lrn(x, *constants.values()), rtol=2e-6)
    wanted = oracle.spatial_lrn_grad(x, dy, *constants.values())
    np.testing.assert_allclose(dx, wanted, atol=2e-6 * np.abs(wanted).max())


# ---------------------------------------------------------------------------------------- stage


def stage_and_gradient(x, dy, constants, groups, window, stride):
    """Of the oracle."""
    rectified, numbers = np.maximum(x, 0), (*constants.values(), groups)
    normalised = oracle.lrn(rectified, *numbers)
    dx = oracle.max_pool_grad(normalised, dy, window, stride)
    dx = oracle.lrn_grad(rectified, dx, *numbers) * (x > 0)
    return oracle.max_pool(normalised, window, stride), dx


@pytest.mark.parametrize(
    ("window", "stride"), [(2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 3)]
)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 9, 7, 22), 1), ((3, 5, 12, 70), 2)],  # rests of vectors, windows that overhang
)
def test_a_stage_and_its_gradient_are_the_oracles(shape, groups, window, stride, kernels):
    x = (50 * normal(1, *shape)).astype(np.float32)
    x[0, :4, :4] = -1  # windows in which nothing passes the rectifier
    sides = (oracle.pooled_side(n, window, stride) for n in shape[1:3])
    dy = normal(2, shape[0], *sides, shape[3]).astype(np.float32)
    stage = functools.partial(
        ops.relu_lrn_pool, **PAPER, groups=groups, window=window, stride=stride
    )
    y, (dx,) = with_gradient(stage, x, dy=dy)
    expected, wanted = stage_and_gradient(x.astype(float), dy, PAPER, groups, window, stride)
    np.testing.assert_allclose(y, expected, rtol=2e-6)
    np.testing.assert_allclose(dx, wanted, atol=2e-6 * np.abs(wanted).max())
    assert ("ffi_call" in str(jax.make_jaxpr(stage)(x))) == (kernels == "native")


@pytest.mark.parametrize(("window", "stride"), [(2, 1), (3, 2), (4, 3)])
def test_a_stages_gradient_goes_to_the_first_of_equal_maxima(window, stride, kernels):
    """Whole numbers of a small range, which no sum of squares changes."""
    rng = np.random.default_rng(window)
    x = rng.integers(-2, 3, (2, 8, 9, 20)).astype(np.float32)
    constants = PAPER | {"k": 1.0, "alpha": 0.0}
    sides = (oracle.pooled_side(n, window, stride) for n in (8, 9))
    dy = rng.integers(-4, 5, (2, *sides, 20)).astype(np.float32)
    rule = constants | {"groups": 2, "window": window, "stride": stride}
    y, (dx,) = with_gradient(lambda x: ops.relu_lrn_pool(x, **rule), x, dy=dy)
    expected, wanted = stage_and_gradient(x.astype(float), dy, constants, 2, window, stride)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    np.testing.assert_allclose(dx, wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("constants", [PAPER, OTHER])
@pytest.mark.parametrize(("window", "stride"), [(3, 2), (2, 3), (7, 4)])
def test_a_stage_is_what_it_consists_of_also_where_that_is_no_number(
    window, stride, constants, dtype
):
    """Windows overlap, lie apart, or are larger than a map."""
    x = 50 * normal(1, 3, 6, 5, 20)
    for place, value in [((0, 3, 3, 9), np.nan), ((1, 5, 2, 0), np.inf), ((1, 2, 4, 3), -np.inf)]:
        x[place] = value
    x = jnp.asarray(x, dtype)
    lrn = constants | {"groups": 2}

    def parts(x):
        x = ops.local_response_norm(ops.activation(x, "relu"), **lrn)
        return ops.max_pool(x, window, stride)

    def stage(x):
        return ops.relu_lrn_pool(x, **lrn, window=window, stride=stride)

    dy = jnp.asarray(normal(2, *jax.eval_shape(parts, x).shape), dtype)
    y, (dx,) = with_gradient(stage, x, dy=dy)
    expected, (wanted,) = with_gradient(parts, x, dy=dy)
    for found, array in ((y, expected), (dx, wanted)):
        assert found.dtype == array.dtype == dtype
        found, array = found.astype(float), array.astype(float)
        assert np.isnan(array).any()
        np.testing.assert_allclose(found, array, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- bfloat16


def test_a_bfloat16_sum_of_ones_that_bfloat16_itself_could_not_count(kernels):
    """bfloat16 has 8 bits: 256 + 1 is 256 again, so adding ones in it never passes 256."""
    total = jnp.bfloat16(0)
    for _ in range(300):
        total += jnp.bfloat16(1)
    assert total == 256

    ones = jnp.ones((1, 3, 3, 64), jnp.bfloat16)
    padding = ((0, 0), (0, 0))
    y = ops.conv(ones, jnp.ones((3, 3, 64, 1)), padding=padding)
    assert y.dtype == jnp.bfloat16
    assert y.item() == 3 * 3 * 64

    maps = jnp.ones((1, 1, 1, 300), jnp.bfloat16)
    norm = functools.partial(ops.local_response_norm, size=599, k=1.0, alpha=1.0, beta=0.75)
    y = jax.jit(norm)(maps)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(float), 301**-0.75, rtol=2**-8)

    plane = jnp.ones((1, 33, 33, 1), jnp.bfloat16)
    y = ops.spatial_response_norm(plane, size=65, k=1.0, alpha=1.0, beta=0.75)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(float), (1 + 33 * 33) ** -0.75, rtol=2**-8)


def test_a_biass_gradient_counts_every_pixel_of_bfloat16_maps():
    x, bias = jnp.ones((25, 41, 1, 2), jnp.bfloat16), jnp.asarray([1.0, 2.0])
    y, (dx, gradient) = with_gradient(ops.add_bias, x, bias, dy=x)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert gradient.dtype == np.float32
    np.testing.assert_array_equal(y.astype(float)[:, :, 0], np.tile([2.0, 3.0], (25, 41, 1)))
    np.testing.assert_array_equal(dx, x)
    np.testing.assert_array_equal(gradient, [1025, 1025])  # bfloat16 would have 1024


def test_the_squares_of_bfloat16_maps_are_not_rounded_to_it(kernels):
    """A square rounded to 8 bits would be raised to the fourth power, with its error."""
    x = jnp.asarray(np.linspace(1, 2, 128).reshape(1, 1, -1, 1), jnp.bfloat16)
    constants = {"size": 1, "k": 1e-3, "alpha": 1.0, "beta": 4.0}
    exact = oracle.lrn(np.asarray(x, float), *constants.values())
    for norm in (ops.local_response_norm, ops.spatial_response_norm):
        found = np.asarray(norm(x, **constants), float)
        assert np.abs(found / exact - 1).max() <= 2**-8 * (1 + 1e-3)  # one rounding, at the end


# -------------------------------------------------------------------------------------- dropout


def mask(
    rows, towers=(0, 1), *, seed: int = 0, layer: int = 1, shape=(64,), rate=0.5
) -> np.ndarray:
    numbers = (jnp.asarray(n, jnp.int32) for n in (rows, towers))
    return np.asarray(_mask(jax.random.key(seed), *numbers, layer, shape, rate))


@functools.partial(jax.jit, static_argnums=(4, 5))
def _mask(key, rows, towers, layer, shape, rate):
    return ops.keep_mask(key, rows, layer=layer, towers=towers, shape=shape, rate=rate)


def test_a_rows_mask_does_not_depend_on_the_rows_beside_it():
    everything = mask(range(4))
    np.testing.assert_array_equal(mask([3, 0, 2, 2]), everything[[3, 0, 2, 2]])
    np.testing.assert_array_equal(mask([3]), everything[[3]])


@pytest.mark.parametrize("shape", [(64,), (3, 2, 8)])
def test_a_towers_mask_does_not_depend_on_who_asks(shape):
    """Tower 0's channels come first on the last axis, as everywhere."""
    both = mask(range(4), (0, 1), shape=shape)
    assert both.shape == (4, *shape[:-1], 2 * shape[-1])
    assert both.dtype == bool
    alone = [mask(range(4), [tower], shape=shape) for tower in (0, 1)]
    np.testing.assert_array_equal(both, np.concatenate(alone, axis=-1))


def test_seed_layer_tower_and_row_all_change_a_mask():
    first = mask([0], [0])
    others = [mask([1], [0]), mask([0], [1]), mask([0], [0], layer=2), mask([0], [0], seed=1)]
    for other in others:
        assert 0.2 < np.mean(first != other) < 0.8  # 64 fair coins differ in half


def test_swapping_row_and_tower_gives_another_mask():
    assert np.any(mask([0], [1]) != mask([1], [0]))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_units_are_dropped_at_the_rate_and_independently(rate):
    keep = mask(range(100), shape=(200,), rate=rate)  # 40,000 units
    spread = np.sqrt(rate * (1 - rate))
    assert abs(keep.mean() - (1 - rate)) < 5 * spread / np.sqrt(keep.size)
    deviation = (keep - keep.mean()) / spread
    pairs = {
        "rows": deviation[:-1] * deviation[1:],
        "units": deviation[:, :-1] * deviation[:, 1:],
        "towers": deviation[:, :200] * deviation[:, 200:],
    }
    for name, products in pairs.items():
        assert abs(products.mean()) < 5 / np.sqrt(products.size), name


def test_masks_do_not_depend_on_how_wide_jax_makes_its_numbers():
    narrow = mask(range(100), shape=(200,), rate=0.3)
    with jax.enable_x64(True):
        wide = mask(range(100), shape=(200,), rate=0.3)
    np.testing.assert_array_equal(wide, narrow)


def test_rate_0_keeps_every_unit():
    assert mask(range(4), rate=0.0).all()


def test_both_dropout_rules_have_the_same_mean_and_differ_in_where_they_scale():
    x = jnp.asarray([[1.0, -2.0, 3.0, 4.0]])
    keep = jnp.asarray([[True, False, True, False]])

    def values(keep, rate, rule):
        return ops.dropout(x, keep, rate, rule).tolist()

    assert values(keep, 0.75, "scale_at_test") == [[1, 0, 3, 0]]
    assert values(None, 0.75, "scale_at_test") == [[0.25, -0.5, 0.75, 1]]
    assert values(keep, 0.75, "inverted") == [[4, 0, 12, 0]]
    assert values(None, 0.75, "inverted") == x.tolist()


def test_a_dropped_unit_that_is_not_a_number_is_dropped_all_the_same():
    for rule in ("scale_at_test", "inverted"):
        kept = ops.dropout(jnp.asarray([jnp.nan, 1.0]), jnp.asarray([False, True]), 0.5, rule)
        assert np.isfinite(kept).all()


# ------------------------------------------------------------------------------------ activation


def test_activations_and_their_gradients():
    x, dy = normal(0, 4, 5, 6), normal(1, 4, 5, 6)
    x[0, 0] = [0.0, -0.0, np.inf, -np.inf, 1e-30, -1e-30]
    y, (dx,) = with_gradient(
        lambda x: ops.activation(x, "relu"), jnp.float32(x), dy=jnp.float32(dy)
    )
    np.testing.assert_array_equal(y, np.maximum(np.float32(x), 0))
    np.testing.assert_array_equal(dx, np.where(x > 0, np.float32(dy), 0))
    x = normal(0, 4, 5, 6)
    y, (dx,) = with_gradient(
        lambda x: ops.activation(x, "tanh"), jnp.float32(x), dy=jnp.float32(dy)
    )
    np.testing.assert_allclose(y, np.tanh(x), rtol=1e-6)
    np.testing.assert_allclose(dx, dy / np.cosh(x) ** 2, rtol=1e-5, atol=1e-6)


def test_what_is_no_number_goes_through_the_rectifier():
    assert np.isnan(ops.activation(jnp.float32(np.nan), "relu"))
