"""Four virtual CPU devices, a shelf of compiled programs, and a few things many tests need.

All of it is set before JAX is first used, and in this process only: a test that starts the
program as a user does sets its own devices.
"""

import getpass
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

from alexnet_jax import config as configs

CACHE = pathlib.Path(tempfile.gettempdir()) / f"alexnet_jax_tests_{getpass.getuser()}"

jax.config.update("jax_num_cpu_devices", 4)
# The same HLO and less work for LLVM: a third of the time to compile a step.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def configured() -> Callable[..., configs.Config]:
    """(preset, {"section.field": value}) -> the resolved config."""

    def make(preset: str = "paper", values: dict[str, Any] | None = None) -> configs.Config:
        user = configs.blank()
        user.model.preset = preset
        for name, value in (values or {}).items():
            section, field = name.split(".")
            user[section][field] = value
        return configs.resolve(user)

    return make


@pytest.fixture(scope="session")
def difference() -> Callable[[Any, Any], float]:
    """(found, expected), two trees -> the largest difference of two leaves, relative to the
    largest number in the expected leaf."""

    def measure(found: Any, expected: Any) -> float:
        def one(a: Any, b: Any) -> float:
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert a.shape == b.shape
            assert np.isfinite(a).all()
            return float(np.abs(a - b).max() / np.abs(b).max())

        return max(jax.tree.leaves(jax.tree.map(one, found, expected)))

    return measure
