"""How the C++ kernels are compiled, kept and done without, and what their results depend on."""

import logging
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from alexnet_jax.ops import native

COMPILER = [os.environ.get("CXX") or "c++"]
needs_compiler = pytest.mark.skipif(not shutil.which(COMPILER[0]), reason="no C++ compiler")

# A step of every kernel, by one thread or as many as there are cores.
DIGEST = """
import hashlib, os, sys
if sys.argv[1] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
from alexnet_jax import ops

def loss(x, first, second, third):
    x = ops.conv(x, first, stride=4, padding=((0, 3), (0, 3)))
    x = ops.local_response_norm(x, size=5, k=2.0, alpha=1e-4, beta=0.75)
    x = ops.conv(x, second, padding=((2, 2), (2, 2)), groups=2)
    return jnp.sum(ops.dense(x.reshape(len(x), -1), third) ** 2)

shapes = (20, 31, 31, 3), (11, 11, 3, 34), (5, 5, 17, 20), (720, 30)
arrays = [np.random.default_rng(0).standard_normal(shape, np.float32) for shape in shapes]
found = jax.jit(jax.value_and_grad(loss, range(1, 4)))(*arrays)
found = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found))
print(hashlib.sha256(found).hexdigest())
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path):
    """Where compiled programs are kept, with a space in its name."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "com piled"))
    yield tmp_path / "com piled"
    jax.config.update("jax_compilation_cache_dir", before)


@needs_compiler
def test_kernels_are_compiled_once_and_made_anew_when_damaged(folder):
    _, suffix = native._library(COMPILER)
    (path,) = folder.iterdir()
    assert suffix in path.name
    whole, made = path.read_bytes(), path.stat().st_mtime_ns
    native._library(COMPILER)
    assert path.stat().st_mtime_ns == made
    for damaged in (whole[:1000], whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], b""):
        path.unlink()  # what is mapped already stays as it is
        path.write_bytes(damaged)
        library, _ = native._library(COMPILER)
        assert library.winograd
        assert [other.read_bytes() for other in folder.iterdir()] == [whole]


@needs_compiler
def test_another_compiler_has_kernels_of_its_own(folder, tmp_path):
    """gcc and g++ are alike in all but their names. What makes no library is not kept."""
    _, suffix = native._library(COMPILER)
    link = tmp_path / "link"
    link.symlink_to(shutil.which(COMPILER[0]))
    _, other = native._library([str(link)])
    assert suffix != other
    assert len({*folder.iterdir()}) == 2
    (tmp_path / "kernels.cc").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "SOURCES", tmp_path)
        with pytest.raises(OSError, match="has no winograd"):
            native._library(COMPILER)
    assert len({*folder.iterdir()}) == 2


@needs_compiler
def test_a_folder_that_cannot_be_written_is_done_without(folder):
    folder.write_text("a file is in the way")
    library, _ = native._library(COMPILER)
    assert library.winograd


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", "false -with arguments"])
def test_without_a_compiler_that_works_xla_computes_and_the_log_says_so(
    compiler, monkeypatch, caplog
):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(native, "_suffix", native._suffix.__wrapped__)
    monkeypatch.setattr(logging.getLogger("alexnet_jax"), "propagate", True)
    caplog.set_level(logging.INFO)
    assert not native.available()
    assert "XLA's slower convolutions are used" in caplog.text
    assert "CXX" in caplog.text


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be counted off")
def test_results_do_not_depend_on_the_number_of_threads():
    kept = jax.config.jax_compilation_cache_dir
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST, threads, kept],
            env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in ("one", "all")
    }
    assert len(digests) == 1
