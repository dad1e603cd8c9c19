"""Compare with the same nets in PyTorch, given the same weights, images and dropout masks.

    pip install torch; python benchmarks/against_pytorch.py [--presets paper owt] [--batch 2]
        [--seed 42] [--learning_rate 1e-4]

Prints two lines per preset, one for this package in float32 and one for the tests' numpy oracle in
float64, both against PyTorch in float64: the largest relative difference max|a - b| / max|b| over
the tensors of a kind. The nets below are written from the published descriptions, with PyTorch's
own layers, gradients and optimiser; they share no constants with what they are compared to. In
float32 a unit may fall on the other side of a ReLU or lose to another maximum in its pooling
window, which alone moves gradients of such a small batch by some hundredths.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F  # noqa: N812  (so PyTorch calls it)

from alexnet_jax import config as configs
from alexnet_jax import metrics, ops
from alexnet_jax.models.layers import Dropout
from alexnet_jax.train import optim
from alexnet_jax.train.state import make_apply

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import oracle

Array = np.ndarray
Params = dict[str, dict[str, Array]]
Leaves = dict[str, dict[str, torch.Tensor]]
Stage = Callable[[torch.Tensor], torch.Tensor]

UPDATES = 3
MOMENTUM, WEIGHT_DECAY = 0.9, 0.0005


@dataclass(frozen=True)
class Case:
    """Inputs for both sides; arrays in the package's layouts (NHWC, HWIO, (in, out))."""

    preset: str
    params: Params
    images: Array
    labels: Array
    masks: Mapping[str, Array]  # 0 or 1, for fc6 and fc7
    learning_rate: float


@dataclass
class Outcome:
    """Results of either side; gradients are those of the first update."""

    test_logits: Array
    logits: Array
    loss: float
    grads: Params
    after: Params  # after UPDATES updates on the same batch


# ------------------------------------------------------------------------------ the nets in PyTorch


def _lrn(k: float, alpha: float, towers: int) -> Stage:
    """Response normalisation within each tower; PyTorch divides alpha by the window's size, 5."""

    def stage(x: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [F.local_response_norm(t, 5, alpha, 0.75, k) for t in x.chunk(towers, 1)], 1
        )

    return stage


def _spatial_lrn(x: torch.Tensor) -> torch.Tensor:
    mean = F.avg_pool2d(x**2, 5, 1, padding=2, count_include_pad=True)
    return x / (1 + 4e-5 * 25 * mean) ** 0.75


def _pool(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, 2, ceil_mode=True)


PAPER_LRN, SOURCE_LRN, CAFFE_LRN = _lrn(2, 5e-4, 2), _lrn(2, 1e-4, 2), _lrn(1, 1e-4, 1)

# After conv1, after conv2, after conv5.
STAGES: dict[str, tuple[tuple[Stage, ...], tuple[Stage, ...], tuple[Stage, ...]]] = {
    "paper": ((F.relu, PAPER_LRN, _pool), (F.relu, PAPER_LRN, _pool), (F.relu, _pool)),
    "source2012": (
        (SOURCE_LRN, _pool, F.relu),
        (F.relu, SOURCE_LRN, _spatial_lrn, _pool),
        (_pool, F.relu),
    ),
    "caffe_alexnet": ((F.relu, CAFFE_LRN, _pool), (F.relu, CAFFE_LRN, _pool), (F.relu, _pool)),
    "caffenet": ((F.relu, _pool, CAFFE_LRN), (F.relu, _pool, CAFFE_LRN), (F.relu, _pool)),
    "owt": ((F.relu, _pool), (F.relu, _pool), (F.relu, _pool)),
}
INPUT_SIZE = {"caffe_alexnet": 227, "caffenet": 227}  # otherwise 224
CONV1_EDGES = {
    "owt": (2, 2, 2, 2),
    "paper": (0, 3, 0, 3),
    "source2012": (0, 3, 0, 3),
}  # otherwise 0
INVERTED = ("caffe_alexnet", "caffenet", "owt")


def _conv(
    x: torch.Tensor, leaf: dict[str, torch.Tensor], stride: int, padding: int, towers: int = 1
) -> torch.Tensor:
    kernel = leaf["kernel"].permute(3, 2, 0, 1)
    return F.conv2d(x, kernel, leaf["bias"], stride, padding, groups=towers)


def _dropout(x: torch.Tensor, preset: str, mask: torch.Tensor | None) -> torch.Tensor:
    """Training mode with a mask, test mode without."""
    if preset in INVERTED:
        return x if mask is None else x * mask * 2
    return x * 0.5 if mask is None else x * mask


