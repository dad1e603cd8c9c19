"""Read the program that XLA compiles of the training step for a GPU or TPU that is not present.

  JAX_PLATFORMS=cpu python benchmarks/compiled_step.py [--target h200] [--batch 1024]
    [--dtype bfloat16] [--devices 1] [--form here] [--most 20]

Needs no such device, only its compiler: `.[cuda13]` for an H200, by its description, or `.[tpu]`
for `v5e` and `v6e`. Every kernel counts with the bytes of its arguments and results, each once and
in full, even where only a slice is read. This says nothing about time, nor about what cuDNN needs
internally. For a TPU, XLA notes the cycles it expects for each kernel except a pool's gradient: an
estimate, not a measurement.

The forms: `here`, the package's; `groups`, with the two towers as one convolution in groups;
`fusions`, what a GPU is given where there are no kernels for normalisation and pools: slices for
pools and for sums over neighbouring maps, space-to-depth; `slices`, slices for pools alone.
"""

import argparse
import collections
import functools
import math
import os
import re
import sys
from typing import Any, NamedTuple

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # it would ask a driver
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # it would ask Google's cloud

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from alexnet_jax import config as configs
from alexnet_jax import inspection, ops
from alexnet_jax.ops import convolution, gpu, native, pooling, stage, varying

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
TARGETS = ("h200", "v5e", "v6e")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
ARRAY = re.compile(rf"\b({'|'.join(WIDTHS)})\[([\d,]*)\]")
INSTRUCTION = re.compile(r"\s*(?:ROOT )?(%[\w.\-]+) = (.+?) ([\w\-]+)\((.*?)\)(?:,|$)")
# Move nothing, or were counted at their start.
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy-done", "slice-done")
COPIES = ("copy-start", "slice-start")  # (source, destination, state)
LITTLE = 10**6  # bytes; kinds of kernels that move no more than this get no row


class Kernel(NamedTuple):
    """An instruction of the program that does work."""

    moved: int  # bytes
    cycles: int  # XLA's estimate; 0 if there is none
    kind: str
    result: str
    source: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, default="h200")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--devices", type=int, choices=(1, 2), default=1)
    parser.add_argument("--form", choices=("here", "fusions", "groups", "slices"), default="here")
    parser.add_argument("--most", type=int, default=20, help="kernels to show")
    options = parser.parse_args()
    mesh = mesh_of(options.target, options.devices)
    step = compiled(mesh, options.batch, options.dtype, options.form)
    hlo, memory = step.as_text(), step.memory_analysis()
    found = read(hlo)
    print(
        f"{options.target}, batch {options.batch}, {options.dtype}, {options.devices} devices, "
        f"form {options.form}: {len(found)} kernels on each; "
        f"{memory.temp_size_in_bytes / 1e9:.1f} GB beside the arguments; "
        f"{inspection.collectives(hlo, mesh) or 'no collectives'}\n"
    )
    kinds = collections.Counter(kernel.kind for kernel in found)
    print("| kind | kernels | GB | million cycles |\n|---|---|---|---|")
    for kind in (*(kind for kind, _ in kinds.most_common()), "all"):
        of_kind = [kernel for kernel in found if kind in (kernel.kind, "all")]
        moved, cycles = (sum(numbers) for numbers in zip(*(kernel[:2] for kernel in of_kind)))
        if moved > LITTLE:
            print(f"| {kind} | {len(of_kind)} | {moved / 1e9:.2f} | {cycles / 1e6:.1f} |")
    print(f"(kinds that move at most {LITTLE / 1e6:.0f} MB in all have no row of their own)")
    print("\n| MB | million cycles | kind | result | of |\n|---|---|---|---|---|")
    for moved, cycles, *what in sorted(found, reverse=True)[: options.most]:
        print(f"| {moved / 1e6:,.0f} | {cycles / 1e6:.1f} | {' | '.join(what)} |")


def mesh_of(target: str, devices: int) -> Mesh:
    """Mesh of absent devices, along `model`."""
    if target == "h200":
        place: dict[str, Any] = {"target_config": H200, "topology": f"1x1x{devices}"}
        try:
            found = topologies.get_topology_desc("", platform="cuda", **place).devices
        except NotImplementedError:
            sys.exit("error: XLA's compiler for GPUs is not here; install .[cuda13]")
    else:
        found = topologies.get_topology_desc(f"{target}:1x{devices}", platform="tpu").devices
    places = np.array(found).reshape(1, devices)
    return Mesh(places, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def compiled(mesh: Mesh, batch: int, dtype: str, form: str) -> jax.stages.Compiled:
    """A training step compiled for the devices of a mesh."""
    on_tpu = mesh.devices.flat[0].platform == "tpu" and form != "fusions"
    native.available = lambda *arrays: False
    jax.default_backend = lambda: "tpu" if on_tpu else "gpu"  # for code that chooses a form by it
    if form == "groups":
        ops.conv, ops.groups_at_once = in_groups, lambda x: True
    if form == "fusions":
        gpu.available = lambda *shape, **rule: False
    if form == "slices":
        stage.max_pool = ops.max_pool = pooling._max_pool
    user = configs.blank()
    user.model.dtype = dtype
    step, arguments = inspection.training_step(configs.resolve(user), 1000, mesh, batch)
    return step.lower(*arguments).compile()


def in_groups(x, kernel, *, stride=1, padding, groups=1):
    x, kernel = varying.varying_alike(x, kernel.astype(x.dtype))
    return convolution._conv(x, kernel, stride, padding, groups)


def read(hlo: str) -> list[Kernel]:
    """Instructions in a compiled module's entry that move data."""
    sizes: dict[str, int] = {}
    found = []
    for line in hlo[hlo.index("\nENTRY ") :].splitlines():
        match = INSTRUCTION.match(line)
        if match is None:
            continue
        name, result, kind, given = match.groups()
        sizes[name] = size_of(result)
        if kind in FREE or "ConcatBitcast" in line:
            continue
        target = re.search(r'custom_call_target="([^"]*)"', line) or re.search(r"kind=(\w+)", line)
        source = re.search(r'op_name="([^"]*)"', line)
        expected = re.search(r'"estimated_cycles":"(\d+)"', line)
        moved = sizes[name] + sum(sizes.get(one, 0) for one in re.findall(r"%[\w.\-]+", given))
        if kind in COPIES:
            moved = 2 * min(map(size_of, re.findall(r"\w+\[[\d,]+\]", result)))
        about = source[1].split("/")[-1] if source else ""
        arrays = " ".join(f"{kind}[{sides}]" for kind, sides in ARRAY.findall(result))
        cycles = int(expected[1]) if expected else 0
        found.append(
            Kernel(moved, cycles, f"{kind} {target[1] if target else ''}".strip(), arrays, about)
        )
    return found


@functools.cache
def size_of(result: str) -> int:
    """Bytes of an array, or of all arrays in a tuple."""
    arrays = ARRAY.findall(result)
    return sum(
        WIDTHS[kind] * math.prod(int(side) for side in sides.split(",") if side)
        for kind, sides in arrays
    )


if __name__ == "__main__":
    main()
