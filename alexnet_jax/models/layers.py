"""The parts of nets: weight layers, their shapes and their initial parameters."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from alexnet_jax import ops
from alexnet_jax.config import LAYERS, SHARES_ENTRY, Model

Params = dict[str, dict[str, Array]]  # {layer: {"kernel": ..., "bias": ...}}, float32

INITIAL_STREAM = 1 << 40  # of random numbers, distinct from those of data and dropout


class Layer(NamedTuple):
    """One weight layer, both towers together."""

    name: str
    kernel: tuple[int, ...]  # (kh, kw, i, o) or (i, o)
    groups: int  # 2 where the towers do not see each other
    stride: int
    padding: ops.Padding
    output: tuple[int, ...]  # (h, w, o) or (o,), before any pool
    stage_output: tuple[int, ...]  # the same after the pool, where one follows

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


def connected(name: str, inputs: int, outputs: int) -> Layer:
    """A fully connected layer."""
    return Layer(name, (inputs, outputs), 1, 1, ((0, 0), (0, 0)), (outputs,), (outputs,))


def scaled(count: int, width: float, towers: int) -> int:
    """`count` times the width, a whole number for each tower."""
    return max(1, round(count * width / towers)) * towers


def initial_parameters(config: Model, layer: Layer, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The preset's random kernel and bias of a layer, float32, in their natural shapes.

    Drawn on the host, so that they depend on the seed and the layer alone, on any platform.
    """
    place = LAYERS.index(SHARES_ENTRY.get(layer.name, layer.name))
    stream = INITIAL_STREAM + (*LAYERS, *SHARES_ENTRY).index(layer.name)
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))
    if config.init == "uniform":
        bound = 1 / math.sqrt(math.prod(layer.kernel[:-1]))
        sizes = (layer.kernel, layer.kernel[-1:])
        kernel, bias = (2 * bound * rng.random(s, np.float32) - np.float32(bound) for s in sizes)
        return kernel, bias
    # Signals keep their scale in a narrower net; conv1 reads the same pixels at any width.
    spread = 1.0 if layer.name == "conv1" else math.sqrt(config.width)
    std = np.float32(config.weight_std[place] / spread)
    kernel = std * rng.standard_normal(layer.kernel, np.float32)
    return kernel, np.full(layer.kernel[-1:], config.bias[place], np.float32)


class Affine(nnx.Module):
    """A convolution or a fully connected layer, or one device's share of it.

    Its parameters are placeholders: `state.make_apply` puts in those it is given.
    """

    def __init__(self, layer: Layer, shards: int):
        outputs = -(-layer.kernel[-1] // shards)
        self.kernel = nnx.Param(jnp.zeros((*layer.kernel[:-1], outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.groups = max(1, layer.groups // shards)
        self.stride = layer.stride
        self.padding = layer.padding

    def __call__(self, x: Array) -> Array:
        """(b, h, w, i) or (b, i) -> (b, h', w', o) or (b, o), of x's dtype."""
        kernel, bias = self.kernel[...], self.bias[...]
        return self._apply(x, kernel, bias, self.groups)

    def apart(self, x: Array) -> list[Array]:
        """The output group by group: each one's maps, (b, h', w', o / groups)."""
        whole = (x, self.kernel[...], self.bias[...])
        parts = (jnp.split(array, self.groups, axis=-1) for array in whole)
        return [self._apply(*part, groups=1) for part in zip(*parts, strict=True)]

    def _apply(self, x: Array, kernel: Array, bias: Array, groups: int) -> Array:
        if x.ndim == 2:
            return ops.add_bias(ops.dense(x, kernel), bias)
        options: dict[str, Any] = {"stride": self.stride, "padding": self.padding}
        return ops.add_bias(ops.conv(x, kernel, groups=groups, **options), bias)
