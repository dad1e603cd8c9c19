"""Grain: source -> batches, from any step on.

The stream is the concatenation of epoch permutations, and a batch is a stretch of it: batch n
holds positions [n * B, (n + 1) * B) whatever the machine. Each element of the Grain pipeline is a
whole batch, written once into its final buffer; its threads make batches side by side.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np

from alexnet_jax.config import Data
from alexnet_jax.data import augment, images
from alexnet_jax.data.augment import Statistics
from alexnet_jax.data.sources import Source

Batch = dict[str, np.ndarray]


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
    num_steps: int,
) -> Iterator[Batch]:
    """Batches start_step .. num_steps - 1 of the training stream, this process's rows.

    Args:
      statistics: of the training split; its mean image has the stored size.
      size: pixels a side of a crop.

    Yields:
      image (b, size, size, 3) uint8, cropped and mirrored; label (b,) int32; offset (b, 2) int32
      and mirror (b,) bool, how; shift (b, 3) float32, the colour noise to add; gain (b,) float32,
      to multiply by at the end.
    """
    stored = statistics.mean_image.shape[0]
    num_examples = len(source)

    def read_batch(step: int) -> Batch:
        start, count = step * rows.batch_size + rows.local.start, len(rows.local)
        draws = augment.draw(seed, start, count, stored - size, data)
        noisy = np.full(count, data.colour_noise > 0)
        if data.colour_noise_epochs:
            noisy &= np.arange(start, start + count) < data.colour_noise_epochs * num_examples
        shift = augment.colour_shift(draws.colour, statistics, data.colour_noise)
        divisor = 1 + data.colour_noise if data.colour_noise_divides else 1
        batch = {
            "image": np.empty((count, size, size, 3), np.uint8),
            "label": np.empty(count, np.int32),
            "offset": draws.offset,
            "mirror": draws.mirror,
            "shift": np.where(noisy[:, None], shift, 0).astype(np.float32),
            "gain": np.where(noisy, 1 / divisor, 1).astype(np.float32),
        }
        for row, index in enumerate(examples_at(seed, start, count, num_examples)):
            example = source.read(int(index))
            square = images.square(images.decode(example.data, example.name), stored)
            augment.crop(square, draws.offset[row], draws.mirror[row], batch["image"][row])
            batch["label"][row] = example.label
        return batch

    return _pipeline(read_batch, start_step, num_steps, data)


def evaluation_batches(source: Source, data: Data, *, stored: int, rows: Rows) -> Iterator[Batch]:
    """Every example once, in the source's order, the last batch padded.

    Yields:
      image (b, stored, stored, 3) uint8, the stored squares; label (b,) int32; valid (b,) bool,
      False for padding.
    """
    num_examples = len(source)

    def read_batch(step: int) -> Batch:
        first = step * rows.batch_size
        batch = {
            "image": np.zeros((len(rows.local), stored, stored, 3), np.uint8),
            "label": np.zeros(len(rows.local), np.int32),
            "valid": np.array([first + row < num_examples for row in rows.local]),
        }
        for place in np.flatnonzero(batch["valid"]):
            example = source.read(first + rows.local[int(place)])
            pixels = images.decode(example.data, example.name)
            batch["image"][place] = images.square(pixels, stored)
            batch["label"][place] = example.label
        return batch

    return _pipeline(read_batch, 0, -(-num_examples // rows.batch_size), data)


def _pipeline(read_batch, start: int, stop: int, data: Data) -> Iterator[Batch]:
    options = grain.ReadOptions(num_threads=workers(data), prefetch_buffer_size=data.prefetch)
    batches = grain.MapDataset.range(start, stop).map(read_batch)
    with contextlib.closing(iter(batches.to_iter_dataset(options))) as ready:  # ends its threads
        yield from ready


def workers(data: Data) -> int:
    """Threads that read and decode."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux; containers give fewer than there are
    return data.workers or (len(allowed(0)) if allowed else os.cpu_count() or 1)
