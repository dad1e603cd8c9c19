"""Save and restore the state, and all that evaluation needs, in one Orbax checkpoint per step.

Arrays are stored in their natural shapes, so a checkpoint does not depend on a mesh: it is read to
the host, and `state.put` places it on whatever devices there are. A checkpoint appears atomically
and is then sealed with checksums; if they show damage, the next older one is used. Kept are the two
newest, and the one with the lowest validation top-1 error (the earlier of equals).
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import logging
import math
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from alexnet_jax import config as configs
from alexnet_jax import seals
from alexnet_jax.config import Config
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.errors import FailedError, UserError, reason
from alexnet_jax.models.layers import Params
from alexnet_jax.train.optim import Plateau
from alexnet_jax.train.state import TrainState, state_shapes

_failures: list[BaseException] = []  # of this process's part of a save


def _not_orbax(record: logging.LogRecord) -> bool:
    """Logs nothing of Orbax's: a failed save raises, and hundreds of lines about it help nobody.

    But where other processes save too, Orbax waits for them before it raises, and they may wait for
    this one. Its failure is then known from here alone.
    """
    if "orbax" not in record.pathname:
        return True
    if record.funcName == "_thread_func" and record.exc_info and record.exc_info[1]:
        _failures.append(record.exc_info[1])
    return False


logging.getLogger("absl").addFilter(_not_orbax)

# TensorStore leaks the metrics it reports, and Orbax asks at every save: 300 KB each time.
tensorstore.experimental_collect_matching_metrics = lambda *prefix: []


def _unraisable(found: Any, otherwise: Callable[[Any], Any] = sys.unraisablehook) -> None:
    """Ignore TensorStore's callbacks after a failed save, when Orbax's event loop is closed."""
    if str(found.exc_value) != "Event loop is closed":
        otherwise(found)


sys.unraisablehook = _unraisable

BEGINNING = Plateau()
log = logging.getLogger(__name__)

UNFINISHED = "*.orbax-checkpoint-tmp*"
PAUSE = 1.0  # seconds between two looks for a failure


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint holds besides the state."""

    config: Config
    labels: tuple[str, ...]
    statistics: Statistics  # of the training split
    plateau: Plateau = BEGINNING
    num_examples: int = 0  # of the training split; stream positions depend on it
    drawn_from: str | None = ""  # the `Source`'s; None in older checkpoints, which lack it
    words: tuple[str, ...] = ()  # readable class names, if labels are codes
    origin: int = 0  # of the `Calendar`
    mixed: bool = False  # earlier training drew the splits otherwise: any image may be known

    @property
    def drawing(self) -> str | None:
        """The `drawn_from` of splits whose images are surely unseen, but the training split's."""
        return "several" if self.mixed else self.drawn_from


class SaveError(FailedError):
    """A checkpoint could not be written; older ones are intact."""


Broadcast = Callable[[Callable[[], str]], str]


def local(say: Callable[[], str]) -> str:
    """`Job.broadcast` for a single process."""
    return say()


