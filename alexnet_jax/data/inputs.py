"""Inputs to prepare: ImageNet's tars, image folders, TFDS data sets, the built-in shapes.

Every kind has `labels`, `splits`, their `total` size in `unit`s (for the progress bar) and the
`digests`, SHA-256, of tars read whole, by split.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from alexnet_jax.config import Data, from_dict
from alexnet_jax.data import imagenet, records, sources
from alexnet_jax.data.examples import NoLabelsError, NoSplitError, Portion, Source
from alexnet_jax.errors import UserError
from alexnet_jax.files import expanded

log = logging.getLogger(__name__)


class SourceInput:
    """A folder, a TFDS data set or the built-in shapes, with whatever splits it has."""

    unit = "image"

    def __init__(self, data: Data):
        self.kind, _, name = data.source.partition(":")
        self.name = name if self.kind == "tfds" else ""  # a folder's location does not matter
        self.folder = expanded(name).resolve() if self.kind == "folder" else None
        self.digests: dict[str, str] = {}
        self.sources: dict[str, Source] = {}
        for split in ("train", "validation", "test"):
            try:
                self.sources[split] = sources.find_source(data, split)
            except (NoSplitError, NoLabelsError):
                if split == "train":
                    raise
                log.info("no %s split", split)
        self.splits = tuple(self.sources)
        self.labels = self.sources["train"].labels
        self.total = sum(len(source) for source in self.sources.values())

    def describe(self) -> dict[str, Any]:
        """The description that goes into the manifest."""
        return {
            "kind": self.kind,
            "name": self.name,
            "num_examples": {split: len(source) for split, source in self.sources.items()},
            "listing": _listing(self.sources.values()),
        }

    def fingerprint(self) -> str:
        """Changes whenever the input may have changed."""
        return " ".join(source.fingerprint for source in self.sources.values())

    def portions(self, split: str, count: int) -> Iterator[Portion]:
        """The examples of a split in order, `count` at a time, each with its own fingerprint."""
        source = self.sources[split]
        for first in range(0, len(source), count):
            yield source.take(np.arange(first, min(first + count, len(source))))

    def units(self, portion: Portion) -> int:
        return len(portion)

    def files(self) -> dict[str, str]:
        """Names and contents of further small files."""
        return {}


def _listing(splits: Iterable[Source]) -> str:
    """SHA-256 of what is known of splits without reading images, wherever they are stored."""
    state = hashlib.sha256()
    for source in splits:
        if not isinstance(source, sources.Folder):
            state.update(source.fingerprint.encode())
            continue
        state.update(repr(source.labels).encode())
        for path, target in zip(source.paths, source.targets):
            line = f"{target} {os.path.basename(path)} {os.path.getsize(path)}\n"
            state.update(os.fsencode(line))
    return state.hexdigest()


class ImageNetInput:
    """The tars of ILSVRC2012, hashed while read and checked at the end of each."""

    kind, unit = "imagenet", "B"
    splits: tuple[str, ...] = ("train", "validation")

    def __init__(self, tars: imagenet.Tars, official: bool):
        if official:
            imagenet.check_sizes(tars)
        self.tars, self.official = tars, official
        self.classes = imagenet.read_classes(tars)
        self.targets = imagenet.validation_targets(tars, self.classes)
        self.labels = self.classes.labels
        self.sizes = {split: path.stat().st_size for split, path in tars.splits.items()}
        self.total = sum(self.sizes.values())
        self.digests: dict[str, str] = {}

    def describe(self) -> dict[str, Any]:
        """As `SourceInput`, for all of these."""
        devkit = self.tars.devkit is not None
        return {
            "kind": self.kind,
            "official": self.official,
            "devkit": devkit,
            "bytes": self.sizes,
        }

    def fingerprint(self) -> str:
        # The portions' own fingerprints cover the contents; --unofficial may be given later.
        about = self.describe() | {"official": None}
        return f"{about} {self.labels} {self.targets.tolist()} {self.files()}"

    def portions(self, split: str, count: int) -> Iterator[Portion]:
        targets = self.targets if split == "validation" else None
        scan = imagenet.Scan(self.tars.splits[split], split, self.classes, targets, count)
        yield from scan
        if self.official:
            imagenet.check_digest(split, scan.sha256)
        self.digests[split] = scan.sha256

    def units(self, portion: Portion) -> int:
        return int(portion.sizes.sum()) if isinstance(portion, imagenet.Members) else 0

    def files(self) -> dict[str, str]:
        """The classes' devkit numbers and names in words, where there is a devkit."""
        if self.classes.names is None or self.classes.devkit_ids is None:
            return {}
        rows = zip(self.labels, self.classes.devkit_ids, self.classes.names)
        lines = [f"{label}\t{number}\t{' '.join(name.split())}\n" for label, number, name in rows]
        return {records.CLASSES: f"{records.CLASSES_HEAD}\n{''.join(lines)}"}


Input = SourceInput | ImageNetInput


def open_input(
    text: str, *, official: bool, split: Sequence[str], tfds_dir: str, cache_dir: str
) -> Input:
    """The input that `--input` names: ImageNet's tars or their folder, images, TFDS or shapes.

    Args:
      official: whether tars must be the published ones.
      split: parts for a folder or data set that comes without splits.

    Raises:
      UserError: it is none of these, or incomplete.
    """
    kind, _, rest = text.partition(":")
    if kind in ("shapes", "tfds"):
        source = text
    else:
        where = rest if kind == "folder" else text
        if "," not in where and not os.path.exists(expanded(where)):
            raise UserError(f"--input={text}: no such file or folder, nor tfds:NAME or shapes")
        tars = imagenet.find(where)
        if tars is not None:
            return ImageNetInput(tars, official)
        source = f"folder:{where}"
    try:
        parts = [int(part) for part in split]
    except ValueError as error:
        raise UserError(f"--split={','.join(split)}: must be whole numbers, as 6,2,2") from error
    asked = {"source": source, "split": parts, "tfds_dir": tfds_dir, "cache_dir": cache_dir}
    return SourceInput(from_dict({"data": asked}).data)
