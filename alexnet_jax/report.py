"""A run's output: the terminal, metrics.jsonl, TensorBoard."""

import datetime
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from alexnet_jax.files import naming, to_nowhere, write_text

METRICS_FILE = "metrics.jsonl"
PASS = "num_examples"  # only in records of passes over a split
RATIO = "update_to_weight/"  # before a layer's name
AVERAGED = ("steps", "loss", "top1_error")


def say(text: str) -> None:
    """Print a line, above the progress bar if there is one.

    If nobody reads stdout any more, as after Ctrl-C in `... | tee log`, what is done goes on.
    """
    try:
        with tqdm.external_write_mode(file=sys.stdout):
            print(text, flush=True)
    except OSError:
        to_nowhere(sys.stdout)


class Silent:
    """The report of a rank other than 0: it writes nothing."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def start_clock(self, step: int) -> None:
        pass

    def record(self, split: str, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        pass

    def say(self, text: str) -> None:
        pass


class Report(Silent):
    """Writes each record to all three places; use as a context manager.

    On a terminal there is a progress bar; elsewhere one plain line per record.

    Args:
      workdir: holds metrics.jsonl and tensorboard/.
      first_step: where the run starts or resumes; records of later steps, left by a run that was
        killed after its last checkpoint, are removed.
      num_steps: of the whole training.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int, num_steps: int):
        self.num_steps = num_steps
        self.start_clock(first_step)
        self.path = workdir / METRICS_FILE
        _drop_later(self.path, first_step)
        self.file = self.path.open("a", encoding="utf-8")
        self.board = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=first_step + 1, flush_secs=1
        )
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            disable=None,  # if there is no terminal
            dynamic_ncols=True,
        )

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        self.board.close()
        with naming(self.path):
            self.file.close()

    def start_clock(self, step: int) -> None:
        """Start measuring the pace from which the time left is estimated."""
        self.first_step, self.started = step, time.perf_counter()

    def record(self, split: str, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        """Write one record: a line of JSON, points for TensorBoard, words for the terminal."""
        line = {"step": step, "epoch": epoch, "split": split, **values}
        with naming(self.path):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        training = PASS not in values
        tag = split if training or split != "train" else "evaluation"
        for name, value in values.items():
            self.board.add_scalar(f"{tag}/{name}", value, step)
        words = described(values)
        if not training or self.bar.disable:
            place = f"step {step}/{self.num_steps}  epoch {epoch:.2f}"
            left = round(self.seconds_left(step))
            pace = f"  {values['images_per_second']:,.0f} images/s"
            eta = f"  ETA {datetime.timedelta(seconds=left)}" if training else ""
            self.say(f"{split:>10}  {place}  {words}{pace}{eta}")
        if not self.bar.disable and training:
            self.bar.set_postfix_str(f"{words}  {values['images_per_second']:,.0f} images/s")
            self.bar.update(step - self.bar.n)

    def seconds_left(self, step: int) -> float:
        """Seconds to the end, validation included, at the pace since `start_clock`."""
        elapsed = time.perf_counter() - self.started
        return elapsed / (step - self.first_step) * (self.num_steps - step)

    def say(self, text: str) -> None:
        say(text)


def described(values: Mapping[str, Any]) -> str:
    """Loss and errors in words, errors in per cent."""
    return (
        f"loss {values['loss']:.4f}  top-1 error {values['top1_error']:.2%}"
        f"  top-5 error {values['top5_error']:.2%}"
    )


def _drop_later(path: pathlib.Path, step: int) -> None:
    if path.exists():
        kept = [line + "\n" for line, record in _lines(path) if record["step"] <= step]
        write_text(path, "".join(kept), sync=True)


def training_records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The training records in a workdir's metrics.jsonl, in order; none if there is no file."""
    return [record for record in _records(workdir) if PASS not in record]


def evaluation_records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records of passes over the split that was evaluated last."""
    records = [record for record in _records(workdir) if PASS in record]
    return [record for record in records if record["split"] == records[-1]["split"]]


def _records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    path = workdir / METRICS_FILE
    return [record for _, record in _lines(path)] if path.exists() else []


def _lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of metrics.jsonl and their records, less any that a killed run left unfinished."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, TypeError, KeyError):
            continue
        yield line, record


def training_by_epoch(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
    """Running loss and top-1 error of training, means over each epoch, complete epochs only.

    They include dropout and augmentation, and the weights change along the way. A record counts
    for the epoch that contains its first step.
    """
    records = training_records(workdir)
    sums: dict[int, dict[str, float]] = {}
    done, begun = 0, 0.0
    for record in records:
        found = sums.setdefault(math.floor(begun + 1e-9) + 1, dict.fromkeys(AVERAGED, 0.0))
        steps, done, begun = record["step"] - done, record["step"], record["epoch"]
        for name, value in zip(AVERAGED, (1.0, record["loss"], record["top1_error"])):
            found[name] += steps * value
    last = math.floor(records[-1]["epoch"] + 1e-9) if records else 0
    return {
        epoch: {name: total / found["steps"] for name, total in found.items() if name != "steps"}
        for epoch, found in sums.items()
        if epoch <= last
    }