class NewestAndBest:
    """Orbax preservation policy that keeps the two newest and the best checkpoint.

    Two, since the newest may turn out to be damaged, and is the best as long as errors fall.
    """

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One answer per checkpoint; those never validated cannot be the best."""
        del context
        keep = set(sorted(checkpoint.step for checkpoint in checkpoints)[-2:])
        errors = [
            (checkpoint.metrics["top1_error"], checkpoint.step)
            for checkpoint in checkpoints
            if checkpoint.metrics and math.isfinite(checkpoint.metrics["top1_error"])
        ]
        if errors:
            keep.add(min(errors)[1])
        return [checkpoint.step in keep for checkpoint in checkpoints]


class Checkpoints:
    """Reads the checkpoints of a folder, even while a run is saving there."""

    def __init__(self, directory: pathlib.Path, broadcast: Broadcast = local):
        self.directory, self.broadcast = directory.absolute(), broadcast
        self.context = ocp.Context()
        registry = ocp.handlers.local_registry()
        registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
        self.context.checkpointables.registry = registry

    def steps(self) -> list[int]:
        """The steps that are there now, damaged or not, in ascending order."""
        names = [path.name for path in self.directory.glob("*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def folder(self, step: int) -> pathlib.Path:
        return self.directory / str(step)

    def newest_whole(self) -> int | None:
        """The newest step whose files are as they were saved; None if there is no checkpoint.

        An unsealed one, left by a run killed before sealing, counts if all of it can be read.

        Raises:
          UserError: there are checkpoints, but all of them are damaged.
        """

        def listed() -> list[int]:
            return json.loads(self.broadcast(lambda: json.dumps(self.steps())))

        steps = listed()
        for step in reversed(steps):
            problem = self._damage_of(step)
            if not problem:
                return step
            if listed() != steps:  # a run has just replaced it with a newer one
                return self.newest_whole()
            log.warning(
                "CHECKPOINT %s IS DAMAGED (%s); trying an older one", self.folder(step), problem
            )
        if steps:
            raise UserError(
                f"all checkpoints of {self.directory} are damaged ({', '.join(map(str, steps))}); "
                "bring a copy back, or begin anew in another --workdir"
            )
        return None

    def _damage_of(self, step: int) -> str:
        """What is wrong with a checkpoint, in words; "" if it is intact."""
        folder = self.folder(step)
        if self.broadcast(lambda: "sealed" if seals.is_sealed(folder) else ""):
            return self.broadcast(lambda: seals.damage(folder) or "")
        problem = ""
        try:  # Orbax reads collectively, on all processes
            self.read_meta(step)
            self.read_params(step)
            self._read_all(step, "training")
        except UserError as error:
            problem = f"it was not sealed, and its reading ends in {type(error.__cause__).__name__}"
        return self.broadcast(lambda: problem)

    def chosen_step(self, wanted: int) -> int:
        """The step `wanted`, or for -1 the newest intact one.

        Raises:
          UserError: there is none, or it is damaged.
        """
        newest = self.newest_whole() if wanted == -1 else None
        if newest is not None:
            return newest
        steps = self.steps()
        if wanted == -1 or not steps:
            raise UserError(f"{self.directory} holds no checkpoint; train there first")
        if wanted not in steps:
            raise UserError(
                f"checkpoint.step={wanted}: {self.directory} holds steps "
                f"{', '.join(map(str, steps))}; set --config.checkpoint.step to one of them"
            )
        problem = self._damage_of(wanted)
        if problem:
            raise UserError(
                f"checkpoint {self.folder(wanted)} is damaged ({problem}); "
                "--config.checkpoint.step=-1 takes the newest that is whole"
            )
        return wanted

    def read_net(self, wanted: int) -> tuple[int, Meta, Params]:
        """`chosen_step`, with its meta and its parameters, as from `read_params`.

        Raises:
          UserError: as `chosen_step`.
        """
        steps = self.steps()
        step = self.chosen_step(wanted)
        try:
            return step, self.read_meta(step), self.read_params(step)
        except UserError:
            if jax.process_count() > 1 or self.steps() == steps:
                raise
        return self.read_net(wanted)  # a run has just replaced it with a newer one

    def read_meta(self, step: int) -> Meta:
        """Everything but the state of a step."""
        found = self._load(step, {"meta": None, "statistics": None})
        meta = found["meta"]
        arrays = {name: np.asarray(value) for name, value in found["statistics"].items()}
        return Meta(
            config=configs.from_dict(meta["config"]),
            labels=tuple(meta["labels"]),
            statistics=Statistics(**arrays),
            plateau=_plateau_from_json(meta["plateau"]),
            num_examples=meta["num_examples"],
            drawn_from=meta.get("pool"),  # missing in older checkpoints, as are the next
            words=tuple(meta.get("words", ())),
            origin=meta.get("origin", 0),
            mixed=meta.get("mixed", False),
        )

    def read_params(self, step: int) -> Params:
        """A step's parameters on the host, numpy arrays in their natural shapes."""
        return self._read_all(step, "params")

    def read_state(self, step: int, meta: Meta) -> TrainState:
        """A step's state on the host, numpy arrays in their natural shapes."""
        shapes = state_shapes(meta.config.model, len(meta.labels))
        training = {"step": shapes.step, "opt_state": shapes.opt_state}
        params = self._read(step, "params", shapes.params)
        return TrainState(params=params, **self._read(step, "training", training))

    def _read_all(self, step: int, name: str) -> Any:
        """All arrays stored under `name`."""
        with self._damage(step), self.context:
            stored = ocp.checkpointables_metadata(str(self.folder(step))).metadata[name]
        return self._read(step, name, stored)

    def _read(self, step: int, name: str, shapes: Any) -> Any:
        target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
        return self._load(step, {name: target})[name]

    def _load(self, step: int, wanted: dict[str, Any]) -> Any:
        with self._damage(step), self.context:
            return ocp.load_checkpointables(str(self.folder(step)), wanted)

    @contextlib.contextmanager
    def _damage(self, step: int) -> Iterator[None]:
        """Turns whatever Orbax raises at an unreadable step into a UserError."""
        try:
            yield
        except Exception as error:
            others = [str(other) for other in self.steps() if other != step]
            older = f"the others are {', '.join(others)}" if others else "there is no other"
            raise UserError(
                f"checkpoint {self.folder(step)} is damaged ({type(error).__name__}); "
                f"take that folder away to go on without it: {older}"
            ) from error


