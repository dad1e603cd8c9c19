"""AlexNet's mathematics once more, in plain float64 numpy: the oracle of the tests.

Nothing here comes from the package or from an array library with gradients: every derivative is
written by hand. Images and maps are square and NHWC, convolution kernels HWIO, dense kernels
(in, out). Tower 0 is the first half of the channels everywhere. Widths and sizes follow the arrays
that are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

Array = np.ndarray
Params = dict[str, dict[str, Array]]
Padding = tuple[tuple[int, int], tuple[int, int]]

KERNEL_SIDE = {"conv1": 11, "conv2": 5, "conv3": 3, "conv4": 3, "conv5": 3, "conv6": 3}
GROUPED = ("conv2", "conv4", "conv5")  # a tower reads only itself here; elsewhere it reads both
POOLED = ("conv1", "conv2", "conv5")


# ---------------------------------------------------------------------------------- convolution


def _taps(
    window: tuple[int, int], stride: int, out: tuple[int, int]
) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
    """For every place (i, j) of a window, row by row: the pixels it meets, one an output place."""
    for i in range(window[0]):
        for j in range(window[1]):
            rows = slice(i, i + stride * (out[0] - 1) + 1, stride)
            columns = slice(j, j + stride * (out[1] - 1) + 1, stride)
            yield i, j, (slice(None), rows, columns)


def _groups(groups: int, channels_in: int, channels_out: int) -> Iterator[tuple[slice, slice]]:
    """The input and output channels of every group."""
    n, m = channels_in // groups, channels_out // groups
    for g in range(groups):
        yield slice(g * n, (g + 1) * n), slice(g * m, (g + 1) * m)


def _pad(x: Array, padding: Padding, value: float = 0.0) -> Array:
    return np.pad(x, ((0, 0), *padding, (0, 0)), constant_values=value)


def conv(
    x: Array, kernel: Array, bias: Array, stride: int, padding: Padding, groups: int = 1
) -> Array:
    """Cross-correlation of x (b, h, w, c) with kernel (kh, kw, c / groups, o), plus bias (o,)."""
    x = _pad(np.asarray(x, float), padding)
    window, channels_out = kernel.shape[:2], kernel.shape[3]
    out = tuple((n - k) // stride + 1 for n, k in zip(x.shape[1:3], window, strict=True))
    y = np.zeros((len(x), *out, channels_out)) + bias
    for i, j, tap in _taps(window, stride, out):
        for read, write in _groups(groups, x.shape[3], channels_out):
            y[..., write] += np.tensordot(x[tap][..., read], kernel[i, j][:, write], 1)
    return y


def conv_grad(
    x: Array, kernel: Array, dy: Array, stride: int, padding: Padding, groups: int = 1
) -> tuple[Array, Array, Array]:
    """The gradients (dx, dkernel, dbias) of sum(conv(x, kernel, bias) * dy)."""
    padded = _pad(np.asarray(x, float), padding)
    dpadded, dkernel = np.zeros(padded.shape), np.zeros(kernel.shape)
    places = ([0, 1, 2], [0, 1, 2])
    for i, j, tap in _taps(kernel.shape[:2], stride, dy.shape[1:3]):
        for read, write in _groups(groups, padded.shape[3], kernel.shape[3]):
            dkernel[i, j][:, write] = np.tensordot(padded[tap][..., read], dy[..., write], places)
            dpadded[tap][..., read] += np.tensordot(dy[..., write], kernel[i, j][:, write].T, 1)
    (top, _), (left, _) = padding
    dx = dpadded[:, top : top + x.shape[1], left : left + x.shape[2]]
    return dx, dkernel, dy.sum((0, 1, 2))


# -------------------------------------------------------------------------------------- pooling


def pooled_side(side: int, window: int, stride: int) -> int:
    """ceil((side - window) / stride) + 1: the last window may overhang the map."""
    if stride > window:
        raise ValueError(f"stride {stride} above window {window} could put a window off the map")
    return -(-(side - window) // stride) + 1


def _overhung(x: Array, window: int, stride: int) -> tuple[Array, tuple[int, int]]:
    """x with -inf where windows overhang it, which clips them; and the size of the pooled map."""
    out = tuple(pooled_side(n, window, stride) for n in x.shape[1:3])
    reach = [stride * (m - 1) + window for m in out]
    extra = [(0, max(0, r - n)) for r, n in zip(reach, x.shape[1:3], strict=True)]
    return _pad(np.asarray(x, float), tuple(extra), -np.inf), out


def max_pool(x: Array, window: int, stride: int) -> Array:
    """The maximum over square windows; those overhanging the right or bottom edge are clipped."""
    padded, out = _overhung(x, window, stride)
    return np.max([padded[tap] for _, _, tap in _taps((window, window), stride, out)], axis=0)


def max_pool_grad(x: Array, dy: Array, window: int, stride: int) -> Array:
    """dx; of several equal maxima the first in row-major order gets the whole gradient."""
    padded, out = _overhung(x, window, stride)
    y, dpadded = max_pool(x, window, stride), np.zeros(padded.shape)
    given = np.zeros(y.shape, bool)
    for _, _, tap in _taps((window, window), stride, out):
        first = (padded[tap] == y) & ~given
        dpadded[tap] += np.where(first, dy, 0)
        given |= first
    return dpadded[:, : x.shape[1], : x.shape[2]]


# ------------------------------------------------------------------------ response normalisation


def _window_sum(x: Array, size: int, axis: int) -> Array:
    """At every i the sum of x over [i - size // 2, i + size // 2] along axis, clipped."""
    x = np.moveaxis(x, axis, 0)
    reach = size // 2
    total = [x[max(0, i - reach) : i + reach + 1].sum(0) for i in range(len(x))]
    return np.moveaxis(np.array(total), 0, axis)


def _channel_sum(x: Array, size: int, groups: int) -> Array:
    """The window sum over channels, with no window reaching from one group into another."""
    towers = x.reshape(*x.shape[:-1], groups, -1)
    return _window_sum(towers, size, -1).reshape(x.shape)


def _map_sum(x: Array, size: int) -> Array:
    """The window sum over the size x size neighbourhood within every map."""
    return _window_sum(_window_sum(x, size, 1), size, 2)


def lrn(x: Array, size: int, k: float, alpha: float, beta: float, groups: int = 1) -> Array:
    """x * (k + alpha * sum of x^2 over `size` neighbouring channels of the group) ** -beta."""
    return x * (k + alpha * _channel_sum(x**2, size, groups)) ** -beta


def lrn_grad(
    x: Array, dy: Array, size: int, k: float, alpha: float, beta: float, groups: int = 1
) -> Array:
    """dx: each x counts by itself and through the denominators of all that have it in reach."""
    scale = k + alpha * _channel_sum(x**2, size, groups)
    through = _channel_sum(dy * x * scale ** (-beta - 1), size, groups)
    return dy * scale**-beta - 2 * alpha * beta * x * through


def spatial_lrn(x: Array, size: int, k: float, alpha: float, beta: float) -> Array:
    """x * (k + alpha * sum of x^2 over the size x size neighbours in the same map) ** -beta."""
    return x * (k + alpha * _map_sum(x**2, size)) ** -beta


def spatial_lrn_grad(x: Array, dy: Array, size: int, k: float, alpha: float, beta: float) -> Array:
    """dx, as in `lrn_grad` with neighbours in the plane."""
    scale = k + alpha * _map_sum(x**2, size)
    through = _map_sum(dy * x * scale ** (-beta - 1), size)
    return dy * scale**-beta - 2 * alpha * beta * x * through


# ---------------------------------------------------------------------------- activation and loss


def activate(x: Array, activation: str) -> Array:
    """ReLU or tanh."""
    return np.tanh(x) if activation == "tanh" else np.maximum(x, 0)


def activate_grad(x: Array, dy: Array, activation: str) -> Array:
    """dx; the slope of ReLU at 0 is 0."""
    return dy * (1 - np.tanh(x) ** 2 if activation == "tanh" else x > 0)


def log_softmax(logits: Array) -> Array:
    """Log probabilities (b, classes)."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def softmax_cross_entropy(logits: Array, labels: Array) -> Array:
    """The loss (b,) of every example; labels (b,) are class numbers."""
    return -log_softmax(logits)[np.arange(len(labels)), labels]


def softmax_cross_entropy_grad(logits: Array, labels: Array) -> Array:
    """The gradient (b, classes) of the sum of the losses."""
    return np.exp(log_softmax(logits)) - np.eye(logits.shape[-1])[labels]


# -------------------------------------------------------------------------------------- presets


@dataclass(frozen=True)
class Preset:
    """All that tells one AlexNet from another; what is written here is the paper's.

    `order` says what follows a convolution; where it is silent only the activation does.
    """

    input_size: int = 224
    widths: Mapping[str, int] = field(
        default_factory=lambda: {
            "conv1": 96, "conv2": 256, "conv3": 384, "conv4": 384, "conv5": 256,
            "fc6": 4096, "fc7": 4096,
        }
    )  # fmt: skip
    towers: int = 2
    conv1_padding: int | None = None  # None: nothing but the overhang that completes a last window
    padding: Mapping[str, int] = field(
        default_factory=lambda: {"conv2": 2, "conv3": 1, "conv4": 1, "conv5": 1, "conv6": 1}
    )
    order: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "conv1": ("activate", "lrn", "pool"),
            "conv2": ("activate", "lrn", "pool"),
            "conv5": ("activate", "pool"),
        }
    )
    pool: tuple[int, int] = (3, 2)  # window, stride
    # size, k, alpha as it multiplies the sum, beta
    lrn: tuple[int, float, float, float] = (5, 2.0, 1e-4, 0.75)
    lrn_groups: int = 2
    spatial_lrn: tuple[int, float, float, float] = (5, 1.0, 4e-5, 0.75)
    dropout_rate: float = 0.5
    # "test_scaling": testing multiplies by 1 - rate; "inverted": training divides by it instead
    dropout: str = "test_scaling"
    dropout_at: str = "output"  # of fc6 and fc7, or their "input"
    bias_rate_factor: float = 2.0
    without: tuple[str, ...] = ()  # layers left out; a convolution's pool stays

    @property
    def convs(self) -> tuple[str, ...]:
        """The names of the convolutional layers, in order, those left out among them."""
        return tuple(name for name in KERNEL_SIDE if name in self.widths)

    @property
    def dense(self) -> tuple[str, ...]:
        """The names of the fully connected layers before the last, in order."""
        return tuple(name for name in ("fc6", "fc7") if name not in self.without)


PAPER = Preset()
CAFFE = replace(
    PAPER,
    input_size=227,
    lrn=(5, 1.0, 1e-4 / 5, 0.75),
    lrn_groups=1,
    dropout="inverted",
)
PRESETS = {
    "paper": PAPER,
    "source2012": replace(
        PAPER,
        order={
            "conv1": ("lrn", "pool", "activate"),
            "conv2": ("activate", "lrn", "spatial_lrn", "pool"),
            "conv5": ("pool", "activate"),
        },
        lrn=(5, 2.0, 1e-4 / 5, 0.75),
    ),
    "caffe_alexnet": CAFFE,
    "caffenet": replace(
        CAFFE,
        order={
            "conv1": ("activate", "pool", "lrn"),
            "conv2": ("activate", "pool", "lrn"),
            "conv5": ("activate", "pool"),
        },
    ),
    "owt": replace(
        PAPER,
        widths=dict(PAPER.widths, conv1=64, conv2=192, conv3=384, conv4=256, conv5=256),
        towers=1,
        conv1_padding=2,
        order=dict.fromkeys(POOLED, ("activate", "pool")),
        dropout="inverted",
        dropout_at="input",
        bias_rate_factor=1.0,
    ),
    "half": replace(
        PAPER,
        widths=dict(PAPER.widths, conv1=48, conv2=128, conv3=192, conv4=192, conv5=256),
        towers=1,
        lrn_groups=1,
    ),
    "conv6": replace(PAPER, widths=dict(PAPER.widths, conv6=256)),
}


def get_preset(preset: str | Preset) -> Preset:
    """A preset by its name; one made with `dataclasses.replace` goes through as it is."""
    return PRESETS[preset] if isinstance(preset, str) else preset


def conv_padding(preset: Preset, layer: str, side: int) -> Padding:
    """The padding of a layer on a square map of this side."""
    if layer != "conv1":
        edges = (preset.padding[layer],) * 2
    elif preset.conv1_padding is None:
        edges = (0, -(side - KERNEL_SIDE["conv1"]) % 4)
    else:
        edges = (preset.conv1_padding,) * 2
    return edges, edges


def shapes(
    preset: str | Preset,
    input_size: int | None = None,
    widths: Mapping[str, int] | None = None,
    classes: int = 1000,
) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shape of every parameter; `widths` overrides those of the preset by layer."""
    preset = get_preset(preset)
    widths = {**preset.widths, **(widths or {}), "fc8": classes}
    side, channels, kernels = input_size or preset.input_size, 3, {}
    for layer in preset.convs:
        if layer not in preset.without:
            k, groups = KERNEL_SIDE[layer], preset.towers if layer in GROUPED else 1
            kernels[layer] = (k, k, channels // groups, widths[layer])
            side += sum(conv_padding(preset, layer, side)[0]) - k
            side = side // (4 if layer == "conv1" else 1) + 1
            channels = widths[layer]
        if "pool" in preset.order.get(layer, ()):
            side = pooled_side(side, *preset.pool)
    if side < 1:
        raise ValueError("the input is too small: its last map would be empty")
    inputs = side * side * channels
    for layer in (*preset.dense, "fc8"):
        kernels[layer] = (inputs, widths[layer])
        inputs = widths[layer]
    return {layer: {"kernel": k, "bias": k[-1:]} for layer, k in kernels.items()}


def random_params(
    rng: np.random.Generator,
    preset: str | Preset,
    input_size: int | None = None,
    widths: Mapping[str, int] | None = None,
    classes: int = 1000,
) -> Params:
    """Parameters that test well: they keep the input's magnitude, and shrink it to 1 at the logits.

    With images of magnitude 50 LRN's denominators vary about as much as on photographs.
    """
    params = {}
    for layer, shape in shapes(preset, input_size, widths, classes).items():
        fan_in = int(np.prod(shape["kernel"][:-1]))
        std = (0.02 if layer == "fc8" else 1.0) * np.sqrt(2 / fan_in)
        params[layer] = {
            "kernel": std * rng.standard_normal(shape["kernel"]),
            "bias": rng.standard_normal(shape["bias"]),
        }
    return params


# -------------------------------------------------------------------------------------- the net


def steps(preset: Preset) -> list[tuple[str, str]]:
    """The net as a chain of (operation, layer)."""
    chain = []
    for layer in preset.convs:
        there = layer not in preset.without
        chain += [("conv", layer)] if there else []
        order = preset.order.get(layer, ("activate",))
        chain += [(op, layer) for op in order if there or op == "pool"]
    chain += [("flatten", "fc6")]
    for layer in preset.dense:
        dense = [("dense", layer), ("activate", layer)]
        dropout = [("dropout", layer)]
        chain += dropout + dense if preset.dropout_at == "input" else dense + dropout
    return [*chain, ("dense", "fc8")]


@dataclass
class Net:
    """What the steps need beside their input. `keep` holds dropout's factors at fc6 and fc7."""

    preset: Preset
    params: Params
    keep: dict[str, Array | float]
    activation: str

    def _conv_options(self, layer: str, side: int) -> tuple[int, Padding, int]:
        groups = self.preset.towers if layer in GROUPED else 1
        return 4 if layer == "conv1" else 1, conv_padding(self.preset, layer, side), groups

    def apply(self, op: str, layer: str, x: Array) -> Array:
        """The output of one step."""
        preset = self.preset
        match op:
            case "conv":
                options = self._conv_options(layer, x.shape[1])
                return conv(x, self.params[layer]["kernel"], self.params[layer]["bias"], *options)
            case "dense":
                return x @ self.params[layer]["kernel"] + self.params[layer]["bias"]
            case "activate":
                return activate(x, self.activation)
            case "lrn":
                return lrn(x, *preset.lrn, preset.lrn_groups)
            case "spatial_lrn":
                return spatial_lrn(x, *preset.spatial_lrn)
            case "pool":
                return max_pool(x, *preset.pool)
            case "dropout":
                return x * self.keep[layer]
            case "flatten":  # rows, then columns, then the channels of both towers
                return x.reshape(len(x), -1)
        raise ValueError(f"no such operation: {op}")

    def back(self, op: str, layer: str, x: Array, dy: Array, grads: Params) -> Array:
        """The gradient at the step's input x; that of its parameters goes into `grads`."""
        preset = self.preset
        match op:
            case "conv":
                options = self._conv_options(layer, x.shape[1])
                dx, dkernel, dbias = conv_grad(x, self.params[layer]["kernel"], dy, *options)
                grads[layer] = {"kernel": dkernel, "bias": dbias}
                return dx
            case "dense":
                grads[layer] = {"kernel": x.T @ dy, "bias": dy.sum(0)}
                return dy @ self.params[layer]["kernel"].T
            case "activate":
                return activate_grad(x, dy, self.activation)
            case "lrn":
                return lrn_grad(x, dy, *preset.lrn, preset.lrn_groups)
            case "spatial_lrn":
                return spatial_lrn_grad(x, dy, *preset.spatial_lrn)
            case "pool":
                return max_pool_grad(x, dy, *preset.pool)
            case "dropout":
                return dy * self.keep[layer]
            case "flatten":
                return dy.reshape(x.shape)
        raise ValueError(f"no such operation: {op}")


def _dropout_factor(preset: Preset, train: bool, mask: Array | None) -> Array | float:
    """What dropout multiplies by. Training without a mask means training without dropout."""
    keep = 1 - preset.dropout_rate
    if not train:
        return keep if preset.dropout == "test_scaling" else 1.0
    if mask is None:
        return 1.0
    return np.asarray(mask, float) / (1 if preset.dropout == "test_scaling" else keep)


def _net(
    params: Params,
    preset: str | Preset,
    train: bool,
    masks: Mapping[str, Array] | None,
    activation: str,
) -> Net:
    preset = get_preset(preset)
    params = {
        layer: {name: np.asarray(value, float) for name, value in leaves.items()}
        for layer, leaves in params.items()
    }
    factors = {
        layer: _dropout_factor(preset, train, (masks or {}).get(layer)) for layer in ("fc6", "fc7")
    }
    return Net(preset, params, factors, activation)


def forward(
    params: Params,
    images: Array,
    preset: str | Preset,
    train: bool,
    masks: Mapping[str, Array] | None = None,
    activation: str = "relu",
) -> tuple[Array, dict[str, Array]]:
    """Logits (b, classes) of images (b, h, w, 3), and the activations by name.

    "conv1", "conv2" and "conv5" are the bare convolutions, "pool1", "pool2" and "pool5" what comes
    of them in the end, whichever operation is last. "conv3", "conv4", "conv6", "fc6" and "fc7" are
    taken after the activation and before dropout; "fc8" is the logits.
    """
    net = _net(params, preset, train, masks, activation)
    x, named = np.asarray(images, float), {}
    for op, layer in steps(net.preset):
        x = net.apply(op, layer, x)
        if op not in ("flatten", "dropout"):
            inside = layer in POOLED and op != "conv"
            named[f"pool{layer[-1]}" if inside else layer] = x  # the last step's value stays
    return x, named


def loss_and_grads(
    params: Params,
    images: Array,
    labels: Array,
    preset: str | Preset,
    masks: Mapping[str, Array] | None = None,
    activation: str = "relu",
) -> tuple[float, Params]:
    """The mean loss of a training batch and its gradient, in the structure of `params`."""
    net = _net(params, preset, True, masks, activation)
    x, chain, inputs = np.asarray(images, float), steps(net.preset), []
    for op, layer in chain:
        inputs.append(x)
        x = net.apply(op, layer, x)
    loss = softmax_cross_entropy(x, labels).mean()
    grads: Params = {}
    dx = softmax_cross_entropy_grad(x, labels) / len(x)
    for (op, layer), x in zip(reversed(chain), reversed(inputs), strict=True):
        dx = net.back(op, layer, x, dx, grads)
    return float(loss), {layer: grads[layer] for layer in params}


# ------------------------------------------------------------------------------------ the update


def sgd_update(
    params: Params,
    velocity: Params,
    grads: Params,
    learning_rate: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0005,
    bias_rate_factor: float = 2.0,
) -> tuple[Params, Params]:
    """v = momentum * v - decay * rate * w - rate * g, then w + v; biases do not decay.

    The rate acts inside the velocity, so an old step keeps the rate it was taken with.
    """
    new_params: Params = {layer: {} for layer in params}
    new_velocity: Params = {layer: {} for layer in params}
    for layer, leaves in params.items():
        for name, w in leaves.items():
            rate = learning_rate * (bias_rate_factor if name == "bias" else 1.0)
            decay = 0.0 if name == "bias" else weight_decay
            v = momentum * velocity[layer][name] - decay * rate * w - rate * grads[layer][name]
            new_velocity[layer][name], new_params[layer][name] = v, w + v
    return new_params, new_velocity
