"""What the training step moves on a GPU that is not there: the program XLA makes for it, read.

  JAX_PLATFORMS=cpu python benchmarks/compiled_step.py [--batch 1024] [--dtype bfloat16]
    [--devices 1] [--form here] [--most 20]

Needs `.[cuda13]`, and no GPU: XLA compiles for an H200 by its description. Every kernel counts
with the bytes of its arguments and results, each once and whole, also where it takes a slice.
That says nothing of time, nor of what cuDNN needs inside. The forms: `here`, the package's;
`fusions`, without its kernels for normalisation and pools; `groups`, with the two towers as one
convolution in groups.
"""

import argparse
import collections
import functools
import math
import os
import re
from typing import NamedTuple

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # which asks a driver

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from alexnet_jax import config as configs
from alexnet_jax import inspection, ops
from alexnet_jax.ops import convolution, gpu, native, varying

# As CUDA and NVIDIA's data sheet describe an H200.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 4800000000000
  device_memory_size: 151397597184
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
ARRAY = re.compile(rf"\b({'|'.join(WIDTHS)})\[([\d,]*)\]")
INSTRUCTION = re.compile(r"\s*(?:ROOT )?(%[\w.\-]+) = (.+?) ([\w\-]+)\((.*?)\)(?:,|$)")
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")  # move nothing


class Kernel(NamedTuple):
    """An instruction of the program that is something to do."""

    moved: int  # bytes
    kind: str
    result: str
    source: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--devices", type=int, choices=(1, 2), default=1)
    parser.add_argument("--form", choices=("here", "fusions", "groups"), default="here")
    parser.add_argument("--most", type=int, default=20, help="kernels to show")
    options = parser.parse_args()
    found = program(options.batch, options.dtype, options.devices, options.form)
    moved = sum(kernel.moved for kernel in found)
    print(
        f"batch {options.batch}, {options.dtype}, {options.devices} devices, form "
        f"{options.form}: {len(found)} kernels on each, {moved / 1e9:.1f} GB\n"
    )
    kinds = collections.Counter(kernel.kind for kernel in found)
    print("| kind | kernels | GB |\n|---|---|---|")
    for kind, count in kinds.most_common():
        total = sum(kernel.moved for kernel in found if kernel.kind == kind)
        print(f"| {kind} | {count} | {total / 1e9:.2f} |")
    print("\n| MB | kind | result | of |\n|---|---|---|---|")
    for kernel in sorted(found, reverse=True)[: options.most]:
        print(f"| {kernel.moved / 1e6:,.0f} | {kernel.kind} | {kernel.result} | {kernel.source} |")


def program(batch: int, dtype: str, devices: int, form: str) -> list[Kernel]:
    """The kernels of a training step, as one device runs them."""
    native.available = lambda *arrays: False
    jax.default_backend = lambda: "gpu"  # for those who choose a form by it
    if form == "groups":
        ops.conv, ops.groups_at_once = in_groups, lambda x: True
    if form == "fusions":
        gpu.available = lambda *shape, **rule: False
    user = configs.blank()
    user.model.dtype = dtype
    target = topologies.get_topology_desc(
        "", platform="cuda", target_config=H200, topology=f"1x1x{devices}"
    )
    places = np.array(target.devices).reshape(1, devices)
    mesh = Mesh(places, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    step, arguments = inspection.training_step(configs.resolve(user), 1000, mesh, batch)
    return read(step.lower(*arguments).compile().as_text())


def in_groups(x, kernel, *, stride=1, padding, groups=1):
    x, kernel = varying.varying_alike(x, kernel.astype(x.dtype))
    return convolution._conv(x, kernel, stride, padding, groups)


def read(hlo: str) -> list[Kernel]:
    """The instructions of a compiled module's entry that move something."""
    sizes: dict[str, int] = {}
    found = []
    for line in hlo[hlo.index("\nENTRY ") :].splitlines():
        match = INSTRUCTION.match(line)
        if match is None:
            continue
        name, result, kind, given = match.groups()
        sizes[name] = size_of(result)
        if kind in FREE:
            continue
        target = re.search(r'custom_call_target="([^"]*)"', line) or re.search(r"kind=(\w+)", line)
        source = re.search(r'op_name="([^"]*)"', line)
        moved = sizes[name] + sum(sizes.get(one, 0) for one in re.findall(r"%[\w.\-]+", given))
        about = source[1].split("/")[-1] if source else ""
        arrays = " ".join(f"{kind}[{sides}]" for kind, sides in ARRAY.findall(result))
        found.append(Kernel(moved, f"{kind} {target[1] if target else ''}".strip(), arrays, about))
    return found


@functools.cache
def size_of(result: str) -> int:
    """Bytes of an array, or of all in a tuple."""
    arrays = ARRAY.findall(result)
    return sum(
        WIDTHS[kind] * math.prod(int(side) for side in sides.split(",") if side)
        for kind, sides in arrays
    )


if __name__ == "__main__":
    main()