class Saver(Checkpoints):
    """Also saves and removes checkpoints; only for the run that holds the workdir's lock.

    Use as a context manager, which on exit waits for the last save.
    """

    def __init__(self, directory: pathlib.Path, broadcast: Broadcast = local):
        super().__init__(directory, broadcast)
        self.context.async_options.create_directories_asynchronously = False  # failing there hangs
        _set_aside_unreadable(self.directory)
        self.checkpointer = ocp.training.Checkpointer(
            str(self.directory), context=self.context, preservation_policy=NewestAndBest()
        )
        self.finishing = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self.pending: tuple[int, concurrent.futures.Future] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        failed = isinstance(error, SaveError)
        try:
            self.wait()
        except SaveError:
            failed = True
            raise
        finally:
            if not failed or jax.process_count() == 1:  # of several, Orbax waits for the others
                self.finishing.shutdown()
                self.checkpointer.close()

    def clean(self) -> None:
        """Remove unfinished saves left by a run that was killed."""
        for leftover in self.directory.glob(UNFINISHED):
            shutil.rmtree(leftover)

    def set_aside_after(self, step: int | None) -> None:
        """Move the checkpoints after a step out of the way of those that will take their place."""
        later = [number for number in self.steps() if step is not None and number > step]
        for number in later:
            _set_aside(self.folder(number))
        if later:
            self.reload()

    def reload(self) -> None:
        """Re-read the folder after another process changed it."""
        self.checkpointer.reload()

    def save(
        self, step: int, state: TrainState, meta: Meta, top1_error: float | None = None
    ) -> None:
        """Start an asynchronous save; the arrays may be donated as soon as this returns.

        Args:
          top1_error: a fraction, if the step was validated.

        Raises:
          SaveError: this save cannot start, or the previous one failed.
        """
        self.wait()
        _failures.clear()
        contents = {
            "params": state.params,
            "training": {"step": state.step, "opt_state": state.opt_state},
            "meta": {
                "config": configs.to_dict(meta.config),
                "labels": list(meta.labels),
                "plateau": _plateau_to_json(meta.plateau),
                "num_examples": meta.num_examples,
                "pool": meta.drawn_from,
                "words": list(meta.words),
                "origin": meta.origin,
                "mixed": meta.mixed,
            },
            "statistics": {k: np.asarray(v) for k, v in meta.statistics._asdict().items()},
        }
        metrics: Any = None if top1_error is None else {"top1_error": top1_error}
        with _save_errors(step):
            response = self.checkpointer.save_checkpointables_async(
                step, contents, metrics=metrics, force=True
            )
        if response is None:
            raise SaveError(f"the save of step {step} was skipped")
        self.pending = step, self.finishing.submit(self._finish, step, response)

    def _finish(self, step: int, response: Any) -> None:
        """Finish a save while training goes on: wait for the write, then seal."""
        response.result()
        if jax.process_index() != 0:
            return
        if not ocp.is_orbax_checkpoint(str(self.folder(step))):
            raise SaveError(f"step {step} is not on disk after its save")
        seals.seal(self.folder(step))

    def wait(self) -> None:
        """Wait until the save in progress is on disk.

        Raises:
          SaveError: it failed; earlier checkpoints are intact.
        """
        if self.pending is None:
            return
        (step, finished), self.pending = self.pending, None
        try:
            with _save_errors(step):
                while not concurrent.futures.wait([finished], PAUSE).done:
                    if _failures and jax.process_count() > 1:
                        raise _failures[0]
                finished.result()
        except SaveError:
            if jax.process_count() == 1:  # of several, all end
                self._forget(step)
            raise

    def _forget(self, step: int) -> None:
        """After a failed save: drop Orbax's second report of it, its files, and its record."""
        with contextlib.suppress(Exception):
            self.checkpointer.wait()
        with contextlib.suppress(OSError):  # a thread may still write there; `clean` does the rest
            shutil.rmtree(self.directory / f"{step}.orbax-checkpoint-tmp")
        with contextlib.suppress(OSError):
            self.checkpointer.reload()


def _set_aside_unreadable(directory: pathlib.Path) -> None:
    """Rename steps with unreadable metrics: Orbax reads all metrics first, and would fail.

    Raises:
      UserError: no readable step is left.
    """
    steps = [path for path in directory.glob("*") if path.name.isdecimal()]
    unreadable = []
    for folder in steps:
        try:
            json.loads((folder / "metrics" / "metrics").read_bytes())
        except FileNotFoundError:
            pass  # the step was not validated
        except ValueError:
            unreadable.append(folder)
    if unreadable == steps != []:
        raise UserError(
            f"all checkpoints of {directory} are damaged (their metrics); bring a copy back, or "
            "begin anew in another --workdir"
        )
    for folder in unreadable:
        log.warning("CHECKPOINT %s IS DAMAGED (its metrics); trying the others", folder)
        with contextlib.suppress(FileNotFoundError):  # another process did it
            _set_aside(folder)


def _set_aside(folder: pathlib.Path) -> None:
    """Rename to N.damaged, replacing one left by an earlier N."""
    aside = folder.with_suffix(".damaged")
    try:
        folder.rename(aside)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


@contextlib.contextmanager
def _save_errors(step: int) -> Iterator[None]:
    """Turns Orbax's failures, including a full disk's ValueError, into SaveError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise SaveError(
            f"saving step {step} failed: {reason(error)}; what was saved before stays: mend that, "
            "and the same command goes on"
        ) from error


def _plateau_to_json(plateau: Plateau) -> dict[str, Any]:
    best = plateau.best if math.isfinite(plateau.best) else None  # JSON has no infinity
    return plateau._asdict() | {"best": best}


def _plateau_from_json(found: dict[str, Any]) -> Plateau:
    best = math.inf if found["best"] is None else found["best"]
    return Plateau(**found)._replace(best=best)
