"""Any input -> records: decoded, made square and stored once, as in the paper, by many processes.

The input is cut into portions, each of which becomes one shard. A shard and the facts about it
are kept in OUTPUT.partial, the latter as a journal entry whose existence means that both are
complete, so a run that was killed resumes with the portions that have no entry. When all are done
the manifest is written and the data folder is renamed to OUTPUT, atomically.
"""

import collections
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from tqdm import tqdm

from alexnet_jax.data import images, native, records, workers
from alexnet_jax.data.examples import Portion, check_labels
from alexnet_jax.data.images import ImageError
from alexnet_jax.data.inputs import Input
from alexnet_jax.data.sources import Folder
from alexnet_jax.data.statistics import Sums
from alexnet_jax.errors import FailedError, UserError, reason
from alexnet_jax.files import digest, read_arrays, synced, write_arrays, write_text

log = logging.getLogger(__name__)

ODDITIES = ("greyscale", "cmyk", "misnamed", "rotated")
PLAN, PLAN_TMP = "plan.json", "plan.json.tmp"


class BrokenImagesError(FailedError):
    """More images were broken than allowed."""


class Settings(NamedTuple):
    """What determines the output, besides the input."""

    format: str  # jpeg or raw
    quality: int  # of jpeg
    size: int  # pixels a side
    shard_size: int  # images


def prepare(
    given: Input,
    output: pathlib.Path,
    settings: Settings,
    *,
    num_workers: int,
    allow_broken: int,
) -> dict[str, Any]:
    """Write `output`, resume writing it, or find it done; return its manifest.

    Raises:
      UserError: the output exists and is something else, or is being made from another input or by
        another process.
      BrokenImagesError: more than `allow_broken`.
      OSError: reading or writing fails.
    """
    partial = output.with_name(output.name + ".partial")
    data, journal = partial / "data", partial / "journal"
    check_labels(given.labels)
    _check_partial(partial)
    if output.is_dir() and not any(output.iterdir()):
        _check_replaceable(output)
    elif output.exists():
        manifest = _already(output, given, settings)
        _remove(partial)  # left by a run killed at its very end
        return manifest
    for folder in (data, journal):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        _check_plan(partial / PLAN, given, settings)
        native.available()  # compiled here once, before the workers need it
        with workers.Pool(write_shard, num_workers) as pool, _progress_bar(given) as bar:
            entries = _write_shards(given, data, journal, settings, pool, bar)
        broken = [name for split in entries.values() for e in split for name in _journal(e).broken]
        if len(broken) > allow_broken:
            raise BrokenImagesError(
                f"{len(broken)} broken images, {allow_broken} allowed: {'; '.join(broken[:20])}"
                f"{'; ...' if len(broken) > 20 else ''}. Leave them out by "
                f"--allow_broken={len(broken)}, for which what was prepared is kept in {partial}; "
                "or replace them, remove that folder, and begin again"
            )
        manifest = _finish(given, data, entries, settings)
        synced(data)
        os.rename(data, output)
        synced(output.parent)
        _remove(partial)
    return manifest


def _write_shards(
    given: Input,
    data: pathlib.Path,
    journal: pathlib.Path,
    settings: Settings,
    pool: workers.Pool,
    bar: tqdm,
) -> dict[str, list[pathlib.Path]]:
    """Write all shards; the journal entries of every split, in order."""
    entries: dict[str, list[pathlib.Path]] = {split: [] for split in given.splits}
    kept = len(list(journal.glob("*.npz")))
    if kept:
        log.info("going on: %d shards are there already", kept)
    for split in given.splits:
        for number, portion in enumerate(given.portions(split, settings.shard_size)):
            entry = journal / f"{split}-{number:05d}.npz"
            entries[split].append(entry)
            shard = data / records.shard_file(split, number)
            if not (entry.exists() and shard.exists()):
                weight = given.units(portion) / len(portion)
                pool.submit(portion, shard, entry, settings, split == "train", weight)
            elif _journal(entry).fingerprint == portion.fingerprint:
                bar.update(given.units(portion))
            else:
                raise UserError(
                    f"{entry.stem} was prepared from other bytes than the input has now; "
                    f"remove {journal.parent} to begin again"
                )
            pool.wait(2 * pool.count, bar.update)
    pool.wait(0, bar.update)
    bar.update(given.total - bar.n)  # tar headers and padding
    return entries


class _Entry(NamedTuple):
    """The facts about a shard."""

    fingerprint: str  # of the portion it holds
    sha256: str
    oddities: dict[str, int]
    broken: list[str]
    offset: np.ndarray
    length: np.ndarray
    label: np.ndarray
    sums: Sums


