"""A validation pass during training: every example of a split once, centre or ten crops."""

from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from alexnet_jax import metrics
from alexnet_jax.config import Config, Data
from alexnet_jax.data import stream
from alexnet_jax.data.examples import Source
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.mesh import local_rows, put_batch
from alexnet_jax.models.layers import Params
from alexnet_jax.train.state import Apply
from alexnet_jax.train.step import DeviceBatch, EvalStep, make_eval_step


def validate(
    eval_step: EvalStep,
    params: Params,
    batches: Iterable[DeviceBatch],
    statistics: Statistics,
    at: Callable[[str], None] = lambda place: None,
) -> metrics.Sums:
    """Sums over every example of `batches`, float64 on the host.

    Args:
      statistics: of the split the net was trained on, on every device of the mesh.
      at: called with a description of each batch.
    """
    parts: list[Array] = []
    for batch in batches:
        at(f"validation batch {len(parts) + 1}")
        parts.append(eval_step(params, batch, statistics))
        jax.block_until_ready(parts[-3:][0])  # at most this many batches in flight
    return metrics.added([np.asarray(part.addressable_data(0))[:, 0] for part in parts])


def device_batches(
    source: Source, data: Data, stored: int, batch_size: int, mesh: Mesh
) -> Iterator[DeviceBatch]:
    """Batches of every example, once, being sent to the devices.

    Args:
      stored: pixels a side of the stored squares.
      batch_size: global; need not divide the number of examples: the last batch is padded.
    """
    rows = stream.Rows(batch_size, local_rows(mesh, batch_size))
    for batch in stream.evaluation_batches(source, data, stored=stored, rows=rows):
        yield put_batch(batch, mesh)


def batch_size(config: Config, mesh: Mesh) -> int:
    """Images in a global evaluation batch, equally many per device; the last batch is padded."""
    wanted, shares = config.eval.batch_size or config.train.batch_size, mesh.shape["data"]
    return -(-wanted // shares) * shares


def make_step(apply: Apply, config: Config, mesh: Mesh) -> EvalStep:
    """The evaluation step that the config asks for."""
    return make_eval_step(
        apply,
        mesh,
        size=config.model.input_size,
        num_crops=config.eval.num_crops,
        mean=config.data.mean,
    )
