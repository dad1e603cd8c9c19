"""The training loop: steps, logs, validation, the plateau, checkpoints, stopping."""

import contextlib
import dataclasses
import logging
import math
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from alexnet_jax import metrics, resident, setup, validate, workdir
from alexnet_jax.checkpoint import Meta
from alexnet_jax.cluster import Job
from alexnet_jax.config import Config
from alexnet_jax.data import stream
from alexnet_jax.data.examples import Source
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.errors import FailedError
from alexnet_jax.mesh import local_columns, local_rows, over_model, put_batch, put_everywhere
from alexnet_jax.models.nets import layers
from alexnet_jax.report import PASS, RATIO, Report, Silent
from alexnet_jax.train import optim
from alexnet_jax.train.state import TrainState, natural_state
from alexnet_jax.train.step import DeviceBatch, StepResults, TrainStep

log = logging.getLogger(__name__)

WAY_OUT = (
    "what was saved stays; the usual way out is a lower --config.optim.learning_rate with "
    "--allow_config_change, or to take the last checkpoint's folder away, if its net is ruined"
)


class TrainingError(FailedError):
    """Training cannot go on."""


class StopSignal:
    """Makes Ctrl-C and SIGTERM stop training after the current step; a second one stops at once.

    In a thread, where Python cannot, they do what they did before.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if main else ():
            self.previous[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: object) -> None:
        if self.job.signal:
            raise KeyboardInterrupt(number)
        self.job.stop(number)
        with contextlib.suppress(OSError):  # the reader may have been stopped as well
            words = "stopping after this step, or one more if a pass is under way"
            print(f"{words}; a second signal stops at once", file=sys.stderr)


class Interval:
    """The steps since the last log: their results, still on the devices, and the time taken."""

    def __init__(self, batch_size: int, mesh: Mesh):
        self.batch_size, self.mesh = batch_size, mesh
        self.restart()

    def restart(self) -> None:
        self.results: list[tuple[int, StepResults]] = []
        self.started = time.perf_counter()

    def add(self, step: int, results: StepResults) -> None:
        results.numbers.copy_to_host_async()
        self.results.append((step, results))
        if len(self.results) > 2:  # stay at most two steps ahead of the devices
            self.results[-3][1].numbers.block_until_ready()

    def read(self) -> dict[str, float]:
        """Means over the interval (root mean square for the gradient norm); starts the next one.

        Raises:
          TrainingError: a loss, a gradient, an update or a weight is not finite.
        """
        names, sums = self.results[0][1].layers, []
        gradients, ratios = [], []  # (layers,) of each step
        local = np.stack([local_columns(results.numbers) for _, results in self.results])
        for (step, _), mine, all_shards in zip(self.results, local, over_model(local, self.mesh)):
            sums.append(StepResults(mine[:, 0], names).sums)  # ()
            squares = np.array([*StepResults(all_shards, names).squares.values()])  # (layers, 3)
            gradients.append(squares[:, 0])
            bad = [name for name, row in zip(names, squares) if not np.isfinite(row).all()]
            if bad or not np.isfinite(sums[-1].loss):
                raise TrainingError(
                    f"step {step}: the loss is {sums[-1].loss / self.batch_size}, and the gradient "
                    f"or the update is not finite in {', '.join(bad) or 'no layer'}; {WAY_OUT}"
                )
            moved, weights = np.sqrt(squares[:, 1:]).T
            ratios.append(np.divide(moved, weights, out=np.zeros_like(moved), where=weights > 0))
        seconds = time.perf_counter() - self.started
        values = metrics.errors(metrics.added(sums))
        values["gradient_norm"] = float(np.sqrt(np.mean(np.sum(gradients, axis=1))))
        for name, ratio in zip(names, np.mean(ratios, axis=0)):
            values[RATIO + name] = float(ratio)
        values["images_per_second"] = len(ratios) * self.batch_size / seconds
        self.restart()
        return values


def train(
    config: Config, directory: pathlib.Path, job: Job, allow_config_change: bool = False
) -> int:
    """Train, or resume training, in a workdir, together with the job's other processes.

    Returns:
      0 if all is done, or the number of the signal that ended it early, after saving.

    Raises:
      UserError: the data, the mesh, the workdir or their combination cannot be used.
      TrainingError: a loss, a gradient or an update was not finite.
      SaveError: a checkpoint could not be written.
    """
    workdir.make(directory)
    with workdir.locked(directory) if job.is_leader else contextlib.nullcontext():
        workdir.check_shared(directory, job)
        run = setup.open_run(config, directory, allow_config_change, job)
        first, last = int(run.state.step), run.calendar.num_steps
        reports = Report(directory, first, last) if job.is_leader else Silent()
        with StopSignal(job), run.checkpoints, reports as report:
            _introduce(run, first, report)
            if first < last:
                return _steps(run, first, report, job)
            report.say(
                f"nothing to do: {first} steps are done, and asked are {last}; more by "
                "--config.train.num_epochs=... or --config.train.num_steps=..."
            )
    return 0


def _steps(run: setup.Run, first: int, report: Silent, job: Job) -> int:
    """Run the steps after `first`; returns the signal that ended them early, or 0."""
    config, calendar, meta, state = run.config, run.calendar, run.meta, run.state
    scale = np.float32(optim.plateau_scale(meta.plateau, config.optim))
    statistics = put_everywhere(meta.statistics, run.mesh)
    batches = device_batches(
        run.source, meta.statistics, config, run.mesh, first, calendar.num_steps, meta.origin
    )
    held_out = _held_out(run)
    batch = next(batches)
    train_step = _compiled(run.train_step, (state, batch, statistics, scale), report)
    report.start_clock(first)
    job.progress(f"step {first + 1}, and the batch after it")
    interval = Interval(calendar.batch_size, run.mesh)
    for step in range(first + 1, calendar.num_steps + 1):
        state, results = train_step(state, batch, statistics, scale)
        batch = next(batches, batch)  # sent to the devices while the step runs
        interval.add(step, results)
        job.progress(f"step {step}")
        stopping = job.stops_after(step)  # asked once: a later signal waits for the next step
        passes = calendar.epoch_ends(step, config.eval.every_epochs)
        saves = passes or stopping or calendar.is_due(step, config.checkpoint.every_steps)
        logs = step == first + 1 or calendar.is_due(step, config.train.log_every_steps)
        if saves or logs or calendar.epoch_ends(step, 1):
            values = interval.read()
            values["learning_rate"] = float(run.schedule(np.int32(step - 1), scale)["kernel"])
            report.record("train", step, calendar.epochs(step), values)
            if step == 1:
                _say_initial_loss(values["loss"], len(meta.labels), report)
        if passes:
            rate = values["learning_rate"]
            error, meta = _validated(
                run, meta, state, held_out, statistics, step, rate, report, job
            )
            scale = np.float32(optim.plateau_scale(meta.plateau, config.optim))
        if saves:
            job.progress(f"the saving of step {step}")
            natural = natural_state(state, len(meta.labels))
            run.checkpoints.save(step, natural, meta, error if passes else None)
            interval.restart()  # so that the next images_per_second excludes the save
        if stopping and step < calendar.num_steps:
            run.checkpoints.wait()
            name = signal.Signals(stopping).name
            report.say(f"{name}: saved step {step}; the same command goes on from there")
            return stopping
        more = step < calendar.num_steps
        job.progress(f"step {step + 1}, and the batch after it" if more else "the last save")
    return 0  # also if a signal came while the last step was validated and saved


def _validated(
    run: setup.Run,
    meta: Meta,
    state: TrainState,
    held_out: Iterable[DeviceBatch],
    statistics: Statistics,
    step: int,
    learning_rate: float,
    report: Silent,
    job: Job,
) -> tuple[float, Meta]:
    """Run and record a validation pass; returns top-1 error, and `meta` with the new plateau."""
    started = time.perf_counter()
    sums = validate.validate(run.eval_step, state.params, held_out, statistics, job.progress)
    values = metrics.errors(sums)
    if not math.isfinite(values["loss"]):
        raise TrainingError(f"step {step}: the validation loss is {values['loss']}; {WAY_OUT}")
    values[PASS] = int(sums.count)
    values["learning_rate"] = learning_rate
    values["images_per_second"] = float(sums.count) / (time.perf_counter() - started)
    report.record(run.config.eval.split, step, run.calendar.epochs(step), values)
    plateau = meta.plateau
    if run.config.optim.schedule == "plateau":
        plateau = optim.plateau_update(plateau, values["top1_error"], run.config.optim)
    if plateau.drops > meta.plateau.drops:
        report.say(f"no better for {run.config.optim.plateau_patience} passes: the rate drops")
    return values["top1_error"], dataclasses.replace(meta, plateau=plateau)


def _held_out(run: setup.Run) -> Iterable[DeviceBatch]:
    """The validation split's batches, of which every iteration is a pass."""
    stored = run.meta.statistics.stored_size

    def sent() -> Iterator[DeviceBatch]:
        batch_size = validate.batch_size(run.config, run.mesh)
        return validate.device_batches(
            run.validation, run.config.data, stored, batch_size, run.mesh
        )

    squares = (len(run.source) + len(run.validation), stored, stored, 3)
    stay = run.config.data.on_device and resident.fits(squares, resident.memory(run.mesh))
    return resident.Batches(sent, stay)


