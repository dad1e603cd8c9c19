"""Images that stay on the devices, for data that fits.

A training split is cropped and mirrored there: each step sends only indices, labels, and what was
drawn for augmentation. A validation split stays as it arrives in the first pass.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_jax.config import Data
from alexnet_jax.data import stream
from alexnet_jax.data.examples import Source
from alexnet_jax.errors import UserError
from alexnet_jax.mesh import put_everywhere
from alexnet_jax.train.step import DeviceBatch

READ_AT_ONCE = 256  # images
SHARE = 0.6  # of a device's memory, at most; the rest is for the net

Finish = Callable[[dict[str, Array]], dict[str, Array]]


def load(source: Source, data: Data, stored: int, size: int, mesh: Mesh) -> Finish:
    """Put every image's stored square, uint8, on every device.

    Args:
      stored, size: pixels a side of a stored square, and of a crop.

    Returns:
      A function that, in a batch of `stream.train_batches` without pixels, sharded over mesh axis
      `data`, replaces `index` by `image`, (b, size, size, 3) uint8.

    Raises:
      UserError: the squares do not fit on a device.
    """
    check_fits((len(source), stored, stored, 3), memory(mesh))
    count = -(-len(source) // READ_AT_ONCE) * READ_AT_ONCE  # the last part is padded
    make, write = _filling((count, stored, stored, 3), mesh)
    squares = make()
    rows = stream.Rows(READ_AT_ONCE, range(READ_AT_ONCE))
    batches = stream.evaluation_batches(source, data, stored=stored, rows=rows)
    with contextlib.closing(batches):
        for first, batch in zip(range(0, count, READ_AT_ONCE), batches, strict=True):
            part = put_everywhere(batch["image"], mesh)
            squares = write(squares, part, np.int32(first))
            part.block_until_ready()  # or parts would pile up in transfer
    cut = make_cut(mesh, size)

    def finish(batch: dict[str, Array]) -> dict[str, Array]:
        rest = {name: values for name, values in batch.items() if name != "index"}
        return {"image": cut(squares, batch["index"], batch["offset"], batch["mirror"]), **rest}

    return finish


def _filling(
    shape: tuple[int, ...], mesh: Mesh
) -> tuple[Callable[[], Array], Callable[[Array, Array, np.int32], Array]]:
    """Functions that make an array of zeros on every device, and write rows of it in place."""

    def write(whole: Array, part: Array, first: np.int32) -> Array:
        return lax.dynamic_update_slice_in_dim(whole, part, first, axis=0)

    everywhere = NamedSharding(mesh, P())
    make = jax.jit(lambda: jnp.zeros(shape, jnp.uint8), out_shardings=everywhere)
    return make, jax.jit(write, donate_argnums=0, out_shardings=everywhere)


class Batches:
    """Batches on the devices, sent anew in every iteration, or only in the first if they `stay`."""

    def __init__(self, send: Callable[[], Iterable[DeviceBatch]], stay: bool):
        self.send, self.stay = send, stay
        self.kept: list[DeviceBatch] = []

    def __iter__(self) -> Iterator[DeviceBatch]:
        if self.kept:
            yield from self.kept
            return
        sent = []
        for batch in self.send():
            if self.stay:
                sent.append(batch)
            yield batch
        self.kept = sent  # all of them, not what an interrupted iteration saw


def memory(mesh: Mesh) -> int | None:
    """Bytes of the smallest device of this process; None if they do not say."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in mesh.local_devices]
    return min((limit for limit in limits if limit), default=None)


def fits(shape: tuple[int, ...], limit: int | None) -> bool:
    """Whether uint8 squares of `shape` take at most SHARE of a device's `limit` bytes."""
    return limit is None or math.prod(shape) <= SHARE * limit


def check_fits(shape: tuple[int, ...], limit: int | None) -> None:
    """Raises UserError unless the squares fit."""
    if limit is not None and not fits(shape, limit):
        needed = math.prod(shape)
        raise UserError(
            f"data.on_device: {shape[0]:,} squares of {shape[1]} pixels a side take "
            f"{needed / 1e9:.1f} GB, more than {SHARE:.0%} of a device's {limit / 1e9:.1f}; "
            "set --config.data.on_device=False"
        )


def make_cut(mesh: Mesh, size: int) -> Callable[[Array, Array, Array, Array], Array]:
    """(squares on every device; index, offset, mirror split over `data`) -> crops split likewise.

    (n, stored, stored, 3), (b,), (b, 2), (b,) -> (b, size, size, 3).
    """

    def local_cut(squares: Array, index: Array, offset: Array, mirror: Array) -> Array:
        def one(index: Array, offset: Array, mirror: Array) -> Array:
            start = (index, offset[0], offset[1], np.int32(0))
            window = lax.dynamic_slice(squares, start, (1, size, size, 3))[0]
            return jnp.where(mirror, window[:, ::-1], window)  # (s, s, 3)

        return jax.vmap(one)(index, offset, mirror)  # (b, s, s, 3)

    specs = (P(), P("data"), P("data"), P("data"))
    return jax.jit(jax.shard_map(local_cut, mesh=mesh, in_specs=specs, out_specs=P("data")))
