"""Every operation of the paper net against the tests' oracle in float64.

  python benchmarks/check_ops.py [--batch 2] [--json FILE]

On this device, in float32, TF32 (which a CPU does not have) and bfloat16, at the net's own sizes
and for inputs representable in the type: |found - oracle| / |oracle|, the larger of output and
gradients, and its limit. Where rounding decides which number is a window's maximum (stages, in
bfloat16), only the parts are compared. Crops and dropout masks must equal numpy's and the CPU's
exactly. If PyTorch is installed, the whole net, its gradients and three updates are also compared
with PyTorch in float64. Ends with status 1 if a limit is exceeded.
"""

import argparse
import concurrent.futures
import functools
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import timing
from ops import LRN, POOL, Row, arguments, parts, rows, torch

from alexnet_jax import config as configs
from alexnet_jax import mesh, metrics, ops, resident
from alexnet_jax.ops import keep_mask

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))
import oracle

MOST = {"float32": 1e-4, "tf32": 3e-3, "bfloat16": 2e-2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    print(f"on {jax.devices()[0].device_kind}\n")
    print("| what | " + " | ".join(f"{name}, at most {most}" for name, most in MOST.items()) + " |")
    print(f"|---{'|---' * len(MOST)}|")
    table: dict[str, dict[str, float]] = {}

    bad = []

    def add(name: str, found: dict[str, float], most: dict[str, float] = MOST) -> None:
        table[name] = found
        bad.extend(f"{name}, {dtype}" for dtype in found if not found[dtype] <= most[dtype])
        cells = (f"{found[dtype]:.1e}" if dtype in found else "" for dtype in MOST)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    everything = rows(options.batch) + parts(options.batch)
    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        for row, found in zip(everything, pool.map(checked, everything)):
            add(row.name, found)
    add("what is no number, behind a stage", {"float32": no_number()})
    add("cross-entropy", {"float32": cross_entropy()})
    add("a bias's gradient", {"bfloat16": bias_gradient()}, {"bfloat16": 1e-4})
    add("crop and mirror on the device", {"float32": crops()})
    add("dropout's mask", {"float32": masks()})
    if torch is not None:
        outputs, changes = net(options.batch)
        add("the net's logits and loss", {"float32": outputs})
        # One unit on the other side of a ReLU moves a gradient by hundredths.
        add("its gradients and three updates", {"float32": changes}, {"float32": 0.05})
    timing.keep(options.json, table)
    print(f"\nToo far away: {'; '.join(bad)}." if bad else "\nAll are as near as they must be.")
    return int(bool(bad))


def checked(row: Row) -> dict[str, float]:
    """Largest relative error of the output and the gradients, by dtype."""
    rng = np.random.default_rng(0)
    given = [rng.standard_normal(shape, np.float32) for shape in arguments(row)]
    found = {}

    def both(dy: jax.Array, *arrays: jax.Array):
        y, back = jax.vjp(row.ours, *arrays)
        return y, back(dy)

    for dtype in MOST if not row.name.startswith("stage") else ["float32"]:
        precision = "highest" if dtype == "float32" else "default"
        with jax.default_matmul_precision(precision):
            arrays = [jnp.asarray(array, timing.array_type(dtype)) for array in given]
            out = jax.eval_shape(row.ours, *arrays)
            dy = jnp.asarray(rng.standard_normal(out.shape, np.float32), out.dtype)
            y, gradients = jax.jit(both)(dy, *arrays)
        wanted = reference(row, *(np.float64(array) for array in (*arrays, dy)))
        found[dtype] = max(map(error, (y, *gradients), wanted))
    return found


def reference(row: Row, *given: np.ndarray) -> tuple[np.ndarray, ...]:
    """The output and the gradients of the arguments, the last of which is dy."""
    *x, dy = given
    if row.name.startswith("conv"):
        options = row.ours.keywords
        sizes = (options["stride"], options["padding"], options["groups"])
        y = oracle.conv(*x, np.zeros(dy.shape[-1]), *sizes)
        return (y, *oracle.conv_grad(*x, dy, *sizes)[:2])
    if row.name.startswith("stage"):
        rectified = np.maximum(*x, 0)
        y = oracle.lrn(rectified, **LRN, groups=2)
        slope = oracle.max_pool_grad(y, dy, *POOL.values())
        slope = oracle.lrn_grad(rectified, slope, **LRN, groups=2) * (x[0] > 0)
        return oracle.max_pool(y, *POOL.values()), slope
    if row.name.startswith("normalisation"):
        return oracle.lrn(*x, **LRN, groups=2), oracle.lrn_grad(*x, dy, **LRN, groups=2)
    if row.name.startswith("pool"):
        return oracle.max_pool(*x, *POOL.values()), oracle.max_pool_grad(*x, dy, *POOL.values())
    return x[0] @ x[1], dy @ x[1].T, x[0].T @ dy


def error(found: jax.Array, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(np.float64(found) - wanted) / np.linalg.norm(wanted))


def no_number() -> float:
    """0, or 1 if a stage or its gradient drops a NaN."""
    x = np.ones((1, 55, 55, 96), np.float32)
    x[0, 30, 30, 50] = np.nan
    stage = functools.partial(ops.relu_lrn_pool, **LRN, groups=2, **POOL)
    y, back = jax.vjp(jax.jit(stage), jnp.asarray(x))
    return float(not (np.isnan(y).any() and np.isnan(back(jnp.ones_like(y))[0]).any()))


def cross_entropy() -> float:
    rng = np.random.default_rng(0)
    logits, labels = 5 * rng.standard_normal((64, 1000), np.float32), rng.integers(0, 1000, 64)
    found = metrics.sums(metrics.log_probabilities(jnp.asarray(logits)), jnp.asarray(labels)).loss
    return error(found, np.sum(oracle.softmax_cross_entropy(np.float64(logits), labels)))


def bias_gradient() -> float:
    """Error of a sum over many bfloat16 pixels, which should be added in float32."""
    dy = np.random.default_rng(0).standard_normal((64, 55, 55, 96), np.float32)
    dy = jnp.asarray(dy, jnp.bfloat16)
    _, gradient = jax.jit(jax.vjp(ops.add_bias, dy, jnp.zeros(96))[1])(dy)
    return error(gradient, np.sum(np.float64(dy), (0, 1, 2)))


def crops() -> float:
    """0, or 1 if any pixel differs."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, (7, 256, 256, 3), np.uint8)
    index, offset = rng.integers(0, 7, 16), rng.integers(0, 33, (16, 2))
    mirror = rng.random(16) < 0.5
    config = configs.resolve(configs.blank())
    cut = resident.make_cut(mesh.make_mesh(configs.Mesh(data=1), config.model), 224)
    found = np.asarray(cut(squares, np.int32(index), np.int32(offset), mirror))
    pairs = zip(index, offset, strict=True)
    wanted = np.stack([squares[i, y : y + 224, x : x + 224] for i, (y, x) in pairs])
    wanted[mirror] = wanted[mirror, :, ::-1]
    return float(np.any(found != wanted))


def masks() -> float:
    """0, or 1 if a unit is kept here but not on the CPU, or the reverse."""

    def drawn(device: jax.Device) -> np.ndarray:
        with jax.default_device(device):
            places, towers = jnp.arange(32), jnp.arange(2)
            one = jax.jit(lambda: keep_mask(
                jax.random.key(1), places, layer=1, towers=towers, shape=(2048,), rate=0.5
            ))  # fmt: skip
            return np.asarray(one())

    return float(np.any(drawn(jax.devices()[0]) != drawn(jax.devices("cpu")[0])))


def net(batch: int) -> tuple[float, float]:
    """Largest difference of logits and loss; of any tensor of gradients and parameters."""
    import against_pytorch as other

    case = other.make_case("paper", batch, seed=42, learning_rate=1e-4)
    with jax.default_matmul_precision("highest"):
        a = other.with_package(case)
    b = other.with_torch(case, torch.float64)
    outputs = [(a.test_logits, b.test_logits), (a.logits, b.logits), (a.loss, b.loss)]
    changes = [(a.grads, b.grads), (a.after, b.after)]
    return (
        max(other.difference(*pair) for pair in outputs),
        max(other.worst(*pair)[0] for pair in changes),
    )


if __name__ == "__main__":
    sys.exit(main())
