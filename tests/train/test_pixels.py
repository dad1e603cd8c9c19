"""What a step feeds the net: crops, and pixels with colour noise, mean and gain, in this order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from alexnet_jax.config import Config
from alexnet_jax.data import augment, images
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.train import optim, pixels
from alexnet_jax.train.calendar import Calendar
from alexnet_jax.train.state import TrainState
from alexnet_jax.train.step import make_train_step

STD = np.array([40.0, 50.0, 60.0], np.float32)


def rough(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8 of noise."""
    return np.random.default_rng((seed, height, width)).integers(
        0, 256, (height, width, 3), np.uint8
    )


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
    params = {"a": {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(2)}}
    devices = np.asarray(jax.devices()[:1]).reshape(1, 1)
    step = make_train_step(
        apply,
        optim.make_update(Config().optim),
        optim.make_schedule(Config().optim, Calendar(4, 4, 1)),
        Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2),
        seed=0,
        mean=mean,
    )
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    _, results = step(state, batch, statistics, jnp.float32(1))

    means = statistics.mean_image
    means = means.mean((0, 1)) if mean == "channel" else means[1:9, 1:9]
    values = (batch["image"] + batch["shift"][:, None, None] - means) / divisor
    values = values.mean((1, 2, 3)) * batch["gain"]
    expected = np.log1p(np.exp(-values)).sum()
    np.testing.assert_allclose(results.sums.loss[0], expected, rtol=1e-4)


def test_cut_takes_each_of_the_ten_crops():
    squares = np.stack([rough(21, 21, seed) for seed in range(4)])
    for top, left, mirror in augment.test_crops(8, 10):
        expected = squares[:, top : top + 13, left : left + 13]
        if mirror:
            expected = np.flip(expected, axis=2)
        cut = pixels.cut(squares, np.array([top, left, mirror], np.int32), 13)
        np.testing.assert_array_equal(np.asarray(cut), expected)


@pytest.fixture
def rough_statistics() -> Statistics:
    mean = rough(22, 22, 9).astype(np.float32) + np.float32(0.25)
    std = np.array([50.0, 60.0, 70.0], np.float32)
    return Statistics(mean, std, np.ones(3, np.float32), np.eye(3, dtype=np.float32))


OFFSETS = np.array([(0, 0), (0, 9), (9, 0), (2, 7), (2, 7)], np.int32)
MIRRORS = np.array([False, True, False, True, False])


def normalised(statistics: Statistics, mean: str) -> tuple[np.ndarray, np.ndarray]:
    """Five pictures of 13 x 13 and what `normalise` makes of them."""
    batch = np.stack([rough(13, 13, seed) for seed in range(5)])
    result = np.asarray(pixels.normalise(batch, OFFSETS, MIRRORS, statistics, mean))
    assert result.dtype == np.float32
    return batch, result


def test_central_subtracts_the_mean_images_centre_whatever_the_crop(rough_statistics):
    batch, result = normalised(rough_statistics, "central")
    expected = batch - rough_statistics.mean_image[4:17, 4:17]  # (22 - 13) // 2 from the top
    np.testing.assert_array_equal(result, expected)


def test_at_crop_subtracts_the_mean_at_the_same_place_mirrored_alike(rough_statistics):
    batch, result = normalised(rough_statistics, "at_crop")
    for image, row, (top, left), mirror in zip(batch, result, OFFSETS, MIRRORS):
        mean = rough_statistics.mean_image[top : top + 13, left : left + 13]
        np.testing.assert_array_equal(row, image - (np.fliplr(mean) if mirror else mean))


def test_at_crop_of_the_mean_itself_is_nothing(rough_statistics):
    """A square equal to the mean gives zeros from every crop of it."""
    whole = rough_statistics._replace(mean_image=rough(22, 22).astype(np.float32))
    batch = np.zeros((5, 13, 13, 3), np.uint8)
    for row in range(5):
        images.crop(rough(22, 22), 22, OFFSETS[row], MIRRORS[row], batch[row])
    assert not np.asarray(pixels.normalise(batch, OFFSETS, MIRRORS, whole, "at_crop")).any()


def test_channel_subtracts_the_channels_means_and_divides(rough_statistics):
    batch, result = normalised(rough_statistics, "channel")
    mean = rough_statistics.mean_image.astype(np.float64).mean(axis=(0, 1))
    expected = (batch - mean) / np.array([50.0, 60.0, 70.0])
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)
