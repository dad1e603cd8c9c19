"""Before the first step: open the data, initialise or restore the state, build the steps."""

import dataclasses
import json
import logging
import operator
import pathlib
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from alexnet_jax import config as configs
from alexnet_jax import validate, workdir
from alexnet_jax.checkpoint import Broadcast, Checkpoints, Meta, Saver, local
from alexnet_jax.cluster import Job
from alexnet_jax.config import SHARES_ENTRY, Config, changes
from alexnet_jax.data import sources, survey
from alexnet_jax.data.examples import Source, check_same_classes, warn_if_trained_on
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.errors import UserError
from alexnet_jax.files import expanded
from alexnet_jax.mesh import training_mesh
from alexnet_jax.models.nets import layers
from alexnet_jax.ops import native
from alexnet_jax.train import optim
from alexnet_jax.train.calendar import Calendar, make_calendar
from alexnet_jax.train.state import (
    Apply,
    TrainState,
    initial_state,
    make_apply,
    put,
)
from alexnet_jax.train.step import EvalStep, TrainStep, make_train_step

log = logging.getLogger(__name__)

# What of a net may change when its weights begin another: its name, initial values, new layers.
NEW_NET = {
    "model.preset", "model.num_classes", "model.conv6", "model.init", "model.weight_std",
    "model.bias",
}  # fmt: skip


# Settings that may differ between the processes of a job; `data.source` is compared by its images.
OF_ONE_HOST = (
    "data.source", "data.cache_dir", "data.tfds_dir", "data.workers", "data.worker_kind",
)  # fmt: skip


class Run(NamedTuple):
    """Everything the training loop needs, ready to start."""

    config: Config  # with the data's number of classes
    mesh: Mesh
    calendar: Calendar
    source: Source  # the training split
    validation: Source
    checkpoints: Saver
    meta: Meta
    state: TrainState
    train_step: TrainStep
    eval_step: EvalStep
    schedule: optim.Schedule


def open_run(config: Config, directory: pathlib.Path, allow_config_change: bool, job: Job) -> Run:
    """Open the data, restore or initialise the state, build the steps; alike on every rank.

    Raises:
      UserError: the data, the mesh, the workdir or their combination cannot be used.
    """
    _check_same_settings(config, job)
    layers(config.model, num_classes=1)  # refuses an input that is too small before all else
    mesh = training_mesh(config)
    with job.leader_first():  # the others find in caches what it compiles, draws and scans
        compiled = native.available()
        source = sources.open_source(config.data, "train")
        validation = sources.open_source(config.data, config.eval.split)
    job.check_same(
        "the C++ compiler", "there" if compiled else "none",
        "install one on every host, or set CXX=false on all",
    )  # fmt: skip
    for source_of in (source, validation):
        job.check_same(
            f"the data of {config.data.source}", source_of.fingerprint,
            "every process must see the same files",
        )  # fmt: skip
    config = with_classes(config, source.labels)
    if len(source.labels) == 1:
        log.warning("%s has one class: there is nothing to tell apart", config.data.source)
    check_parameters(config)
    check_step(config.checkpoint.step)
    checkpoints = Saver(directory / workdir.CHECKPOINTS, job.broadcast)
    latest = checkpoints.newest_whole()
    saved = None if latest is None else checkpoints.read_meta(latest)
    if saved is not None:
        check_same_classes(
            saved.labels, source.labels, config.data.source, f"the run in {directory}",
            "choose another --workdir, or the data that it was trained with",
        )  # fmt: skip
        changed = workdir.check_resume(saved.config, config, allow_config_change)
    elif config.train.init_from:
        check_init_from(config, source.labels, job.broadcast)
    with job.leader_first():
        source, statistics = survey.surveyed(source, config.data, config.model)
        validation, _ = survey.surveyed(validation, config.data, config.model)
    if latest is None or saved is None:
        state, mixed = _first_state(config, validation, job.broadcast)
        meta = Meta(config, source.labels, statistics, mixed=mixed)
    else:
        if not allow_config_change:
            _check_images(saved, source, config.data.source)
        if not any(name.startswith("data.") for name in changed):
            statistics = saved.statistics
        meta = _resumed(saved, latest, config, statistics, source)
        state = checkpoints.read_state(latest, meta)
    config = meta.config
    meta = dataclasses.replace(
        meta,
        num_examples=len(source),
        drawn_from=source.drawn_from,
        words=source.words or meta.words,
    )
    warn_if_trained_on(meta.drawing, validation, config.data.source, config.eval.split)
    calendar = make_calendar(config.train, len(source), meta.origin)
    with job.leader_first():
        if job.is_leader:
            checkpoints.clean()
            checkpoints.set_aside_after(latest)
            workdir.write(directory, config, source.labels)
        else:
            checkpoints.reload()
    apply = make_apply(config.model, len(source.labels), mesh.shape["model"])
    return Run(
        config=config,
        mesh=mesh,
        calendar=calendar,
        source=source,
        validation=validation,
        checkpoints=checkpoints,
        meta=meta,
        state=put(state, mesh),
        train_step=make_step(apply, config, mesh, calendar),
        eval_step=validate.make_step(apply, config, mesh),
        schedule=jax.jit(optim.make_schedule(config.optim, calendar)),
    )