def torch_logits(
    leaves: Leaves, images: torch.Tensor, preset: str, masks: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Logits of images (b, h, w, 3); without masks, in test mode."""
    towers = 1 if preset == "owt" else 2
    first, second, fifth = STAGES[preset]
    x = F.pad(images.permute(0, 3, 1, 2), CONV1_EDGES.get(preset, (0, 0, 0, 0)))
    x = _conv(x, leaves["conv1"], 4, 0)
    for stage in first:
        x = stage(x)
    x = _conv(x, leaves["conv2"], 1, 2, towers)
    for stage in second:
        x = stage(x)
    x = F.relu(_conv(x, leaves["conv3"], 1, 1))
    x = F.relu(_conv(x, leaves["conv4"], 1, 1, towers))
    x = _conv(x, leaves["conv5"], 1, 1, towers)
    for stage in fifth:
        x = stage(x)
    x = x.permute(0, 2, 3, 1).flatten(1)
    for name in ("fc6", "fc7"):
        if preset == "owt":
            x = _dropout(x, preset, masks.get(name))
        x = F.relu(x @ leaves[name]["kernel"] + leaves[name]["bias"])
        if preset != "owt":
            x = _dropout(x, preset, masks.get(name))
    return x @ leaves["fc8"]["kernel"] + leaves["fc8"]["bias"]


def with_torch(case: Case, dtype: torch.dtype) -> Outcome:
    """PyTorch's results, with torch.optim.SGD as the optimiser."""
    leaves: Leaves = {
        layer: {
            name: torch.tensor(value, dtype=dtype, requires_grad=True)
            for name, value in values.items()
        }
        for layer, values in case.params.items()
    }
    images, labels = torch.tensor(case.images, dtype=dtype), torch.tensor(case.labels)
    masks = {name: torch.tensor(mask, dtype=dtype) for name, mask in case.masks.items()}
    bias_rate = case.learning_rate * (1 if case.preset == "owt" else 2)
    optimizer = torch.optim.SGD(
        [
            {"params": [leaf["kernel"] for leaf in leaves.values()], "weight_decay": WEIGHT_DECAY},
            {"params": [leaf["bias"] for leaf in leaves.values()], "lr": bias_rate},
        ],
        lr=case.learning_rate,
        momentum=MOMENTUM,
    )
    with torch.no_grad():
        test_logits = torch_logits(leaves, images, case.preset, {}).numpy()
    for update in range(UPDATES):
        optimizer.zero_grad()
        logits = torch_logits(leaves, images, case.preset, masks)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        if update == 0:
            first = logits.detach().numpy(), loss.item(), _arrays(leaves, lambda leaf: leaf.grad)
        optimizer.step()
    return Outcome(test_logits, *first, _arrays(leaves, torch.Tensor.detach))


def _arrays(leaves: Leaves, of: Callable[[torch.Tensor], torch.Tensor]) -> Params:
    """Copies, because the optimiser works in place."""
    return {
        layer: {name: of(leaf).numpy().copy() for name, leaf in values.items()}
        for layer, values in leaves.items()
    }


# ----------------------------------------------------------------------------------- the other side


def with_oracle(case: Case) -> Outcome:
    """Results of the tests' oracle, in float64."""
    params = case.params
    test_logits, _ = oracle.forward(params, case.images, case.preset, train=False)
    logits, _ = oracle.forward(params, case.images, case.preset, train=True, masks=case.masks)
    velocity = {
        layer: {name: np.zeros_like(w) for name, w in values.items()}
        for layer, values in params.items()
    }
    for update in range(UPDATES):
        loss, grads = oracle.loss_and_grads(
            params, case.images, case.labels, case.preset, case.masks
        )
        if update == 0:
            first = logits, loss, grads
        factor = oracle.PRESETS[case.preset].bias_rate_factor
        params, velocity = oracle.sgd_update(
            params, velocity, grads, case.learning_rate, MOMENTUM, WEIGHT_DECAY, factor
        )
    return Outcome(test_logits, *first, params)


# --------------------------------------------------------------------------------- this package


def package_masks(preset: str, batch: int, params: Params) -> dict[str, Array]:
    """Masks that `with_package` will draw, in the shapes of what they multiply here."""
    key, rows = jax.random.key(0), jnp.arange(batch)
    if preset == "owt":  # one tower; at the inputs of fc6 and fc7
        places = {"fc6": (0, (6, 6, 256), 1), "fc7": (1, (4096,), 1)}
    else:  # at the outputs
        places = {"fc6": (1, (2048,), 2), "fc7": (2, (2048,), 2)}
    masks = {
        name: ops.keep_mask(key, rows, layer=n, towers=jnp.arange(t), shape=shape, rate=0.5)
        for name, (n, shape, t) in places.items()
    }
    return {name: np.asarray(mask).reshape(batch, -1).astype(int) for name, mask in masks.items()}


def with_package(case: Case) -> Outcome:
    """This package's results, float32, on one device."""
    user = configs.blank()
    user.model.preset = case.preset
    config = configs.resolve(user)
    apply = make_apply(config.model, 1000, shards=1)
    optimizer = optim.make_optimizer(config.optim)
    rate = jnp.float32(case.learning_rate)
    rates = {"kernel": rate, "bias": rate * config.optim.bias_rate_factor}
    images, labels = jnp.float32(case.images), jnp.asarray(case.labels)
    dropout = Dropout(jax.random.key(0), jnp.arange(len(images)))

    def mean_loss(params, images):
        logits = apply(params, images, dropout)
        sums = metrics.sums(metrics.log_probabilities(logits), labels)
        return sums.loss / len(labels), logits

    @jax.jit
    def update(params, state, images):
        (loss, logits), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, images)
        own = optim.own_rates(config.optim, rates, params)
        steps, state = optimizer.update(grads, state, params, rates=own)
        return optax.apply_updates(params, steps), state, (logits, loss, grads)

    params = jax.tree.map(jnp.float32, case.params)
    test_logits = jax.jit(apply, static_argnums=2)(params, images, None)
    state, first = optimizer.init(params), None
    for _ in range(UPDATES):
        params, state, found = update(params, state, images)
        first = first or jax.tree.map(np.asarray, found)
    return Outcome(np.asarray(test_logits), *first, jax.tree.map(np.asarray, params))


