"""Figure 1's four-layer net against counts by hand and against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from alexnet_jax.models.nets import layers
from alexnet_jax.train.state import initial_state, make_apply

CLASSES = 10
PADDING = ((2, 2), (2, 2))


def mean_pool(x: np.ndarray) -> np.ndarray:
    """Means over windows of 3 in steps of 2, of the pixels inside the map, spelled out."""
    side = oracle.pooled_side(x.shape[1], 3, 2)
    out = np.empty((len(x), side, side, x.shape[3]))
    for i in range(side):
        for j in range(side):
            out[:, i, j] = x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].mean((1, 2))
    return out


def forward(params: oracle.Params, x: np.ndarray, activation) -> np.ndarray:
    for layer, pool in (
        ("conv1", lambda x: oracle.max_pool(x, 3, 2)), ("conv2", mean_pool), ("conv3", mean_pool)
    ):  # fmt: skip
        kernel, bias = params[layer]["kernel"], params[layer]["bias"]
        x = pool(activation(oracle.conv(x, kernel, bias, 1, PADDING)))
    return x.reshape(len(x), -1) @ params["fc4"]["kernel"] + params["fc4"]["bias"]


def test_layers_have_the_sizes_and_counts_of_the_original(configured):
    found = {layer.name: layer for layer in layers(configured("cifar").model, CLASSES)}
    assert [layer.stage_output for layer in found.values()] == [
        (16, 16, 32), (8, 8, 32), (4, 4, 64), (10,),
    ]  # fmt: skip
    counts = {name: layer.parameters for name, layer in found.items()}
    assert counts == {
        "conv1": 5 * 5 * 3 * 32 + 32,
        "conv2": 5 * 5 * 32 * 32 + 32,
        "conv3": 5 * 5 * 32 * 64 + 64,
        "fc4": 4 * 4 * 64 * 10 + 10,
    }
    assert sum(layer.multiply_adds for layer in found.values()) == (
        32**2 * 75 * 32 + 16**2 * 800 * 32 + 8**2 * 800 * 64 + 1024 * 10
    )


@pytest.mark.parametrize(
    ("activation", "by_numpy"), [("relu", lambda x: np.maximum(x, 0)), ("tanh", np.tanh)]
)
@pytest.mark.parametrize("size", [32, 27])
def test_logits_are_numpys(size, activation, by_numpy, configured, difference):
    values = {"model.activation": activation, "model.input_size": size}
    model = configured("cifar", {**values, "data.stored_size": size}).model
    rng = np.random.default_rng(size)
    params = {
        layer.name: {
            "kernel": rng.standard_normal(layer.kernel) * np.sqrt(2 / np.prod(layer.kernel[:-1])),
            "bias": rng.standard_normal(layer.kernel[-1]),
        }
        for layer in layers(model, CLASSES)
    }
    images = rng.standard_normal((3, size, size, 3))
    given = jax.tree.map(jnp.float32, params)
    logits = jax.jit(make_apply(model, CLASSES, 1))(given, jnp.float32(images), None)
    assert difference(logits, forward(params, images, by_numpy)) < 1e-5


def test_weights_begin_as_the_original_had_them(configured):
    config = configured("cifar")
    state = initial_state(config.model, CLASSES, 0)
    for layer, std in {"conv1": 1e-4, "conv2": 0.01, "conv3": 0.01, "fc4": 0.01}.items():
        kernel = state.params[layer]["kernel"]
        # Of so many normal numbers the deviation is known to 1 / sqrt(2 n); five times that.
        assert kernel.std() == pytest.approx(std, rel=5 / np.sqrt(2 * kernel.size))
        assert not state.params[layer]["bias"].any()
