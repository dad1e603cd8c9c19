"""Kernels in C++, compiled where a C++ compiler is found, and called by XLA on a CPU.

What is compiled is for this machine's processor and kept beside JAX's own compiled programs. Where
there is no compiler, or it fails, what calls these kernels has a form for XLA to fall back on.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import numbers
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from alexnet_jax import files

SOURCES = pathlib.Path(__file__).parent  # kernels.cc and the headers it is made of
KERNELS = ("winograd", "winograd_weights", "strided", "strided_weights")
KERNELS += ("dense", "dense_input", "normalise", "normalise_gradient", "update")
LONGEST = 300  # seconds, of a compiler
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared", "-w")


def available(*arrays: Array) -> bool:
    """Whether the kernels can be called with arrays of these dtypes here."""
    return (
        jax.default_backend() == "cpu"
        and all(array.dtype == jnp.float32 for array in arrays)
        and bool(_suffix())
    )


def call(kernel: str, shape: tuple[int, ...], *arrays: Array, **attributes: float) -> Array:
    """The float32 result of a kernel; its attributes are bools, integers or floats as there."""
    result = _result(shape, arrays[0])
    run = jax.ffi.ffi_call(f"{kernel}_{_suffix()}", result, vmap_method="sequential")
    return run(*arrays, **_typed(attributes))


def update(
    weights: Array, velocity: Array, gradient: Array, rate: Array, good: Array, **attributes: float
) -> tuple[Array, Array, Array]:
    """`update` of update.h: both in place, and (2,) squares."""
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
    def typed(value: float) -> Any:
        if isinstance(value, bool):
            return value
        return np.int64(value) if isinstance(value, numbers.Integral) else np.float32(value)

    return {name: typed(value) for name, value in attributes.items()}


@functools.cache
def _suffix() -> str:
    """Compiles and registers the kernels; what their names end in, empty where they cannot be.

    A program that XLA has kept finds these very kernels under its name for them, or none.
    """
    logger = logging.getLogger(__name__)
    told = os.environ.get("CXX")
    compiler = shlex.split(told or "c++")
    found = shutil.which(compiler[0]) if compiler else None
    if found is None:
        level = logging.WARNING if told else logging.INFO
        missing = f"no C++ compiler {told or 'c++'!r} (CXX names another)"
        logger.log(level, "%s: XLA's slower convolutions are used", missing)
        return ""
    try:
        library, suffix = _library([found, *compiler[1:]])
        for kernel in KERNELS:
            capsule = jax.ffi.pycapsule(getattr(library, kernel))
            jax.ffi.register_ffi_target(f"{kernel}_{suffix}", capsule, platform="cpu")
        return suffix
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
        reason = said.splitlines()[0] if said else str(error)
        failed = f"{found} failed ({reason}; CXX names another)"
        logger.warning("%s: XLA's slower convolutions are used", failed)
        return ""


def _library(compiler: Sequence[str]) -> tuple[ctypes.CDLL, str]:
    """The compiled kernels, from the cache or made anew, and what makes them these.

    Raises:
      OSError, subprocess.SubprocessError: they cannot be compiled or loaded.
    """

    def run(*arguments: str) -> bytes:
        command = [*compiler, *arguments]
        return subprocess.run(command, check=True, capture_output=True, timeout=LONGEST).stdout

    # The compiler's version and all that -march=native stands for here.
    machine = run("-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    told = "\0".join((*compiler, *FLAGS, jax.__version__))
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]*")))
    suffix = hashlib.sha256(sources + machine + told.encode()).hexdigest()[:16]
    folder = _kept()
    for path in folder.glob(f"native-{suffix}-*.so") if folder else ():
        with contextlib.suppress(OSError):
            if path.stem.rpartition("-")[2] == _digest(path):
                return _loaded(path), suffix
            path.unlink()  # damaged
    with tempfile.TemporaryDirectory() as scratch:
        made = pathlib.Path(scratch) / "native.so"
        run(*FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCES / "kernels.cc"), "-o", str(made))
        library = _loaded(made)
        if folder:
            path = folder / f"native-{suffix}-{_digest(made)}.so"
            with contextlib.suppress(OSError), files.whole(path) as partial:
                shutil.copyfile(made, partial)
        return library, suffix


def _loaded(path: pathlib.Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path.resolve()))
    missing = [kernel for kernel in KERNELS if not hasattr(library, kernel)]
    if missing:
        raise OSError(f"{path} has no {missing[0]}")
    return library


def _kept() -> pathlib.Path | None:
    """Where JAX keeps compiled programs, if in a folder."""
    told = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if not told or "://" in told:
        return None
    folder = pathlib.Path(told)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
