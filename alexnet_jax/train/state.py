"""The training state: step, parameters, velocities."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding

from alexnet_jax.config import Model, Optim
from alexnet_jax.mesh import parameter_spec
from alexnet_jax.models.layers import Dropout, Params, initial_parameters
from alexnet_jax.models.nets import layers, make_net
from alexnet_jax.train.optim import make_optimizer


class TrainState(NamedTuple):
    """A pytree. On a mesh, arrays are split on their last axis over `model`."""

    step: Any  # () int32, updates done
    params: Any  # Params, or their shapes
    opt_state: Any  # Optax's; velocities have the parameters' structure and shapes


Apply = Callable[[Params, Array, Dropout | None], Array]  # params, images, dropout -> logits


def make_apply(model: Model, num_classes: int, shards: int, layer: str | None = None) -> Apply:
    """The net, up to a layer, as a pure function of one device's share of the parameters.

    With two shards it must be called under `shard_map` with mesh axis `model`; the output of a
    layer before the last is then this shard's.

    Raises:
      ValueError: when called, if the images have another size than the net's input.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: make_net(model, num_classes, shards)))
    last, size = layers(model, num_classes)[-1].name, model.input_size

    def apply(params: Params, images: Array, dropout: Dropout | None) -> Array:
        if images.shape[1:] != (size, size, 3):
            raise ValueError(f"images of {images.shape}: must be (b, {size}, {size}, 3)")
        return dict(nnx.merge(graph, params).outputs(images, dropout))[layer or last]

    return apply


def state_shapes(model: Model, num_classes: int) -> TrainState:
    """The state's natural shapes and dtypes, as ShapeDtypeStructs."""
    params = {
        layer.name: {
            "kernel": jax.ShapeDtypeStruct(layer.kernel, np.float32),
            "bias": jax.ShapeDtypeStruct(layer.kernel[-1:], np.float32),
        }
        for layer in layers(model, num_classes)
    }
    step = jax.ShapeDtypeStruct((), np.int32)
    optimizer = make_optimizer(Optim())  # all settings have states of one structure
    return TrainState(step, params, jax.eval_shape(optimizer.init, params))


def initial_state(model: Model, num_classes: int, seed: int) -> TrainState:
    """The state before the first step, on the host: numpy arrays in their natural shapes."""
    params = {
        layer.name: dict(zip(("kernel", "bias"), initial_parameters(model, layer, seed)))
        for layer in layers(model, num_classes)
    }
    shapes = state_shapes(model, num_classes)
    zeros = jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), shapes)
    return zeros._replace(params=params)


def put(tree: Any, mesh: Mesh) -> Any:
    """Put a state, or parameters, of natural shapes from the host onto the mesh.

    fc8's classes are split over the towers too. If their count is odd, two shards together hold one
    column more: the padding starts at zero and stays there, since its logits are cut off.
    """

    def padded(leaf: np.ndarray, place: jax.ShapeDtypeStruct) -> Array:
        ends = [(0, wide - narrow) for wide, narrow in zip(place.shape, leaf.shape)]
        whole = np.pad(leaf, ends) if any(map(sum, ends)) else leaf
        return jax.make_array_from_callback(whole.shape, place.sharding, whole.__getitem__)

    return jax.tree.map(padded, tree, placed_shapes(tree, mesh))


def placed_shapes(tree: Any, mesh: Mesh) -> Any:
    """The shapes and shardings that `put` gives natural arrays or shapes."""
    shards = mesh.shape["model"]

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        shape = tuple(leaf.shape)
        if _is_fc8(path) and shape:
            shape = (*shape[:-1], -(-shape[-1] // shards) * shards)
        leaf = jax.ShapeDtypeStruct(shape, leaf.dtype)
        return leaf.update(sharding=NamedSharding(mesh, parameter_spec(leaf)))

    return jax.tree.map_with_path(place, tree)


def natural_state(state: TrainState, num_classes: int) -> TrainState:
    """The state's arrays, still on their devices, fc8 without the padding that `put` added."""

    def cut(path: Any, leaf: Array) -> Array:
        padded = _is_fc8(path) and leaf.ndim and leaf.shape[-1] != num_classes
        return _first_columns(leaf, num_classes) if padded else leaf

    return jax.tree.map_with_path(cut, state)


@functools.partial(jax.jit, static_argnums=1)
def _first_columns(leaf: Array, count: int) -> Array:
    return leaf[..., :count]


def _is_fc8(path: Any) -> bool:
    return any(getattr(entry, "key", None) == "fc8" for entry in path)
