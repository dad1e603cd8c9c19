"""The four-layer net of the paper's figure 1, as the original's layers-18pct has it.

Source: cuda-convnet, layers-cifar/layers-18pct.cfg, without its response normalisation and decay,
since the figure's nets are not regularised. One tower.
"""

from collections.abc import Iterator

from flax import nnx
from jax import Array

from alexnet_jax import ops
from alexnet_jax.config import Model
from alexnet_jax.models.layers import Affine, Dropout, Layer, connected, scaled

CHANNELS = {"conv1": 32, "conv2": 32, "conv3": 64}
KERNEL, PADDING = 5, ((2, 2), (2, 2))  # pixels, of every convolution
WINDOW, STRIDE = 3, 2  # pixels, of every pool


def shapes(config: Model, num_classes: int, size: int) -> tuple[Layer, ...]:
    """The net's weight layers for an input of `size` pixels a side, in order, with every shape."""
    found, inputs = [], 3
    for name, count in CHANNELS.items():
        outputs = scaled(count, config.width, 1)
        pooled = ops.pooled_size(size, WINDOW, STRIDE)
        kernel = (KERNEL, KERNEL, inputs, outputs)
        maps = (size, size, outputs), (pooled, pooled, outputs)
        found.append(Layer(name, kernel, 1, 1, PADDING, *maps))
        inputs, size = outputs, pooled
    return (*found, connected("fc4", inputs * size * size, num_classes))


class Cifar(nnx.Module):
    """The net, on one device.

    Args:
      config: its width, activation and dtype.
      num_classes: columns of fc4.
    """

    conv1: Affine
    conv2: Affine
    conv3: Affine
    fc4: Affine

    def __init__(self, config: Model, num_classes: int):
        self.config = config
        for layer in shapes(config, num_classes, config.input_size):
            setattr(self, layer.name, Affine(layer, shards=1))

    def outputs(self, images: Array, dropout: Dropout | None) -> Iterator[tuple[str, Array]]:
        """Each layer's name and output, after activation and pool; of fc4 the logits.

        Args:
          images: (b, s, s, 3) float32, mean subtracted.
          dropout: not used; nothing is dropped.
        """
        del dropout
        x = images.astype(self.config.dtype)  # (b, 32, 32, 3)
        x: Array = ops.max_pool(self.activation(self.conv1(x)), WINDOW, STRIDE)  # (b, 16, 16, 32)
        yield "conv1", x
        x = ops.mean_pool(self.activation(self.conv2(x)), WINDOW, STRIDE)  # (b, 8, 8, 32)
        yield "conv2", x
        x = ops.mean_pool(self.activation(self.conv3(x)), WINDOW, STRIDE)  # (b, 4, 4, 64)
        yield "conv3", x
        yield "fc4", self.fc4(x.reshape(x.shape[0], -1))  # (b, 10)

    def activation(self, x: Array) -> Array:
        return ops.activation(x, self.config.activation)
