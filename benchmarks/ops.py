"""Every operation of the paper net, forward and backward: this package, XLA's plain form, PyTorch.

  python benchmarks/ops.py [--batch 32] [--dtype float32] [--rounds 5] [--step] [--json FILE]

The floor of a row is the larger of the time for its multiply-adds at the rate of a large matrix
product and for its bytes at the rate of a large array, both measured in the same run, the best of
eight (data in caches moves faster: there it is an estimate, not a bound). Forward reads x and the
kernel and writes y; backward reads x, the kernel and dy and writes the gradients; the update reads
weights, velocities and gradients in float32 and writes the first two. Medians, in milliseconds, of
rounds in which every row runs in turn; after the sum, the parts of stages 1 and 2 (ReLU,
normalisation and max pooling). PyTorch, if installed, runs without torch.compile, in its own
layout, on a GPU in channels_last. --step compares the sum of all rows with a whole training step.
On a GPU many short calls are timed at once; the time to send a call there is included, and printed.
"""

import argparse
import functools
import os
import pathlib
import statistics
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is here too

import jax
import jax.numpy as jnp
import numpy as np
import timing
import train_step
from jax import lax

from alexnet_jax import config as configs
from alexnet_jax import ops
from alexnet_jax.models import alexnet
from alexnet_jax.train import optim, state

try:
    import torch
    import torch.nn.functional as F  # noqa: N812  (so PyTorch calls it)
    import torch_nets
except ImportError:
    torch = None

