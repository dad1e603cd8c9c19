"""Prepared data: ArrayRecord shards of small squares, an index of their positions, a manifest.

A record is a label (int32, little-endian), the length of a name (uint16), the name, and the image:
a JPEG file or raw pixels. A shard is an ArrayRecord file that any reader of the format can read.
This module reads by index, with one system call per record: the library's own reader copies and
hashes every record again, which for raw pixels takes four times as long as everything else.
"""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import pathlib
import resource
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from alexnet_jax.data.examples import Example, NoSplitError, taken
from alexnet_jax.data.statistics import Statistics, read_statistics
from alexnet_jax.errors import UserError
from alexnet_jax.files import digest, read_arrays

log = logging.getLogger(__name__)

VERSION = 1
MANIFEST, LABELS, STATISTICS = "manifest.json", "labels.txt", "statistics.npz"
CLASSES = "classes.tsv"  # of ImageNet, with a devkit
CLASSES_HEAD = "wnid\tdevkit_id\tname"
_HEAD = struct.Struct("<iH")
# ArrayRecord files are Riegeli files: chunks, interrupted by a header at the start of each block.
_BLOCK, _BLOCK_HEADER = 1 << 16, 24
_CHUNK = struct.Struct("<8xQ8xQQ")  # size of the data; kind and number of records; decoded size
# The required fields of a manifest, and of its entries for a file and for a split.
_MANIFEST = {"sha256": str, "format": str, "quality": int, "size": int, "shard_size": int,
             "input": dict, "splits": dict, "files": dict}  # fmt: skip
_FILE = {"file": str, "bytes": int, "sha256": str}
_SPLIT = {"num_examples": int, "oddities": dict, "broken": list,
          "shards": [_FILE | {"num_examples": int}]}  # fmt: skip


class Index(NamedTuple):
    """Where the n records of a split lie."""

    shard: np.ndarray  # (n,) int32, index into the split's shards
    offset: np.ndarray  # (n,) int64, bytes from the shard's start to the record's own first byte
    length: np.ndarray  # (n,) int32, bytes, block headers not counted
    label: np.ndarray  # (n,) int32


@dataclasses.dataclass(frozen=True)
class Records:
    """One split of a prepared data set."""

    labels: tuple[str, ...]
    fingerprint: str
    size: int  # pixels a side of the squares
    raw: bool
    statistics: Statistics  # of the training split
    index: Index
    shards: "_Files"
    drawn_from: str = ""  # prepared data comes with its splits
    words: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.index.shard)

    @property
    def targets(self) -> np.ndarray:
        return self.index.label.astype(np.int64)

    def read(self, index: int) -> Example:
        """One image as it is stored.

        Raises:
          OSError: the shard is damaged or cannot be read.
        """
        shard, offset, length, target = (int(column[index]) for column in self.index)
        file = self.shards[shard]
        try:
            label, name, image = unpack(read_record(file, offset, length))
            if label != target:
                raise ValueError(f"label {label} in the record, {target} in the index")
            if self.raw:
                return Example(image.reshape(self.size, self.size, 3), label, name)
        except (OSError, ValueError, struct.error) as error:
            raise OSError(
                f"{self.shards.paths[shard]} is damaged at byte {offset} ({error}); see what else "
                "is by `python -m alexnet_jax.prepare --verify=DIR`"
            ) from error
        return Example(image.tobytes(), label, name)

    def name(self, index: int) -> str:
        return self.read(index).name

    def take(self, indices: np.ndarray) -> "Records":
        index = Index(*(column[indices] for column in self.index))
        return dataclasses.replace(self, index=index, fingerprint=taken(self, indices))


