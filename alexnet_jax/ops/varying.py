"""What custom gradients require of arrays under `shard_map`.

There an array is either the same on all devices of a mesh axis or varies over it, and a custom
gradient takes operands of one kind only.
"""

import jax
from jax import Array, lax


def varying_alike(x: Array, kernel: Array) -> tuple[Array, Array]:
    """Both marked as varying over every mesh axis that either varies over."""
    axes = [jax.typeof(array).manual_axis_type.varying for array in (x, kernel)]
    missing = [tuple((axes[0] | axes[1]) - own) for own in axes]
    x, kernel = (
        lax.pcast(array, names, to="varying") if names else array
        for array, names in zip((x, kernel), missing)
    )
    return x, kernel
