"""Files written whole or not at all, and on the disk when they have to be."""

import contextlib
import hashlib
import os
import pathlib
import secrets
import zipfile
from collections.abc import Iterable, Iterator

import numpy as np

from alexnet_jax.errors import reason


@contextlib.contextmanager
def whole(path: pathlib.Path, sync: bool = False) -> Iterator[pathlib.Path]:
    """The path to write a file to, which takes the place of `path` when nothing was raised.

    Args:
      sync: have it on the disk before anything that comes after. Then nobody else may be writing
        `path`, and what one that was killed left beside it is written over.
    """
    partial = path.with_name(f"{path.name}.tmp" if sync else f"{path.name}.{secrets.token_hex(8)}")
    try:
        yield partial
        if sync:
            synced(partial)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    if sync:
        synced(path.parent)


def write_text(path: pathlib.Path, text: str, sync: bool = False) -> None:
    """Write a text file, whole or not at all."""
    with whole(path, sync) as partial:
        partial.write_text(text, encoding="utf-8")


def write_arrays(path: pathlib.Path, sync: bool = False, **arrays: np.ndarray) -> None:
    """Write an .npz file, whole or not at all; nothing in it needs pickle to be read."""
    with whole(path, sync) as partial, open(partial, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_arrays(path: pathlib.Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file that `write_arrays` wrote.

    Nothing in it is unpickled, nor unpacked: what is read lies on the disk at its full size.

    Raises:
      ValueError: it is no such file.
    """
    try:
        with zipfile.ZipFile(path) as members:
            if any(m.compress_type != zipfile.ZIP_STORED for m in members.infolist()):
                raise ValueError("its arrays are compressed")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: np.asarray(arrays[name]) for name in names}
    except Exception as error:  # at damaged bytes numpy and zipfile raise what they stumble over
        raise ValueError(reason(error)) from error


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def synced(path: pathlib.Path) -> None:
    """Have a file, or what a folder lists, on the disk before anything that comes after."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