def device_batches(
    source: Source,
    statistics: Statistics,
    config: Config,
    mesh: Mesh,
    first: int,
    last: int,
    origin: int = 0,
) -> Generator[DeviceBatch, None, None]:
    """Training batches first .. last - 1, being sent to the devices; batch 0 is at `origin`."""
    batches = host_batches(source, statistics, config, mesh, first, last, origin)
    finish: resident.Finish | None = None
    if config.data.on_device:
        stored, size = statistics.stored_size, config.model.input_size
        finish = resident.load(source, config.data, stored, size, mesh)

    with contextlib.closing(batches):
        for batch in batches:
            placed = put_batch(batch, mesh)
            yield finish(placed) if finish else placed


def host_batches(
    source: Source,
    statistics: Statistics,
    config: Config,
    mesh: Mesh,
    first: int,
    last: int,
    origin: int = 0,
) -> stream.Batches:
    """This process's rows of the same batches, on the host; `index`, not pixels, if those stay."""
    batch_size = config.train.batch_size
    return stream.train_batches(
        source,
        statistics,
        config.data,
        seed=config.seed,
        size=config.model.input_size,
        rows=stream.Rows(batch_size, local_rows(mesh, batch_size)),
        start_step=first,
        stop_step=last,
        origin=origin,
        pixels=not config.data.on_device,
    )


