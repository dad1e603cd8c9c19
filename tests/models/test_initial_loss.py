"""The full-size nets before training: the loss that a healthy initialisation gives.

Published figures: the reference experiments with the original's, the paper's and Caffe's
initialisation, dropout on, measured on photographs less their mean image.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax import metrics
from alexnet_jax.config import blank, resolve
from alexnet_jax.data import images, shapes
from alexnet_jax.models.layers import Dropout
from alexnet_jax.train.state import initial_state, make_apply

COUNT = 16
LITERAL = (0.01,) * 8  # every weight's standard deviation, as the paper prints it


def centred_pictures(size: int) -> np.ndarray:
    """(COUNT, size, size, 3) float32: centre crops less the mean of the pictures."""
    squares = np.stack([images.square(shapes.draw("train", i)[0], 256) for i in range(COUNT)])
    centred = squares.astype(np.float32) - squares.mean(axis=0, dtype=np.float32)
    start = (256 - size) // 2
    return centred[:, start : start + size, start : start + size]


def logits(preset: str, weight_std: tuple[float, ...] | None, training: bool) -> jax.Array:
    user = blank()
    user.model.preset = preset
    user.model.weight_std = weight_std
    model = resolve(user).model
    params = initial_state(model, 1000, seed=42).params
    dropout = Dropout(jax.random.key(0), jnp.arange(COUNT)) if training else None
    apply = make_apply(model, 1000, shards=1)
    return jax.jit(lambda p, x: apply(p, x, dropout))(params, centred_pictures(model.input_size))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "weight_std", "published"),
    [
        ("paper", None, 7.14),
        ("paper", LITERAL, 7.05),
        ("source2012", None, 7.14),
        ("caffe_alexnet", None, 6.91),
    ],
    ids=["paper", "paper to the letter", "source2012", "caffe_alexnet"],
)
def test_the_loss_at_initialisation_is_the_published_one(preset, weight_std, published):
    log_probs = metrics.log_probabilities(logits(preset, weight_std, training=True))
    assert abs(-float(log_probs.mean()) - published) < 0.015  # over all labels alike


@pytest.mark.slow
def test_the_papers_printed_std_gives_a_signal_fifteen_times_weaker():
    healthy, literal = (
        np.std(logits("paper", std, training=False), axis=0).mean() for std in (None, LITERAL)
    )
    assert 13 < healthy / literal < 17
