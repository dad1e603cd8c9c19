"""Grain pipeline from source to batches, starting at any step.

The stream is the concatenation of epoch permutations, and a batch is a stretch of it: batch n
holds the B positions from n * B on, whatever the machine (from `origin` + n * B where a run was
continued with another B). An element of the Grain pipeline is a piece of a batch, not a record, so
that its overhead is paid once for many rows. Grain's threads make the pieces, or each has a process
make them; pixels do not go through Grain: they are written into the batch itself.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from alexnet_jax.config import Data
from alexnet_jax.data import augment, buffers, images, native, workers
from alexnet_jax.data.examples import Source
from alexnet_jax.data.statistics import Statistics

PIECE = 128  # rows at most

Batch = dict[str, np.ndarray]
Batches = Generator[Batch, None, None]  # its close() ends the workers


class Rows(NamedTuple):
    """A process's share of every global batch."""

    batch_size: int  # global
    local: range  # the rows this process reads


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The order of one epoch, (n,) int64, a function of (seed, epoch)."""
    key = np.array([seed, augment.ORDER_STREAM + (epoch << 8)], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(num_examples)


def examples_at(seed: int, start: int, count: int, num_examples: int) -> np.ndarray:
    """Indices of the examples at stream positions start .. start + count - 1, (count,) int64."""
    positions = np.arange(start, start + count)
    epochs = positions // num_examples
    indices = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        order = permutation(seed, int(epoch), num_examples)
        indices[here] = order[positions[here] - epoch * num_examples]
    return indices


def train_batches(
    source: Source,
    statistics: Statistics,
    data: Data,
    *,
    seed: int,
    size: int,
    rows: Rows,
    start_step: int,
    stop_step: int,
    origin: int = 0,
    pixels: bool = True,
) -> Batches:
    """Batches start_step .. stop_step - 1 of the training stream, this process's rows.

    Args:
      statistics: of the training split; its mean image has the stored size.
      size: pixels a side of a crop.
      origin: the position at which batch 0 would begin.
      pixels: False yields `index` instead of images, for `resident`.

    Yields:
      image (b, size, size, 3) uint8, cropped and mirrored, or without pixels index (b,) int32 into
      the source; label (b,) int32; offset (b, 2) int32 and mirror (b,) bool, of the crop; shift
      (b, 3) float32, the colour noise to add; gain (b,) float32, a factor to apply last.
    """
    stored, num_examples = statistics.stored_size, len(source)

    def drawn(step: int, local: range) -> tuple[np.ndarray, Batch]:
        """The indices of the examples, and how each is augmented."""
        start, count = origin + step * rows.batch_size + local.start, len(local)
        draws = augment.draw(seed, start, count, stored - size, data)
        noisy = np.full(count, data.colour_noise > 0)
        if data.colour_noise_epochs:
            noisy &= np.arange(start, start + count) < data.colour_noise_epochs * num_examples
        shift = augment.colour_shift(draws.colour, statistics, data.colour_noise)
        divisor = 1 + data.colour_noise if data.colour_noise_divides else 1
        return examples_at(seed, start, count, num_examples), {
            "offset": draws.offset,
            "mirror": draws.mirror,
            "shift": np.where(noisy[:, None], shift, 0).astype(np.float32),
            "gain": np.where(noisy, 1 / divisor, 1).astype(np.float32),
        }

    def read(step: int, local: range, image: np.ndarray) -> Batch:
        indices, how = drawn(step, local)
        label = np.empty(len(local), np.int32)
        asked = zip(indices.tolist(), how["offset"].tolist(), how["mirror"].tolist())
        for row, one in enumerate(asked):
            label[row] = _read(source, stored, *one, image[row])
        return {"label": label, **how}

    def without_pixels() -> Batches:
        targets = source.targets.astype(np.int32)
        for step in steps:
            indices, how = drawn(step, rows.local)
            yield {"index": indices.astype(np.int32), "label": targets[indices], **how}

    steps = range(start_step, stop_step)
    return _batches(read, rows.local, size, steps, data) if pixels else without_pixels()


def evaluation_batches(source: Source, data: Data, *, stored: int, rows: Rows) -> Batches:
    """Every example once, in the source's order, the last batch padded.

    Yields:
      image (b, stored, stored, 3) uint8, the stored squares; label (b,) int32; valid (b,) bool,
      False for padding.
    """
    num_examples = len(source)

    def read(step: int, local: range, image: np.ndarray) -> Batch:
        places = step * rows.batch_size + np.array(local)
        valid, label = places < num_examples, np.zeros(len(local), np.int32)
        image[~valid] = 0
        for row in np.flatnonzero(valid):
            label[row] = _read(source, stored, int(places[row]), (0, 0), False, image[row])
        return {"label": label, "valid": valid}

    return _batches(read, rows.local, stored, range(-(-num_examples // rows.batch_size)), data)


def _read(
    source: Source,
    stored: int,
    index: int,
    offset: Sequence[int],
    mirror: bool,
    out: np.ndarray,
) -> int:
    """Write a crop of an example's stored square into `out`; return its label."""
    example = source.read(index)
    pixels = images.decode(example.data, example.name, fleeting=True)
    images.crop(pixels, stored, offset, mirror, out)
    return example.label


# (step, rows of the global batch, output for their pixels) -> the batch's other arrays
ReadPiece = Callable[[int, range, np.ndarray], Batch]


def _batches(read: ReadPiece, local: range, side: int, steps: range, data: Data) -> Batches:
    """The batches of `steps`, whose pixels are (len(local), side, side, 3) uint8."""
    pieces = [local[first : first + PIECE] for first in range(0, len(local), PIECE)]
    places = [slice(piece.start - local.start, piece.stop - local.start) for piece in pieces]
    shape = (len(local), side, side, 3)
    count, ahead = workers.count(data.workers), data.prefetch * len(pieces)
    if workers.kind(data, len(steps) * len(local)) == "processes":
        memory = buffers.Slots(-(-max(ahead, count) // len(pieces)), shape)
    else:
        memory = buffers.Images(shape)

    def element(number: int) -> Batch:
        """Make a piece; its pixels are written into the batch's memory."""
        turn, place = divmod(number, len(pieces))
        return read(steps[turn], pieces[place], memory(turn)[places[place]])

    make = element
    with contextlib.ExitStack() as stack:
        if isinstance(memory, buffers.Slots):
            native.available()  # compiled here once, before the workers need it
            stack.enter_context(contextlib.closing(memory))
            make = stack.enter_context(workers.elsewhere(element, count))
        numbers = grain.MapDataset.range(len(steps) * len(pieces))
        options = grain.ReadOptions(num_threads=count, prefetch_buffer_size=max(ahead, count))
        pipeline = iter(numbers.map(make).to_iter_dataset(options))
        arriving = stack.enter_context(contextlib.closing(pipeline))
        for turn in range(len(steps)):
            parts = [next(arriving) for _ in pieces]
            yield {"image": memory.take(turn)} | {
                name: np.concatenate([part[name] for part in parts]) for name in parts[0]
            }
