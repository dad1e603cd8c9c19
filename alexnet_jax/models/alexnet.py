"""The two towers, written once, from the point of view of one device.

A device owns `towers // shards` of the towers. Everything is local but `exchange`, which is the
identity where one device owns both and an all-gather over the mesh axis where it does not. It is
called where the paper's GPUs talk (figure 2): before conv3, fc6, fc7 and fc8; and once more for
the logits, whose classes are split over the towers too.

Parameters are global arrays of the natural shapes, tower 0 first on the last axis. A device's
share of each is a contiguous half of that axis; so a checkpoint knows nothing of the split.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from alexnet_jax import ops
from alexnet_jax.config import LAYERS, Model, UserError

SPATIAL_LRN = {"size": 5, "k": 1.0, "alpha": 4e-5, "beta": 0.75}  # layers-145.cfg, rnorm2's second

INITIAL_STREAM = 1 << 40  # of random numbers, beside those of data and dropout


class Layer(NamedTuple):
    """One weight layer, both towers together."""

    name: str
    kernel: tuple[int, ...]  # (kh, kw, i, o) or (i, o)
    groups: int  # 2 where the towers do not see each other
    stride: int
    padding: ops.Padding
    output: tuple[int, ...]  # (h, w, o) or (o,), before any pool
    stage_output: tuple[int, ...]  # the same behind the pool, where one follows

    @property
    def parameters(self) -> int:
        return math.prod(self.kernel) + self.kernel[-1]

    @property
    def multiply_adds(self) -> int:
        """Per image; windows that overhang an edge count in full."""
        return math.prod(self.kernel) * math.prod(self.output[:-1])


class Dropout(NamedTuple):
    """What a training step's dropout masks depend on."""

    key: Array  # of the run's seed and the step
    rows: Array  # (b,) int32, the images' places in the global batch


def layers(config: Model, num_classes: int) -> tuple[Layer, ...]:
    """The net's weight layers, in order, with every shape.

    Raises:
      UserError: the input is so small that a map would shrink below 1.
    """
    shapes = _layers(config, num_classes)
    if shapes is None:
        least = next(s for s in range(1, 4096) if _layers(config, num_classes, s) is not None)
        raise UserError(
            f"model.input_size={config.input_size}: a map would shrink below 1 pixel; "
            f"the least input is {least}: set --config.model.input_size={least} or more"
        )
    return shapes


def _layers(config: Model, num_classes: int, size: int = 0) -> tuple[Layer, ...] | None:
    towers = config.towers
    pools: dict[str, tuple[int, int]] = dict(
        zip(("conv1", "conv2", "conv5"), zip(config.pool_windows, config.pool_strides))
    )
    stages = {"conv1": config.after_conv1, "conv2": config.after_conv2, "conv5": config.after_conv5}
    channels = [_scaled(c, config.width, towers) for c in config.channels]
    features = [_scaled(f, config.width, towers) for f in config.features]
    size = size or config.input_size
    found: list[Layer] = []

    def add(name: str, inputs: int, outputs: int, window: int, stride: int, pad: int, groups: int):
        nonlocal size
        # conv1 without padding overhangs right and bottom, so that no pixel is lost.
        overhang = (window - size) % stride if name == "conv1" and pad == 0 else 0
        ends = (pad, pad + overhang)
        kernel = (window, window, inputs // groups, outputs)
        out = (size + sum(ends) - window) // stride + 1
        size = ops.pooled_size(out, *pools[name]) if "pool" in stages.get(name, ()) else out
        maps = (out, out, outputs), (size, size, outputs)
        found.append(Layer(name, kernel, groups, stride, (ends, ends), *maps))

    c1, c2, c3, c4, c5 = channels
    p1, p2, p3, p4, p5 = config.paddings
    add("conv1", 3, c1, 11, 4, p1, 1)
    add("conv2", c1, c2, 5, 1, p2, towers)
    add("conv3", c2, c3, 3, 1, p3, 1)
    add("conv4", c3, c4, 3, 1, p4, towers)
    add("conv5", c4, c5, 3, 1, p5, towers)
    if config.conv6:
        add("conv6", c5, c5, 3, 1, 1, 1)
    if any(extent < 1 for layer in found for extent in (*layer.output, *layer.stage_output)):
        return None
    width = math.prod(found[-1].stage_output)
    for name, outputs in zip(("fc6", "fc7", "fc8"), (*features, num_classes)):
        found.append(Layer(name, (width, outputs), 1, 1, ((0, 0), (0, 0)), (outputs,), (outputs,)))
        width = outputs
    return tuple(found)


def _scaled(count: int, width: float, towers: int) -> int:
    """`count` times the width, a whole number for each tower."""
    return max(1, round(count * width / towers)) * towers


Parameters = Callable[[Layer], tuple[Any, Any]]  # a layer's kernel and bias


def initial_parameters(config: Model, seed: int) -> Parameters:
    """The preset's random parameters of a layer, float32, in their natural shapes.

    Drawn on the host, so that they depend on the seed and the layer alone, on any platform.
    """

    def draw(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
        place = LAYERS.index("conv5" if layer.name == "conv6" else layer.name)
        stream = INITIAL_STREAM + (*LAYERS, "conv6").index(layer.name)
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))
        if config.init == "uniform":
            bound = 1 / math.sqrt(math.prod(layer.kernel[:-1]))
            sizes = (layer.kernel, layer.kernel[-1:])
            kernel, bias = (
                2 * bound * rng.random(s, np.float32) - np.float32(bound) for s in sizes
            )
            return kernel, bias
        # A narrower net keeps the size of its signals; conv1 reads the same pixels at any width.
        spread = 1.0 if layer.name == "conv1" else math.sqrt(config.width)
        std = np.float32(config.weight_std[place] / spread)
        kernel = std * rng.standard_normal(layer.kernel, np.float32)
        return kernel, np.full(layer.kernel[-1:], config.bias[place], np.float32)

    return draw


