"""Threads and processes that read images: how many, of which kind, and how they end."""

import multiprocessing
import os
import signal
import threading

from alexnet_jax.config import Data


def count(asked: int) -> int:
    """How many: those asked for, or, if 0, one for each core this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux; containers give fewer than there are
    return asked or (len(allowed(0)) if allowed else os.cpu_count() or 1)


def kind(data: Data) -> str:
    """`threads` or `processes`.

    Decoding and copying leave the interpreter to other threads; reading TFDS does not.
    """
    if data.worker_kind != "auto":
        return data.worker_kind
    return "processes" if data.source.startswith("tfds:") else "threads"


def live_with_parent() -> None:
    """Have this process leave Ctrl-C to the one that started it, and end when that does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()  # however it ends
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
