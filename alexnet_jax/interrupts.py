"""Ctrl-C and SIGTERM around a command, from its first import on: never lost, no traceback."""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any


def at_once() -> None:
    """Have Ctrl-C end this process at once until `heard`: it could be lost while JAX is imported.

    To be called by a command before its other imports. A process that ignores Ctrl-C goes on to.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    if os.getpid() == 1:  # in a container, where Linux drops signals that have no handler
        signal.signal(signal.SIGTERM, _leave)


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt again, and raised once more if Python swallowed it."""
    before = sys.unraisablehook
    sys.unraisablehook = functools.partial(_sent_again, otherwise=before)
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.getpid() == 1:
            signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        sys.unraisablehook = before


def _leave(number: int, frame: object) -> None:
    os._exit(128 + number)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def _sent_again(ignored: Any, otherwise: Callable[[Any], object]) -> None:
    """Re-sends a signal that Python swallowed, as in a garbage-collector callback of JAX."""
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        number = (*getattr(ignored.exc_value, "args", ()), signal.SIGINT)[0]
        main = threading.main_thread().ident
        threading.Timer(0.01, signal.pthread_kill, (main, number)).start()
    else:
        otherwise(ignored)
