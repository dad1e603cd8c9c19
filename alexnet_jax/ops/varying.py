"""What custom gradients ask of arrays under `shard_map`."""

import jax
from jax import Array, lax


def varying_alike(x: Array, kernel: Array) -> tuple[Array, Array]:
    """Both as different from device to device as either is, which a custom gradient asks for."""
    axes = [jax.typeof(array).manual_axis_type.varying for array in (x, kernel)]
    missing = [tuple((axes[0] | axes[1]) - own) for own in axes]
    x, kernel = (
        lax.pcast(array, names, to="varying") if names else array
        for array, names in zip((x, kernel), missing)
    )
    return x, kernel
