"""Shared by the benchmarks: timing, the precision of products, and keeping what was found."""

import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

from alexnet_jax.files import write_text

DTYPES = ("float32", "tf32", "bfloat16")
LEAST = 0.03  # seconds timed as one, enough that what a device's queue hides does not matter


def array_type(dtype: str) -> str:
    """The array type of products in `dtype`."""
    return "bfloat16" if dtype == "bfloat16" else "float32"


def set_precision(dtype: str) -> str:
    """Make JAX multiply in `dtype`; returns the arrays' type.

    A GPU multiplies float32 as TF32, JAX's default there, or in full precision. A CPU has no TF32.
    """
    import jax

    if dtype == "float32" and jax.default_backend() == "gpu":
        jax.config.update("jax_default_matmul_precision", "highest")
    return array_type(dtype)


def keep(path: pathlib.Path | None, found: Any) -> None:
    """Write what was found so far, where --json says; whole, whenever this process is ended."""
    if path:
        write_text(path, json.dumps(found, indent=1))


class Work:
    """Something to time: a call that may return before its work is done, and what waits for it.

    If calls are short, several are sent ahead and timed as one, as in training, which does not wait
    for each step either. `alone` waits for each call, as on a CPU, where one would otherwise run
    beside the next. `rest` releases what the others may need.
    """

    def __init__(
        self,
        call: Callable[[], Any],
        wait: Callable[[Any], Any],
        alone: bool = False,
        rest: Callable[[], None] = lambda: None,
    ):
        self.call, self.wait, self.alone, self.rest, self.count = call, wait, alone, rest, 1

    def warm(self) -> None:
        """Compile, and determine how many calls are timed as one."""
        times: list[float] = []
        while len(times) < 3 or (len(times) < 10 and sum(times[2:]) < 0.5):
            times.append(self.seconds())
        self.count = min(1000, max(1, round(LEAST / min(times))))
        self.rest()

    def seconds(self) -> float:
        """Mean seconds per call, over `count` calls."""
        started = time.perf_counter()
        for _ in range(self.count):
            found = self.call()
            if self.alone:
                self.wait(found)
        self.wait(found)
        return (time.perf_counter() - started) / self.count

    def median(self, seconds: float) -> float:
        """Median of at least three such means, taken for at least `seconds`."""
        times, started = [], time.perf_counter()
        while len(times) < 3 or time.perf_counter() - started < seconds:
            times.append(self.seconds())
        self.rest()
        return statistics.median(times)
