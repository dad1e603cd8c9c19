"""What all sources of images and labels have in common."""

import hashlib
import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from alexnet_jax.errors import UserError

log = logging.getLogger(__name__)


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


def check_same_classes(
    trained: tuple[str, ...],
    given: tuple[str, ...],
    where: str,
    other: str = "the checkpoint",
    way_out: str = "use the data the net was trained for",
) -> None:
    """Raises UserError unless the classes `trained`, of `other`, and `given`, of `where`, agree."""
    if trained == given:
        return
    if len(trained) != len(given):
        detail = f"{len(given)} classes, {other} {len(trained)}"
    else:
        pairs = ((i, a, b) for i, (a, b) in enumerate(zip(given, trained)) if a != b)
        place, mine, theirs = next(pairs)
        detail = f"class {place} is {mine!r}, in {other} {theirs!r}"
    raise UserError(f"{where} has other classes: {detail}; {way_out}")


def warn_if_trained_on(drawing: str | None, source: Source, where: str, split: str) -> None:
    """Warn if a net may have been trained on images of `split`, drawn otherwise than its own.

    Args:
      drawing: the `drawn_from` of the split the net was trained on; None if unknown.
      source: a split of `where`, the data used now.
    """
    if split != "train" and drawing is not None and source.drawn_from != drawing:
        log.warning(
            "%s: images of its %s split may be among those trained on, which were drawn otherwise",
            where, split,
        )  # fmt: skip


def taken(source: Source, indices: np.ndarray) -> str:
    """The fingerprint of the examples at `indices` of a source."""
    key = source.fingerprint.encode() + np.ascontiguousarray(indices, "<i8").tobytes()
    return hashlib.sha256(key).hexdigest()
