"""Files written whole or not at all, and on the disk when they have to be."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def whole(path: pathlib.Path, sync: bool = False) -> Iterator[pathlib.Path]:
    """The path to write a file to, which takes the place of `path` when nothing was raised.

    Args:
      sync: have it on the disk before anything that comes after.
    """
    # Where processes may write the same file, each writes its own.
    partial = path.with_name(f"{path.name}.tmp" if sync else f"{path.name}.{os.getpid()}.tmp")
    yield partial
    if sync:
        synced(partial)
    os.replace(partial, path)
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


def synced(path: pathlib.Path) -> None:
    """Have a file, or what a folder lists, on the disk before anything that comes after."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
