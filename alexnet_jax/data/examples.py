"""What all sources of images and labels have in common."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from alexnet_jax.errors import UserError


class NoSplitError(UserError):
    """A data set does not have the split asked for; nothing is wrong with it otherwise."""


class NoLabelsError(UserError):
    """A data set has the split, but without labels."""


class Example(NamedTuple):
    """One image as it is stored."""

    data: bytes | np.ndarray  # a file's bytes, or (h, w, 3) uint8 pixels
    label: int
    name: str  # for messages


class Portion(Protocol):
    """Some examples, read by index in any thread or process."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the examples may have changed."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Example: ...


class Source(Portion, Protocol):
    """One split of a data set."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names; an example's label is an index into them."""
        ...

    @property
    def words(self) -> tuple[str, ...]:
        """The classes' names in words where labels are codes; else empty."""
        ...

    @property
    def targets(self) -> np.ndarray:
        """(n,) int64, every example's label; slow where labels are stored with the images."""
        ...

    @property
    def drawn_from(self) -> str:
        """Changes whenever the examples that this split was drawn from, or the way of drawing, do.

        Empty where the data came with its splits.
        """
        ...

    def name(self, index: int) -> str:
        """The example's name, found without reading the example where possible."""
        ...

    def take(self, indices: np.ndarray) -> "Source":
        """The examples at `indices`, (m,) int64, in that order."""
        ...


def check_labels(labels: Sequence[str]) -> None:
    """Raises UserError if a label cannot be stored as one line of UTF-8 text."""
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
