"""Tars read in place: checked members, and images by their offsets. Nothing is unpacked."""

import contextlib
import dataclasses
import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from alexnet_jax.data.examples import Example
from alexnet_jax.data.images import MAX_BYTES, ImageError
from alexnet_jax.errors import UserError, printable, reason

MAX_HEADER_BYTES = 2**14  # of names and attributes: tarfile itself has no limit, in size or time
AGAIN = "download it again"
# What tarfile and gzip raise on damaged data.
_DAMAGED = (
    tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError,
    zlib.error,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Members:
    """A portion: some images of a tar, read by their offsets."""

    path: str  # of the tar
    names: tuple[str, ...]  # like n01440764/n01440764_10026.JPEG
    offsets: np.ndarray  # (n,) int64, bytes from the start of the tar to the data
    sizes: np.ndarray  # (n,) int64, bytes
    targets: np.ndarray  # (n,) int64
    fingerprint: str

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Example:
        """One image as it is stored.

        Raises:
          ImageError: over MAX_BYTES.
          UserError: the tar has become shorter or unreadable.
        """
        name, size = self.names[index], int(self.sizes[index])
        if size > MAX_BYTES:
            raise ImageError(f"{name}: has {size} bytes; at most {MAX_BYTES} are read")
        with reading(self.path), open(self.path, "rb") as file:
            file.seek(int(self.offsets[index]))
            data = file.read(size)
        if len(data) < size:
            raise UserError(f"{self.path} has become shorter; {AGAIN}")
        return Example(data, int(self.targets[index]), name)


@contextlib.contextmanager
def reading(what: str | os.PathLike[str]) -> Iterator[None]:
    """Turns errors that a file or its contents raise into UserErrors."""
    try:
        yield
    except _DAMAGED as error:
        message = f"{what} cannot be read ({reason(error)}); make it readable or {AGAIN}"
        raise UserError(message) from error


@contextlib.contextmanager
def opened(
    what: str | os.PathLike[str], file: IO[bytes] | None = None
) -> Iterator[tarfile.TarFile]:
    """The tar in `file`, or else at the path `what`, which names it in messages."""
    with reading(what), contextlib.ExitStack() as stack:
        if file is None:
            file = stack.enter_context(open(what, "rb"))
        headers: Any = _Headers(file)
        yield stack.enter_context(tarfile.open(None, "r:", headers, tarinfo=_Member))


class _Member(tarfile.TarInfo):
    """Rewinds the tar if a header is invalid; tarfile's own may go on behind it instead."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Member":
        place = tar.offset
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError:
            tar.offset = place
            raise


class _Headers:
    """A tar's file that refuses reads larger than any legitimate header."""

    def __init__(self, file: IO[bytes]):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes at byte {self.tell()}")
        return self._read(size)


def files(
    tar: tarfile.TarFile, what: str | os.PathLike[str], stop: int
) -> Iterator[tarfile.TarInfo]:
    """The files of an open tar that ends at `stop`, in order; skips folders, refuses the rest."""
    while (member := tar.next()) is not None:
        vars(tar)["members"].clear()  # tarfile would keep a million of them
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise UserError(f"{what} has {member.name!r}, which is no plain file; take it out")
        # With a negative size tarfile would loop for ever.
        if member.size < 0 or member.offset_data + member.size > stop:
            raise UserError(f"{what} is cut short or damaged at byte {member.offset}; {AGAIN}")
        yield member
    # tarfile takes any block that is not a header for the end, which really is a block of zeros.
    file: Any = tar.fileobj
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE) or file.tell() > stop:
        raise UserError(f"{what} is cut short or damaged at byte {tar.offset}; {AGAIN}")


def basename(member: tarfile.TarInfo) -> str:
    """The last part of a member's name, printable on one line."""
    return printable(posixpath.basename(member.name))
