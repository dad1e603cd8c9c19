"""Paths as users write them; atomic file writes, synced to disk where needed; unread output."""

import contextlib
import errno
import hashlib
import os
import pathlib
import secrets
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from typing import TextIO

import numpy as np

from alexnet_jax.errors import UserError, reason


def expanded(text: str) -> pathlib.Path:
    """The path that a user wrote, with ~ as the home folder.

    Raises:
      UserError: it begins with ~ but there is no such home folder.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise UserError(f"{text}: there is no such home folder; set HOME, or write the whole path")
    return pathlib.Path(path)


@contextlib.contextmanager
def writing(what: str, way_out: str) -> Iterator[None]:
    """Turns an OSError into the UserError that `what`, a flag or field, cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what} cannot be written ({error.strerror or error}); {way_out}"
        ) from error


def make_folder(folder: pathlib.Path, what: str, way_out: str) -> None:
    """Create a folder, if it is missing, and check that it can be written.

    Raises:
      UserError: that `what`, a flag or field, cannot be written.
    """
    with writing(what, way_out):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Names the file in an OSError that does not, as when a disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextlib.contextmanager
def whole(path: pathlib.Path, sync: bool = False) -> Iterator[pathlib.Path]:
    """A temporary path to write to, which replaces `path` if nothing was raised.

    Args:
      sync: fsync, so that it is on disk before anything that follows. Nobody else may then be
        writing `path`; a temporary file left by a killed process is overwritten.
    """
    partial = path.with_name(f"{path.name}.tmp" if sync else f"{path.name}.{secrets.token_hex(8)}")
    try:
        with naming(path):
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
    """Write a text file atomically."""
    with whole(path, sync) as partial:
        partial.write_text(text, encoding="utf-8")


def write_arrays(path: pathlib.Path, sync: bool = False, **arrays: np.ndarray) -> None:
    """Write an .npz file atomically; it can be read without pickle."""
    with whole(path, sync) as partial, open(partial, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_arrays(path: pathlib.Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file that `write_arrays` wrote.

    Nothing in it is unpickled or decompressed: arrays have their full size on disk.

    Raises:
      ValueError: it is not such a file.
    """
    try:
        with zipfile.ZipFile(path) as members:
            if any(m.compress_type != zipfile.ZIP_STORED for m in members.infolist()):
                raise ValueError("its arrays are compressed")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: np.asarray(arrays[name]) for name in names}
    except Exception as error:  # on damaged bytes numpy and zipfile raise errors of all kinds
        raise ValueError(reason(error)) from error


def to_nowhere(stream: TextIO) -> None:
    """Let what else is written to a stream go nowhere, for instance if nobody reads it any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def synced(path: pathlib.Path) -> None:
    """fsync a file, or the entries of a folder, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
