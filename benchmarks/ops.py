"""Every operation of the paper net, forward and backward: this package, XLA's plain form, PyTorch.

  python benchmarks/ops.py [--batch 32] [--dtype float32] [--rounds 5]

The floor of a row is the larger of its multiply-adds at the rate of a large matrix product and of
its bytes at the rate of a large array's, both measured in the same run, the best of eight (what
caches hold moves faster: there it is an estimate and no bound); forward reads x and the kernel
and writes y, backward reads x, the kernel and dy and writes the gradients. Medians of rounds in
which every row runs in turn, milliseconds; PyTorch, where it is installed, in its own layout, and
without torch.compile.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from alexnet_jax import config as configs
from alexnet_jax import ops
from alexnet_jax.models import alexnet

try:
    import torch
    import torch.nn.functional as F  # noqa: N812  (so PyTorch calls it)
    import torch_nets
except ImportError:
    torch = None

LRN = {"size": 5, "k": 2.0, "alpha": 1e-4, "beta": 0.75}


class Row(NamedTuple):
    """One operation; functions take x, and the kernel where there is one."""

    name: str
    x: tuple[int, ...]
    kernel: tuple[int, ...]  # () for none
    flops: float  # forward; backward twice as many, conv1 as many
    ours: Callable
    plain: Callable
    torch: Callable | None  # of NCHW and OIHW tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    flops, bandwidth = machine(options.dtype)
    print(f"a matrix product: {flops / 1e9:,.0f} GFLOP/s; a copy: {bandwidth / 1e9:,.1f} GB/s\n")
    print("| operation | pass | floor | this package | XLA's plain form | PyTorch |")
    print("|---|---|---|---|---|---|")
    for row in rows(options.batch):
        for backward in (False, True):
            found = measured(row, backward, options.dtype, options.rounds)
            least = floor(row, backward, options.dtype, flops, bandwidth)
            cells = [least, *(found.get(name) for name in ("ours", "plain", "torch"))]
            text = " | ".join("" if cell is None else f"{cell * 1e3:,.1f}" for cell in cells)
            print(f"| {row.name} | {'backward' if backward else 'forward'} | {text} |", flush=True)


def rows(batch: int) -> list[Row]:
    net = configs.resolve(configs.blank()).model
    layers = alexnet.shapes(net, 1000, 224)
    found, side, maps = [], 224, 3
    for layer in layers[:-3]:
        options = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        flops = 2 * layer.multiply_adds * batch
        forms = (functools.partial(form, **options) for form in (ops.conv, plain_conv, torch_conv))
        found.append(Row(layer.name, (batch, side, side, maps), layer.kernel, flops, *forms))
        side, _, maps = layer.stage_output
    for name, side, width in (("1", 55, 96), ("2", 27, 256)):
        x = (batch, side, side, width)
        norm = functools.partial(ops.local_response_norm, **LRN, groups=2)
        found.append(Row(f"normalisation {name}", x, (), 0, norm, plain_norm, torch_norm))
    for name, side, width in (("1", 55, 96), ("2", 27, 256), ("5", 13, 256)):
        pool = functools.partial(ops.max_pool, window=3, stride=2)
        x = (batch, side, side, width)
        found.append(Row(f"pool {name}", x, (), 0, lambda x, p=pool: p(x), plain_pool, torch_pool))
    for layer in layers[-3:]:
        x, flops = (batch, layer.kernel[0]), 2 * layer.multiply_adds * batch
        found.append(Row(layer.name, x, layer.kernel, flops, jnp.matmul, jnp.matmul, product))
    return found


def floor(row: Row, backward: bool, dtype: str, flops: float, bandwidth: float) -> float:
    """Seconds."""
    y = jax.eval_shape(row.ours, *(jax.ShapeDtypeStruct(s, dtype) for s in arguments(row)))
    width = jnp.dtype(dtype).itemsize
    x, kernel, out = (width * float(np.prod(s)) for s in (row.x, row.kernel or (0,), y.shape))
    moved = x + kernel + out
    passes = 1
    if backward:
        first = row.name == "conv1"  # nobody asks for the gradient of the image
        moved += kernel + (0 if first else x)
        passes = 1 if first else 2
    return max(passes * row.flops / flops, moved / bandwidth)


def arguments(row: Row) -> list[tuple[int, ...]]:
    return [row.x, row.kernel] if row.kernel else [row.x]


def measured(row: Row, backward: bool, dtype: str, rounds: int) -> dict[str, float]:
    """Seconds a call takes, medians."""
    rng = np.random.default_rng(0)
    given = [rng.standard_normal(shape, np.float32) for shape in arguments(row)]
    wanted = (1,) if row.name == "conv1" else tuple(range(len(given)))
    calls = {
        name: jax_call(form, given, wanted, backward, dtype)
        for name, form in (("ours", row.ours), ("plain", row.plain))
    }
    if torch is not None and row.torch is not None:
        calls["torch"] = torch_call(row.torch, given, wanted, backward, dtype)
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(3):
                call()
            times[name].append((time.perf_counter() - started) / 3)
    return {name: statistics.median(values) for name, values in times.items()}


def jax_call(form, given, wanted, backward, dtype) -> Callable[[], None]:
    given = [jnp.asarray(array, dtype) for array in given]
    if not backward:
        forward = jax.jit(form)
        return lambda: jax.block_until_ready(forward(*given))
    y, back = jax.jit(lambda *given: jax.vjp(form, *given))(*given)  # what forward keeps
    gradients = jax.jit(lambda back, dy: [back(dy)[place] for place in wanted])
    dy = jnp.ones_like(y)
    return lambda: jax.block_until_ready(gradients(back, dy))


def torch_call(form, given, wanted, backward, dtype) -> Callable[[], None]:
    device = torch_nets.configure()
    orders = ((0, 3, 1, 2), (3, 2, 0, 1)) if given[0].ndim == 4 else ((0, 1), (0, 1))
    tensors = [
        torch.tensor(array.transpose(order).copy()).to(device, getattr(torch, dtype))
        for array, order in zip(given, orders)
    ]
    for place in wanted:
        tensors[place].requires_grad_(backward)
    y = form(*tensors)
    dy = torch.ones_like(y)
    asked = [tensors[place] for place in wanted]

    def call() -> None:
        if backward:
            torch.autograd.grad(y, asked, dy, retain_graph=True)
        else:
            with torch.no_grad():
                form(*tensors)
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def plain_conv(x, kernel, *, stride, padding, groups):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def plain_norm(x):
    """Shifted sums and a power, each tower by itself."""
    parts = jnp.split(x, 2, axis=-1)
    sums = [
        lax.reduce_window(
            part.astype(jnp.float32) ** 2, 0.0, lax.add, (1, 1, 1, 5), (1, 1, 1, 1), "SAME"
        )
        for part in parts
    ]
    found = [part * (2 + 1e-4 * sums) ** -0.75 for part, sums in zip(parts, sums)]
    return jnp.concatenate(found, axis=-1).astype(x.dtype)


def plain_pool(x):
    lowest = np.asarray(-np.inf, x.dtype)[()]  # a constant: XLA then knows how to differentiate
    return lax.reduce_window(x, lowest, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")


def torch_conv(x, kernel, *, stride, padding, groups):
    (top, bottom), (left, right) = padding
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(x, kernel, None, stride, (top, left), 1, groups)


def torch_norm(x):
    return torch_nets.response_norm(x, torch_nets.band(x.shape[1] // 2).to(x.device))


def torch_pool(x):
    return F.max_pool2d(x, 3, 2)


def product(x, kernel):
    return x @ kernel


def machine(dtype: str) -> tuple[float, float]:
    """FLOP/s of a large matrix product, bytes/s of reading and writing a large array in place."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    matrix, array = jnp.ones((size, size), dtype), jnp.ones(1 << 27, jnp.float32)
    multiply, add = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1, donate_argnums=0)
    products, copies = [], []
    for _ in range(8):
        started = time.perf_counter()
        jax.block_until_ready(multiply(matrix, matrix))
        products.append(time.perf_counter() - started)
        started = time.perf_counter()
        array = jax.block_until_ready(add(array))
        copies.append(time.perf_counter() - started)
    return 2 * size**3 / min(products), 2 * array.nbytes / min(copies)


if __name__ == "__main__":
    main()
