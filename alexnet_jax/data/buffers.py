"""The memory that batches are written into, by threads or by other processes.

Fresh memory costs as much as what is written into it, so all of it is used again.
"""

import mmap
import os
import tempfile
import threading
import time

import numpy as np

_WORD = np.dtype(np.int64)


class Images:
    """The pixels of batches in the making, each begun by whichever thread comes first.

    A batch's memory is used again when nobody holds the batch, or a view of it, any more.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self.making: dict[int, np.ndarray] = {}
        self.free: list[np.ndarray] = []
        self.lock = threading.Lock()

    def __call__(self, step: int) -> np.ndarray:
        """Those of a step's batch, uint8."""
        with self.lock:
            if step not in self.making:
                memory = self.free.pop() if self.free else np.empty(self.shape, np.uint8)
                self.making[step] = np.asarray(_Lent(memory, self.free))
            return self.making[step]

    def take(self, step: int) -> np.ndarray:
        """The same when they are made; they belong to the caller then."""
        image = self(step)
        del self.making[step]
        return image


class _Lent:
    """What an array and all views of it hold on to; it gives their memory back when they go."""

    def __init__(self, memory: np.ndarray, owner: list[np.ndarray]):
        self.memory, self.owner = memory, owner
        self.__array_interface__ = memory.__array_interface__

    def __del__(self):
        self.owner.append(self.memory)


class Slots:
    """Memory shared with the processes this is sent to, in slots that pieces take in turn.

    Piece n is written into slot n % count by one process, once `done` says that the piece which
    had the slot before was copied out of it, and copied out by the one that made this, in order.
    Not in /dev/shm, which is small in containers, and where too much is a crash.
    """

    def __init__(self, count: int, shape: tuple[int, ...], path: str = ""):
        self.count, self.shape = count, shape
        size = _WORD.itemsize + count * int(np.prod(shape))
        self.descriptor = -1
        if not path:
            if hasattr(os, "memfd_create"):  # Linux
                self.descriptor = os.memfd_create("alexnet_jax")
                path = f"/proc/{os.getpid()}/fd/{self.descriptor}"
            else:
                self.descriptor, path = tempfile.mkstemp(prefix="alexnet_jax-")
            os.ftruncate(self.descriptor, size)
        self.path = path
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), size)
        self.done = np.frombuffer(memory, _WORD, 1)  # pieces that were copied
        self.memory = np.frombuffer(memory, np.uint8, offset=_WORD.itemsize)
        self.memory = self.memory.reshape(count, *shape)

    def __reduce__(self):
        return Slots, (self.count, self.shape, self.path)

    def free(self, number: int) -> np.ndarray:
        """The slot of a piece, waited for; for the process that writes it."""
        while self.done[0] + self.count <= number:
            time.sleep(0.0005)
        return self.memory[number % self.count]

    def copy(self, number: int, out: np.ndarray) -> None:
        """A written piece, whose slot is free afterwards; pieces are to be copied in order."""
        out[:] = self.memory[number % self.count][: len(out)]
        self.done[0] = number + 1

    def close(self) -> None:
        """Nobody waits any more."""
        self.done[0] = np.iinfo(_WORD).max // 2
        os.close(self.descriptor)
        if not self.path.startswith("/proc/"):
            os.unlink(self.path)
