"""Errors of a net on a whole split: centre or ten crops, every example once."""

import dataclasses
import logging
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from alexnet_jax import metrics
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.config import Config, Data, UserError
from alexnet_jax.data import sources, stream, survey
from alexnet_jax.data.augment import Statistics
from alexnet_jax.data.sources import Source
from alexnet_jax.mesh import local_rows, make_mesh, put_batch
from alexnet_jax.train.state import Apply, Params, make_apply, put
from alexnet_jax.train.step import EvalStep, make_eval_step
from alexnet_jax.workdir import CHECKPOINTS

log = logging.getLogger(__name__)


def evaluate(
    eval_step: EvalStep,
    params: Params,
    source: Source,
    statistics: Statistics,
    data: Data,
    batch_size: int,
    mesh: Mesh,
) -> metrics.Sums:
    """Sums over every example of `source`, float64 on the host.

    Args:
      statistics: of the split the net was trained on.
      batch_size: global; need not divide the number of examples.
    """
    rows = stream.Rows(batch_size, local_rows(mesh, batch_size))
    stored = statistics.mean_image.shape[0]
    batches = stream.evaluation_batches(source, data, stored=stored, rows=rows)
    parts = [eval_step(params, put_batch(batch, mesh), statistics) for batch in batches]
    return total(parts)


def total(parts: Iterable[metrics.Sums]) -> metrics.Sums:
    """Steps' sums added up on the host: (shards,) float32 arrays -> () float64 numbers."""
    fetched = [[np.asarray(value.addressable_data(0))[0] for value in part] for part in parts]
    return metrics.Sums(*np.sum(np.array(fetched, np.float64), axis=0))


def check_labels(trained: tuple[str, ...], given: tuple[str, ...], where: str) -> None:
    """Raises UserError unless a net for classes `trained` can be evaluated on classes `given`."""
    if trained == given:
        return
    if len(trained) != len(given):
        detail = f"{len(given)} classes, the checkpoint {len(trained)}"
    else:
        pairs = ((i, a, b) for i, (a, b) in enumerate(zip(given, trained)) if a != b)
        place, mine, theirs = next(pairs)
        detail = f"class {place} is {mine!r}, in the checkpoint {theirs!r}"
    raise UserError(f"{where} has other classes: {detail}; use the data the net was trained for")


def batch_size(config: Config, mesh: Mesh) -> int:
    """Images in one global batch of evaluation, as many for each device; the last is padded."""
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


def evaluate_workdir(config: Config, directory: pathlib.Path) -> dict[str, Any]:
    """Errors of a checkpoint of `directory` on split `eval.split` of `data.source`.

    The net, its classes and what is done to pixels are the checkpoint's, whatever `config` says
    of them; so are the devices, where the config's mesh does not fit on those there are.

    Returns:
      split, num_examples, num_crops, loss, top1_error, top5_error, and the checkpoint's step.
      The loss of ten crops is that of the averaged probability.

    Raises:
      UserError: there is no such run, step or split, or the data has other classes.
    """
    if not (directory / CHECKPOINTS).is_dir():
        raise UserError(f"--workdir={directory} holds no checkpoints; train there first")
    with Checkpoints(directory / CHECKPOINTS) as checkpoints:
        step = checkpoints.chosen_step(config.checkpoint.step)
        meta, params = checkpoints.read_meta(step), checkpoints.read_params(step)
    model = meta.config.model
    stored = meta.statistics.mean_image.shape[0]
    trained = meta.config.data
    data = dataclasses.replace(
        config.data,
        stored_size=stored,
        mean=trained.mean,
        split=trained.split,
        split_seed=trained.split_seed,
    )
    config = dataclasses.replace(config, model=model, data=data)
    mesh = _fitting_mesh(config)
    source = sources.open_source(data, config.eval.split)
    check_labels(meta.labels, source.labels, data.source)
    source, _ = survey.surveyed(source, data, model)
    eval_step = make_step(make_apply(model, len(meta.labels), mesh.shape["model"]), config, mesh)
    size = batch_size(config, mesh)
    sums = evaluate(eval_step, put(params, mesh), source, meta.statistics, data, size, mesh)
    return {
        "split": config.eval.split,
        "num_examples": int(sums.count),
        "num_crops": config.eval.num_crops,
        **metrics.errors(sums),
        "step": step,
    }


def _fitting_mesh(config: Config) -> Mesh:
    """The config's mesh where there are devices for it, otherwise all devices sharing the batch."""
    try:
        return make_mesh(config.mesh, config.model)
    except UserError as error:
        log.warning("%s: evaluating without splitting the towers", error)
        return make_mesh(Config().mesh, config.model)
