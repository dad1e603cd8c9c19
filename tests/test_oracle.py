"""The oracle against central differences and against formulas spelled out in scalar loops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle
import pytest

SIDE = 37
CLASSES = 7
TINY = {"conv1": 8, "conv2": 12, "conv3": 8, "conv4": 12, "conv5": 8, "fc6": 10, "fc7": 9}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def slope(loss: Callable[[], float], x: np.ndarray, index: tuple[int, ...]) -> float:
    """The central difference of loss() in x[index], which is moved in place and put back."""
    here, step = x[index], 1e-5 * max(1.0, abs(x[index]))
    values = []
    for there in (here + step, here - step):
        x[index] = there
        values.append(loss())
    x[index] = here
    return (values[0] - values[1]) / (2 * step)


def slopes(loss: Callable[[], float], x: np.ndarray) -> np.ndarray:
    """The central differences in every element of x."""
    return np.array([slope(loss, x, index) for index in np.ndindex(x.shape)]).reshape(x.shape)


def distinct(shape: tuple[int, ...]) -> np.ndarray:
    """Numbers far enough apart that a small step never makes another one the maximum."""
    return rng().permutation(int(np.prod(shape))).reshape(shape) * 0.1 - 1.0


def tiny_net(name: str) -> tuple[oracle.Params, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Parameters, images, labels and dropout masks of a narrow net on odd-sized images."""
    widths = TINY | ({"conv6": 6} if name == "conv6" else {})
    params = oracle.random_params(rng(1), name, SIDE, widths, CLASSES)
    images = 50 * rng(2).standard_normal((3, SIDE, SIDE, 3))
    side = 0 if oracle.PRESETS[name].dropout_at == "input" else 1
    masks = {
        layer: rng(3).integers(0, 2, (3, params[layer]["kernel"].shape[side]))
        for layer in ("fc6", "fc7")
    }
    return params, images, np.array([0, 3, 6]), masks