def write_shard(
    portion: Portion,
    shard: pathlib.Path,
    entry: pathlib.Path,
    settings: Settings,
    summed: bool,
    weight: float,
    progress: workers.Progress,
) -> None:
    """Write one shard and its journal entry, each whole or not at all. Runs in a worker.

    Args:
      portion: its images.
      shard, entry: paths to write.
      summed: whether its pixels count for the statistics.
      weight: units of progress per image.

    Raises:
      OSError: reading or writing fails.
    """
    sums, labels, broken = Sums(settings.size), [], []
    oddities: collections.Counter[str] = collections.Counter()

    def packed() -> Iterator[bytes]:
        for index in range(len(portion)):
            try:
                example = portion.read(index)
                square = images.square(images.decode(example.data, example.name), settings.size)
                found = images.oddities(example)
            except ImageError as error:
                broken.append(str(error).encode("utf-8", "backslashreplace").decode())
            else:
                image, seen = _encoded(square, settings)
                if summed:
                    sums.add(seen)
                oddities.update(found)
                labels.append(example.label)
                yield records.pack(example.label, _stored_name(portion, example.name), image)
            progress.value += weight

    partial = shard.with_name(f"{shard.name}.tmp")
    offset, length = records.write_shard(partial, packed())
    synced(partial)
    facts = {
        "fingerprint": portion.fingerprint,
        "sha256": digest(partial),
        "oddities": {name: oddities[name] for name in ODDITIES},
        "broken": broken,
        "count": sums.count,
    }
    os.replace(partial, shard)
    synced(shard.parent)
    write_arrays(
        entry,
        sync=True,
        facts=np.array(json.dumps(facts)),
        offset=offset,
        length=length,
        label=np.array(labels, np.int32),
        pixels=sums.pixels if summed else np.zeros(0, np.int64),
        products=sums.products,
    )


def _stored_name(portion: Portion, name: str) -> str:
    """CLASS/FILE of a folder's image, so that the folder's location is not stored."""
    return "/".join(pathlib.PurePath(name).parts[-2:]) if isinstance(portion, Folder) else name


def _encoded(square: np.ndarray, settings: Settings) -> tuple[bytes, np.ndarray]:
    """The bytes stored for a square, and the pixels that will be read from them."""
    if settings.format == "raw":
        return square.tobytes(), square
    data = simplejpeg.encode_jpeg(square, settings.quality, "RGB", "420")
    return data, simplejpeg.decode_jpeg(data, "RGB")


def _journal(entry: pathlib.Path) -> _Entry:
    sums = Sums(0)
    try:
        arrays: dict[str, Any] = read_arrays(
            entry, ("facts", "pixels", "products", "offset", "length", "label")
        )
        facts = json.loads(str(arrays.pop("facts")))
        sums.count = facts.pop("count")
        sums.pixels, sums.products = arrays.pop("pixels"), arrays.pop("products")
        return _Entry(**facts, **arrays, sums=sums)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{entry} is damaged ({error}); remove {entry.parent} to begin again"
        ) from error


def _finish(
    given: Input, data: pathlib.Path, entries: Mapping[str, list[pathlib.Path]], settings: Settings
) -> dict[str, Any]:
    """Write the files beside the shards, the manifest last."""
    total = Sums(settings.size)
    splits = {}
    for split, paths in entries.items():
        columns: list[list[np.ndarray]] = []
        shards, broken, oddities = [], [], collections.Counter[str]()
        for number, path in enumerate(paths):
            entry = _journal(path)
            count = len(entry.label)
            shard = np.full(count, number, np.int32)
            columns.append([shard, entry.offset, entry.length, entry.label])
            oddities.update(entry.oddities)
            broken += entry.broken
            if split == "train":
                total.merge(entry.sums)
            file = data / records.shard_file(split, number)
            shards.append(
                {
                    "file": file.name,
                    "num_examples": count,
                    "bytes": file.stat().st_size,
                    "sha256": entry.sha256,
                }
            )
        index = records.Index(*(np.concatenate(column) for column in zip(*columns)))
        if split == "train":
            _check_classes(given.labels, index.label)
        write_arrays(data / records.index_file(split), sync=True, **index._asdict())
        splits[split] = {
            "num_examples": len(index.shard),
            "oddities": {name: oddities[name] for name in ODDITIES},
            "broken": broken,
            "shards": shards,
        }
    write_arrays(data / records.STATISTICS, sync=True, **total.statistics()._asdict())
    texts = {records.LABELS: "".join(f"{label}\n" for label in given.labels), **given.files()}
    for name, text in texts.items():
        (data / name).write_text(text, encoding="utf-8")
    manifest = {
        "version": records.VERSION,
        **settings._asdict(),
        "input": given.describe() | {"sha256": given.digests},
        "splits": splits,
        "files": {
            name: records.file_entry(data / name)
            for name in (*texts, records.STATISTICS, *map(records.index_file, splits))
        },
    }
    known = {shard["file"] for split in splits.values() for shard in split["shards"]}
    for path in data.iterdir():
        if path.name not in known | set(manifest["files"]):  # left by a killed worker
            path.unlink()
    for name in manifest["files"]:
        synced(data / name)
    manifest = records.sealed(manifest)
    write_text(data / records.MANIFEST, json.dumps(manifest, indent=1) + "\n", sync=True)
    return manifest


