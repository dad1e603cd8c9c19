"""Building the device mesh; placing batches and parameters on it."""

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_jax import config as configs
from alexnet_jax.errors import FailedError, UserError


def start_devices(cpu_count: int, at_least: bool = False) -> None:
    """Start the platform's devices; call before JAX is first used.

    The CPU platform starts `cpu_count` virtual ones, unless that is 0 or JAX_NUM_CPU_DEVICES is
    set; with `at_least`, it overrides a smaller JAX_NUM_CPU_DEVICES.

    Raises:
      UserError: JAX_PLATFORMS names what this machine has not.
      FailedError: a platform that JAX chose itself does not start.
    """
    asked = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    if cpu_count and asked < (cpu_count if at_least else 1):
        with contextlib.suppress(RuntimeError):  # in a process that has started them: as they are
            jax.config.update("jax_num_cpu_devices", cpu_count)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines() or ["there are none"]
        platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        if not platforms:
            raise FailedError(f"JAX cannot start this machine's devices: {said[0]}") from error
        raise UserError(
            f"JAX_PLATFORMS={platforms}: JAX cannot start such devices here ({said[0]}); unset it "
            "to have JAX choose, or set JAX_PLATFORMS=cpu"
        ) from error


def make_mesh(mesh: configs.Mesh, model: configs.Model) -> jax.sharding.Mesh:
    """A mesh with axes `data` x `model`; the two devices of a pair over `model` are neighbours.

    Raises:
      UserError: the net does not split; or the mesh takes more devices than there are, leaves a
        process without any, or splits the batch unevenly over processes.
    """
    if mesh.model == 2 and not model.splits:
        reason = "has one tower" if model.towers != 2 else "normalises across the towers"
        raise UserError(
            f"mesh.model=2: the net of preset {model.preset!r} {reason} and does not split; "
            "set --config.mesh.model=1 (more devices then share the batch)"
        )
    available = jax.device_count()
    data = available // mesh.model if mesh.data == -1 else mesh.data
    if data * mesh.model > available or data == 0:
        wanted = max(data, 1) * mesh.model
        way_out = f"run on {wanted} devices"
        if jax.default_backend() == "cpu":
            way_out = f"start {wanted} virtual ones with JAX_NUM_CPU_DEVICES={wanted}"
        raise UserError(
            f"mesh.model={mesh.model} x mesh.data={max(data, 1)} takes {wanted} devices and there "
            f"are {available} ({jax.default_backend()}); {way_out}, or set --config.mesh.model=1 "
            "and --config.mesh.data=-1"
        )
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    devices = np.asarray(devices[: data * mesh.model], object).reshape(data, mesh.model)
    idle = jax.process_count() - len({device.process_index for device in devices.flat})
    if idle:
        more = "give each more devices" if mesh.data == -1 else "set --config.mesh.data=-1"
        raise UserError(
            f"mesh.model={mesh.model} x mesh.data={data} leaves {idle} of {jax.process_count()} "
            f"processes without a device; start fewer, or {more}"
        )
    if not _even([device.process_index for device in row] for row in devices):
        raise UserError(
            f"mesh.model={mesh.model} x mesh.data={data} splits the batch unevenly over "
            f"{jax.process_count()} processes; give each an even number of devices, or set "
            "--config.mesh.model=1 and --config.mesh.data=-1"
        )
    return jax.sharding.Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def _even(processes: Iterable[Sequence[int]]) -> bool:
    """Whether processes have equally large shares of a batch, any two identical or disjoint.

    Args:
      processes: for each place along `data`, the processes of its devices.
    """
    shares: dict[int, set[int]] = {}
    for place, owners in enumerate(processes):
        for owner in owners:
            shares.setdefault(owner, set()).add(place)
    return len({len(share) for share in shares.values()}) == 1 and all(
        one == other or not one & other for one, other in itertools.combinations(shares.values(), 2)
    )


def training_mesh(config: configs.Config) -> jax.sharding.Mesh:
    """`make_mesh`, if batches split evenly over its data axis and the accumulation steps.

    Raises:
      UserError: as `make_mesh`; or the batch does not split evenly.
    """
    mesh = make_mesh(config.mesh, config.model)
    batch_size, parts = config.train.batch_size, config.train.accumulation_steps
    places = mesh.shape["data"]
    shares = places * parts
    if batch_size % shares:
        micro = f" x {parts} accumulation steps" if parts > 1 else ""
        raise UserError(
            f"train.batch_size={batch_size}: must divide by the {places} devices of mesh axis "
            f"data{micro}; set --config.train.batch_size={-(-batch_size // shares) * shares}"
        )
    return mesh


def parameter_spec(array: jax.Array | jax.ShapeDtypeStruct) -> P:
    """Parameters and velocities are sharded on the last axis over `model`; scalars are not."""
    return P(*(None,) * (array.ndim - 1), "model") if array.ndim else P()


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> range:
    """The rows of the global batch that this process's devices need.

    Processes that hold the two towers of one `data` place read the same rows; others disjoint ones.
    """
    sharding = NamedSharding(mesh, P("data"))
    shares = sharding.devices_indices_map((batch_size,))
    ends = [shares[own][0].indices(batch_size)[:2] for own in sharding.addressable_devices]
    return range(min(ends)[0], max(ends)[1])


def local_columns(array: jax.Array) -> np.ndarray:
    """This process's columns of an array (n, shards) sharded over `model`, each once.

    Data already requested by `copy_to_host_async` is not fetched again.
    """
    if array.is_fully_replicated:
        return np.asarray(array)
    columns: dict[int, jax.Array] = {}
    for shard in array.addressable_shards:
        columns.setdefault(shard.index[-1].start or 0, shard.data)
    return np.concatenate([np.asarray(columns[start]) for start in sorted(columns)], axis=-1)


def over_model(local: np.ndarray, mesh: jax.sharding.Mesh) -> np.ndarray:
    """Sum `local_columns`, (..., local shards), over all shards: (...) float64.

    A collective where the shards are in several processes: all processes must call it together.
    """
    local = local.astype(np.float64)
    if local.shape[-1] < mesh.shape["model"]:
        every = multihost_utils.process_allgather(local)  # (processes, ..., 1)
        local = np.concatenate([every[owner.process_index] for owner in mesh.devices[0]], axis=-1)
    return local.sum(axis=-1)


def put_everywhere(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Replicate arrays, which every process has, on every device."""
    everywhere = NamedSharding(mesh, P())

    def put(array: Any) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, everywhere, array.__getitem__)

    return jax.tree.map(put, tree)


def put_batch(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Start sending this process's rows of a batch to the devices, as arrays split over `data`."""
    sharding = NamedSharding(mesh, P("data"))
    if sharding.is_fully_addressable:
        return jax.device_put(dict(batch), sharding)  # all in one call, which is faster
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }
