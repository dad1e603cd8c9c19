"""How fast a batch of images reaches the device: at once, in parts, from page-locked memory.

  python benchmarks/copies.py [--batch 1024] [--size 224] [--rounds 5] [--json FILE]

The batches lie in memory shared between processes, as the reading processes leave them, and are
taken in turn, one ahead of the one that is waited for, as in training. XLA copies an array to
page-locked memory, in one thread, and from there to the device; arrays sent together each have
their own thread. Parts are joined on the device. Mapped memory is page-locked beforehand
(`client.dma_map`), and sent directly. Prints medians of rounds in which all ways take turns. On a
CPU nothing is sent "at once": it only shows that this works.
"""

import argparse
import collections
import functools
import mmap
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import timing

SLOTS = 4  # batches in memory
PARTS = (4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    shape = (options.batch, options.size, options.size, 3)
    ways = {"at once": (jax.device_put, slots(shape))}
    ways |= {f"in {n} parts": (functools.partial(in_parts, n), slots(shape)) for n in PARTS}
    mapped, failed = slots(shape), {}
    try:
        jax.devices()[0].client.dma_map(mapped.ctypes.data, mapped.nbytes)
        ways["mapped"] = (jax.device_put, mapped)
    except Exception as reason:  # whatever a backend raises that cannot
        failed["mapped"] = str(reason).splitlines()[0]
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, options.rounds):  # the first touches memory for the first time
        for name, (send, memory) in ways.items():
            found = options.batch / seconds(send, memory)
            if turn >= 0:
                rates[name].append(found)
    print(f"batches of {shape}, on {jax.devices()[0].device_kind}\n")
    print("| way | images/s | lowest | highest | GB/s |\n|---|---|---|---|---|")
    for name, values in rates.items():
        middle = statistics.median(values)
        bandwidth = middle * np.prod(shape[1:]) / 1e9
        cells = (middle, min(values), max(values))
        print(f"| {name} | {' | '.join(f'{cell:,.0f}' for cell in cells)} | {bandwidth:.1f} |")
    for name, reason in failed.items():
        print(f"| {name} | failed: {reason} | | | |")
    timing.keep(options.json, {"rates": rates, "failed": failed})


def slots(shape: tuple[int, ...]) -> np.ndarray:
    """(SLOTS, *shape) of random bytes, in shared memory."""
    memory = np.frombuffer(mmap.mmap(-1, SLOTS * int(np.prod(shape))), np.uint8)
    memory = memory.reshape(SLOTS, *shape)
    memory[:] = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return memory


def in_parts(count: int, batch: np.ndarray) -> jax.Array:
    return join(jax.device_put(np.array_split(batch, count)))


@jax.jit
def join(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(parts)


def seconds(send: Callable[[np.ndarray], jax.Array], memory: np.ndarray) -> float:
    """Per batch, over at least half a second."""
    arriving: collections.deque[jax.Array] = collections.deque()
    started = time.perf_counter()
    for count, batch in enumerate(turns(memory)):
        arriving.append(send(batch))
        if len(arriving) > 1:
            arriving.popleft().block_until_ready()
        spent = time.perf_counter() - started
        if count >= SLOTS and spent > 0.5:
            arriving.pop().block_until_ready()  # or it would slow the next way down
            return spent / count
    raise AssertionError


def turns(memory: np.ndarray) -> Iterator[np.ndarray]:
    while True:
        yield from memory


if __name__ == "__main__":
    main()
