"""The paper's update, in Optax or as C++; its schedule, the original's, Caffe's and a cosine.

    v <- momentum * v - decay * rate * w - rate * gradient        (paper, section 5)
    w <- w + v

The rate and the decay act inside the velocity: a drop of the rate leaves the velocity as it is.
Biases have their own rate and no decay, as in the original.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from alexnet_jax.config import LAYERS, SHARES_ENTRY, Optim
from alexnet_jax.models.layers import Params
from alexnet_jax.ops import gpu, native
from alexnet_jax.train.calendar import Calendar

Rates = dict[str, Array]  # "kernel", "bias"; "conv1_kernel", "conv1_bias" where they differ
Schedule = Callable[[ArrayLike, ArrayLike], Rates]  # (step, plateau scale) -> rates
Update = Callable[[Array, Params, Any, Params, Rates], tuple[Params, Any, dict]]

# The automatic schedule of the original's net #170: the weights' rate falls to .004 of its start
# in three drops by the same factor, at quarters of training; the biases' once, tenfold, halfway.
EXPONENTIAL_RATIO = 0.004
NEVER = 2**31 - 1  # steps, which a state counts in int32


def make_optimizer(optim: Optim) -> optax.GradientTransformationExtraArgs:
    """Optax chain of the update above; `update` takes `rates=`, as from `own_rates`.

    Parameters are {layer: {"kernel": ..., "bias": ...}}; velocities have their shapes and dtypes.
    """
    return optax.chain(
        optax.add_decayed_weights(optim.weight_decay, mask=_kernels),
        optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), _scaled),
        optax.trace(decay=optim.momentum),
    )


def make_update(optim: Optim) -> Update:
    """How a step applies its gradients.

    Returns:
      (good, params, opt_state, gradients, rates) -> (params, opt_state, squares), all of one
      device's share. Where `good`, () bool, is false, nothing is changed. A kernel or bias whose
      rate is 0 keeps its values and its velocity, as in the original (weights.cu). `squares` are,
      for each layer, the sums of squares of its kernel's update and of the kernel before; zeros
      where the kernel is not changed.

      On a CPU one pass over memory does it all, in place; elsewhere it is `make_optimizer`'s chain.
    """
    optimizer = make_optimizer(optim)

    def update(good: Array, params: Params, opt_state: Any, gradients: Params, rates: Rates):
        velocities = optax.tree_utils.tree_get(opt_state, "trace")
        own = own_rates(optim, rates, params)
        moves = jax.tree.map(lambda rate: good & (rate > 0), own)
        if native.available(*jax.tree.leaves(params)):
            trees = params, velocities, gradients, own, moves
            params, velocities, squares = _in_place(optim, *trees)
            return params, optax.tree_utils.tree_set(opt_state, trace=velocities), squares

        updates, opt_state = optimizer.update(gradients, opt_state, params, rates=own)
        moved = (
            optax.apply_updates(params, updates),
            optax.tree_utils.tree_get(opt_state, "trace"),
        )
        params_now, velocities = (
            jax.tree.map(jnp.where, moves, new, old)
            for new, old in zip(moved, (params, velocities))
        )
        squares = {}
        for layer, moving in moves.items():
            both = cast(Params, updates)[layer]["kernel"], params[layer]["kernel"]
            squares[layer] = tuple(jnp.where(moving["kernel"], s, 0) for s in _squares(*both))
        return params_now, optax.tree_utils.tree_set(opt_state, trace=velocities), squares

    return update


def square(leaf: Array) -> Array:
    """The sum of squares, () of the leaf's dtype."""
    return jnp.sum(leaf * leaf)


def _squares(one: Array, other: Array) -> tuple[Array, Array]:
    """The sums of squares of two arrays of one shape.

    On a GPU in one reduction: for two, XLA makes a copy of every kernel that it updates.
    """
    if not gpu.is_gpu():
        return square(one), square(other)
    zeros = (np.zeros((), one.dtype),) * 2
    add = functools.partial(jax.tree.map, jnp.add)
    return lax.reduce((one * one, other * other), zeros, add, range(one.ndim))


def _in_place(
    optim: Optim,
    params: Params,
    velocities: Params,
    gradients: Params,
    rates: Params,
    moves: Params,
) -> tuple[Params, Params, dict[str, tuple[Array, Array]]]:
    """The update, where `moves`, () bool for each array, at its own rate, () float32."""

    def one(path: Any, *leaves: Array) -> tuple[Array, Array, Array]:
        decay = optim.weight_decay if path[-1].key == "kernel" else 0.0
        return native.update(*leaves, momentum=float(optim.momentum), decay=float(decay))

    found = jax.tree.map_with_path(one, params, velocities, gradients, rates, moves)
    weights, moved, sums = jax.tree.transpose(jax.tree.structure(params), None, found)
    squares = {name: (kinds["kernel"][0], kinds["kernel"][1]) for name, kinds in sums.items()}
    return weights, moved, squares


