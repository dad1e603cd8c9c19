"""The memory that batches are written into, by threads or by other processes.

Fresh memory costs as much as writing into it, so all memory is reused.
"""

import functools
import itertools
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable

import numpy as np

LENT = 5  # batches held at once: one arriving, those of three steps under way, one let go of since
LONGEST_PAUSE = 0.01  # seconds; waiting must not slow down those that work
HELD = -1
_WORD = np.dtype(np.int64)


class Images:
    """Pixel buffers of batches in progress, each allocated by whichever thread comes first.

    A buffer is reused once nobody holds its batch, or a view of it.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self.making: dict[int, np.ndarray] = {}
        self.free: list[np.ndarray] = []
        self.lock = threading.Lock()

    def __call__(self, turn: int) -> np.ndarray:
        """The buffer of batch `turn`, uint8."""
        with self.lock:
            if turn not in self.making:
                memory = self.free.pop() if self.free else np.empty(self.shape, np.uint8)
                self.making[turn] = np.asarray(
                    _Lent(memory, functools.partial(self.free.append, memory))
                )
            return self.making[turn]

    def take(self, turn: int) -> np.ndarray:
        """The buffer of batch `turn` when it is finished; it then belongs to the caller."""
        image = self(turn)
        del self.making[turn]
        return image


class _Lent:
    """The base object of an array and all its views; calls `give_back` when they are gone.

    Until then `give_back` keeps their memory alive.
    """

    def __init__(self, memory: np.ndarray, give_back: Callable[[], object]):
        self.give_back = give_back
        self.__array_interface__ = memory.__array_interface__

    def __del__(self):
        self.give_back()


class Slots:
    """Memory shared with the processes this is sent to, in slots that batches take in turn.

    Batch n is written into its slot, its rows by several processes; batches are assigned slots in
    order, as these become free. The process that made this takes the batches. Up to LENT of them
    stay in their slots until nobody holds them; beyond that, a batch is copied.
    Not in /dev/shm: containers keep it small, and overfilling it crashes.
    """

    def __init__(self, ahead: int, shape: tuple[int, ...], path: str = ""):
        """For `ahead` batches in progress; `path` is that of existing memory to share, if any."""
        self.ahead, self.shape, count = ahead, shape, ahead + LENT
        words = -(-count // 8) * 8  # the pixels after them begin at a multiple of 64 bytes
        size = words * _WORD.itemsize + count * int(np.prod(shape))
        made = not path
        if made:
            self.file = _File()
            path = self.file.path
            os.ftruncate(self.file.descriptor, size)
        self.path = path
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), size)
        self.owner = np.frombuffer(memory, _WORD, count)
        self.memory = np.frombuffer(memory, np.uint8, offset=words * _WORD.itemsize)
        self.memory = self.memory.reshape(count, *shape)
        if made:
            self.owner[:] = range(count)  # the batch of each slot, or HELD
            self.coming = itertools.count(count)

    def __reduce__(self):
        return Slots, (self.ahead, self.shape, self.path)

    def __call__(self, number: int) -> np.ndarray:
        """Wait for the slot of a batch and return it; for the processes that write the batch."""
        pause = 0.0005
        while not len(found := np.flatnonzero(self.owner == number)):
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        return self.memory[found[0]]

    def take(self, number: int) -> np.ndarray:
        """A batch that is fully written; batches must be taken in order."""
        slot = int(np.flatnonzero(self.owner == number)[0])
        if np.count_nonzero(self.owner == HELD) == LENT:
            copy = self.memory[slot].copy()
            self._give_back(slot)
            return copy
        self.owner[slot] = HELD
        return np.asarray(_Lent(self.memory[slot], functools.partial(self._give_back, slot)))

    def _give_back(self, slot: int) -> None:
        self.owner[slot] = next(self.coming)

    def close(self) -> None:
        """Call once all processes this was sent to have opened it or ended; held batches stay."""
        self.file.close()


class _File:
    """A file that other processes open by its path; on Linux anonymous memory (memfd)."""

    def __init__(self):
        if hasattr(os, "memfd_create"):  # Linux
            self.descriptor = os.memfd_create("alexnet_jax")
            self.path = f"/proc/{os.getpid()}/fd/{self.descriptor}"
        else:
            self.descriptor, self.path = tempfile.mkstemp(prefix="alexnet_jax-")

    def close(self) -> None:
        os.close(self.descriptor)
        if not self.path.startswith("/proc/"):
            os.unlink(self.path)
