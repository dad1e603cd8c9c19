"""Where images come from: folders, TFDS, prepared records, the built-in shapes."""

import dataclasses
import hashlib
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from alexnet_jax.config import Data
from alexnet_jax.data import images, records, shapes
from alexnet_jax.data.examples import (
    Example,
    NoLabelsError,
    NoSplitError,
    Source,
    check_labels,
    taken,
)
from alexnet_jax.errors import UserError, printable, reason
from alexnet_jax.files import expanded, writing

log = logging.getLogger(__name__)

DAMAGED = "if the file is damaged, build the data set again"
FOLDER_NAMES = {
    "train": ("train",),
    "validation": ("val", "validation", "valid"),
    "test": ("test",),
}


@dataclasses.dataclass(frozen=True)
class Folder:
    """Image files in class folders."""

    labels: tuple[str, ...]
    targets: np.ndarray
    fingerprint: str
    paths: tuple[str, ...]
    drawn_from: str = ""
    words: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Example:
        path = self.paths[index]
        return Example(read_file(path), int(self.targets[index]), path)

    def name(self, index: int) -> str:
        return self.paths[index]

    def take(self, indices: np.ndarray) -> "Folder":
        paths = tuple(self.paths[index] for index in indices)
        targets, fingerprint = self.targets[indices], taken(self, indices)
        return Folder(self.labels, targets, fingerprint, paths, self.drawn_from)


@dataclasses.dataclass(frozen=True)
class Tfds:
    """One split of a prepared TFDS data set, read without TensorFlow."""

    split: str  # with the data set, as tfds:NAME SPLIT; for messages
    labels: tuple[str, ...]
    fingerprint: str
    examples: Sequence[Any]  # dicts with image, encoded bytes, and label
    indices: np.ndarray  # (n,) int64, this source's among `examples`
    drawn_from: str = ""
    words: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def targets(self) -> np.ndarray:
        return np.array([self.read(index).label for index in range(len(self))])

    def read(self, index: int) -> Example:
        name = self.name(index)
        try:
            example = self.examples[int(self.indices[index])]
            return Example(bytes(example["image"]), int(example["label"]), name)
        except (RuntimeError, TypeError, ValueError) as error:
            raise OSError(f"{name} cannot be read ({reason(error)}); {DAMAGED}") from error

    def name(self, index: int) -> str:
        return f"{self.split}, {self.indices[index]}"

    def take(self, indices: np.ndarray) -> "Tfds":
        fingerprint = taken(self, indices)
        return dataclasses.replace(self, indices=self.indices[indices], fingerprint=fingerprint)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: it begins with a dot, or is a viewer's."""
    return name[0] == "." or name.lower() in ("thumbs.db", "desktop.ini")


def read_file(path: str) -> bytes:
    """An image file's bytes.

    Raises:
      ImageError: over MAX_BYTES.
      OSError: the file cannot be read; the message names it.
    """
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            size, parts, read = os.fstat(file).st_size, [], 0
            # Some file systems return less than asked for, and some files do not report their size.
            while size <= images.MAX_BYTES and (part := os.read(file, max(size - read, 1 << 16))):
                parts.append(part)
                read += len(part)
                size = max(size, read)
        finally:
            os.close(file)
        if size > images.MAX_BYTES:
            raise images.ImageError(
                f"{path}: has {size} bytes; at most {images.MAX_BYTES} are read"
            )
        return b"".join(parts)
    except OSError as error:
        message = f"{printable(path)} cannot be read ({error.strerror})"
        raise OSError(message) from error


def open_source(data: Data, split: str) -> Source:
    """As `find_source`, also in what it raises; a test split stands in for a missing validation."""
    try:
        return find_source(data, split)
    except NoSplitError as missing:
        if split != "validation":
            raise
        try:
            source = find_source(data, "test")
        except NoSplitError:
            raise NoSplitError(f"{missing}; a test split would stand in") from None
    log.info("%s has no validation split: its test split stands in", data.source)
    return source


