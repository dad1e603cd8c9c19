"""The kernels that benchmarks set beside the package's operations, interpreted, against numpy."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))
import kernels

LRN = {"size": 5, "k": 2.0, "alpha": 1e-2, "beta": 0.75}


@pytest.mark.parametrize(("maps", "groups"), [(96, 2), (12, 2), (7, 1)])
def test_normalisation_and_its_gradient(maps, groups):
    rng = np.random.default_rng(0)
    x, dy = (4 * rng.standard_normal((2, 3, 7, maps), np.float32) for _ in range(2))
    y, back = jax.vjp(lambda x: kernels.local_response_norm(x, **LRN, groups=groups), x)
    np.testing.assert_allclose(y, oracle.lrn(np.float64(x), **LRN, groups=groups), rtol=1e-5)
    wanted = oracle.lrn_grad(np.float64(x), np.float64(dy), **LRN, groups=groups)
    np.testing.assert_allclose(back(jnp.asarray(dy))[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(3, 2), (2, 2), (3, 1), (3, 3)])
@pytest.mark.parametrize("shape", [(2, 7, 8, 96), (1, 5, 40, 6)])
def test_pools_and_their_gradients(shape, window, stride):
    """Of numbers of which many are the same, so that the first of them has to be found."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 4, shape).astype(np.float32)
    y, back = jax.vjp(lambda x: kernels.max_pool(x, window, stride), x)
    np.testing.assert_array_equal(y, oracle.max_pool(x, window, stride))
    dy = rng.integers(-9, 9, y.shape).astype(np.float32)
    wanted = oracle.max_pool_grad(x, dy, window, stride)
    np.testing.assert_array_equal(back(jnp.asarray(dy))[0], wanted)


def test_what_is_no_number_stays_visible():
    x = np.ones((1, 3, 3, 1), np.float32)
    x[0, 1, 1] = np.nan
    y, back = jax.vjp(lambda x: kernels.max_pool(x, 3, 2), x)
    assert np.isnan(y).all()
    assert not np.asarray(back(jnp.ones_like(y))[0]).any()