def _check_same_settings(config: Config, job: Job) -> None:
    """Raises UserError if this rank's settings differ from rank 0's, but for where files lie."""
    first = job.broadcast(lambda: json.dumps(configs.to_dict(config)))
    theirs = configs.from_dict(json.loads(first))
    for name in configs.field_names():
        given, other = map(operator.attrgetter(name), (config, theirs))
        if given != other and name not in OF_ONE_HOST:
            raise UserError(
                f"{name}={given!r} on rank {job.rank}, {other!r} on rank 0; give every process the "
                "same flags"
            )
    job.check_same(
        "the number of devices", str(jax.local_device_count()), "give every process as many"
    )


def _first_state(
    config: Config, validation: Source, broadcast: Broadcast
) -> tuple[TrainState, bool]:
    """The state of a new run, with the weights of `train.init_from` if that names a workdir.

    And whether these may have been trained on images of `validation`.
    """
    labels = validation.labels
    state = initial_state(config.model, len(labels), config.seed)
    if not config.train.init_from:
        return state, False
    _, meta, given = _checkpoints_of(config.train.init_from, broadcast).read_net(-1)
    new = _new_layers(config, labels, meta)
    _say_other_net(config, meta)
    log.info(
        "weights are taken over from %s; new: %s",
        config.train.init_from,
        ", ".join(new) or "nothing",
    )
    # A new last layer starts at zero: every class is then equally probable.
    drawn = {name: state.params[name] for name in new}
    drawn |= {name: jax.tree.map(np.zeros_like, drawn[name]) for name in new if name != "conv6"}
    mixed = bool({*meta.labels} & {*labels}) and meta.drawing not in (None, validation.drawn_from)
    return state._replace(params={**given, **drawn}), mixed


def _say_other_net(config: Config, meta: Meta) -> None:
    """Warn if the weights taken over are of a net that computes something else from an image."""
    refused, asked = changes(meta.config, config)
    found = {name: pair for name, pair in refused.items() if name not in NEW_NET}
    found |= {name: pair for name, pair in asked.items() if name == "data.mean"}
    if meta.config.model.dropout_rule == config.model.dropout_rule == "inverted":
        found.pop("model.dropout_after", None)  # which is of no consequence after training
        found.pop("model.dropout_rate", None)
    if found:
        words = ", ".join(f"{name}={old!r}, not {new!r}" for name, (old, new) in found.items())
        log.warning(
            "the net of %s was trained with %s: here its weights compute something else",
            config.train.init_from, words,
        )  # fmt: skip


def _resumed(
    saved: Meta, step: int, config: Config, statistics: Statistics, source: Source
) -> Meta:
    """The meta of a run that resumes at `step` with `config`; where it began from stays."""
    began, given = saved.config.train.init_from, config.train.init_from
    if given not in ("", began):
        log.warning(
            "train.init_from=%s is not used: this run goes on from its step %d", given, step
        )
    train = dataclasses.replace(config.train, init_from=began)
    return dataclasses.replace(
        saved,
        config=dataclasses.replace(config, train=train),
        origin=_origin(saved, step, config.train.batch_size, len(source)),
        statistics=statistics,
        mixed=saved.drawing not in (None, source.drawn_from),
    )


