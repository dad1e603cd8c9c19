"""ILSVRC2012 from its tars as downloaded: nothing is unpacked, images are read in place."""

import hashlib
import importlib.util
import io
import os
import pathlib
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np
import scipy.io

from alexnet_jax.data.tars import AGAIN, Members, basename, files, opened, reading
from alexnet_jax.errors import UserError, reason
from alexnet_jax.files import expanded

BLOCK_BYTES = 2**22  # read at a time
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
MAX_DEVKIT_BYTES = 2**26  # unpacked; packed, the official one has 2.5 MB
MATLAB_COMPRESSED = 15  # source: MAT-file format, version 5, table 1-1
SYNSETS = "data/meta.mat"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"


class Official(NamedTuple):
    """A tar as image-net.org distributes it. Source: tensorflow_datasets' checksums."""

    name: str
    size: int  # bytes
    sha256: str


OFFICIAL = {
    "train": Official(
        "ILSVRC2012_img_train.tar",
        147_897_477_120,
        "b08200a27a8e34218a0e58fde36b0fe8f73bc377f4acea2d91602057c3ca45bb",
    ),
    "validation": Official(
        "ILSVRC2012_img_val.tar",
        6_744_924_160,
        "c7e06a6c0baccf06d8dbeb6577d71efff84673a5dbdd50633ab44f8ea0456ae0",
    ),
}


class Tars(NamedTuple):
    """Paths of the downloads."""

    train: pathlib.Path
    validation: pathlib.Path
    devkit: pathlib.Path | None

    @property
    def splits(self) -> dict[str, pathlib.Path]:
        """The tars of images, by split."""
        return {"train": self.train, "validation": self.validation}


class Classes(NamedTuple):
    """The classes' names, all in the order of `labels`."""

    labels: tuple[str, ...]  # WNIDs, sorted: an image's label is an index into them
    names: tuple[str, ...] | None  # in words; None without a devkit
    devkit_ids: tuple[int, ...] | None  # ILSVRC2012_ID, which is in another order


def find(where: str) -> Tars | None:
    """The tars in a folder, or those listed; None if a folder has neither tar of images.

    Args:
      where: a folder that holds the tars under their official names; or the files themselves,
        comma-separated, told apart by `train`, `val` or `devkit` in a file's name.

    Raises:
      UserError: a tar is missing; a listed file is missing, of a kind listed twice or of none.
    """
    folder = expanded(where)
    if where and os.path.isdir(folder):
        names = {split: official.name for split, official in OFFICIAL.items()} | {"devkit": DEVKIT}
        paths = {kind: folder / name for kind, name in names.items()}
        found = {kind: path for kind, path in paths.items() if path.is_file()}
        if not OFFICIAL.keys() & found.keys():
            return None
    else:
        found = _listed(where)
    for split, official in OFFICIAL.items():
        if split not in found:
            raise UserError(
                f"{where!r} lacks the {split} tar, {official.name}; register at image-net.org and "
                "download it"
            )
    return Tars(found["train"], found["validation"], found.get("devkit"))


def _listed(where: str) -> dict[str, pathlib.Path]:
    found: dict[str, pathlib.Path] = {}
    words = {"train": "train", "val": "validation", "devkit": "devkit"}
    for entry in filter(None, map(str.strip, where.split(","))):
        path = expanded(entry)
        if not os.path.isfile(path):
            raise UserError(
                f"{entry!r}: no such file; give the ImageNet tars as image-net.org gives them to "
                "registered users, or their folder"
            )
        kinds = [kind for word, kind in words.items() if word in path.name.lower()]
        if len(kinds) != 1:
            raise UserError(
                f"{entry!r}: an ImageNet file is known by one of {', '.join(words)} in its name; "
                "rename it"
            )
        if kinds[0] in found:
            raise UserError(f"{found[kinds[0]]} and {path} are both for {kinds[0]}; list one")
        found[kinds[0]] = path
    return found


def check_sizes(tars: Tars) -> None:
    """Raises UserError if a tar is not of the official size, as after a broken download."""
    for split, path in tars.splits.items():
        with reading(path):
            size = path.stat().st_size
        _check(split, "bytes", size, OFFICIAL[split].size)


def check_digest(split: str, digest: str) -> None:
    """Raises UserError if the SHA-256 of a split's tar, in hex, is not the official one."""
    _check(split, "as its SHA-256", digest, OFFICIAL[split].sha256)


def _check(split: str, unit: str, found: int | str, expected: int | str) -> None:
    if found != expected:
        raise UserError(
            f"the {split} tar has {found} {unit}, {OFFICIAL[split].name} of image-net.org has "
            f"{expected}; {AGAIN}, or take it as it is with --unofficial"
        )