LRN = {"size": 5, "k": 2.0, "alpha": 1e-4, "beta": 0.75}
POOL = {"window": 3, "stride": 2}


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
    parser.add_argument("--dtype", choices=timing.DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step", action="store_true", help="the whole training step, too")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    width = timing.set_precision(options.dtype)
    flops, bandwidth, sent = machine(width)
    print(
        f"batch {options.batch}, {options.dtype}, on {jax.devices()[0].device_kind}; a matrix "
        f"product: {flops / 1e9:,.0f} GFLOP/s; a copy: {bandwidth / 1e9:,.1f} GB/s; a call of "
        f"nothing: {sent * 1e3:.3f} ms\n"
    )
    print("| operation | pass | floor | this package | XLA's plain form | PyTorch |")
    print("|---|---|---|---|---|---|")
    about = {"batch": options.batch, "dtype": options.dtype, "flops_per_second": flops}
    about |= {"bytes_per_second": bandwidth, "call_of_nothing": sent}
    table = []

    def add(name: str, way: str, found: dict[str, float]) -> None:
        table.append({"operation": name, "pass": way, **found})
        cells = [found.get(column) for column in ("floor", "ours", "plain", "torch")]
        print(f"| {name} | {way} | {' | '.join(map(milliseconds, cells))} |", flush=True)
        timing.keep(options.json, about | {"seconds": table})

    def add_rows(rows: list[Row]) -> None:
        for row in rows:
            for backward in (False, True):
                found = measured(row, backward, options.dtype, options.rounds)
                least = floor(row, backward, width, flops, bandwidth)
                add(row.name, "backward" if backward else "forward", {"floor": least, **found})

    add_rows(rows(options.batch))
    add("update", "", update(bandwidth, options.rounds))
    whole = [name for name in ("floor", "ours", "torch") if all(name in row for row in table)]
    total = {name: sum(row[name] for row in table) for name in whole}
    add("all", "", total)
    if options.step:
        made, _ = train_step.ours(options.batch, options.dtype, "train")
        made.warm()
        step = statistics.median(made.seconds() for _ in range(options.rounds))
        add("training step", "", {"floor": total["floor"], "ours": step})
    add_rows(parts(options.batch))
    if options.step:
        print(f"\nThe floors add up to {total['floor'] / step:.0%} of the step.")


def milliseconds(seconds: float | None) -> str:
    return "" if not seconds else f"{seconds * 1e3:,.{1 if seconds > 0.01 else 3}f}"


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
    stage = functools.partial(ops.relu_lrn_pool, **LRN, groups=2, **POOL)
    for name, side, width in (("1", 55, 96), ("2", 27, 256)):
        x = (batch, side, side, width)
        found.append(Row(f"stage {name}", x, (), 0, stage, plain_stage, torch_stage))
    found.append(pool_row("5", (batch, 13, 13, 256)))
    for layer in layers[-3:]:
        x, flops = (batch, layer.kernel[0]), 2 * layer.multiply_adds * batch
        found.append(Row(layer.name, x, layer.kernel, flops, ops.dense, jnp.matmul, product))
    return found


def parts(batch: int) -> list[Row]:
    """Parts of the stages after conv1 and conv2, without the ReLU."""
    norm = functools.partial(ops.local_response_norm, **LRN, groups=2)
    found = []
    for name, x in (("1", (batch, 55, 55, 96)), ("2", (batch, 27, 27, 256))):
        found.append(Row(f"normalisation {name}", x, (), 0, norm, plain_norm, torch_norm))
        found.append(pool_row(name, x))
    return found


def pool_row(name: str, x: tuple[int, ...]) -> Row:
    pool = functools.partial(ops.max_pool, **POOL)
    return Row(f"pool {name}", x, (), 0, lambda x: pool(x), plain_pool, torch_pool)


def floor(row: Row, backward: bool, dtype: str, flops: float, bandwidth: float) -> float:
    """Seconds."""
    y = jax.eval_shape(row.ours, *(jax.ShapeDtypeStruct(s, dtype) for s in arguments(row)))
    width = jnp.dtype(dtype).itemsize
    x, kernel, out = (width * float(np.prod(s)) for s in (row.x, row.kernel or (0,), y.shape))
    moved = x + kernel + out
    passes = 1
    if backward:
        first = row.name == "conv1"  # the image's gradient is not needed
        moved += kernel + (0 if first else x)
        passes = 1 if first else 2
    return max(passes * row.flops / flops, moved / bandwidth)


def arguments(row: Row) -> list[tuple[int, ...]]:
    return [row.x, row.kernel] if row.kernel else [row.x]


def wanted(row: Row) -> tuple[int, ...]:
    """The arguments whose gradients training needs."""
    return (1,) if row.name == "conv1" else tuple(range(len(arguments(row))))


def measured(row: Row, backward: bool, dtype: str, rounds: int) -> dict[str, float]:
    """Median seconds per call."""
    calls = {
        name: jax_call(form, arguments(row), wanted(row), backward, dtype)
        for name, form in (("ours", row.ours), ("plain", row.plain))
    }
    if torch is not None and row.torch is not None:
        calls["torch"] = torch_call(row.torch, arguments(row), wanted(row), backward, dtype)
    return medians(calls, rounds)


def medians(calls: dict[str, timing.Work], rounds: int) -> dict[str, float]:
    times = {name: [] for name in calls}
    for call in calls.values():
        call.warm()
        call.count = max(call.count, 3)
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(call.seconds())
    return {name: statistics.median(values) for name, values in times.items()}


def jax_work(call: Callable) -> timing.Work:
    return timing.Work(call, jax.block_until_ready, alone=jax.default_backend() == "cpu")


def jax_call(form, shapes, wanted, backward, dtype) -> timing.Work:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    width = timing.array_type(dtype)
    given = [jax.random.normal(key, shape, width) for key, shape in zip(keys, shapes)]
    if not backward:
        forward = jax.jit(form)
        return jax_work(lambda: forward(*given))
    y, back = jax.jit(lambda *given: jax.vjp(form, *given))(*given)  # as the forward pass keeps it
    gradients = jax.jit(lambda back, dy: [back(dy)[place] for place in wanted])
    dy = jnp.ones_like(y)
    return jax_work(lambda: gradients(back, dy))


def torch_call(form, shapes, wanted, backward, dtype) -> timing.Work:
    device = torch_nets.configure(dtype)
    width = getattr(torch, timing.array_type(dtype))
    torch.manual_seed(0)
    tensors = []
    for shape, order in zip(shapes, ((0, 3, 1, 2), (3, 2, 0, 1))):
        if len(shape) == 4:
            shape = [shape[axis] for axis in order]
        tensor = torch.randn(shape, device=device, dtype=width)
        last = len(shape) == 4 and device == "cuda"
        tensors.append(tensor.contiguous(memory_format=torch.channels_last) if last else tensor)
    for place in wanted:
        tensors[place].requires_grad_(backward)
    y = form(*tensors)
    dy = torch.ones_like(y)
    asked = [tensors[place] for place in wanted]

    @torch.no_grad()
    def forward():
        return form(*tensors)

    def back():
        return torch.autograd.grad(y, asked, dy, retain_graph=True)

    return torch_nets.work(back if backward else forward, device)


def update(bandwidth: float, rounds: int) -> dict[str, float]:
    """The update of all weights: its floor, and seconds in this package and in PyTorch.

    Like a training step, this package's also sums squares; PyTorch's does not.
    """
    config = configs.resolve(configs.blank())
    now = state.initial_state(config.model, 1000, 0)
    change = optim.make_update(config.optim)
    weights = jax.device_put((now.params, now.opt_state))
    gradients = jax.device_put(now.params)
    good, rates = jnp.bool_(True), dict.fromkeys(("kernel", "bias"), jnp.float32(1e-8))
    count = sum(leaf.size for leaf in jax.tree.leaves(now.params))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(weights, good, gradients, rates):  # none is a constant, so XLA keeps the guard
        params, opt_state, squares = change(good, *weights, gradients, rates)
        return (params, opt_state), squares

    def ours():
        nonlocal weights
        weights, squares = step(weights, good, gradients, rates)
        return weights, squares

    calls = {"ours": jax_work(ours)}
    if torch is not None:
        device = torch_nets.configure()
        params = [torch.from_numpy(leaf).to(device) for leaf in jax.tree.leaves(now.params)]
        for param in params:
            param.grad = torch.ones_like(param)
        sgd = torch.optim.SGD(params, lr=0.0, momentum=0.9, weight_decay=0.0005, fused=True)
        calls["torch"] = torch_nets.work(sgd.step, device)
    return {"floor": 20 * count / bandwidth, **medians(calls, rounds)}


def plain_conv(x, kernel, *, stride, padding, groups=1, order=("NHWC", "HWIO", "NHWC")):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=order,
        feature_group_count=groups,
    )


