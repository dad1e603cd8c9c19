"""Predictions of trained nets for images: probabilities, best labels, features."""

import concurrent.futures
import dataclasses
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from alexnet_jax.checkpoint import Broadcast, Checkpoints, Meta, local
from alexnet_jax.command import keep_compiled
from alexnet_jax.config import Config, changes, stored_size
from alexnet_jax.data import images, sources, survey, workers
from alexnet_jax.data.examples import Source, check_same_classes, warn_if_trained_on
from alexnet_jax.errors import FailedError, UserError, printable
from alexnet_jax.files import expanded, write_arrays
from alexnet_jax.mesh import make_mesh, put_everywhere
from alexnet_jax.models.layers import Params
from alexnet_jax.models.nets import layers
from alexnet_jax.train.state import make_apply, put
from alexnet_jax.train.step import EvalStep, make_features_step, make_predict_step
from alexnet_jax.validate import batch_size, device_batches
from alexnet_jax.workdir import CHECKPOINTS

log = logging.getLogger(__name__)

FILES_AT_ONCE = 1024
TAKEN = ("model.", "data.stored_size", "data.mean", "data.split")  # from the checkpoint


class Net(NamedTuple):
    """A checkpoint, ready for inference."""

    config: Config  # with the checkpoint's net and preprocessing
    meta: Meta
    step: int
    params: Params  # on the mesh
    mesh: Mesh

    def __repr__(self) -> str:  # in a notebook, where the arrays would fill pages
        preset, classes = self.config.model.preset, len(self.meta.labels)
        return f"<Net of preset {preset}, {classes} classes, step {self.step}>"


def open_net(config: Config, directory: str | pathlib.Path, broadcast: Broadcast = local) -> Net:
    """The checkpoint of `directory` that `checkpoint.step` names.

    The net, its classes and the preprocessing are the checkpoint's, whatever `config` says. If
    the config's mesh does not fit the available devices, all of them share the batch. What is
    compiled from now on is kept in `data.cache_dir`, as the commands do.

    Args:
      broadcast: `Job.broadcast`, if all ranks of a job open it.

    Raises:
      UserError: there is no such run or step, or it is damaged.
    """
    directory = expanded(str(directory))
    if not (directory / CHECKPOINTS).is_dir():
        raise UserError(f"--workdir={directory} holds no checkpoints; train there first")
    keep_compiled(config.data.cache_dir)
    checkpoints = Checkpoints(directory / CHECKPOINTS, broadcast)
    step, meta, params = checkpoints.read_net(config.checkpoint.step)
    _say_taken(config, meta)
    trained = meta.config.data
    data = dataclasses.replace(
        config.data,
        stored_size=meta.statistics.stored_size,
        mean=trained.mean,
        split=trained.split,
        split_seed=trained.split_seed,
    )
    config = dataclasses.replace(config, model=meta.config.model, data=data)
    mesh = _fitting_mesh(config)
    return Net(config, meta, step, put(params, mesh), mesh)


def _say_taken(config: Config, meta: Meta) -> None:
    """Log which settings are the checkpoint's, where the config's differ."""
    kept, size = meta.config, meta.statistics.stored_size
    given = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_classes=kept.model.num_classes),
        data=dataclasses.replace(config.data, stored_size=stored_size(config.data, config.model)),
    )
    kept = dataclasses.replace(kept, data=dataclasses.replace(kept.data, stored_size=size))
    changed: dict[str, tuple] = {}
    for found in changes(kept, given):
        changed |= {name: pair for name, pair in found.items() if name.startswith(TAKEN)}
    if changed:
        words = [f"{name}={old!r}, not {new!r}" for name, (old, new) in changed.items()]
        more = f", and {len(words) - 5} more" if len(words) > 5 else ""
        log.info("of the checkpoint: %s%s", "; ".join(words[:5]), more)