class _Files:
    """Files opened on first use; other processes open them again."""

    def __init__(self, paths: tuple[str, ...]):
        self.paths = paths
        self.opened: dict[int, int] = {}

    def __getitem__(self, number: int) -> int:
        """A file descriptor."""
        descriptor = self.opened.get(number)
        if descriptor is None:
            try:
                descriptor = os.open(self.paths[number], os.O_RDONLY)
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                raise OSError(
                    f"{self.paths[number]}: this process may open no more files, and has "
                    f"{len(self.opened)} shards open; raise `ulimit -n`, or prepare with a larger "
                    "--shard_size"
                ) from error
            kept = self.opened.setdefault(number, descriptor)
            if kept != descriptor:  # another thread was faster
                os.close(descriptor)
            descriptor = kept
        return descriptor

    def __reduce__(self):
        return _Files, (self.paths,)

    def __del__(self):
        for descriptor in self.opened.values():
            os.close(descriptor)


def pack(label: int, name: str, image: bytes) -> bytes:
    """The bytes of a record."""
    encoded = name.encode("utf-8", "surrogateescape")[-1000:]
    return _HEAD.pack(label, len(encoded)) + encoded + image


def unpack(record: np.ndarray) -> tuple[int, str, np.ndarray]:
    """Label, name and image of a record, (n,) uint8 -> image (m,) uint8, a view."""
    label, length = _HEAD.unpack(record[: _HEAD.size].tobytes())
    name = record[_HEAD.size : _HEAD.size + length].tobytes()
    return label, name.decode("utf-8", "replace"), record[_HEAD.size + length :]


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Write an ArrayRecord file, and return where its records lie: offsets (n,), lengths (n,).

    Raises:
      OSError: writing fails.
    """
    lengths = []
    try:
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for record in records:
            writer.write(record)
            lengths.append(len(record))
        writer.close()
    except RuntimeError as error:  # how the library reports a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
    with open(path, "rb") as file:
        found = list(_places(file.fileno(), len(lengths)))
    if [length for _, length in found] != lengths:
        raise RuntimeError(
            f"{path} is not laid out as this version of array_record did when this was written"
        )
    return np.array([o for o, _ in found], np.int64), np.array(lengths, np.int32)


def _places(file: int, count: int) -> Iterator[tuple[int, int]]:
    """Offset and length of each of the first `count` records of an ArrayRecord file.

    Every record is a chunk of its own: a chunk header, then data that ends with the record.
    """
    position = 64  # the file's signature is a chunk without data
    while count:
        start = _skipped(position, 0)
        size, kind, length = _CHUNK.unpack(read_record(file, start, _CHUNK.size).tobytes())
        if kind & 0xFF == ord("r"):
            data = _skipped(start, _CHUNK.size)
            yield _skipped(data, size - length), length
            count -= 1
        position = _skipped(_skipped(start, _CHUNK.size), size, landing=False)


def _skipped(position: int, size: int, landing: bool = True) -> int:
    """The position `size` bytes after `position`, not counting block headers.

    With `landing`, a block header at that position is skipped too.
    """
    if position % _BLOCK == 0:
        position += _BLOCK_HEADER
    room = _BLOCK - position % _BLOCK
    if size >= room:
        blocks, rest = divmod(size - room, _BLOCK - _BLOCK_HEADER)
        position += room + blocks * _BLOCK
        size = rest + (_BLOCK_HEADER if rest else 0)
    position += size
    return position + (_BLOCK_HEADER if landing and position % _BLOCK == 0 else 0)


def read_record(file: int, offset: int, length: int) -> np.ndarray:
    """The record of `length` bytes at `offset` of a file, (length,) uint8.

    In one system call, if the file system returns all that is asked for.

    Raises:
      OSError: the file ends before the record does.
    """
    record = np.empty(length, np.uint8)
    target = record.data
    done = min(_BLOCK - offset % _BLOCK, length)
    parts = [target[:done]]
    while done < length:
        more = min(_BLOCK - _BLOCK_HEADER, length - done)
        parts += [memoryview(bytearray(_BLOCK_HEADER)), target[done : done + more]]
        done += more
    left = sum(map(len, parts))
    while left:
        read = os.preadv(file, parts, offset)
        if read == 0:
            raise OSError("the shard ends within the record")
        offset, left = offset + read, left - read
        while left and read >= len(parts[0]):
            read -= len(parts.pop(0))
        parts[0] = parts[0][read:]
    return record


def open_records(directory: pathlib.Path, split: str) -> Records:
    """One split of a prepared directory.

    Raises:
      NoSplitError: the directory has no such split.
      UserError: the directory is not a prepared one, or its files differ from the manifest's.
    """
    manifest, text = read_manifest(directory)
    splits = manifest["splits"]
    if split not in splits:
        raise NoSplitError(
            f"records:{directory} has no split {split!r}; it has {', '.join(splits)}"
        )
    entries = splits[split]["shards"]
    _allow_open(len(entries))
    for entry in entries:
        problem = _wrong_size(directory, entry)
        if problem:
            raise UserError(f"records:{directory}: {problem}; prepare it again")
    small = {name: _whole(directory, entry) for name, entry in manifest["files"].items()}
    fingerprint = hashlib.sha256(f"{split} ".encode() + text).hexdigest()
    name = STATISTICS
    try:
        statistics = read_statistics(small[name], manifest["size"])
        name = LABELS
        # Not splitlines(), which takes a dozen characters for line ends.
        labels = tuple(small[name].read_bytes().decode("utf-8").split("\n")[:-1])
        name = CLASSES
        words = _words(small[name].read_bytes().decode("utf-8"), labels) if name in small else ()
        name = index_file(split)
        index = Index(**read_arrays(small[name], Index._fields))
        _check_index(index, splits[split], len(labels))
    except ValueError as error:
        raise UserError(f"records:{directory}: {name}: {error}; prepare it again") from error
    shards = _Files(tuple(str(directory / entry["file"]) for entry in entries))
    raw = manifest["format"] == "raw"
    size = manifest["size"]
    return Records(labels, fingerprint, size, raw, statistics, index, shards, words=words)


def _words(table: str, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Distinct names of the classes in words, from the text of CLASSES.

    The first of a class's synonyms; if that is ambiguous, all of them, or else the first and the
    label: ImageNet has a `maillot` beside a `maillot, tank suit`, and two cranes.
    """
    head, _, rows = table.partition("\n")
    found = [tuple(row.split("\t", 2)) for row in rows.split("\n")[:-1]]
    if head != CLASSES_HEAD or tuple(row[0] for row in found) != labels:
        log.warning("%s does not name the classes, and is not used", CLASSES)
        return ()
    every = [row[-1].strip() or row[0] for row in found]
    first = [names.split(",")[0] for names in every]
    times = collections.Counter(first), collections.Counter(every)
    return tuple(
        one if times[0][one] == 1 else names if times[1][names] == 1 else f"{one} ({label})"
        for one, names, label in zip(first, every, labels)
    )


