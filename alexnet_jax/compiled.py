"""The package's C++ libraries, compiled at run time where there is a C++ compiler.

They are compiled for this machine's processor and kept in JAX_COMPILATION_CACHE_DIR, if that is a
folder, beside JAX's programs. Without such a folder they last as long as this process, which shares
them with its children. Without a compiler, or if it fails, callers fall back to other code.
"""

import atexit
import contextlib
import ctypes
import hashlib
import importlib.util
import logging
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence

from alexnet_jax import files

LONGEST = 300  # seconds, for one run of the compiler
# For ARM processors some compilers, such as clang 14, do not know -march=native.
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
FLAGS = ("-std=c++17", "-O3", NATIVE, "-fno-math-errno", "-fPIC", "-shared", "-w")

log = logging.getLogger(__name__)
KEPT = "ALEXNET_JAX_COMPILED"  # environment variable: the folder, if JAX has none
_one_at_a_time = threading.Lock()
_found: dict[pathlib.Path, tuple[ctypes.CDLL | None, str]] = {}


def load(
    source: pathlib.Path, symbols: Sequence[str], flags: Sequence[str], instead: str
) -> tuple[ctypes.CDLL | None, str]:
    """The library of a source file and the headers beside it, loaded once per process.

    Args:
      symbols: functions it must have.
      flags: for the compiler, in addition to FLAGS.
      instead: what to log as the consequence if there is no library.

    Returns:
      The library, and a hash of source, compiler, processor and flags; None and "" if there is no
      library.
    """
    with _one_at_a_time:
        if source not in _found:
            _found[source] = _load(source, symbols, flags, instead)
        return _found[source]


def _load(
    source: pathlib.Path, symbols: Sequence[str], flags: Sequence[str], instead: str
) -> tuple[ctypes.CDLL | None, str]:
    try:
        return library(compiler(), source, symbols, flags)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
        reason = said.splitlines()[0] if said else str(error)
        log.info("no C++ (%s; CXX names another compiler): %s", reason, instead)
        return None, ""


def compiler() -> list[str]:
    """The command of a C++ compiler, in words: what CXX names; else c++; else package ziglang's.

    Raises:
      FileNotFoundError: there is none.
      ValueError: the quotes of CXX are not closed.
    """
    told = os.environ.get("CXX")
    words = shlex.split(told or "c++")
    found = shutil.which(words[0]) if words else None
    if found:
        return [found, *words[1:]]
    if told:
        raise FileNotFoundError(f"there is no {told!r}")
    package = importlib.util.find_spec("ziglang")
    if package and package.origin and sys.executable:
        return [sys.executable, "-P", "-m", "ziglang", "c++"]
    raise FileNotFoundError("there is no 'c++'; 'pip install ziglang' brings one")


def library(
    compiler: Sequence[str], source: pathlib.Path, symbols: Sequence[str], flags: Sequence[str]
) -> tuple[ctypes.CDLL, str]:
    """As `load`, with the given compiler.

    Raises:
      OSError, subprocess.SubprocessError: it cannot be compiled or loaded.
    """

    def run(*arguments: str) -> bytes:
        command = [*compiler, *arguments]
        return subprocess.run(command, check=True, capture_output=True, timeout=LONGEST).stdout

    # The compiler's version and all that NATIVE stands for here.
    machine = run(NATIVE, "-dM", "-E", "-x", "c++", os.devnull)
    told = "\0".join((*compiler, *FLAGS, *flags))
    text = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    suffix = hashlib.sha256(text + machine + told.encode()).hexdigest()[:16]
    name = f"{source.stem}-{suffix}"
    kept: list[pathlib.Path] = []
    for folder in _told():
        with contextlib.suppress(OSError):  # it may not be looked into
            kept += folder.glob(f"{name}-*.so")
    for path in kept:
        with contextlib.suppress(OSError):
            if path.stem.rpartition("-")[2] == files.digest(path)[:16]:
                return _loaded(path, symbols), suffix
            path.unlink()  # damaged
    folder = _kept()
    with tempfile.TemporaryDirectory(
        dir=None if _loads(tempfile.gettempdir()) else folder
    ) as scratch:
        made = pathlib.Path(scratch) / f"{name}.so"
        run(*FLAGS, *flags, str(source), "-o", str(made))
        loaded = _loaded(made, symbols)
        path = folder / f"{name}-{files.digest(made)[:16]}.so"
        with contextlib.suppress(OSError), files.whole(path) as partial:
            shutil.copyfile(made, partial)
        return loaded, suffix


def _loaded(path: pathlib.Path, symbols: Sequence[str]) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path.resolve()))
    missing = [symbol for symbol in symbols if not hasattr(found, symbol)]
    if missing:
        raise OSError(f"{path} has no {missing[0]}")
    return found


def _told() -> list[pathlib.Path]:
    """The folders where libraries may be kept, JAX's first."""
    told = (os.environ.get("JAX_COMPILATION_CACHE_DIR"), os.environ.get(KEPT))
    return [pathlib.Path(folder) for folder in told if folder and "://" not in folder]


def _loads(folder: str | pathlib.Path) -> bool:
    """Whether programs can be loaded from a folder's file system, as far as it says."""
    return not os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0)


def _kept() -> pathlib.Path:
    """The folder to keep libraries in."""
    for folder in _told():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK) and _loads(folder):
                return folder
    folder = tempfile.mkdtemp(prefix="alexnet_jax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[KEPT] = folder
    return pathlib.Path(folder)