def _progress_bar(given: Input) -> tqdm:
    return tqdm(
        total=given.total,
        unit=given.unit,
        unit_scale=True,
        desc="preparing",
        disable=None,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
        "[{elapsed}<{remaining}, {rate_fmt}]",
    )


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes of this host out of the folder until the context or process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"another process is writing {folder}; wait for it, or stop it") from error
    except OSError as error:  # a file system without locks
        log.warning(
            "%s cannot be locked (%s); start no second process that writes it",
            folder, error.strerror,
        )  # fmt: skip
    try:
        yield
    finally:
        os.close(descriptor)


def _check_classes(labels: Sequence[str], found: np.ndarray) -> None:
    """Raises UserError if a class has lost all its training images."""
    for label, count in zip(labels, np.bincount(found, minlength=len(labels))):
        if count == 0:
            raise UserError(
                f"class {label!r} has no training image that can be read; replace its images, or "
                "take the class out"
            )


def _check_partial(partial: pathlib.Path) -> None:
    """Raises UserError if the folder holds files but no plan of ours."""
    files = (path for path in partial.rglob("*") if not path.is_dir() and path.name != PLAN_TMP)
    if not (partial / PLAN).exists() and any(files):
        raise UserError(
            f"{partial} would be written and then removed, but holds files of yours; move it away, "
            "or choose another --output"
        )


def _check_replaceable(empty: pathlib.Path) -> None:
    """Raises UserError if an empty output folder has to stay, such as a mount point."""
    aside = empty.with_name(f"{empty.name}.{secrets.token_hex(8)}")
    try:
        os.rename(empty, aside)
        os.rename(aside, empty)
    except FileNotFoundError:  # another process looks at the same time
        pass
    except OSError as error:
        raise UserError(
            f"--output={empty} cannot be replaced ({error.strerror}); name a folder in it"
        ) from error


def _remove(partial: pathlib.Path) -> None:
    """Remove what a run leaves, the plan last: a folder without one is not taken for ours."""
    if partial.is_dir():
        for folder in ("data", "journal"):
            shutil.rmtree(partial / folder, ignore_errors=True)
        for name in (PLAN_TMP, PLAN):
            (partial / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody put other files there
            partial.rmdir()


def _check_plan(path: pathlib.Path, given: Input, settings: Settings) -> None:
    """Writes the plan, or raises UserError if an existing one is for something else."""
    fingerprint = hashlib.sha256(given.fingerprint().encode()).hexdigest()
    plan = settings._asdict() | {"input": given.kind, "fingerprint": fingerprint}
    if not path.exists():
        write_text(path, json.dumps(plan), sync=True)
        return
    try:
        old = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({reason(error)}); remove {path.parent} to begin again"
        ) from error
    changes = _changes(old | {"fingerprint": fingerprint}, plan)
    if changes:
        changes = f"with another input, or other settings ({changes})"
    elif old != plan:
        changes = "with another input, or other files in it"
    if changes:
        raise UserError(
            f"{path.parent} was begun {changes}; choose another --output, or remove it to begin "
            "again"
        )


def _already(output: pathlib.Path, given: Input, settings: Settings) -> dict[str, Any]:
    """The manifest of an output that exists already.

    Raises:
      UserError: it is from another input or other settings, or not prepared data at all.
    """
    if not (output / records.MANIFEST).is_file():
        raise UserError(f"--output={output} exists and is no prepared data; choose another")
    manifest, _ = records.read_manifest(output)
    old = {name: manifest[name] for name in settings._asdict()} | manifest["input"]
    new = settings._asdict() | given.describe()
    changes = _changes(old, new)
    if changes:
        raise UserError(
            f"--output={output} holds another input, or other settings ({changes}); choose another"
        )
    log.info(
        "%s is prepared already, from files of these names and sizes; --verify=%s reads every byte "
        "again", output, output,
    )  # fmt: skip
    return manifest


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """How `new` differs from `old`, in words."""
    pairs = ((name, old.get(name), value) for name, value in new.items())
    return ", ".join(f"{name}: {was} -> {value}" for name, was, value in pairs if was != value)