def shard_file(split: str, number: int) -> str:
    return f"{split}-{number:05d}.array_record"


def index_file(split: str) -> str:
    return f"{split}.index.npz"


def _check_index(index: Index, split: dict[str, Any], num_classes: int) -> None:
    """Raises ValueError if a record lies outside its shard or a label has no class."""
    count, sizes = split["num_examples"], np.array([s["bytes"] for s in split["shards"]], np.int64)
    if any(column.shape != (count,) or column.dtype.kind != "i" for column in index):
        raise ValueError(f"it is not of {count} examples")
    bounds = {"shard": len(sizes), "label": num_classes}
    for name, bound in bounds.items():
        column = getattr(index, name)
        if count and not 0 <= column.min() <= column.max() < bound:
            raise ValueError(f"it names a {name} that is none of {bound}")
    inside = (index.offset >= 0) & (index.length >= _HEAD.size)
    if not np.all(inside & (index.offset <= sizes[index.shard] - index.length)):
        raise ValueError("a record lies outside its shard")


def _allow_open(count: int) -> None:
    """Let this process, and those it starts, open `count` more files, up to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def read_manifest(directory: pathlib.Path) -> tuple[dict[str, Any], bytes]:
    """The manifest of a prepared directory, and its bytes.

    Raises:
      UserError: it is missing, unreadable, of another version or was changed.
    """
    try:
        text = (directory / MANIFEST).read_bytes()
        manifest = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"records:{directory} holds no readable {MANIFEST} ({error}); "
            f"make it by `python -m alexnet_jax.prepare --input=... --output={directory}`"
        ) from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise UserError(
            f"records:{directory} is of version {version!r}, read is {VERSION}; prepare it again"
        )
    if not _is_whole(manifest):
        raise UserError(f"records:{directory}: {MANIFEST} was changed; prepare it again")
    return manifest, text


def _is_whole(manifest: dict[str, Any]) -> bool:
    """Whether it is unchanged, has all required fields, and names no file in another folder."""
    if not _fits(manifest, _MANIFEST):
        return False
    splits, files = manifest["splits"], manifest["files"]
    if not all(_fits(split, _SPLIT) for split in splits.values()):
        return False
    entries = [*files.values(), *(shard for split in splits.values() for shard in split["shards"])]
    return (
        {STATISTICS, LABELS, *map(index_file, splits)} <= files.keys()
        and all(_fits(entry, _FILE) for entry in entries)
        and all(entry["file"] == os.path.basename(entry["file"]) for entry in entries)
        and all(text.isprintable() for text in (*splits, *(entry["file"] for entry in entries)))
        and manifest["sha256"] == _seal(manifest)
    )


def _fits(value: Any, form: Any) -> bool:
    """Whether a JSON value has the fields of `form`, with their types; it may have others."""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(
            name in value and _fits(value[name], part) for name, part in form.items()
        )
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(item, form[0]) for item in value)
    return isinstance(value, form)


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of itself, so that changes are detected."""
    return {**manifest, "sha256": _seal(manifest)}