def _compiled(step: TrainStep, arguments: tuple, report: Silent) -> TrainStep:
    """The step compiled ahead of time, so that the first step's time does not include compiling."""
    started = time.perf_counter()
    compiled = step.lower(*arguments).compile()  # pyright: ignore[reportFunctionMemberAccess]
    report.say(f"compiled the training step in {time.perf_counter() - started:.1f} s")
    return compiled


def _say_initial_loss(loss: float, num_classes: int, report: Silent) -> None:
    report.say(
        f"loss at initialisation {loss:.4f}; a uniform guess has ln({num_classes}) = "
        f"{math.log(num_classes):.4f}"
    )


def _introduce(run: setup.Run, first: int, report: Silent) -> None:
    model, calendar = run.config.model, run.calendar
    count = sum(layer.parameters for layer in layers(model, len(run.meta.labels)))
    shape = " x ".join(f"{name}={size}" for name, size in run.mesh.shape.items())
    idle = jax.device_count() - run.mesh.size
    unused = f"; devices not used: {idle}" if idle else ""
    report.say(
        f"preset {model.preset}, width {model.width:g}, input {model.input_size}, {model.dtype}: "
        f"{count:,} parameters on {jax.default_backend()} mesh {shape}{unused}"
    )
    report.say(
        f"{run.config.data.source}: {calendar.num_examples:,} training images, "
        f"{len(run.validation):,} of split {run.config.eval.split}, "
        f"{len(run.meta.labels)} classes; {calendar.num_steps:,} steps of {calendar.batch_size}"
    )
    if first:
        report.say(f"going on from step {first}")
