"""The kernels for GPUs, interpreted, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from alexnet_jax import ops
from alexnet_jax.ops import gpu, native

LRN = {"size": 5, "k": 2.0, "alpha": 1e-2, "beta": 0.75}


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """As the operations choose there; the kernels themselves see that there is none."""
    monkeypatch.setattr(native, "available", lambda *arrays: False)
    monkeypatch.setattr(gpu, "is_gpu", lambda: True)


def calls(function, *arrays) -> int:
    """Of kernels."""
    return str(jax.make_jaxpr(function)(*arrays)).count("pallas_call")


def numbers(*shape) -> np.ndarray:
    return 4 * np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


# A thread has all maps of a tower, some of one, or those of several in a row; pixels fill programs
# or do not.
@pytest.mark.parametrize(("maps", "groups"), [(96, 2), (8, 1), (48, 2), (16, 2), (128, 1), (24, 3)])
@pytest.mark.parametrize("size", [5, 3, 9, 1])
def test_normalisation_and_its_gradient(maps, groups, size):
    x, dy = numbers(2, 3, 7, maps), numbers(2, 3, 7, maps)[::-1].copy()
    rule = LRN | {"size": size, "groups": groups}

    def norm(x):
        return ops.local_response_norm(x, **rule)

    y, back = jax.vjp(norm, x)
    np.testing.assert_allclose(y, oracle.lrn(np.float64(x), **rule), rtol=1e-5)
    wanted = oracle.lrn_grad(np.float64(x), np.float64(dy), **rule)
    np.testing.assert_allclose(back(jnp.asarray(dy))[0], wanted, rtol=1e-4, atol=1e-5)
    assert calls(norm, x) == 1


@pytest.mark.parametrize(
    ("maps", "rule"), [(16, {"size": 11}), (16, {"beta": 0.5}), (20, {}), (48, {"groups": 4})]
)
def test_what_there_is_no_kernel_for_is_left_to_xla(maps, rule):
    x = numbers(1, 2, 3, maps)
    rule = LRN | rule
    np.testing.assert_allclose(
        ops.local_response_norm(x, **rule), oracle.lrn(np.float64(x), **{"groups": 1} | rule), 1e-5
    )
    assert calls(lambda x: ops.local_response_norm(x, **rule), x) == 0


@pytest.mark.parametrize(("window", "stride"), [(3, 2), (2, 2), (3, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("shape", [(2, 7, 8, 48), (1, 5, 13, 8), (3, 6, 6, 16)])
def test_gradients_of_pools(shape, window, stride):
    """Of numbers of which many are the same, so that the first of them has to be found."""
    x = np.random.default_rng(0).integers(0, 4, shape).astype(np.float32)
    y, back = jax.vjp(lambda x: ops.max_pool(x, window, stride), x)
    np.testing.assert_array_equal(y, oracle.max_pool(x, window, stride))
    dy = np.random.default_rng(1).integers(-9, 9, y.shape).astype(np.float32)
    wanted = oracle.max_pool_grad(x, dy, window, stride)
    np.testing.assert_array_equal(back(jnp.asarray(dy))[0], wanted)
    assert calls(lambda dy: back(dy), jnp.asarray(dy)) == 1


@pytest.mark.parametrize("shape", [(2, 11, 11, 96), (1, 6, 9, 32)])
def test_the_stage_and_its_gradient(shape):
    x = numbers(*shape)
    x[0, 0] = -1  # a window in which nothing passes the rectifier
    pool = {"window": 3, "stride": 2}

    def stage(x):
        return ops.relu_lrn_pool(x, **LRN, groups=2, **pool)

    y, back = jax.vjp(stage, x)
    rectified = np.maximum(np.float64(x), 0)
    normalised = oracle.lrn(rectified, **LRN, groups=2)
    np.testing.assert_allclose(y, oracle.max_pool(normalised, 3, 2), rtol=1e-5)
    dy = numbers(*y.shape)
    wanted = oracle.max_pool_grad(normalised, np.float64(dy), 3, 2)
    wanted = oracle.lrn_grad(rectified, wanted, **LRN, groups=2) * (x > 0)
    np.testing.assert_allclose(back(jnp.asarray(dy))[0], wanted, rtol=1e-4, atol=1e-5)
    assert calls(stage, x) == 1
    assert calls(lambda dy: back(dy), jnp.asarray(dy)) == 2


def test_the_rectifier_takes_nothing_at_zero():
    x = np.zeros((1, 3, 3, 8), np.float32)
    rule = gpu.Rule(5, 2.0, 1e-2, 1, rectify=True)
    assert not np.asarray(gpu.normalise_gradient(x, jnp.ones_like(x), rule)).any()


def test_bfloat16_is_summed_in_float32():
    x = jnp.asarray(numbers(2, 5, 5, 96), jnp.bfloat16)
    rule = LRN | {"groups": 2}
    y, back = jax.vjp(lambda x: ops.local_response_norm(x, **rule), x)
    wanted = oracle.lrn(np.float64(x), **rule)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(y), wanted, rtol=2**-8)
    dx = back(jnp.ones_like(y))[0]
    wanted = oracle.lrn_grad(np.float64(x), np.ones(x.shape), **rule)
    np.testing.assert_allclose(np.float64(dx), wanted, rtol=2**-8, atol=1e-6)


def test_what_is_no_number_stays_visible():
    x = np.ones((1, 3, 3, 8), np.float32)
    x[0, 1, 1] = np.nan
    y, back = jax.vjp(lambda x: ops.max_pool(x, 3, 2), x)
    assert np.isnan(y).all()
    assert not np.asarray(back(jnp.ones_like(y))[0]).any()
    assert np.isnan(ops.local_response_norm(jnp.asarray(x), **LRN)[0, 1, 1]).all()


def test_the_rectifier_is_no_maximum():
    """Triton's maximum, unlike XLA's and the interpreter's, is the one of two that is a number."""
    x = jnp.zeros((1, 4, 4, 16), jnp.bfloat16)
    rule = gpu.Rule(5, 2.0, 1e-2, 1, rectify=True)
    for kernel in (gpu.normalise, lambda x, rule: gpu.normalise_gradient(x, x, rule)):
        found = str(jax.make_jaxpr(lambda x, kernel=kernel: kernel(x, rule))(x))
        assert " rsqrt " in found  # what the kernel does is shown
        assert " max " not in found


def test_what_is_no_number_passes_the_stage():
    x = np.ones((1, 7, 7, 16), np.float32)
    x[0, 3, 3, 5] = np.nan
    stage = LRN | {"groups": 1, "window": 3, "stride": 2}
    y, back = jax.vjp(lambda x: ops.relu_lrn_pool(x, **stage), x)
    assert np.isnan(y).any()
    assert np.isnan(np.asarray(back(jnp.ones_like(y))[0])).any()


def test_more_numbers_than_an_index_counts_are_left_to_xla():
    x = jax.ShapeDtypeStruct((7000, 55, 55, 104), jnp.bfloat16)  # 2.2e9
    found = jax.make_jaxpr(lambda x: ops.local_response_norm(x, **LRN))(x)
    assert "pallas_call" not in str(found)