@pytest.mark.parametrize(
    ("side", "stride", "padding", "groups"),
    [
        (7, 1, ((1, 1), (1, 1)), 1),
        (7, 2, ((0, 2), (0, 2)), 1),
        (8, 2, ((1, 0), (2, 1)), 2),
        (6, 1, ((2, 2), (2, 2)), 2),
        (9, 4, ((0, 0), (0, 0)), 1),
    ],
)
def test_convolution_gradients_are_the_central_differences(side, stride, padding, groups):
    x = rng(1).standard_normal((2, side, side, 4))
    kernel = rng(2).standard_normal((3, 3, 4 // groups, 4))
    bias = rng(3).standard_normal(4)
    dy = rng(4).standard_normal(oracle.conv(x, kernel, bias, stride, padding, groups).shape)

    def loss() -> float:
        return float((oracle.conv(x, kernel, bias, stride, padding, groups) * dy).sum())

    dx, dkernel, dbias = oracle.conv_grad(x, kernel, dy, stride, padding, groups)
    np.testing.assert_allclose(dx, slopes(loss, x), atol=1e-8)
    np.testing.assert_allclose(dkernel, slopes(loss, kernel), atol=1e-8)
    np.testing.assert_allclose(dbias, slopes(loss, bias), atol=1e-8)


def test_convolution_is_the_sum_over_a_window_without_flipping_the_kernel():
    x, kernel = rng(1).standard_normal((1, 5, 5, 2)), rng(2).standard_normal((3, 3, 2, 1))
    y = oracle.conv(x, kernel, np.array([0.5]), 2, ((0, 0), (0, 0)))
    assert y.shape == (1, 2, 2, 1)
    np.testing.assert_allclose(y[0, 1, 0, 0], (x[0, 2:5, 0:3] * kernel[..., 0]).sum() + 0.5)


def test_padding_stands_where_it_is_asked_for():
    x, kernel = np.ones((1, 2, 2, 1)), np.ones((2, 2, 1, 1))
    y = oracle.conv(x, kernel, np.zeros(1), 1, ((0, 1), (1, 0)))
    np.testing.assert_array_equal(y[0, :, :, 0], [[2, 4], [1, 2]])


def test_a_group_reads_its_own_half_of_the_channels():
    x, kernel = rng(1).standard_normal((1, 4, 4, 4)), rng(2).standard_normal((3, 3, 2, 6))
    bias, edges = rng(3).standard_normal(6), ((1, 1), (1, 1))
    y = oracle.conv(x, kernel, bias, 1, edges, groups=2)
    first = oracle.conv(x[..., :2], kernel[..., :3], bias[:3], 1, edges)
    second = oracle.conv(x[..., 2:], kernel[..., 3:], bias[3:], 1, edges)
    np.testing.assert_allclose(y, np.concatenate([first, second], -1), rtol=1e-12)


@pytest.mark.parametrize(
    ("side", "window", "stride", "pooled"),
    [(7, 3, 2, 3), (6, 3, 2, 3), (2, 3, 2, 1), (5, 3, 1, 3), (8, 3, 3, 3), (5, 2, 2, 3)],
)
def test_pooling_clips_overhanging_windows_and_sends_the_gradient_to_the_maximum(
    side, window, stride, pooled
):
    x = distinct((2, side, side, 2))
    y = oracle.max_pool(x, window, stride)
    assert y.shape == (2, pooled, pooled, 2)
    for _, r, c, _ in np.ndindex(y.shape):
        rows, columns = (slice(stride * i, stride * i + window) for i in (r, c))
        np.testing.assert_array_equal(y[:, r, c], x[:, rows, columns].max((1, 2)))
    dy = rng(1).standard_normal(y.shape)
    numeric = slopes(lambda: float((oracle.max_pool(x, window, stride) * dy).sum()), x)
    np.testing.assert_allclose(oracle.max_pool_grad(x, dy, window, stride), numeric, atol=1e-8)


def test_of_equal_maxima_the_first_in_row_major_order_gets_the_whole_gradient():
    x = np.array([[1, 2, 2, 0], [2, 2, 0, 0], [0, 0, 0, 0], [0, 5, 5, 0]], float)
    dy = np.array([[10, 20], [30, 40]], float)  # windows of 3 by stride 2: the last is clipped
    dx = oracle.max_pool_grad(x[None, :, :, None], dy[None, :, :, None], 3, 2)
    expected = np.array([[0, 10, 20, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 30, 40, 0]], float)
    np.testing.assert_array_equal(dx[0, :, :, 0], expected)


def test_a_stride_above_the_window_is_refused():
    with pytest.raises(ValueError, match="stride 3 above window 2"):
        oracle.max_pool(np.zeros((1, 4, 4, 1)), 2, 3)


@pytest.mark.parametrize("groups", [1, 2])
def test_response_normalisation_is_the_equation_of_the_paper(groups):
    x, (n, k, alpha, beta) = 3 * rng().standard_normal((2, 2, 3, 12)), (5, 2.0, 0.03, 0.75)
    maps = 12 // groups  # the paper's N: here those of one group
    expected = np.empty(x.shape)
    for b, r, c, channel in np.ndindex(x.shape):
        group, i = divmod(channel, maps)
        total = 0.0
        for j in range(max(0, i - n // 2), min(maps - 1, i + n // 2) + 1):
            total += x[b, r, c, group * maps + j] ** 2
        expected[b, r, c, channel] = x[b, r, c, channel] / (k + alpha * total) ** beta
    np.testing.assert_allclose(oracle.lrn(x, n, k, alpha, beta, groups), expected, rtol=1e-12)


def test_spatial_normalisation_sums_over_the_clipped_square_around_a_pixel_of_its_own_map():
    x, (size, k, alpha, beta) = 3 * rng().standard_normal((2, 6, 7, 3)), (5, 1.0, 0.03, 0.75)
    expected = np.empty(x.shape)
    for b, r, c, channel in np.ndindex(x.shape):
        square = x[b, max(0, r - 2) : r + 3, max(0, c - 2) : c + 3, channel]
        total = sum(float(value) ** 2 for value in square.ravel())
        expected[b, r, c, channel] = x[b, r, c, channel] / (k + alpha * total) ** beta
    np.testing.assert_allclose(oracle.spatial_lrn(x, size, k, alpha, beta), expected, rtol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_response_normalisation_gradient_is_the_central_difference(groups):
    x, constants = 3 * rng().standard_normal((2, 2, 3, 12)), (5, 2.0, 0.03, 0.75, groups)
    dy = rng(1).standard_normal(x.shape)
    numeric = slopes(lambda: float((oracle.lrn(x, *constants) * dy).sum()), x)
    np.testing.assert_allclose(oracle.lrn_grad(x, dy, *constants), numeric, atol=1e-8)


def test_spatial_normalisation_gradient_is_the_central_difference():
    x, constants = 3 * rng().standard_normal((2, 6, 7, 2)), (5, 1.0, 0.03, 0.75)
    dy = rng(1).standard_normal(x.shape)
    numeric = slopes(lambda: float((oracle.spatial_lrn(x, *constants) * dy).sum()), x)
    np.testing.assert_allclose(oracle.spatial_lrn_grad(x, dy, *constants), numeric, atol=1e-8)


def test_cross_entropy_is_minus_the_log_probability_even_of_huge_logits():
    logits, labels = rng().standard_normal((4, 5)), np.array([0, 4, 2, 2])
    odds = np.exp(logits)
    expected = -np.log(odds[np.arange(4), labels] / odds.sum(-1))
    np.testing.assert_allclose(oracle.softmax_cross_entropy(logits, labels), expected)
    huge = oracle.softmax_cross_entropy(np.array([[1e4, 0.0]]), np.array([1]))
    np.testing.assert_allclose(huge, [1e4])


def test_cross_entropy_gradient_is_the_central_difference():
    logits, labels = rng().standard_normal((4, 5)), np.array([0, 4, 2, 2])
    numeric = slopes(lambda: float(oracle.softmax_cross_entropy(logits, labels).sum()), logits)
    gradient = oracle.softmax_cross_entropy_grad(logits, labels)
    np.testing.assert_allclose(gradient, numeric, atol=1e-9)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_activation_gradient_is_the_central_difference(activation):
    x, dy = rng().standard_normal((3, 4)), rng(1).standard_normal((3, 4))
    numeric = slopes(lambda: float((oracle.activate(x, activation) * dy).sum()), x)
    np.testing.assert_allclose(oracle.activate_grad(x, dy, activation), numeric, atol=1e-9)


def test_the_slope_of_relu_at_zero_is_zero():
    assert oracle.activate_grad(np.zeros(1), np.ones(1), "relu")[0] == 0


def check_net(name: str, activation: str) -> None:
    """Gradients of a whole net against central differences in some elements of every parameter.

    A loss near 2 rounded to 16 digits and divided by a step of 2e-5 is uncertain by some 1e-11.
    """
    params, images, labels, masks = tiny_net(name)
    if activation == "tanh":
        images /= 50  # else all units are saturated,
        params["fc8"]["kernel"] *= 50  # made for activations of that magnitude

    def loss() -> float:
        logits, _ = oracle.forward(params, images, name, True, masks, activation)
        return float(oracle.softmax_cross_entropy(logits, labels).mean())

    value, grads = oracle.loss_and_grads(params, images, labels, name, masks, activation)
    assert value == pytest.approx(loss(), rel=1e-12)
    for layer, leaves in params.items():
        for leaf, x in leaves.items():
            assert grads[layer][leaf].shape == x.shape
            scale = np.abs(grads[layer][leaf]).max()
            assert scale > 1e-5, (layer, leaf)
            for flat in rng(4).choice(x.size, 4, replace=False):
                index = np.unravel_index(flat, x.shape)
                error = abs(grads[layer][leaf][index] - slope(loss, x, index))
                assert error < 1e-6 * scale + 5e-11, (layer, leaf, index, error / scale)


@pytest.mark.parametrize("name", oracle.PRESETS)
def test_gradients_of_every_net_are_the_central_differences(name):
    check_net(name, "relu")


@pytest.mark.parametrize("name", ["paper", "source2012"])
def test_gradients_of_nets_of_tanh_units_are_the_central_differences(name):
    check_net(name, "tanh")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("paper", 60_965_224),
        ("source2012", 60_965_224),
        ("caffe_alexnet", 60_965_224),
        ("caffenet", 60_965_224),
        ("owt", 61_100_840),
        ("half", 59_798_312),
        ("conv6", 61_555_304),
    ],
)
def test_every_net_has_the_known_number_of_parameters(name, count):
    leaves = [shape for layer in oracle.shapes(name).values() for shape in layer.values()]
    assert sum(int(np.prod(shape)) for shape in leaves) == count


def test_activations_are_named_and_their_maps_have_the_sizes_of_the_arrays():
    params, images, _, _ = tiny_net("conv6")
    logits, named = oracle.forward(params, images, "conv6", train=False)
    assert {name: value.shape[1:] for name, value in named.items()} == {
        "conv1": (8, 8, 8), "pool1": (4, 4, 8), "conv2": (4, 4, 12), "pool2": (2, 2, 12),
        "conv3": (2, 2, 8), "conv4": (2, 2, 12), "conv5": (2, 2, 8), "pool5": (1, 1, 8),
        "conv6": (1, 1, 6), "fc6": (10,), "fc7": (9,), "fc8": (7,),
    }  # fmt: skip
    assert named["fc8"] is logits
    assert named["conv1"].min() < 0  # bare, whereas these have been through ReLU:
    assert min(named[name].min() for name in ("conv3", "pool5", "conv6", "fc6", "fc7")) >= 0


def test_dropout_halves_when_testing_in_one_rule_and_doubles_when_training_in_the_other():
    ones = np.ones(4)
    for name, training, testing in [("paper", 1.0, 0.5), ("owt", 2.0, 1.0)]:
        preset = oracle.get_preset(name)
        np.testing.assert_array_equal(oracle._dropout_factor(preset, True, ones), training * ones)
        assert oracle._dropout_factor(preset, False, None) == testing
        assert oracle._dropout_factor(preset, True, None) == 1.0


@pytest.mark.parametrize("name", ["caffenet", "owt"])
def test_a_dropped_unit_has_no_effect_and_a_kept_one_counts_twice(name):
    params, images, _, masks = tiny_net(name)
    masks["fc7"] = np.ones_like(masks["fc7"])
    masks["fc7"][:, 0] = 0
    logits, named = oracle.forward(params, images, name, True, masks)
    kept = 2 * named["fc6" if name == "owt" else "fc7"]
    kept[:, 0] = 0
    reader = params["fc7" if name == "owt" else "fc8"]
    after = kept @ reader["kernel"] + reader["bias"]
    np.testing.assert_allclose(
        np.maximum(after, 0) if name == "owt" else after,
        named["fc7"] if name == "owt" else logits,
        rtol=1e-12,
    )


def test_two_steps_of_the_update_are_those_computed_by_hand():
    params = {"fc8": {"kernel": np.array([[2.0]]), "bias": np.array([2.0])}}
    grads = {"fc8": {"kernel": np.array([[3.0]]), "bias": np.array([3.0])}}
    velocity = {"fc8": {"kernel": np.zeros((1, 1)), "bias": np.zeros(1)}}
    params, velocity = oracle.sgd_update(params, velocity, grads, 0.1)
    first = -0.0005 * 0.1 * 2 - 0.1 * 3
    assert params["fc8"]["kernel"][0, 0] == pytest.approx(2 + first)
    assert params["fc8"]["bias"][0] == pytest.approx(2 - 0.2 * 3)
    params, velocity = oracle.sgd_update(params, velocity, grads, 0.01)
    second = 0.9 * first - 0.0005 * 0.01 * (2 + first) - 0.01 * 3
    assert velocity["fc8"]["kernel"][0, 0] == pytest.approx(second)
    assert params["fc8"]["kernel"][0, 0] == pytest.approx(2 + first + second)
    assert velocity["fc8"]["bias"][0] == pytest.approx(-0.9 * 0.6 - 0.02 * 3)