def layer_rates(optim: Optim) -> Mapping[str, float]:
    """The factors of the layers' rates; a layer that is not named has 1."""
    own: dict[str, float] = dict(zip(LAYERS, optim.layer_rates, strict=True))
    return {**own, **{name: own[other] for name, other in SHARES_ENTRY.items()}}


def own_rates(optim: Optim, rates: Rates, params: Params) -> Params:
    """The rate of each kernel and bias of `params`, () float32."""
    factors = layer_rates(optim)

    def rate(layer: str, kind: str) -> Array:
        found = rates.get(f"{layer}_{kind}", rates[kind]) * factors.get(layer, 1.0)
        return jnp.asarray(found, jnp.float32)

    return {layer: {kind: rate(layer, kind) for kind in kinds} for layer, kinds in params.items()}


def _kernels(params: Any) -> Any:
    return {layer: {kind: kind == "kernel" for kind in kinds} for layer, kinds in params.items()}


def _scaled(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    del params
    return jax.tree.map(lambda rate, update: -rate * update, extra["rates"], updates), state


def make_schedule(optim: Optim, calendar: Calendar) -> Schedule:
    """Learning rates by step.

    Returns:
      (step, scale) -> rates, float32 scalars. `scale` is `plateau_scale`'s; 1 for other schedules.
    """
    num_steps = calendar.num_steps
    before = calendar.origin / calendar.batch_size  # steps

    def passed(steps: list[int], step: Array) -> Array:
        return jnp.sum(step >= jnp.array(steps, jnp.int32))

    def at(epoch: float) -> int:
        return min(calendar.first_step(epoch), NEVER)

    def share(part: float) -> int:
        """The step at which a fraction of the whole training is over."""
        return min(math.ceil((num_steps + before) * part - before), NEVER)

    def factors(step: Array) -> tuple[Array | float, Array | float]:
        """The factors on the starting rates of weights and of biases."""
        if optim.schedule == "epochs":
            drop = optim.drop_factor ** passed([at(epoch) for epoch in optim.drop_epochs], step)
            return drop, drop if optim.biases_drop else 1.0
        if optim.schedule == "steps":
            drop = optim.drop_factor ** (step // min(optim.drop_every_steps, NEVER))
            return drop, drop
        if optim.schedule == "exponential":
            weights = EXPONENTIAL_RATIO ** (passed([share(k / 4) for k in (1, 2, 3)], step) / 3)
            return weights, 0.1 ** passed([share(1 / 2)], step)
        if optim.schedule == "cosine":
            done = (step + before) / (num_steps + before)
            drop = (1 + jnp.cos(jnp.pi * jnp.minimum(done, 1.0))) / 2
            return drop, drop
        return 1.0, 1.0

    def schedule(step: ArrayLike, scale: ArrayLike) -> Rates:
        step = jnp.asarray(step)
        weights, biases = factors(step)
        rates = {
            "kernel": scale * optim.learning_rate * weights,
            "bias": scale * optim.learning_rate * optim.bias_rate_factor * biases,
        }
        if optim.conv1_drop_epoch or optim.conv1_freeze_epoch:
            drop = optim.drop_factor if optim.conv1_drop_epoch else 1.0
            dropped = jnp.where(step >= at(optim.conv1_drop_epoch), drop, 1.0)
            frozen = (step >= at(optim.conv1_freeze_epoch)) & (optim.conv1_freeze_epoch > 0)
            rates["conv1_kernel"] = jnp.where(frozen, 0.0, rates["kernel"] * dropped)
            rates["conv1_bias"] = jnp.where(frozen, 0.0, rates["bias"])
        return jax.tree.map(lambda rate: jnp.asarray(rate, jnp.float32), rates)

    return schedule


class Plateau(NamedTuple):
    """What the plateau schedule remembers between validation passes."""

    best: float = math.inf  # top-1 error, a fraction
    passes: int = 0  # since the best one or the last drop
    drops: int = 0


def plateau_update(plateau: Plateau, error: float, optim: Optim) -> Plateau:
    """The state after a validation pass with top-1 error `error`, a fraction.

    The rate drops when `plateau_patience` passes in a row have not improved on the best error by
    at least `plateau_min_delta`: the paper's rule (section 5), which it gives without numbers.
    """
    least = optim.plateau_min_delta * (1 - 1e-9)  # .043 less .042 is not quite .001
    if plateau.best - error >= least:
        return plateau._replace(best=error, passes=0)
    passes = plateau.passes + 1
    if passes >= optim.plateau_patience and plateau.drops < optim.plateau_max_drops:
        return plateau._replace(passes=0, drops=plateau.drops + 1)
    return plateau._replace(passes=passes)


def plateau_scale(plateau: Plateau, optim: Optim) -> float:
    """The factor on the learning rates; 1 under every other schedule."""
    return optim.drop_factor**plateau.drops if optim.schedule == "plateau" else 1.0