def find_source(data: Data, split: str) -> Source:
    """The examples of one split, `train`, `validation` or `test`.

    Raises:
      NoSplitError: the data set has no such split.
      NoLabelsError: the split has no labels.
      UserError: there is no such data set or class.
    """
    if split not in FOLDER_NAMES:
        raise UserError(f"split {split!r}: must be one of {', '.join(FOLDER_NAMES)}")
    if data.source == "shapes":
        directory = shapes.shapes_directory(expanded(data.cache_dir))
        if not directory.exists():
            log.info("drawing the built-in shapes, once, into %s", directory)
        with writing(f"data.cache_dir={data.cache_dir!r}", "set --config.data.cache_dir=DIR"):
            shapes.write_shapes(directory)
        return _folder(directory, split, data)
    kind, _, name = data.source.partition(":")
    if kind == "tfds":
        return _tfds(name, split, data)
    if kind == "records":
        return records.open_records(expanded(name), split)
    return _folder(expanded(name), split, data)


def stratified(source: Folder | Tfds, split: str, data: Data) -> Source:
    """The part of `source` that `data.split` gives to `split`, drawn per class by `split_seed`.

    Raises:
      NoSplitError: that is none.
      UserError: a class has too few images to be split.
    """
    if not data.split[tuple(FOLDER_NAMES).index(split)]:
        raise NoSplitError(
            f"data.split={data.split} leaves nothing for {split}; give it a part or name the "
            "splits by folders"
        )
    rng = np.random.Generator(np.random.Philox(data.split_seed))
    targets, chosen = source.targets, []
    drawn_from = hashlib.sha256(repr((data.split, data.split_seed, source.labels)).encode())
    for index, target in enumerate(targets):
        drawn_from.update(os.fsencode(f"{target} {os.path.basename(source.name(index))}\n"))
    for label, name in enumerate(source.labels):
        order = rng.permutation(np.flatnonzero(targets == label))
        counts = [round(len(order) * part / sum(data.split)) for part in data.split[1:]]
        validation, test, train = np.split(order, np.cumsum(counts))
        parts = {"train": train, "validation": validation, "test": test}
        if any(len(parts[s]) == 0 for s, share in zip(parts, data.split) if share):
            raise UserError(
                f"class {name!r} has {len(order)} images: too few to split by "
                f"data.split={data.split}; add images or name the splits by folders"
            )
        chosen.append(parts[split])
    part = source.take(np.sort(np.concatenate(chosen)))
    return dataclasses.replace(part, drawn_from=drawn_from.hexdigest())


def _folder(root: pathlib.Path, split: str, data: Data) -> Source:
    if not root.is_dir():
        raise UserError(
            f"data.source=folder:{root}: no such folder; name one that holds train/CLASS/* and "
            "val/CLASS/*, or CLASS/*"
        )
    splits = {name for names in FOLDER_NAMES.values() for name in names}
    found = sorted(entry.name for entry in root.iterdir() if entry.name.lower() in splits)
    capitals = [name for name in found if name not in splits]
    if capitals:
        raise UserError(f"{root} has a folder {capitals[0]!r}; name it {capitals[0].lower()!r}")
    wanted, train = FOLDER_NAMES[split], root / "train"
    if not train.is_dir():
        if not found:
            return stratified(_class_folders(root, _class_names(root)), split, data)
        if split == "train" or not splits.issuperset(_class_names(root)):
            raise UserError(
                f"{root} has a folder {found[0]!r} but none named train; add it, or, if "
                f"{found[0]!r} is a class, put all classes into a folder {train}"
            )
    found = [root / name for name in wanted if (root / name).is_dir()]
    if len(found) > 1:
        raise UserError(f"{root} has both {found[0].name} and {found[1].name}; keep one of them")
    if not found:
        raise NoSplitError(
            f"{root} has no folder for split {split!r}: looked for {', '.join(wanted)}; add one, "
            "or leave only class folders, which are then split"
        )
    return _class_folders(found[0], _class_names(train if train.is_dir() else found[0]))


def _class_names(root: pathlib.Path) -> tuple[str, ...]:
    with os.scandir(root) as scan:
        entries = [entry for entry in scan if not is_hidden(entry.name)]
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise UserError(f"{entry.path} is a link to nothing; mend it, or take it away")
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise UserError(
            f"{root} has no class folders: it should hold one for each class, or train/ and val/ "
            "with them, as it must if a class is called train, val or test"
        )
    check_labels(names)
    return tuple(names)


