"""One pass over every image of a split before it is used: which are whole, and the statistics.

A survey's result is kept in the cache folder, under a name that changes with the files.
"""

import concurrent.futures
import functools
import hashlib
import logging
import pathlib
import threading

import numpy as np
from tqdm import tqdm

from alexnet_jax.config import Data, Model, stored_size
from alexnet_jax.data import images, workers
from alexnet_jax.data.examples import Source
from alexnet_jax.data.records import Records
from alexnet_jax.data.statistics import Statistics, Sums, read_statistics
from alexnet_jax.errors import UserError
from alexnet_jax.files import expanded, make_folder, read_arrays, write_arrays, writing

log = logging.getLogger(__name__)

VERSION = "3"  # to be raised when the same files would give another survey
CHUNK = 64  # images a worker takes at a time


def surveyed(source: Source, data: Data, model: Model) -> tuple[Source, Statistics]:
    """The whole images of `source`, and their statistics at the stored size of `model`.

    Prepared records were surveyed when they were made; the statistics are the training split's.

    Raises:
      UserError: there is no image.
    """
    size = stored_size(data, model)
    if not len(source):
        raise UserError(f"{data.source}: a split is without images; choose another, or add some")
    if isinstance(source, Records) and source.size == size:
        return source, source.statistics
    if isinstance(source, Records) and source.size < size:
        _say_enlarged(data.source, source.size, size)
    return survey(source, size, data.cache_dir, workers.count(data.workers))


@functools.cache  # once, not for every split
def _say_enlarged(name: str, size: int, wanted: int) -> None:
    log.warning(
        "%s: its squares of %d pixels are enlarged to %d; if the originals are larger, prepare "
        "with --size=%d", name, size, wanted, wanted,
    )  # fmt: skip


def survey(
    source: Source, stored_size: int, cache_dir: str, num_workers: int
) -> tuple[Source, Statistics]:
    """The whole images of `source`, and their statistics at `stored_size`.

    Broken images are counted, named in a warning and left out.

    Raises:
      UserError: a class has no whole image, or the cache folder cannot be written.
    """
    key = f"{VERSION} {images.decoders()} {stored_size} {source.fingerprint}"
    key = hashlib.sha256(key.encode()).hexdigest()
    path = expanded(cache_dir) / "surveys" / f"{key[:32]}.npz"
    found = _kept(path, stored_size, len(source))
    if found is None:
        written = f"data.cache_dir={cache_dir!r}", "set --config.data.cache_dir=DIR"
        make_folder(path.parent, *written)  # better to fail before the scan than after
        log.info("surveying %d images, once; kept in %s", len(source), path.parent)
        found = _found(*_scan(source, stored_size, num_workers))
        with writing(*written):
            write_arrays(path, sync=False, **found)
    broken = found.pop("broken")
    if len(broken):
        log.warning("%d of %d images are broken and left out:", len(broken), len(source))
        for message in found["messages"]:
            log.warning("  %s", message)
        log.warning("(remembered in %s; remove it to have them read again)", path)
        whole = np.setdiff1d(np.arange(len(source)), broken)
        lost = np.setdiff1d(source.targets, source.targets[whole])
        if len(lost):
            raise UserError(
                f"class {source.labels[lost[0]]!r} has no image that can be read; replace its "
                "images, or take the class out"
            )
        source = source.take(whole)
    del found["messages"]
    return source, Statistics(**found)


def _scan(source: Source, size: int, num_workers: int) -> tuple[Sums, list[tuple[int, str]]]:
    """The sums of the whole images; the indices of the broken ones, and why they are broken."""

    total, broken, one_at_a_time = Sums(size), [], threading.Lock()

    def chunk(first: int) -> None:
        sums, out = Sums(size), []
        for index in range(first, min(first + CHUNK, len(source))):
            try:
                example = source.read(index)
                sums.add(images.square(images.decode(example.data, example.name), size))
            except images.ImageError as error:
                out.append((index, str(error)))
        with one_at_a_time:  # not in order, for which a slow image would let results pile up
            total.merge(sums)
            broken.extend(out)

    pool = concurrent.futures.ThreadPoolExecutor(num_workers)
    with pool, tqdm(total=len(source), unit="image", disable=None, leave=False) as bar:
        for _ in pool.map(chunk, range(0, len(source), CHUNK)):
            bar.update(CHUNK)
    return total, sorted(broken)


def _found(sums: Sums, broken: list[tuple[int, str]]) -> dict[str, np.ndarray]:
    if sums.count == 0:
        first = f", e.g. {broken[0][1]}" if broken else ""
        raise UserError(f"none of {len(broken)} images can be read{first}; replace them")
    return {
        **sums.statistics()._asdict(),
        "broken": np.array([index for index, _ in broken], np.int64),
        "messages": np.array([message for _, message in broken], np.str_),
    }


def _kept(path: pathlib.Path, size: int, count: int) -> dict[str, np.ndarray] | None:
    """The result of an earlier survey, if there is one and it is undamaged."""
    if not path.exists():
        return None
    try:
        found = read_statistics(path, size)._asdict() | read_arrays(path, ("broken", "messages"))
        if not np.isin(found["broken"], np.arange(count)).all():
            raise ValueError(f"it is not of {count} images")
        return found
    except ValueError as error:
        log.warning("%s is damaged (%s); surveying again", path, error)
        return None
