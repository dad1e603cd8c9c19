"""What the results of the C++ kernels depend on."""

import os
import subprocess
import sys

import pytest

from alexnet_jax.ops import native

# A step of every kernel, by one thread or as many as there are cores.
DIGEST = """
import hashlib, os, sys
if sys.argv[1] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp, numpy as np
from alexnet_jax import ops

def loss(x, first, second, third):
    x = ops.conv(x, first, stride=4, padding=((0, 3), (0, 3)))
    lrn = {"size": 5, "k": 2.0, "alpha": 1e-4, "beta": 0.75}
    x = ops.relu_lrn_pool(x, **lrn, groups=2, window=2, stride=1)
    x = ops.conv(x, second, padding=((2, 2), (2, 2)), groups=2)
    x = ops.local_response_norm(x, **lrn)
    return jnp.sum(ops.dense(x.reshape(len(x), -1), third) ** 2)

shapes = (20, 31, 31, 3), (11, 11, 3, 34), (5, 5, 17, 20), (500, 30)
arrays = [np.random.default_rng(0).standard_normal(shape, np.float32) for shape in shapes]
found = jax.jit(jax.value_and_grad(loss, range(1, 4)))(*arrays)
found = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found))
print(hashlib.sha256(found).hexdigest())
"""


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be counted off")
def test_results_do_not_depend_on_the_number_of_threads():
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST, threads],
            env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in ("one", "all")
    }
    assert len(digests) == 1