def _seal(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


def verify(directory: pathlib.Path) -> Iterator[str]:
    """Read every file of a prepared directory whole; yields its problem, with its name, or ""."""
    manifest, _ = read_manifest(directory)
    shards = [entry for split in manifest["splits"].values() for entry in split["shards"]]
    for entry in [*manifest["files"].values(), *shards]:
        try:
            yield _problem(directory, entry)
        except OSError as error:
            yield f"{entry['file']} cannot be read ({error.strerror})"


def _problem(directory: pathlib.Path, entry: dict[str, Any]) -> str:
    """What is wrong with a file of a prepared directory, which is read whole; "" if nothing is."""
    name, path = entry["file"], directory / entry["file"]
    problem = _wrong_size(directory, entry)
    if not problem and digest(path) != entry["sha256"]:
        return f"{name} has other bytes than were written: its SHA-256 differs"
    if not problem and "num_examples" in entry:
        count = ArrayRecordReader(str(path)).num_records()
        if count != entry["num_examples"]:
            return f"{name} has {count} records, not {entry['num_examples']}"
    return problem


def file_entry(path: pathlib.Path) -> dict[str, Any]:
    """The manifest's entry for a file."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest(path)}


def _wrong_size(directory: pathlib.Path, entry: dict[str, Any]) -> str:
    path = directory / entry["file"]
    if not path.is_file():
        return f"{entry['file']} is missing"
    size = path.stat().st_size
    return "" if size == entry["bytes"] else f"{path.name} has {size} bytes, not {entry['bytes']}"


def _whole(directory: pathlib.Path, entry: dict[str, Any]) -> pathlib.Path:
    """The path of a small file, after checking its size and checksum."""
    if problem := _problem(directory, entry):
        raise UserError(f"records:{directory}: {problem}; prepare it again")
    return directory / entry["file"]