def open_split(net: Net, split: str) -> Source:
    """The unbroken images of a split of `data.source`, on which the net can be evaluated.

    Raises:
      UserError: there is no such split, or the data has other classes.
    """
    source = sources.open_source(net.config.data, split)
    way_out = f"set data.source to the data the net was trained for, {net.meta.config.data.source}"
    labels, where = source.labels, net.config.data.source
    check_same_classes(net.meta.labels, labels, where, way_out=way_out)
    warn_if_trained_on(net.meta.drawing, source, net.config.data.source, split)
    return survey.surveyed(source, net.config.data, net.config.model)[0]


def predictor(net: Net) -> Callable[[Source], np.ndarray]:
    """source -> the net's log probabilities, (n, classes) float32, over `eval.num_crops`."""
    config, shards = net.config, net.mesh.shape["model"]
    step = make_predict_step(
        make_apply(config.model, len(net.meta.labels), shards),
        net.mesh,
        size=config.model.input_size,
        num_crops=config.eval.num_crops,
        mean=config.data.mean,
    )

    def predict(source: Source) -> np.ndarray:
        return np.concatenate([part[0] for part in _outputs(net, source, step)])[: len(source)]

    return predict


def features(net: Net, source: Source, layer: str) -> np.ndarray:
    """A layer's output for the centre crop of every example, (n, ..., c) float32.

    Raises:
      UserError: the net has no such layer before its last.
    """
    return np.concatenate(list(feature_batches(net, source, layer)))


def feature_batches(net: Net, source: Source, layer: str) -> Iterator[np.ndarray]:
    """As `features`, also in what it raises, a batch at a time, for what does not fit in memory."""
    config, shards = net.config, net.mesh.shape["model"]
    found = {shape.name: shape for shape in layers(config.model, len(net.meta.labels))[:-1]}
    if layer not in found:
        raise UserError(f"--layer={layer}: must be one of {', '.join(found)}")
    step = make_features_step(
        make_apply(config.model, len(net.meta.labels), shards, layer),
        net.mesh,
        size=config.model.input_size,
        mean=config.data.mean,
    )
    left = len(source)
    for output in _outputs(net, source, step):
        yield output[:left].reshape(-1, *found[layer].stage_output)
        left -= len(output)


def _outputs(net: Net, source: Source, step: EvalStep) -> Iterator[np.ndarray]:
    """The output of `step` for each global batch, padding included."""
    size = batch_size(net.config, net.mesh)
    stored = net.meta.statistics.stored_size
    statistics = put_everywhere(net.meta.statistics, net.mesh)
    for batch in device_batches(source, net.config.data, stored, size, net.mesh):
        output = step(net.params, batch, statistics)
        yield np.asarray(multihost_utils.process_allgather(output, tiled=True))


def averaged(log_probs: Sequence[np.ndarray]) -> np.ndarray:
    """Logarithm of the mean of several nets' probabilities, (n, classes) float32.

    The float32 probabilities are averaged in float64.
    """
    if len(log_probs) == 1:
        return log_probs[0]
    mean = np.mean([np.exp(part) for part in log_probs], axis=0, dtype=np.float64)
    return np.log(np.maximum(mean.astype(np.float32), np.finfo(np.float32).tiny))


def check_finite(log_probs: np.ndarray, directories: Sequence[pathlib.Path]) -> None:
    """Raises FailedError if training has ruined a net."""
    if np.isnan(log_probs).any():
        raise FailedError(
            f"--workdir={','.join(map(str, directories))}: the net gives probabilities that are no "
            "numbers, since its training diverged; set --config.checkpoint.step to an older one"
        )


def example_names(source: Source) -> list[str]:
    """The examples' names, in the source's order."""
    return [source.name(index) for index in range(len(source))]