def zero_parameters(shards: int) -> Parameters:
    """Zeros in the shapes of one device's share."""

    def zeros(layer: Layer) -> tuple[Array, Array]:
        outputs = -(-layer.kernel[-1] // shards)
        return jnp.zeros((*layer.kernel[:-1], outputs)), jnp.zeros(outputs)

    return zeros


class Affine(nnx.Module):
    """A convolution or a fully connected layer, or one device's share of its output."""

    def __init__(self, layer: Layer, parameters: Parameters, shards: int):
        kernel, bias = parameters(layer)
        self.kernel = nnx.Param(jnp.asarray(kernel))
        self.bias = nnx.Param(jnp.asarray(bias))
        self.groups = layer.groups // shards if layer.groups > 1 else 1
        self.stride = layer.stride
        self.padding = layer.padding

    def __call__(self, x: Array) -> Array:
        """(b, h, w, i) or (b, i) -> (b, h', w', o) or (b, o), of x's dtype."""
        kernel, bias = self.kernel[...], self.bias[...].astype(x.dtype)
        if x.ndim == 2:
            return x @ kernel.astype(x.dtype) + bias
        options: dict[str, Any] = {"stride": self.stride, "padding": self.padding}
        return ops.conv(x, kernel, groups=self.groups, **options) + bias


class AlexNet(nnx.Module):
    """AlexNet on one device of `shards`.

    Args:
      config: the net.
      num_classes: columns of fc8.
      parameters: gives each layer's kernel and bias.
      shards: devices the towers are split over, 1 or 2.
      axis_name: the mesh axis of those devices; None where there is one.

    Shapes in the comments are those of preset `paper`, c/n standing for c on n shards.
    """

    conv1: Affine
    conv2: Affine
    conv3: Affine
    conv4: Affine
    conv5: Affine
    conv6: Affine  # preset conv6 only
    fc6: Affine
    fc7: Affine
    fc8: Affine

    def __init__(
        self,
        config: Model,
        num_classes: int,
        parameters: Parameters,
        shards: int = 1,
        axis_name: str | None = None,
    ):
        self.config = config
        self.num_classes = num_classes
        self.shards = shards
        self.axis_name = axis_name
        for layer in layers(config, num_classes):
            setattr(self, layer.name, Affine(layer, parameters, shards))

    def __call__(self, images: Array, dropout: Dropout | None = None) -> Array:
        """Logits of images.

        Args:
          images: (b, s, s, 3) float32, mean subtracted.
          dropout: while training; None when evaluating.

        Returns:
          (b, num_classes) of the compute dtype, all classes on every device.
        """
        *_, (_, logits) = self.outputs(images, dropout)
        return logits

    def outputs(self, images: Array, dropout: Dropout | None) -> Iterator[tuple[str, Array]]:
        """Each layer's name and output, this device's share; of fc8 the logits of all classes.

        An output is what the next layer reads, before any exchange: behind activation, response
        normalisation, pool and dropout.
        """
        config = self.config
        x = images.astype(config.dtype)  # (b, 224, 224, 3)
        x = self.stage(self.conv1(x), config.after_conv1, 0)  # (b, 27, 27, 96/n)
        yield "conv1", x
        x = self.stage(self.conv2(x), config.after_conv2, 1)  # (b, 13, 13, 256/n)
        yield "conv2", x
        x = self.exchange(x)  # (b, 13, 13, 256)
        x = self.activation(self.conv3(x))  # (b, 13, 13, 384/n)
        yield "conv3", x
        x = self.activation(self.conv4(x))  # (b, 13, 13, 384/n)
        yield "conv4", x
        x = self.stage(self.conv5(x), config.after_conv5, 2)  # (b, 6, 6, 256/n)
        yield "conv5", x
        if config.conv6:
            x = self.activation(self.conv6(self.exchange(x)))  # (b, 6, 6, 256/n)
            yield "conv6", x
        x = self.drop(x, "pool5", dropout)
        x = self.exchange(x).reshape(x.shape[0], -1)  # (b, 9216)
        x = self.drop(self.activation(self.fc6(x)), "fc6", dropout)  # (b, 4096/n)
        yield "fc6", x
        x = self.exchange(x)  # (b, 4096)
        x = self.drop(self.activation(self.fc7(x)), "fc7", dropout)  # (b, 4096/n)
        yield "fc7", x
        x = self.exchange(x)  # (b, 4096)
        x = self.exchange(self.fc8(x))  # (b, 1000)
        yield "fc8", x[:, : self.num_classes]  # less the column that evens out an odd count

    def exchange(self, x: Array) -> Array:
        """Both towers' maps or units from this device's: (..., c/n) -> (..., c), tower 0 first."""
        if self.axis_name is None:
            return x
        return lax.all_gather(x, self.axis_name, axis=x.ndim - 1, tiled=True)

    def activation(self, x: Array) -> Array:
        return jnp.tanh(x) if self.config.activation == "tanh" else jax.nn.relu(x)

    def stage(self, x: Array, steps: tuple[str, ...], pool: int) -> Array:
        """What follows a convolution, in the preset's order: (b, h, w, c) -> (b, h', w', c)."""
        config = self.config
        for step in steps:
            if step == "activation":
                x = self.activation(x)
            elif step == "pool":
                x = ops.max_pool(x, config.pool_windows[pool], config.pool_strides[pool])
            elif config.lrn and step == "spatial_lrn":
                x = ops.spatial_response_norm(x, **SPATIAL_LRN)
            elif config.lrn:
                x = ops.local_response_norm(
                    x,
                    size=config.lrn_size,
                    k=config.lrn_k,
                    alpha=config.lrn_alpha,
                    beta=config.lrn_beta,
                    groups=1 if config.lrn_across_towers else config.towers // self.shards,
                )
        return x

    def drop(self, x: Array, place: str, dropout: Dropout | None) -> Array:
        """Dropout on (b, ..., c/n), where the preset drops at `place`; paper, section 4.2."""
        config = self.config
        if place not in config.dropout_after:
            return x
        keep = None
        if dropout is not None:
            local = config.towers // self.shards
            first = 0 if self.axis_name is None else lax.axis_index(self.axis_name) * local
            keep = ops.keep_mask(
                dropout.key,
                dropout.rows,
                layer=("pool5", "fc6", "fc7").index(place),
                towers=first + jnp.arange(local),
                shape=(*x.shape[1:-1], x.shape[-1] // local),
                rate=config.dropout_rate,
            )
        return ops.dropout(x, keep, config.dropout_rate, config.dropout_rule)