def read_classes(tars: Tars) -> Classes:
    """The classes of the training tar, from its headers alone, and their entries in the devkit.

    Raises:
      UserError: not a complete tar of class tars; a devkit that is damaged or lacks a class.
    """
    with opened(tars.train) as outer:
        labels = tuple(sorted(label for label, _ in _class_tars(outer, tars.train)))
    if tars.devkit is None:
        return Classes(labels, None, None)
    synsets = _synsets(tars.devkit)
    if unknown := [label for label in labels if label not in synsets]:
        raise UserError(
            f"class {unknown[0]!r} of {tars.train} is not in {tars.devkit}; use the devkit that "
            "belongs to the tars, or none"
        )
    ids, names = zip(*(synsets[label] for label in labels))
    return Classes(labels, names, ids)


def _synsets(devkit: pathlib.Path) -> dict[str, tuple[int, str]]:
    """WNID -> ILSVRC2012_ID and words of the classes, which are the synsets without children."""
    data = _devkit_file(devkit, SYNSETS)
    try:
        _check_unpacked(data)
        mat = io.BytesIO(data)
        table: Any = np.atleast_1d(scipy.io.loadmat(mat, squeeze_me=True)["synsets"])
        leaves = [row for row in table if int(row["num_children"]) == 0]
        found = {str(s["WNID"]): (int(s["ILSVRC2012_ID"]), str(s["words"])) for s in leaves}
    except Exception as error:  # on damaged data scipy and numpy may raise anything
        message = f"{devkit}, {SYNSETS} has no table of synsets ({reason(error)}); {AGAIN}"
        raise UserError(message) from error
    if not len(leaves) == len(found) == len({number for number, _ in found.values()}):
        raise UserError(f"{devkit}, {SYNSETS} has a class or a number twice; {AGAIN}")
    return found


def _check_unpacked(data: bytes) -> None:
    """Raises ValueError if compressed variables of a MATLAB file would exhaust memory."""
    place, order = 128, "<" if data[126:128] == b"IM" else ">"
    room = MAX_DEVKIT_BYTES
    while place + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, place)
        place += 8 + size
        if kind == MATLAB_COMPRESSED:
            packed = data[place - size : place]
            room -= len(zlib.decompressobj().decompress(packed, room + 1))
        if room < 0:
            raise ValueError(f"over {MAX_DEVKIT_BYTES:,} bytes unpacked")


def validation_targets(tars: Tars, classes: Classes) -> np.ndarray:
    """Every validation image's label, from the devkit or else from tensorflow_datasets.

    Returns:
      (n,) int64: entry k is the label of validation image number k + 1.

    Raises:
      UserError: there is no list, or it names a class that the training tar lacks.
    """
    if tars.devkit is not None and classes.devkit_ids is not None:
        origin, keys = f"{tars.devkit}, {GROUND_TRUTH}", map(str, classes.devkit_ids)
        data = _devkit_file(tars.devkit, GROUND_TRUTH)
    else:
        spec = importlib.util.find_spec("tensorflow_datasets")  # importing it takes a second
        package = ((spec and spec.submodule_search_locations) or ["tensorflow_datasets"])[0]
        origin = os.path.join(package, "datasets", "imagenet2012", "validation_labels.txt")
        if not os.path.isfile(origin):
            raise UserError(
                f"the validation tar has no labels, and there is no {origin}; install "
                f"tensorflow-datasets, or put {DEVKIT} beside the tars"
            )
        keys, data = classes.labels, pathlib.Path(origin).read_bytes()
    label_of = {key: label for label, key in enumerate(keys)}
    targets = []
    for number, line in enumerate(data.decode("ascii", "replace").rstrip().split("\n"), 1):
        if line.strip() not in label_of:
            raise UserError(
                f"{origin}, line {number}: {line[:40]!r} is none of the {len(label_of)} classes "
                f"of {tars.train}; use a list and a training tar that belong together"
            )
        targets.append(label_of[line.strip()])
    return np.array(targets, np.int64)


def _devkit_file(devkit: pathlib.Path, name: str) -> bytes:
    """The content of the devkit's file whose path ends in `name`."""
    with reading(devkit), open(devkit, "rb") as file:
        data = file.read(MAX_DEVKIT_BYTES + 1)
        if data.startswith(b"\x1f\x8b") and len(data) <= MAX_DEVKIT_BYTES:
            unpacker = zlib.decompressobj(wbits=31)
            data = unpacker.decompress(data, MAX_DEVKIT_BYTES + 1)
            if not unpacker.eof and len(data) <= MAX_DEVKIT_BYTES:
                raise EOFError("it ends too early")  # before the checksum of its bytes
        if len(data) > MAX_DEVKIT_BYTES:
            raise ValueError(f"over {MAX_DEVKIT_BYTES:,} bytes unpacked")
    with opened(devkit, io.BytesIO(data)) as tar:
        for member in files(tar, devkit, len(data)):
            if f"/{member.name}".endswith(f"/{name}"):
                return data[member.offset_data :][: member.size]
    raise UserError(f"{devkit} has no {name}; download {DEVKIT} again, or go without")


class _Image(NamedTuple):
    """Where an image lies in the tar."""

    name: str
    offset: int
    size: int
    target: int


