"""Kernels in C++, compiled where a C++ compiler is found, and called by XLA on a CPU.

Without one, or if it fails, the callers of these kernels fall back on XLA.
"""

import functools
import importlib.metadata
import numbers
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from alexnet_jax import compiled

SOURCE = pathlib.Path(__file__).parent / "kernels.cc"
KERNELS = ("winograd", "winograd_weights", "strided", "strided_weights")
KERNELS += ("dense", "dense_input", "dense_weights")
KERNELS += ("normalise", "normalise_gradient", "stage", "stage_gradient", "update")


class Rule(NamedTuple):
    """Attributes of response normalisation, with a power of 3/4."""

    groups: int
    size: int
    k: float
    alpha: float


def available(*arrays: Array) -> bool:
    """Whether the kernels can be called with arrays of these dtypes here."""
    return (
        jax.default_backend() == "cpu"
        and all(array.dtype == jnp.float32 for array in arrays)
        and bool(_suffix())
    )


def call(kernel: str, shape: tuple[int, ...], *arrays: Array, **attributes: float) -> Array:
    """The float32 result of a kernel; its attributes are bools, integers or floats as declared."""
    result = _result(shape, arrays[0])
    run = jax.ffi.ffi_call(f"{kernel}_{_suffix()}", result, vmap_method="sequential")
    return run(*arrays, **_typed(attributes))


def update(
    weights: Array, velocity: Array, gradient: Array, rate: Array, moves: Array, **attributes: float
) -> tuple[Array, Array, Array]:
    """`Update` of update.h: new weights and velocity, both in place, and (2,) sums of squares."""
    results = [_result(shape, weights) for shape in (weights.shape, weights.shape, (2,))]
    name = f"update_{_suffix()}"
    kernel = jax.ffi.ffi_call(name, results, input_output_aliases={0: 0, 1: 1})
    found = kernel(weights, velocity, gradient, rate, moves, **_typed(attributes))
    return found[0], found[1], found[2]


def _result(shape: tuple[int, ...], like: Array) -> jax.ShapeDtypeStruct:
    """A float32 result that varies across devices as `like` does."""
    kind = jax.typeof(like)
    place = kind.sharding.update(spec=P())
    mat = kind.manual_axis_type
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place, manual_axis_type=mat)


def _typed(attributes: dict[str, float]) -> dict[str, Any]:
    def typed(value: float) -> Any:
        if isinstance(value, bool):
            return value
        return np.int64(value) if isinstance(value, numbers.Integral) else np.float32(value)

    return {name: typed(value) for name, value in attributes.items()}


@functools.cache
def _suffix() -> str:
    """Compile and register the kernels; return the suffix of their names, empty on failure.

    A program from XLA's cache has this suffix in its calls, so it finds these very kernels or none.
    """
    whose = importlib.metadata.version("jaxlib")  # other headers make another library
    flags = (f"-I{jax.ffi.include_dir()}", f"-DJAXLIB={whose}")
    instead = "XLA's slower forms are used"
    library, suffix = compiled.load(SOURCE, KERNELS, flags, instead)
    for kernel in KERNELS if library else ():
        capsule = jax.ffi.pycapsule(getattr(library, kernel))
        jax.ffi.register_ffi_target(f"{kernel}_{suffix}", capsule, platform="cpu")
    return suffix
