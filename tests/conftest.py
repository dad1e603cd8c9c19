"""Four virtual CPU devices, a shelf of compiled programs, and a few things many tests need.

All of it is set before JAX is first used, and in this process only: a test that starts the
program as a user does sets its own devices.
"""

import getpass
import logging
import os
import pathlib
import pickle
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import config as configs
from alexnet_jax import main as command
from alexnet_jax.data import workers
from alexnet_jax.ops import gpu, native

CACHE = pathlib.Path(tempfile.gettempdir()) / f"alexnet_jax_tests_{getpass.getuser()}"

ANIMALS = ("cat", "dog", "owl")
TINY = """
from alexnet_jax.config import blank


def get_config():
    config = blank()
    config.model.width = 1 / 16
    config.model.input_size = 36
    config.data.source = "folder:{data}"
    config.data.cache_dir = "{cache}"
    config.mesh.data = 1
    config.optim.schedule = "epochs"
    config.train.batch_size = 8
    config.train.num_steps = 6
    config.train.log_every_steps = 1
    return config
"""

jax.config.update("jax_num_cpu_devices", 4)
# The same HLO and less work for LLVM: a third of the time to compile a step.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)  # for compiled C++, and other processes
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class _InThread:
    """Stands in for a worker that is a process, which takes a second to start."""

    def __init__(self, job: bytes, flag: str, *shared: Any):
        self.job, self.shared = pickle.loads(job), shared
        self.process = types.SimpleNamespace(kill=lambda: None, join=lambda: None)

    def do(self, *arguments: Any) -> None:
        self.job(*arguments, *self.shared)


@pytest.fixture(params=["native", "XLA's", "a TPU's"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The forms of operations: this package's own, those without a compiler, those for a TPU.

    A test may also ask for "a GPU's": what XLA is given there, where it is no Pallas kernel.
    """
    if request.param == "native" and not native.available():
        pytest.skip("no C++ compiler")
    if request.param != "native":
        monkeypatch.setattr(native, "available", lambda *arrays: False)
    if request.param == "a TPU's":
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    if request.param == "a GPU's":
        monkeypatch.setattr(gpu, "is_gpu", lambda: True)
        monkeypatch.setattr(gpu, "available", lambda *shape, **rule: False)
    return request.param


@pytest.fixture(scope="module")
def shards_by_threads() -> Iterator[None]:
    """Prepares without processes, and leaves the package's messages to the tests' own ways."""
    logger = logging.getLogger("alexnet_jax")
    before = logger.handlers[:], logger.level, logger.propagate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "_Worker", _InThread)
        patch.setattr(os, "fsync", lambda descriptor: None)  # most of the time, and not seen here
        yield
    logger.handlers[:], logger.level, logger.propagate = before


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


@pytest.fixture(scope="session")
def draw_folder(tmp_path_factory) -> Callable[..., pathlib.Path]:
    """(class names, images of each in train, in val, suffix) -> a folder of noisy images."""

    def draw(labels: Sequence[str], train: int, val: int, suffix: str) -> pathlib.Path:
        root = tmp_path_factory.mktemp("images")
        rng = np.random.default_rng(len(labels))
        for split, count in (("train", train), ("val", val)):
            for place, label in enumerate(labels):
                (root / split / label).mkdir(parents=True)
                for number in range(count):
                    noise = rng.integers(0, 80, (45 + number, 50, 3))
                    pixels = (noise + 80 * np.eye(3)[place % 3] + 40 * (place // 3)).astype(
                        np.uint8
                    )
                    Image.fromarray(pixels).save(root / split / label / f"{number:02d}.{suffix}")
        return root

    return draw


@pytest.fixture(scope="session")
def images(draw_folder) -> pathlib.Path:
    """16 training and 5 validation images of each of three classes."""
    return draw_folder(ANIMALS, 16, 5, "jpg")


@pytest.fixture(scope="session")
def config_file(images, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("config")
    path = folder / "tiny.py"
    path.write_text(TINY.format(data=images, cache=folder / "cache"))
    return path


@pytest.fixture(scope="session")
def run(config_file):
    """(workdir, further arguments) -> the exit status."""

    def call(workdir, *arguments: str) -> int:
        return command.main(["main", f"--config={config_file}", f"--workdir={workdir}", *arguments])

    return call


@pytest.fixture(scope="session")
def trained(config_file, tmp_path_factory) -> pathlib.Path:
    """The workdir of a run of six steps, one epoch."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    assert command.main(["main", f"--config={config_file}", f"--workdir={workdir}"]) == 0
    return workdir