def predict_files(
    config: Config, directories: Sequence[pathlib.Path], paths: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The five best labels, with probabilities, of image files and of those in folders.

    Yields:
      For each file in order, some at a time: file, labels, words if labels are codes, and
      probabilities; for a broken image, file and error.

    Raises:
      UserError: a path does not exist, no files are found, or the nets have different classes.
      FailedError: training has ruined a net.
    """
    files = _files(paths)
    predictors, labels, words = [], (), ()
    for directory in directories:
        net = open_net(config, directory)
        name, way_out = f"--workdir={directory}", "an ensemble needs the same"
        mine = net.meta.labels
        check_same_classes(labels or mine, mine, name, str(directories[0]), way_out)
        labels, words = net.meta.labels, words or net.meta.words
        predictors.append(predictor(net))
    for first in range(0, len(files), FILES_AT_ONCE):
        some = files[first : first + FILES_AT_ONCE]
        with concurrent.futures.ThreadPoolExecutor(workers.count(config.data.workers)) as pool:
            problems = dict(zip(some, pool.map(_problem, some)))
        whole = tuple(path for path in some if not problems[path])
        source = sources.Folder(labels, np.zeros(len(whole), np.int64), "", whole)
        found = averaged([predict(source) for predict in predictors]) if whole else np.empty(0)
        check_finite(found, directories)
        best = (
            {"file": path, **best_labels(row, labels, words)}
            for path, row in zip(whole, np.exp(found))
        )
        for path in some:
            yield {"file": path, "error": problems[path]} if problems[path] else next(best)


def _problem(path: str) -> str:
    """Why an image file cannot be read; "" if it can."""
    try:
        images.decode(sources.read_file(path), path)
    except (images.ImageError, OSError) as error:
        return str(error)
    return ""


def best_labels(
    probabilities: np.ndarray, labels: Sequence[str], words: Sequence[str]
) -> dict[str, list]:
    """The five best `labels`, their `words` if there are any, and their `probabilities`."""
    best = np.argsort(-probabilities, kind="stable")[:5]
    return {
        "labels": [labels[place] for place in best],
        **({"words": [words[place] for place in best]} if words else {}),
        "probabilities": [float(probabilities[place]) for place in best],
    }


def _files(paths: Sequence[str]) -> list[str]:
    """The named files, and those in named folders at any depth, sorted per folder."""
    found = []
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder; name images, or folders with them")
        if os.path.isdir(path):
            inside = _inside(path)
            if not inside:
                raise UserError(f"{path}: there are no files in it; name another folder, or images")
            found += inside
        elif not os.path.isfile(path):
            raise UserError(f"{path}: is a pipe or device; save the image to a file first")
        else:
            found.append(path)
    if not found:
        raise UserError("no image to look at: name files or folders after the flags")
    return found


def _inside(folder: str) -> list[str]:
    """The files under a folder, following links, without hidden ones."""

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); leave it out, or permit it"
        )

    seen, found = {os.path.realpath(folder)}, []
    for where, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(where, name))
            if sources.is_hidden(name) or real in seen:
                folders.remove(name)
            seen.add(real)
        found += [os.path.join(where, name) for name in files if not sources.is_hidden(name)]
    others = [path for path in found if not os.path.isfile(path)]
    if others:
        log.warning(
            "%d links to nothing, pipes or devices are not looked at: %s", len(others),
            ", ".join(map(printable, others[:20])),
        )  # fmt: skip
    return sorted(set(found) - set(others))


def write_features(
    config: Config, directory: pathlib.Path, layer: str, output: pathlib.Path
) -> dict[str, Any]:
    """Write a layer's outputs for split `eval.split` to an .npz file; returns a summary.

    Raises:
      UserError: as `open_net`, `open_split` and `features`.
    """
    net = open_net(config, directory)
    source = open_split(net, config.eval.split)
    found = features(net, source, layer)
    write_arrays(
        output,
        features=found,
        targets=source.targets,
        labels=np.array(source.labels),
        names=np.array(example_names(source)),
    )
    return {
        "split": config.eval.split,
        "layer": layer,
        "shape": list(found.shape),
        "output": str(output),
        "step": net.step,
    }


def _fitting_mesh(config: Config) -> Mesh:
    """The config's mesh if it fits the devices, otherwise all devices sharing the batch."""
    try:
        return make_mesh(config.mesh, config.model)
    except UserError as error:
        log.warning("%s; until then all devices share the batch", error)
        return make_mesh(Config().mesh, config.model)
