"""Which form of an operation is fastest here: what XLA is asked for can be said in several ways.

  python benchmarks/forms.py [--batch 1024] [--dtype bfloat16] [--rounds 5] [--json FILE]

Of each convolution of the paper net: the towers as two convolutions (the package's form on a GPU),
as one in groups, or as a batch of two; conv1 over pixels or over squares of 4x4 of them (space to
depth); maps last or first in memory. Of normalisation: its sums by shifted adds (the package's), by
a product with a banded matrix, or by reduce_window; of pools the package's and XLA's own; of both a
kernel by itself (`kernels.py`). Forward and backward, with the gradients that XLA finds of what is
neither a kernel nor the package's; milliseconds, medians of rounds in which every form of a row
runs in turn.
"""

import argparse
import functools
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import kernels
import numpy as np
import ops as rows_of
import timing
from jax import Array, lax

from alexnet_jax.ops import convolution, native

FIRST = ("NCHW", "HWIO", "NCHW")
LAST = ("NHWC", "HWIO", "NHWC")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dtype", choices=timing.DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    timing.set_precision(options.dtype)
    native.available = lambda *arrays: False  # XLA's forms, also where there are others
    print(f"batch {options.batch}, {options.dtype}, on {jax.devices()[0].device_kind}\n")
    print("| operation | pass | forms, the fastest first |\n|---|---|---|")
    about = {"batch": options.batch, "dtype": options.dtype}
    table = []
    for row in rows_of.rows(options.batch):
        forms = forms_of(row)
        for backward in (False, True) if forms else ():
            calls = {}
            for name, (form, shape) in forms.items():
                shapes = [shape, row.kernel] if row.kernel else [shape]
                asked = rows_of.wanted(row)
                calls[name] = rows_of.jax_call(form, shapes, asked, backward, options.dtype)
            found = rows_of.medians(calls, options.rounds)
            way = "backward" if backward else "forward"
            table.append({"operation": row.name, "pass": way, "seconds": found})
            order = sorted(found, key=lambda name: found[name])
            cells = [f"{name} {found[name] * 1e3:,.3f}" for name in order]
            print(f"| {row.name} | {way} | {'; '.join(cells)} |", flush=True)
            if options.json:
                options.json.write_text(json.dumps(about | {"forms": table}, indent=1))


def forms_of(row: rows_of.Row) -> dict[str, tuple[Callable, tuple[int, ...]]]:
    """Name -> a form of the row's operation and the shape of the x it takes."""
    if row.name.startswith("conv"):
        return convolutions(row)
    if row.name.startswith("normalisation"):
        forms = {"shifted adds": row.ours, "banded product": banded, "reduce_window": row.plain}
    elif row.name.startswith("pool"):
        forms = {"strided slices": row.ours, "reduce_window": row.plain}
    else:
        return {}
    if jax.default_backend() == "gpu":  # elsewhere it would be interpreted
        forms["a kernel"] = kernels.of(row)
    return {name: (form, row.x) for name, form in forms.items()}


def convolutions(row: rows_of.Row) -> dict[str, tuple[Callable, tuple[int, ...]]]:
    how = row.ours.keywords  # what `rows` gave the convolution
    stride, padding, groups = how["stride"], how["padding"], how["groups"]
    b, h, w, maps = row.x
    forms = {}
    for place, order, x in (("last", LAST, row.x), ("first", FIRST, (b, maps, h, w))):
        one = functools.partial(rows_of.plain_conv, order=order, stride=stride, padding=padding)
        if groups == 1:
            forms[f"maps {place}"] = one, x
            continue
        axis = order[0].index("C")
        for name, form in (("two", in_two), ("in groups", in_groups), ("batch of two", batched)):
            forms[f"{name}, maps {place}"] = functools.partial(form, one, groups, axis), x
    if stride > 1:
        forms["squares"] = functools.partial(by_squares, stride=stride, padding=padding), row.x
    return forms


def in_two(one: Callable, groups: int, axis: int, x: Array, kernel: Array) -> Array:
    parts = zip(jnp.split(x, groups, axis=axis), jnp.split(kernel, groups, axis=-1))
    return jnp.concatenate([one(*part) for part in parts], axis=axis)


def in_groups(one: Callable, groups: int, axis: int, x: Array, kernel: Array) -> Array:
    return one(x, kernel, groups=groups)


def batched(one: Callable, groups: int, axis: int, x: Array, kernel: Array) -> Array:
    towers = jnp.stack(jnp.split(x, groups, axis=axis))
    found = jax.vmap(one)(towers, jnp.stack(jnp.split(kernel, groups, axis=-1)))
    return jnp.concatenate(list(found), axis=axis)


def by_squares(x: Array, kernel: Array, *, stride: int, padding) -> Array:
    """Maps last, squares of stride x stride pixels for pixels, in steps of 1."""
    y = jax.eval_shape(
        functools.partial(rows_of.plain_conv, order=LAST, stride=stride, padding=padding), x, kernel
    )
    squares, _ = convolution._space_to_depth(x, y.shape, kernel.shape, stride, padding)
    tall, wide = (-(-side // stride) for side in kernel.shape[:2])
    more = [(0, count * stride - side) for count, side in zip((tall, wide), kernel.shape)]
    kernel = jnp.pad(kernel, [*more, (0, 0), (0, 0)])
    kernel = kernel.reshape(tall, stride, wide, stride, *kernel.shape[2:]).transpose(
        0, 2, 1, 3, 4, 5
    )
    kernel = kernel.reshape(tall, wide, -1, kernel.shape[-1])
    return rows_of.plain_conv(squares, kernel, order=LAST, stride=1, padding=((0, 0), (0, 0)))


def banded(x: Array) -> Array:
    """Two towers' normalisation; the band ends where a tower does."""
    size, k, alpha = rows_of.LRN["size"], rows_of.LRN["k"], rows_of.LRN["alpha"]
    maps = np.arange(x.shape[-1])
    near = abs(maps[:, None] - maps) <= size // 2
    together = maps[:, None] * 2 // len(maps) == maps * 2 // len(maps)
    x32, band = x.astype(jnp.float32), jnp.asarray(near & together, jnp.float32)
    sums = jnp.einsum("bhwj,ji->bhwi", x32 * x32, band, precision=lax.Precision.HIGHEST)
    total = k + alpha * sums
    return (x32 * lax.rsqrt(total) * lax.rsqrt(jnp.sqrt(total))).astype(x.dtype)


if __name__ == "__main__":
    main()