def _class_folders(root: pathlib.Path, labels: tuple[str, ...]) -> Folder:
    unknown = set(_class_names(root)) - set(labels)
    if unknown:
        raise UserError(
            f"{root} has class {min(unknown)!r}, which the training split lacks; take its folder "
            "away, or give the class training images"
        )
    paths, targets, state = [], [], hashlib.sha256(repr(labels).encode())
    for target, label in enumerate(labels):
        if not (root / label).is_dir():
            continue
        with os.scandir(root / label) as scan:
            entries = sorted((e for e in scan if not is_hidden(e.name)), key=lambda e: e.name)
        folders = [entry.path for entry in entries if entry.is_dir()]
        if folders:
            first = printable(folders[0])
            log.warning("%d folders inside classes are not read: %s", len(folders), first)
        files = [entry for entry in entries if entry.is_file()]
        others = [entry.path for entry in entries if not (entry.is_file() or entry.is_dir())]
        if others:
            log.warning(
                "%d links to nothing, pipes or devices are not read: %s",
                len(others), ", ".join(map(printable, others[:20])),
            )  # fmt: skip
        if not files:
            raise UserError(f"{root / label} has no images; add some or remove the class folder")
        for entry in files:
            status = entry.stat()
            stamp = f"{label}/{entry.name} {status.st_size} {status.st_mtime_ns}"
            state.update(os.fsencode(stamp) + b"\n")
            paths.append(entry.path)
            targets.append(target)
    return Folder(labels, np.array(targets), state.hexdigest(), tuple(paths))


def _tfds(name: str, split: str, data: Data) -> Source:
    # Imported here: it takes a second, and most runs do not need it.
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    directory = str(expanded(data.tfds_dir)) if data.tfds_dir else None
    where = directory or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    try:  # from files alone: the data set's own code would try to download
        builder: Any = read_only_builder.builder_from_files(name, data_dir=directory)
    except (ValueError, OSError) as error:
        raise UserError(
            f"data.source=tfds:{name}: not found in {where}. {_tfds_way_out(name, where)}"
        ) from error
    splits, features = builder.info.splits, builder.info.features
    kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    if not all(key in features and isinstance(features[key], kinds[key]) for key in kinds):
        raise UserError(
            f"data.source=tfds:{name} has no features named image and label, an Image and a "
            f"ClassLabel; it has {', '.join(sorted(features))}"
        )
    if features["image"].np_dtype != np.uint8:
        raise UserError(
            f"data.source=tfds:{name} has images of {np.dtype(features['image'].np_dtype)}; only "
            "uint8 is read"
        )
    filled = [part for part, found in splits.items() if found.num_examples]
    alone = filled == ["train"]
    part = "train" if alone else split
    if part not in filled:
        raise NoSplitError(f"tfds:{name} has no split {split!r}; it has {', '.join(filled)}")
    try:
        skip: Any = tfds.decode.SkipDecoding
        examples = builder.as_data_source(part, decoders={"image": skip()})
    except NotImplementedError as error:
        raise UserError(
            f"data.source=tfds:{name} in {builder.data_dir} is not stored as array_record, which "
            f"reading without TensorFlow needs. {_tfds_way_out(name, where)}"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise OSError(f"tfds:{name} {part} cannot be read ({reason(error)}); {DAMAGED}") from error
    labels = tuple(features["label"].names)
    files = [(os.path.basename(path), os.stat(path)) for path in splits[part].filepaths]
    stamps = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
    key = f"{builder.info.full_name} {part} {len(examples)} {labels} {stamps}"
    every = np.arange(len(examples))
    source = Tfds(f"tfds:{builder.info.full_name} {part}", labels, key, examples, every)
    if len(source) and source.read(0).label < 0:
        raise NoLabelsError(f"tfds:{name}: split {part!r} comes without labels; use another")
    return stratified(source, split, data) if alone else source


def _tfds_way_out(name: str, where: str) -> str:
    """Advice: what to fetch, where to put it, and what runs without it."""
    build = (  # the command `tfds build` would also need apache-beam
        "with TensorFlow (`pip install -e '.[tfds-prepare]'`) run `python -c \"import "
        f"tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='{where}', "
        "file_format='array_record').download_and_prepare()\"`"
    )
    if name.partition(":")[0].partition("/")[0] == "imagenet2012":
        build = (
            "fetch ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from image-net.org into a "
            "folder DIR, run `python -m alexnet_jax.prepare --input=DIR --output=OUT` and train "
            f"with --config.data.source=records:OUT. Or put them into {where}/downloads/manual and "
            f"{build}"
        )
    return (
        f"{build[0].upper()}{build[1:]}; a finished data set elsewhere is named by "
        "--config.data.tfds_dir=DIR. Without any data, --config=configs/quickstart.py runs"
    )