class Scan:
    """One pass over a tar's bytes in order: portions of images, hashed on the way.

    Attributes:
      size: bytes of the tar.
      position: bytes hashed so far.
      sha256: of the whole file, in hex; empty until the iteration has ended.
    """

    def __init__(
        self, path: str | os.PathLike[str], split: str, classes: Classes,
        targets: np.ndarray | None, count: int,
    ):  # fmt: skip
        """Prepares a scan; iterating starts it.

        Args:
          path: the tar.
          split: `train`, a tar of class tars, or `validation`, a tar of images.
          classes: of the training tar.
          targets: (n,) int64, the label of validation image number k + 1; None for `train`.
          count: images per portion, at least 1.
        """
        self._path, self._labels, self._count = os.fspath(path), classes.labels, count
        self._targets = np.empty(0, np.int64) if targets is None else targets
        self._images = {"train": self._train, "validation": self._validation}[split]
        with reading(self._path):
            self.size = os.path.getsize(self._path)
        self.position, self.sha256 = 0, ""

    def __iter__(self) -> Iterator[Members]:
        """Portions of `count` images; the last has what is left.

        A portion's fingerprint is the SHA-256 of the tar's bytes up to its last image's end.

        Raises:
          UserError: the tar is incomplete, or not built as ImageNet's are.
        """
        state, portion, self.position, self.sha256 = hashlib.sha256(), [], 0, ""
        with reading(self._path), open(self._path, "rb", BLOCK_BYTES) as file:
            for image in self._images():
                # After each image, not each portion, so that the disk is read once, in blocks and
                # without jumps: the next header most often lies in a block that was just read.
                self._hash(file, state, image.offset + image.size)
                portion.append(image)
                if len(portion) == self._count:
                    yield self._members(portion, state.hexdigest())
                    portion = []
            if self.position == 0:
                raise UserError(f"{self._path} has no images; {AGAIN}")
            if portion:
                yield self._members(portion, state.hexdigest())
            self._hash(file, state, self.size)
            if os.fstat(file.fileno()).st_size != self.size:
                raise UserError(f"{self._path} has changed while it was read; let it become whole")
        self.sha256 = state.hexdigest()

    def _hash(self, file: IO[bytes], state: Any, stop: int) -> None:
        """Adds the bytes up to `stop` to the hash."""
        while self.position < stop:
            block = file.read(min(BLOCK_BYTES, stop - self.position))
            if not block:
                raise UserError(f"{self._path} has become shorter; {AGAIN}")
            state.update(block)
            self.position += len(block)

    def _members(self, portion: list[_Image], fingerprint: str) -> Members:
        names = tuple(image.name for image in portion)
        offsets, sizes, targets = np.array([image[1:] for image in portion], np.int64).T.copy()
        return Members(self._path, names, offsets, sizes, targets, fingerprint)

    def _train(self) -> Iterator[_Image]:
        label_of = {label: target for target, label in enumerate(self._labels)}
        with opened(self._path) as outer:
            for label, member in _class_tars(outer, self._path):
                if label not in label_of:
                    raise UserError(f"{self._path} has class {label!r} anew; leave it as it is")
                what, empty = f"{self._path}, {label}.tar", True
                # Opened in place, a tar inside the tar gives offsets into the whole file.
                file: Any = outer.fileobj
                file.seek(member.offset_data)
                with opened(what, file) as inner:
                    for image in files(inner, what, member.offset_data + member.size):
                        name, empty = f"{label}/{basename(image)}", False
                        yield _Image(name, image.offset_data, image.size, label_of[label])
                if empty:
                    raise UserError(f"{what} has no images; {AGAIN} or take it out")

    def _validation(self) -> Iterator[_Image]:
        seen = np.zeros(len(self._targets) + 1, bool)
        with opened(self._path) as tar:
            for image in files(tar, self._path, self.size):
                name = basename(image)
                match = re.search(r"_([0-9]{1,18})\.jpe?g\Z", name, re.IGNORECASE)
                number = int(match[1]) if match else 0
                if not 1 <= number < len(seen):
                    raise UserError(
                        f"{self._path} has {name!r}: the name of a validation image should end in "
                        f"_NUMBER.JPEG, 1 to {len(seen) - 1}, which gives its label; take it out"
                    )
                if seen[number]:
                    raise UserError(f"{self._path} has number {number} twice; take {name!r} out")
                seen[number] = True
                target = int(self._targets[number - 1])
                yield _Image(name, image.offset_data, image.size, target)


def _class_tars(
    outer: tarfile.TarFile, path: str | os.PathLike[str]
) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Class name and header of every class tar, in the order of the training tar."""
    seen = set()
    for member in files(outer, path, os.path.getsize(path)):
        label, suffix = os.path.splitext(basename(member))
        if suffix != ".tar":
            raise UserError(
                f"{path} has {member.name!r}, but should hold nothing but a tar of each class, "
                "named CLASS.tar; take it out"
            )
        if label in seen:
            raise UserError(f"{path} has class {label!r} twice; take one out")
        seen.add(label)
        yield label, member
    if not seen:
        raise UserError(f"{path} has no class tars; {AGAIN}")
