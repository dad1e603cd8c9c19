"""What a training step feeds the net: pixels, colour noise, mean and gain, in this order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from alexnet_jax.config import Config
from alexnet_jax.data.augment import Statistics
from alexnet_jax.train import optim
from alexnet_jax.train.state import TrainState
from alexnet_jax.train.step import make_train_step

STD = np.array([40.0, 50.0, 60.0], np.float32)


@pytest.mark.parametrize(("mean", "divisor"), [("central", np.ones(3)), ("channel", STD)])
def test_colour_noise_is_on_the_scale_of_pixels_whatever_is_subtracted(mean, divisor):
    rng = np.random.default_rng(0)
    statistics = Statistics(
        rng.uniform(90, 160, (10, 10, 3)).astype(np.float32), STD, np.ones(3), np.eye(3)
    )
    batch = {
        "image": rng.integers(0, 256, (4, 8, 8, 3), np.uint8),
        "label": np.zeros(4, np.int32),
        "offset": np.ones((4, 2), np.int32),
        "mirror": np.zeros(4, bool),
        "shift": rng.normal(0, 10, (4, 3)).astype(np.float32),
        "gain": np.array([1, 1, 1 / 1.1, 1], np.float32),
    }

    def apply(params, images, dropout):  # the loss of class 0 then tells the images' mean
        return jnp.stack([images.mean((1, 2, 3)), jnp.zeros(len(images))], 1) + params["a"]["bias"]

    optimizer = optim.make_optimizer(Config().optim)
    params = {"a": {"bias": jnp.zeros(2)}}
    devices = np.asarray(jax.devices()[:1]).reshape(1, 1)
    step = make_train_step(
        apply,
        optimizer,
        optim.make_schedule(Config().optim, 4, 4, 1),
        Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2),
        seed=0,
        mean=mean,
    )
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    _, results = step(state, batch, statistics, jnp.float32(1))

    means = statistics.mean_image
    means = means.mean((0, 1)) if mean == "channel" else means[1:9, 1:9]
    pixels = (batch["image"] + batch["shift"][:, None, None] - means) / divisor
    values = pixels.mean((1, 2, 3)) * batch["gain"]
    expected = np.log1p(np.exp(-values)).sum()
    np.testing.assert_allclose(results.sums.loss[0], expected, rtol=1e-4)