# ----------------------------------------------------------------------------------- the comparison


def make_case(preset: str, batch: int, seed: int, learning_rate: float) -> Case:
    """Random weights that preserve magnitude, and images like photographs less their mean."""
    rng = np.random.default_rng(seed)
    size = INPUT_SIZE.get(preset, 224)
    params = oracle.random_params(rng, preset)
    masks = package_masks(preset, batch, params)
    images = 50 * rng.standard_normal((batch, size, size, 3))
    return Case(preset, params, images, rng.integers(0, 1000, batch), masks, learning_rate)


def difference(a: Array | float, b: Array | float) -> float:
    """max|a - b| / max|b|"""
    return float(np.abs(np.asarray(a, float) - b).max() / np.abs(b).max())


def worst(a: Params, b: Params, less: Params | None = None) -> tuple[float, str]:
    """Largest difference over all tensors, and where; `less` is first subtracted from both."""
    found = []
    for layer, values in b.items():
        for name, value in values.items():
            start = less[layer][name] if less else 0.0
            gap = difference(np.asarray(a[layer][name], float) - start, value - start)
            found.append((gap, f"{layer}.{name}"))
    return max(found)


def report(case: Case, a: Outcome, b: Outcome) -> str:
    """One line: logits in both modes, the loss, the gradients, the parameters and their changes."""
    parts = [
        f"test logits {difference(a.test_logits, b.test_logits):.1e}",
        f"logits {difference(a.logits, b.logits):.1e}",
        f"loss {difference(a.loss, b.loss):.1e}",
    ]
    gaps = {"gradients": worst(a.grads, b.grads), "parameters": worst(a.after, b.after)}
    if a.logits.dtype == np.float64:  # the smallest changes are below the resolution of float32
        gaps["their changes"] = worst(a.after, b.after, case.params)
    parts += [f"{label} {gap:.1e} ({where})" for label, (gap, where) in gaps.items()]
    return "  ".join(parts)


def main() -> None:
    """Compare the requested presets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    presets = ["paper", "source2012", "caffe_alexnet", "owt"]
    parser.add_argument("--presets", nargs="+", default=presets, choices=list(STAGES))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    args = parser.parse_args()
    for preset in args.presets:
        case = make_case(preset, args.batch, args.seed, args.learning_rate)
        reference = with_torch(case, torch.float64)
        print(f"{preset:14s}package  {report(case, with_package(case), reference)}", flush=True)
        print(f"{preset:14s}oracle   {report(case, with_oracle(case), reference)}", flush=True)


if __name__ == "__main__":
    main()
