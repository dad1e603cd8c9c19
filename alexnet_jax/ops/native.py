"""Kernels of native.cc, compiled where a C++ compiler is found, and called by XLA on a CPU.

What is compiled is for this machine's processor and kept beside JAX's own compiled programs. Where
there is no compiler, or it fails, what calls these kernels has a form for XLA to fall back on.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import shutil
import subprocess
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

SOURCE = pathlib.Path(__file__).with_name("native.cc")
KERNELS = ("winograd", "winograd_weights", "strided", "strided_weights")
KERNELS += ("dense", "dense_input", "normalise", "normalise_gradient", "update")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared", "-w")


def available(*arrays: Array) -> bool:
    """Whether the kernels can be called with arrays of these dtypes here."""
    return (
        jax.default_backend() == "cpu"
        and all(array.dtype == jnp.float32 for array in arrays)
        and bool(_suffix())
    )


def call(kernel: str, shape: tuple[int, ...], *arrays: Array, **attributes: float) -> Array:
    """The float32 result of a kernel; its attributes are told apart by their Python types."""
    result = _result(shape, arrays[0])
    return jax.ffi.ffi_call(f"{kernel}_{_suffix()}", result)(*arrays, **_typed(attributes))


def update(
    weights: Array, velocity: Array, gradient: Array, rate: Array, good: Array, **attributes: float
) -> tuple[Array, Array, Array]:
    """`update` of native.cc: both in place, and (2,) squares."""
    results = [_result(shape, weights) for shape in (weights.shape, weights.shape, (2,))]
    name = f"update_{_suffix()}"
    kernel = jax.ffi.ffi_call(name, results, input_output_aliases={0: 0, 1: 1})
    found = kernel(weights, velocity, gradient, rate, good, **_typed(attributes))
    return found[0], found[1], found[2]


def _result(shape: tuple[int, ...], like: Array) -> jax.ShapeDtypeStruct:
    """A float32 result that differs from device to device as `like` does."""
    kind = jax.typeof(like)
    place = kind.sharding.update(spec=P())
    mat = kind.manual_axis_type
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place, manual_axis_type=mat)


def _typed(attributes: dict[str, float]) -> dict[str, Any]:
    kinds = {bool: bool, int: np.int64, float: np.float32}
    return {name: kinds[type(value)](value) for name, value in attributes.items()}


@functools.cache
def _suffix() -> str:
    """Compiles and registers the kernels; what their names end in, empty where they cannot be.

    A program that XLA has kept finds these very kernels under its name for them, or none.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    logger = logging.getLogger(__name__)
    if compiler is None:
        logger.info("no C++ compiler (set CXX): XLA's slower convolutions are used")
        return ""
    try:
        library, suffix = _library(compiler)
        for kernel in KERNELS:
            capsule = jax.ffi.pycapsule(getattr(library, kernel))
            jax.ffi.register_ffi_target(f"{kernel}_{suffix}", capsule, platform="cpu")
        return suffix
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", b"").decode() or str(error)).strip().splitlines()[0]
        logger.warning(
            "%s failed (%s; set CXX to another): XLA's slower convolutions are used",
            compiler,
            reason,
        )
        return ""


def _library(compiler: str) -> tuple[ctypes.CDLL, str]:
    """The compiled kernels, from the cache or made anew, and what makes them these.

    Raises:
      OSError, subprocess.CalledProcessError: they cannot be compiled or loaded.
    """

    def run(*arguments: str) -> bytes:
        ended = subprocess.run([compiler, *arguments], check=True, capture_output=True)
        return ended.stdout

    headers = jax.ffi.include_dir()
    # The compiler's version and all that -march=native stands for here.
    machine = run("-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    parts = (SOURCE.read_bytes(), machine, " ".join(FLAGS).encode(), jax.__version__.encode())
    suffix = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    with contextlib.ExitStack() as stack:
        folder = _kept() or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for path in folder.glob(f"native-{suffix}-*.so"):
            if path.stem.rpartition("-")[2] == _digest(path):
                return ctypes.CDLL(str(path)), suffix
            path.unlink(missing_ok=True)  # damaged
        made = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder))) / "so"
        run(*FLAGS, f"-I{headers}", str(SOURCE), "-o", str(made))
        path = folder / f"native-{suffix}-{_digest(made)}.so"
        made.replace(path)
        return ctypes.CDLL(str(path)), suffix


def _kept() -> pathlib.Path | None:
    """Where JAX keeps compiled programs, if anywhere, and if it can be written."""
    told = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if told is None:
        return None
    folder = pathlib.Path(told)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
