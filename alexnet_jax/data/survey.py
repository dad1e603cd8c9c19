"""One look at every image of a split before it is used: is it whole, and what are the statistics.

What a survey finds is kept in the cache folder, under a name that changes with the files.
"""

import concurrent.futures
import contextlib
import hashlib
import logging
import os
import pathlib
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from alexnet_jax.config import Data, Model, UserError, stored_size
from alexnet_jax.data import images, stream
from alexnet_jax.data.augment import Statistics
from alexnet_jax.data.sources import Source, Subset

log = logging.getLogger(__name__)

VERSION = "1"  # raised when the same files would give another survey
CHUNK = 64  # images a worker takes at a time
# What numpy and zipfile raise at a damaged file.
_DAMAGED = (
    OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error
)  # fmt: skip


class _Sums(NamedTuple):
    """Exact integers, so that no order of adding shows in the result."""

    pixels: np.ndarray  # (stored, stored, 3) int64, summed over images
    products: np.ndarray  # (3, 3) int64, of channels, summed over images and pixels
    broken: list[tuple[int, str]]  # index and message


def surveyed(source: Source, data: Data, model: Model) -> tuple[Source, Statistics]:
    """The whole images of `source`, and their statistics at the stored size of `model`."""
    return survey(source, stored_size(data, model), data.cache_dir, stream.workers(data))


def survey(
    source: Source, stored_size: int, cache_dir: str, workers: int
) -> tuple[Source, Statistics]:
    """The whole images of `source`, and their statistics at `stored_size`.

    Broken images are counted, named in a warning and left out.

    Raises:
      UserError: no class may lose all its images; the cache folder must be writable.
    """
    key = hashlib.sha256(f"{VERSION} {stored_size} {source.fingerprint}".encode()).hexdigest()
    path = pathlib.Path(cache_dir).expanduser() / "surveys" / f"{key[:32]}.npz"
    found = _kept(path)
    if found is None:
        with _writing(path.parent), tempfile.TemporaryFile(dir=path.parent):
            pass  # a refusal is better heard before the scan than after
        log.info("surveying %d images, once; kept in %s", len(source), path.parent)
        found = _statistics(_scan(source, stored_size, workers), len(source))
        _keep(path, found)
    broken = found.pop("broken")
    if len(broken):
        log.warning("%d of %d images are broken and left out:", len(broken), len(source))
        for message in found["messages"]:
            log.warning("  %s", message)
        whole = np.setdiff1d(np.arange(len(source)), broken)
        lost = np.setdiff1d(source.targets, source.targets[whole])
        if len(lost):
            raise UserError(f"class {source.labels[lost[0]]!r} has no image that can be read")
        source = Subset(source, whole, key)
    del found["messages"]
    return source, Statistics(**found)


def _scan(source: Source, stored_size: int, workers: int) -> _Sums:
    def chunk(start: int) -> _Sums:
        pixels = np.zeros((stored_size, stored_size, 3), np.int64)
        products = np.zeros((3, 3), np.int64)
        broken = []
        for index in range(start, min(start + CHUNK, len(source))):
            try:
                example = source.read(index)
            except OSError as error:
                raise UserError(
                    f"an image cannot be read ({error}); allow it or take it out"
                ) from error
            try:
                square = images.square(images.decode(example.data, example.name), stored_size)
            except images.ImageError as error:
                broken.append((index, str(error)))
                continue
            pixels += square
            flat = square.reshape(-1, 3).astype(np.float64)
            products += (flat.T @ flat).astype(np.int64)  # exact: below 2**53
        return _Sums(pixels, products, broken)

    total = chunk(len(source))  # of nothing
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    with pool, tqdm(total=len(source), unit="image", disable=None, leave=False) as bar:
        for part in pool.map(chunk, range(0, len(source), CHUNK)):
            total = _Sums(
                total.pixels + part.pixels,
                total.products + part.products,
                total.broken + part.broken,
            )
            bar.update(CHUNK)
    return total


def _statistics(sums: _Sums, num_examples: int) -> dict[str, np.ndarray]:
    count = num_examples - len(sums.broken)
    if count == 0:
        first = f", e.g. {sums.broken[0][1]}" if sums.broken else ""
        raise UserError(f"none of {num_examples} images can be read{first}")
    mean_image = sums.pixels / count
    num_pixels = count * mean_image.shape[0] ** 2
    mean = sums.pixels.sum(axis=(0, 1)) / num_pixels
    covariance = sums.products / num_pixels - np.outer(mean, mean)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    # Of one colour all over, a channel would divide by nothing; half a grey level stands in.
    std = np.sqrt(np.maximum(np.diag(covariance), 0.25))
    return {
        "mean_image": mean_image.astype(np.float32),
        "channel_std": std.astype(np.float32),
        "eigenvalues": np.maximum(eigenvalues, 0).astype(np.float32),
        "eigenvectors": eigenvectors.astype(np.float32),
        "broken": np.array([index for index, _ in sums.broken], np.int64),
        "messages": np.array([message for _, message in sums.broken], np.str_),
    }


def _kept(path: pathlib.Path) -> dict[str, np.ndarray] | None:
    """What an earlier survey found, if it is there and whole."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as kept:
            return {name: kept[name] for name in (*Statistics._fields, "broken", "messages")}
    except _DAMAGED as error:
        log.warning("%s is damaged (%s); surveying again", path, error)
        return None


def _keep(path: pathlib.Path, found: dict[str, np.ndarray]) -> None:
    with _writing(path.parent):
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            np.savez(file, allow_pickle=False, **found)
        os.replace(file.name, path)


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    """Makes the cache folder, and the disk's refusals the user's to resolve."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"data.cache_dir: {folder} cannot be written ({error}); set --config.data.cache_dir=DIR"
        ) from error