def plain_norm(x):
    """Shifted sums and a power, within each tower."""
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
    lowest = np.asarray(-np.inf, x.dtype)[()]  # a constant, so that XLA can differentiate
    return lax.reduce_window(x, lowest, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")


def plain_stage(x):
    return plain_pool(plain_norm(jnp.maximum(x, 0)))


def torch_conv(x, kernel, *, stride, padding, groups):
    (top, bottom), (left, right) = padding
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(x, kernel, None, stride, (top, left), 1, groups)


def torch_norm(x):
    return torch_nets.response_norm(x, torch_band(x.shape[1] // 2, x.device), groups=2)


@functools.cache
def torch_band(maps, device):
    return torch_nets.band(maps).to(device)


def torch_pool(x):
    return F.max_pool2d(x, 3, 2)


def torch_stage(x):
    return torch_pool(torch_norm(F.relu(x)))


def product(x, kernel):
    return x @ kernel


def machine(dtype: str) -> tuple[float, float, float]:
    """FLOP/s of a large matrix product, bytes/s of reading and writing a large array in place,
    seconds of a call that does nothing."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size)).astype(dtype) for key in keys)
    array, small = jnp.ones(1 << 27, jnp.float32), jnp.zeros(1)
    multiply, add = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1, donate_argnums=0)
    nothing = jax.jit(lambda x: x + 1)

    def copy():
        nonlocal array
        array = add(array)
        return array

    best = []
    for call in (lambda: multiply(left, right), copy, lambda: nothing(small)):
        made = jax_work(call)
        made.warm()
        best.append(min(made.seconds() for _ in range(8)))
    return 2 * size**3 / best[0], 2 * array.nbytes / best[1], best[2]


if __name__ == "__main__":
    main()
