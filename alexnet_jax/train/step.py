"""One update and one evaluation of a batch: pure, jitted, split over the mesh.

Each device computes the loss of its own rows. The two devices of a pair over `model` hold the same
rows and, after the last exchange, the same logits, so both compute the same loss. If each
differentiated the whole of it, the reduce-scatter of the logits' gradients would add two equal
terms, and every gradient of the net would be twice too large; so each takes half. The other
reduce-scatters add different terms, what each device's use of the maps contributes. Over `model`
nothing travels but the exchanges and, backward, their reduce-scatters; over `data`, gradients and
sums.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from alexnet_jax import metrics
from alexnet_jax.data import augment
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.mesh import parameter_spec
from alexnet_jax.models.layers import Dropout, Params
from alexnet_jax.train import optim, pixels
from alexnet_jax.train.state import Apply, TrainState

DROPOUT_STREAM = 4  # beside those of data/augment.py

DeviceBatch = dict[str, Array]


class SumsOfSquares(NamedTuple):
    """Of one layer, float32: () of one shard, or (shards,), which add up to the layer's.

    Update and weight are 0 where nothing is updated: the layer is frozen, or the loss or a gradient
    is not finite.
    """

    gradient: Array  # of the mean loss, kernel and bias
    update: Array  # what was added to the kernel
    weight: Array  # the kernel, before


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["numbers"], meta_fields=["layers"]
)
@dataclasses.dataclass(frozen=True)
class StepResults:
    """What a training step reports, summed over `data` only.

    The host adds up the shards (`mesh.over_model`), so that no collective over `model` is spent on
    it; all numbers are in one array, so that the host fetches them in one transfer.
    """

    numbers: Any  # (4 + 3 * layers, shards) float32: `sums`, equal in all shards, and `squares`
    layers: tuple[str, ...]

    @classmethod
    def of(cls, sums: metrics.Sums, squares: dict[str, SumsOfSquares]) -> "StepResults":
        """The results of one shard."""
        numbers = [*sums, *(number for layer in squares.values() for number in layer)]
        return cls(jnp.stack(numbers)[:, None], tuple(squares))

    @property
    def sums(self) -> metrics.Sums:
        """Sums over the global batch, (shards,) each."""
        return metrics.Sums(*self.numbers[: len(metrics.Sums._fields)])

    @property
    def squares(self) -> dict[str, SumsOfSquares]:
        """By layer, (shards,) each."""
        rest = self.numbers[len(metrics.Sums._fields) :]
        return {
            layer: SumsOfSquares(*rest[3 * i : 3 * i + 3]) for i, layer in enumerate(self.layers)
        }


TrainStep = Callable[
    [TrainState, DeviceBatch, Statistics, ArrayLike], tuple[TrainState, StepResults]
]
EvalStep = Callable[[Params, DeviceBatch, Statistics], Array]


def make_train_step(
    apply: Apply,
    update: optim.Update,
    schedule: optim.Schedule,
    mesh: Mesh,
    *,
    seed: int,
    mean: str,
    accumulation_steps: int = 1,
) -> TrainStep:
    """The paper's update on one global batch.

    Args:
      apply: the net on one shard of `mesh`'s axis `model`.
      update, schedule: of train/optim.py.
      seed: of the dropout masks.
      mean: what `pixels.normalise` subtracts.
      accumulation_steps: number of parts in which a device takes its rows, for the same update in
        less memory.

    Returns:
      (state, batch, statistics, scale) -> (state, results), jitted. The state given is donated;
      `batch` is `stream.train_batches`'s; `scale`, () float32, is the plateau's.
    """
    shards, replicas = mesh.shape["model"], mesh.shape["data"]
    # With one replica there is nothing to sum, but XLA would still copy every gradient.
    rows_spec, axes = (P("data"), ("data", "model")) if replicas > 1 else (P(), ("model",))

    def over_data(tree: Any) -> Any:
        return lax.psum(tree, "data") if replicas > 1 else tree

    def local_loss(
        params: Params, batch: DeviceBatch, statistics: Statistics, key: Array, batch_size: int
    ):
        """This device's part of the global batch's mean loss."""
        images = batch["image"].astype(jnp.float32) + batch["shift"][:, None, None]  # (b, s, s, 3)
        images = pixels.normalise(images, batch["offset"], batch["mirror"], statistics, mean)
        images = images * batch["gain"][:, None, None, None]
        logits = apply(params, images, Dropout(key, batch["row"]))  # (b, classes)
        sums = metrics.sums(metrics.log_probabilities(logits), batch["label"])
        return sums.loss / (shards * batch_size), sums

    def local_step(state: TrainState, batch: DeviceBatch, statistics: Statistics, scale: Array):
        # Not whatever JAX_DEFAULT_PRNG_IMPL says: others depend on how rows are split.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), DROPOUT_STREAM)
        key = jax.random.fold_in(key, state.step)
        count = batch["label"].shape[0]
        first = lax.axis_index("data") * count if replicas > 1 else 0
        batch = batch | {"row": first + jnp.arange(count)}
        params = state.params
        if replicas > 1:
            # Of parameters that are the same on all replicas, `jax.grad` sums the gradient over
            # `data` itself, once for each accumulated part; of varying ones `over_data` does, once.
            params = lax.pcast(params, ("data",), to="varying")
        gradient = jax.grad(local_loss, has_aux=True)

        def part(batch: DeviceBatch):
            return gradient(params, batch, statistics, key, count * replicas)

        gradients, sums = _accumulated(part, batch, accumulation_steps, axes)
        gradients, sums = over_data((gradients, sums))
        norms = {
            layer: optim.square(leaves["kernel"]) + optim.square(leaves["bias"])
            for layer, leaves in cast(Params, gradients).items()
        }
        # A bad update is not applied. Each tower judges by its own gradients, which saves a
        # collective: should only one be bad, the other moves, but the loop ends before it saves.
        # Forward and backward no longer need the parameters, which are updated in place.
        good = jnp.all(jnp.isfinite(jnp.stack([sums.loss, *norms.values()])))
        rates = schedule(state.step, scale)
        now = (cast(Params, state.params), state.opt_state)
        params, opt_state, changes = update(good, *now, cast(Params, gradients), rates)
        squares = {layer: SumsOfSquares(norm, *changes[layer]) for layer, norm in norms.items()}
        return TrainState(state.step + 1, params, opt_state), StepResults.of(sums, squares)

    def train_step(state: TrainState, batch: DeviceBatch, statistics: Statistics, scale: Array):
        specs = jax.tree.map(parameter_spec, state)
        return jax.shard_map(
            local_step,
            mesh=mesh,
            in_specs=(specs, rows_spec, P(), P()),
            out_specs=(specs, P(None, "model")),
        )(state, batch, statistics, scale)

    return jax.jit(train_step, donate_argnums=0)


def _accumulated(
    part: Callable[[DeviceBatch], Any], batch: DeviceBatch, steps: int, axes: tuple[str, ...]
) -> Any:
    """The sum of `part`, which varies over mesh `axes`, over `steps` equal parts of the rows."""
    if steps == 1:
        return part(batch)
    parts = jax.tree.map(lambda rows: rows.reshape(steps, -1, *rows.shape[1:]), batch)
    shapes = jax.eval_shape(part, jax.tree.map(lambda rows: rows[0], parts))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def add(total: Any, batch: DeviceBatch):
        return jax.tree.map(jnp.add, total, part(batch)), None

    return lax.scan(add, lax.pcast(zeros, axes, to="varying"), parts)[0]


def make_eval_step(apply: Apply, mesh: Mesh, *, size: int, num_crops: int, mean: str) -> EvalStep:
    """Loss and correct answers of one batch of images, squares as stored.

    Args:
      size: pixels a side of a crop.
      num_crops: 1, the centre; 10, whose probabilities are averaged (paper, section 4.1).
      mean: what `pixels.normalise` subtracts.

    Returns:
      (params, batch, statistics) -> `metrics.Sums` over the valid rows of the global batch, in one
      array, (4, shards) float32, equal in all shards. `batch` is `stream.evaluation_batches`'s.
    """

    def local_eval(params: Params, batch: DeviceBatch, statistics: Statistics):
        log_probs = _averaged(apply, params, batch, statistics, size, num_crops, mean)
        sums = metrics.sums(log_probs, batch["label"], batch["valid"])
        return jnp.stack(lax.psum(sums, "data"))[:, None]

    return _jitted(local_eval, mesh, P(None, "model"))


def make_predict_step(
    apply: Apply, mesh: Mesh, *, size: int, num_crops: int, mean: str
) -> EvalStep:
    """As `make_eval_step`: (params, batch, statistics) -> log probabilities.

    (shards, b, classes) float32, rows split over `data`; all shards hold the same.
    """

    def local_predict(params: Params, batch: DeviceBatch, statistics: Statistics):
        return _averaged(apply, params, batch, statistics, size, num_crops, mean)[None]

    return _jitted(local_predict, mesh, P("model", "data"))


def make_features_step(features: Apply, mesh: Mesh, *, size: int, mean: str) -> EvalStep:
    """A layer's output for centre crops: (params, batch, statistics) -> (b, pixels, c) float32.

    One pixel where the layer is fully connected.

    Args:
      features: `state.make_apply` up to the layer, whose last axis is this shard's share.
    """

    def local_features(params: Params, batch: DeviceBatch, statistics: Statistics):
        crop = jnp.asarray(augment.test_crops(batch["image"].shape[1] - size, 1))[0]
        images = _test_images(batch["image"], crop, statistics, size, mean)
        found = features(params, images, None).astype(jnp.float32)
        return found.reshape(found.shape[0], -1, found.shape[-1])  # (b, pixels or 1, c/n)

    return _jitted(local_features, mesh, P("data", None, "model"))


def _averaged(
    apply: Apply,
    params: Params,
    batch: DeviceBatch,
    statistics: Statistics,
    size: int,
    num_crops: int,
    mean: str,
) -> Array:
    """Logarithms of the probabilities averaged over the test crops, (b, classes) float32."""
    crops = jnp.asarray(augment.test_crops(batch["image"].shape[1] - size, num_crops))

    def one_crop(_, crop: Array):
        images = _test_images(batch["image"], crop, statistics, size, mean)
        return None, metrics.log_probabilities(apply(params, images, None))

    _, log_probs = lax.scan(one_crop, None, crops)  # (crops, b, classes)
    return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(len(crops))


def _test_images(stored: Array, crop: Array, statistics: Statistics, size: int, mean: str) -> Array:
    """A row of `augment.test_crops`, cut from every image, minus the mean: (b, s, s, 3) float32."""
    images = pixels.cut(stored, crop, size)
    offset = jnp.broadcast_to(crop[:2], (images.shape[0], 2))
    mirror = jnp.broadcast_to(crop[2] > 0, images.shape[:1])
    return pixels.normalise(images, offset, mirror, statistics, mean)


def _jitted(local: Callable, mesh: Mesh, out_specs: P) -> Any:
    """`local` (params, batch, statistics), jitted, on every device's share."""

    def step(params: Params, batch: DeviceBatch, statistics: Statistics):
        specs = jax.tree.map(parameter_spec, params)
        return jax.shard_map(
            local, mesh=mesh, in_specs=(specs, P("data"), P()), out_specs=out_specs
        )(params, batch, statistics)

    return jax.jit(step)