def _check_images(meta: Meta, source: Source, name: str) -> None:
    """Raises UserError if a run would resume with other training images than it had."""
    moved = meta.drawn_from not in (None, source.drawn_from)
    if meta.num_examples != len(source):
        change = f"has {len(source)} training images, and had {meta.num_examples}"
    elif moved:
        change = "has files of other names than"
    else:
        return
    also = ", and images moved from one split to another" if moved else ""
    raise UserError(
        f"{name} {change} when last trained on{also}; bring back just the images that it had, or "
        "go on by --allow_config_change"
    )


def _checkpoints_of(init_from: str, broadcast: Broadcast) -> Checkpoints:
    """The checkpoints of workdir `train.init_from`."""
    folder = expanded(init_from) / workdir.CHECKPOINTS
    if not folder.is_dir():
        raise UserError(f"train.init_from={init_from!r} holds no checkpoints; train there")
    return Checkpoints(folder, broadcast)


def check_init_from(config: Config, labels: tuple[str, ...], broadcast: Broadcast = local) -> None:
    """Find out whether a net can start from the newest checkpoint in workdir `train.init_from`.

    Raises:
      UserError: there is no checkpoint, its net differs, or a new layer has a rate of 0.
    """
    checkpoints = _checkpoints_of(config.train.init_from, broadcast)
    step = checkpoints.chosen_step(-1)
    _new_layers(config, labels, checkpoints.read_meta(step))


def _new_layers(config: Config, labels: tuple[str, ...], meta: Meta) -> list[str]:
    """The layers that a net does not take over: the last if classes differ, and a new conv6."""
    net = {layer.name: layer.kernel for layer in layers(config.model, len(labels))}
    given = {layer.name: layer.kernel for layer in layers(meta.config.model, len(meta.labels))}
    new, rates, last = [], optim.layer_rates(config.optim), list(net)[-1]
    for name in sorted(net.keys() | given.keys()):
        here, there = net.get(name), given.get(name)
        if (name == last and meta.labels != labels) or (name == "conv6" and there is None):
            new.append(name)
        elif here != there:
            raise UserError(
                f"train.init_from: {name} of {config.train.init_from} has a kernel of {there}, "
                f"here it is {here}; both nets must be the same but for their classes"
            )
    for name in new:
        if not rates[name]:
            raise UserError(
                f"optim.layer_rates: {name} has a rate of 0, but is new here and would never "
                f"learn; give {SHARES_ENTRY.get(name, name)} a rate"
            )
    return new


def make_step(apply: Apply, config: Config, mesh: Mesh, calendar: Calendar) -> TrainStep:
    """The training step that the config asks for."""
    return make_train_step(
        apply,
        optim.make_update(config.optim),
        optim.make_schedule(config.optim, calendar),
        mesh,
        seed=config.seed,
        mean=config.data.mean,
        accumulation_steps=config.train.accumulation_steps,
    )


def _origin(meta: Meta, step: int, batch_size: int, num_examples: int) -> int:
    """The `Calendar.origin` that keeps a run's position in epochs when it resumes at `step`."""
    position = meta.origin + step * meta.config.train.batch_size
    return round(position * num_examples / meta.num_examples) - step * batch_size


def check_parameters(config: Config) -> None:
    """Raises UserError if the net is larger than `train.max_parameters`; allocates nothing."""
    net = layers(config.model, config.model.num_classes)
    count, most = sum(layer.parameters for layer in net), config.train.max_parameters
    if count > most:
        largest = max(net, key=lambda layer: layer.parameters)
        raise UserError(
            f"the net has {count:,} parameters, {largest.parameters:,} of them in {largest.name}; "
            f"at most train.max_parameters={most:,} are allowed: "
            f"make it smaller, or set --config.train.max_parameters={count}"
        )


def check_step(step: int) -> None:
    """Raises UserError if `checkpoint.step` is set, which training does not follow."""
    if step != -1:
        raise UserError(
            f"checkpoint.step={step}: training goes on from the newest; leave it "
            f"at -1, and to go back take later ones out of WORKDIR/{workdir.CHECKPOINTS}"
        )


def with_classes(config: Config, labels: tuple[str, ...]) -> Config:
    """The config with the data's number of classes; raises UserError if it names another."""
    named = config.model.num_classes
    if named not in (0, len(labels)):
        raise UserError(
            f"model.num_classes={named}: {config.data.source} has {len(labels)} classes; "
            "set --config.model.num_classes=0 to take the data's"
        )
    model = dataclasses.replace(config.model, num_classes=len(labels))
    return dataclasses.replace(config, model=model)
