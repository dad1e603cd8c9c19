"""Which form of a convolution is fastest here: XLA can be asked for it in several ways.

  python benchmarks/forms.py [--batch 1024] [--dtype bfloat16] [--rounds 5] [--json FILE]

For each convolution of the paper net: the towers as two convolutions (the package's form on a GPU),
as one grouped convolution, or as a batch of two; conv1 over pixels, or by space-to-depth (the
package's); maps last or first in memory. Forward and backward, with XLA's gradients; milliseconds,
medians of rounds in which every form of a row runs in turn.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ops as rows_of
import timing
from jax import Array

from alexnet_jax.ops import convolution

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
    print(f"batch {options.batch}, {options.dtype}, on {jax.devices()[0].device_kind}\n")
    print("| operation | pass | forms, the fastest first |\n|---|---|---|")
    about = {"batch": options.batch, "dtype": options.dtype}
    table = []
    for row in rows_of.rows(options.batch):
        forms = convolutions(row) if row.name.startswith("conv") else {}
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
            timing.keep(options.json, about | {"forms": table})


def convolutions(row: rows_of.Row) -> dict[str, tuple[Callable, tuple[int, ...]]]:
    """Name -> a form of the row's operation and the shape of its x."""
    how = row.ours.keywords  # as set in `rows`
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
        by_blocks = convolution.conv_space_to_depth
        by_blocks = functools.partial(by_blocks, stride=stride, padding=padding)
        forms["space-to-depth"] = by_blocks, row.x
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


if __name__ == "__main__":
    main()
