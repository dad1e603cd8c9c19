"""The two towers, written once, from the point of view of one device.

A device owns `towers // shards` of the towers. Everything is local but `exchange`, which is the
identity where one device owns both and an all-gather over the mesh axis where it does not. It is
called where the paper's GPUs communicate (figure 2): before conv3, fc6, fc7 and fc8 (and conv6, in
the preset that has it); and once more for the logits, whose classes are split over the towers too.

Parameters are global arrays of the natural shapes, tower 0 first on the last axis. A device's
share of each is a contiguous part of that axis, so checkpoints do not depend on the split.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from alexnet_jax import ops
from alexnet_jax.config import Model
from alexnet_jax.models.layers import Affine, Dropout, Layer, connected, scaled

SPATIAL_LRN = {"size": 5, "k": 1.0, "alpha": 4e-5, "beta": 0.75}  # layers-145.cfg, after rnorm2
POOLED: tuple[str, ...] = ("conv1", "conv2", "conv5")
RELU_LRN_POOL = ("activation", "lrn", "pool")  # the paper's order


def shapes(config: Model, num_classes: int, size: int) -> tuple[Layer, ...]:
    """The net's weight layers for an input of `size` pixels a side, in order, with every shape."""
    towers = config.towers
    pools = dict(zip(POOLED, zip(config.pool_windows, config.pool_strides)))
    channels = [scaled(count, config.width, towers) for count in config.channels]
    features = [scaled(count, config.width, towers) for count in config.features]
    # name, outputs, window, stride, padding, groups
    convolutions = [
        ("conv1", channels[0], 11, 4, config.paddings[0], 1),
        ("conv2", channels[1], 5, 1, config.paddings[1], towers),
        ("conv3", channels[2], 3, 1, config.paddings[2], 1),
        ("conv4", channels[3], 3, 1, config.paddings[3], towers),
        ("conv5", channels[4], 3, 1, config.paddings[4], towers),
        ("conv6", channels[4], 3, 1, 1, 1),
    ][: 6 if config.conv6 else 5]
    found: list[Layer] = []
    inputs = 3

    def pooled(size: int) -> int:
        return ops.pooled_size(size, *pools[name]) if "pool" in steps_after(config, name) else size

    for name, outputs, window, stride, pad, groups in convolutions:
        if name in config.without:
            size = pooled(size)
            continue
        # conv1 without padding overhangs right and bottom, so that no pixel is lost.
        overhang = (window - size) % stride if name == "conv1" and pad == 0 else 0
        ends = (pad, pad + overhang)
        out = (size + sum(ends) - window) // stride + 1
        size = pooled(out)
        kernel = (window, window, inputs // groups, outputs)
        maps = (out, out, outputs), (size, size, outputs)
        found.append(Layer(name, kernel, groups, stride, (ends, ends), *maps))
        inputs = outputs
    inputs *= size * size
    for name, outputs in zip(("fc6", "fc7", "fc8"), (*features, num_classes)):
        if name not in config.without:
            found.append(connected(name, inputs, outputs))
            inputs = outputs
    return tuple(found)


def steps_after(config: Model, name: str) -> tuple[str, ...]:
    """The steps after a convolution, in the preset's order; a layer left out keeps its pool."""
    steps = {"conv1": config.after_conv1, "conv2": config.after_conv2, "conv5": config.after_conv5}
    found = steps.get(name, ("activation",))
    return tuple(step for step in found if step == "pool" or name not in config.without)


class AlexNet(nnx.Module):
    """AlexNet on one device of `shards`.

    Args:
      config: the net.
      num_classes: columns of fc8.
      shards: devices along the mesh axis `model`, over which the towers are split: 1 or 2.

    Shapes in the comments are those of preset `paper`, c/n a device's share of c maps or
    units, n being `shards`.
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

    def __init__(self, config: Model, num_classes: int, shards: int):
        self.config = config
        self.num_classes = num_classes
        self.shards = shards
        for layer in shapes(config, num_classes, config.input_size):
            setattr(self, layer.name, Affine(layer, shards))

    def outputs(self, images: Array, dropout: Dropout | None) -> Iterator[tuple[str, Array]]:
        """Each layer's name and output, this device's share; of fc8 the logits of all classes.

        An output is what the next layer reads, before any exchange: after activation, response
        normalisation and pool, for fc6 and fc7 also after dropout (dropout at pool5 comes later).

        Args:
          images: (b, s, s, 3) float32, mean subtracted.
          dropout: while training; None when evaluating.

        Yields:
          (b, h, w, c/n) or (b, c/n), and for fc8 (b, num_classes), of the compute dtype.
        """
        x = images.astype(self.config.dtype)  # (b, 224, 224, 3)
        x = self.convolution("conv1", x)  # (b, 27, 27, 96/n)
        yield "conv1", x
        x = self.convolution("conv2", x)  # (b, 13, 13, 256/n)
        yield "conv2", x
        x = self.convolution("conv3", x, both=True)  # (b, 13, 13, 384/n)
        yield "conv3", x
        x = self.convolution("conv4", x)  # (b, 13, 13, 384/n)
        yield "conv4", x
        x = self.convolution("conv5", x)  # (b, 6, 6, 256/n)
        yield "conv5", x
        if self.config.conv6:
            x = self.convolution("conv6", x, both=True)  # (b, 6, 6, 256/n)
            yield "conv6", x
        x = self.drop(x, "pool5", dropout)
        x = self.connected("fc6", x, dropout)  # (b, 4096/n)
        yield "fc6", x
        x = self.connected("fc7", x, dropout)  # (b, 4096/n)
        yield "fc7", x
        x = self.exchange(x).reshape(x.shape[0], -1)  # (b, 4096), maps without fc6, fc7
        x = self.exchange(self.fc8(x))  # (b, 1000)
        yield "fc8", x[:, : self.num_classes]  # without the column that pads an odd count

    def convolution(self, name: str, x: Array, both: bool = False) -> Array:
        """A convolution of this tower's maps, or `both` towers', and what follows it.

        (b, h, w, c/n) -> (b, h', w', c'/n). A layer left out passes its input on, pooled.
        """
        local = self.config.towers // self.shards
        if name in self.config.without:
            return self.stage(x, name, local)
        layer: Affine = getattr(self, name)
        x = self.exchange(x) if both else x
        # At once if there is one group here (the layer reads both towers, or one is elsewhere), if
        # the LRN after it reads both, or if the platform computes groups at once.
        if layer.groups == 1 or self.config.normalises_across or ops.groups_at_once(x):
            return self.stage(layer(x), name, local)
        # Tower by tower. Where the next layer splits what is joined here, XLA drops both steps, and
        # no array holds both towers until a layer reads both.
        return jnp.concatenate([self.stage(part, name, 1) for part in layer.apart(x)], axis=-1)

    def connected(self, name: str, x: Array, dropout: Dropout | None) -> Array:
        """A fully connected layer over both towers: (b, ..., c/n) -> (b, c'/n).

        A layer left out passes its input on.
        """
        if name in self.config.without:
            return x
        layer = getattr(self, name)
        x = layer(self.exchange(x).reshape(x.shape[0], -1))
        return self.drop(self.activation(x), name, dropout)

    def exchange(self, x: Array) -> Array:
        """Both towers' maps or units from this device's: (..., c/n) -> (..., c), tower 0 first.

        Differentiated, the all-gather becomes a reduce-scatter: each device has the gradient of its
        own use of both towers' maps, and a map's owner gets the sum of the two.
        """
        if self.shards == 1:
            return x
        return lax.all_gather(x, "model", axis=x.ndim - 1, tiled=True)

    def activation(self, x: Array) -> Array:
        return ops.activation(x, self.config.activation)

    def stage(self, x: Array, name: str, towers: int) -> Array:
        """The steps after convolution `name`, on x's towers: (b, h, w, c) -> (b, h', w', c)."""
        config, steps = self.config, steps_after(self.config, name)
        lrn: dict[str, Any] = {
            "size": config.lrn_size,
            "k": config.lrn_k,
            "alpha": config.lrn_alpha,
            "beta": config.lrn_beta,
            "groups": 1 if config.lrn_across_towers else towers,
        }
        pool: dict[str, Any] = {}
        if "pool" in steps:
            entry = POOLED.index(name)
            pool = {"window": config.pool_windows[entry], "stride": config.pool_strides[entry]}
        if steps == RELU_LRN_POOL and config.activation == "relu" and config.lrn:
            return ops.relu_lrn_pool(x, **lrn, **pool)
        for step in steps:
            if step == "activation":
                x = self.activation(x)
            elif step == "pool":
                x = ops.max_pool(x, **pool)
            elif config.lrn and step == "spatial_lrn":
                x = ops.spatial_response_norm(x, **SPATIAL_LRN)
            elif config.lrn:
                x = ops.local_response_norm(x, **lrn)
        return x

    def drop(self, x: Array, place: str, dropout: Dropout | None) -> Array:
        """Dropout on (b, ..., c/n), where the preset drops at `place`; paper, section 4.2."""
        config = self.config
        if place not in config.dropout_after:
            return x
        keep = None
        if dropout is not None:
            local = config.towers // self.shards
            first = 0 if self.shards == 1 else lax.axis_index("model") * local
            keep = ops.keep_mask(
                dropout.key,
                dropout.rows,
                layer=("pool5", "fc6", "fc7").index(place),
                towers=first + jnp.arange(local),
                shape=(*x.shape[1:-1], x.shape[-1] // local),
                rate=config.dropout_rate,
            )
        return ops.dropout(x, keep, config.dropout_rate, config.dropout_rule)
