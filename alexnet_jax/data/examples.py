"""What images and their labels come as, whatever they are read from."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from alexnet_jax.errors import UserError


class Example(NamedTuple):
    """One image as it is stored."""

    data: bytes | np.ndarray  # a file's bytes, or (h, w, 3) uint8 pixels
    label: int
    name: str  # for messages


class Source(Protocol):
    """One split of a data set, read by index from any thread."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names; an example's label is a place in them."""
        ...

    @property
    def words(self) -> tuple[str, ...]:
        """What the classes are called where labels are codes; else nothing."""
        ...

    @property
    def targets(self) -> np.ndarray:
        """(n,) int64, every example's label; may take a while where they lie with the images."""
        ...

    @property
    def fingerprint(self) -> str:
        """Text that is another when the examples may be."""
        ...

    @property
    def pool(self) -> str:
        """Text that is another when the examples that this split was drawn from are, or how.

        Nothing where the data came with its splits.
        """
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Example: ...

    def name(self, index: int) -> str:
        """The example's name, which may be told without reading it."""
        ...

    def take(self, indices: np.ndarray) -> "Source":
        """The examples at `indices`, (m,) int64, in their order."""
        ...


def check_labels(labels: Sequence[str]) -> None:
    """Raises UserError where a line of text cannot hold a label."""
    for label in labels:
        if "\n" in label or any("\ud800" <= character <= "\udfff" for character in label):
            raise UserError(
                f"class {label!r}: a name with a line break, or that is no UTF-8, cannot be kept "
                "in labels.txt; rename it"
            )


def taken(source: Source, indices: np.ndarray) -> str:
    """The fingerprint of the examples at `indices` of a source."""
    key = source.fingerprint.encode() + np.ascontiguousarray(indices, "<i8").tobytes()
    return hashlib.sha256(key).hexdigest()
