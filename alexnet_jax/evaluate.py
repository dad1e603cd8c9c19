"""--mode=eval: errors on a split of one trained net, or of several together."""

import csv
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from alexnet_jax import metrics
from alexnet_jax.checkpoint import Broadcast, local
from alexnet_jax.config import Config
from alexnet_jax.data.examples import Source
from alexnet_jax.errors import UserError, shortened
from alexnet_jax.files import whole, write_arrays
from alexnet_jax.predict import (
    Net,
    averaged,
    check_finite,
    example_names,
    open_net,
    open_split,
    predictor,
)

MOST_CLASSES = 20  # in a table


class Predictions(NamedTuple):
    """Predictions for every example of a split, in the source's order."""

    log_probabilities: np.ndarray  # (n, classes) float32; of several nets, of the mean probability
    targets: np.ndarray  # (n,) int64
    source: Source
    net_words: tuple[str, ...] = ()  # readable class names, of the first net that has any

    @property
    def words(self) -> tuple[str, ...]:
        """Class names for people to read."""
        return self.net_words or self.source.words or self.source.labels


def predictions(net: Net, split: str) -> Predictions:
    """A net's predictions for a split.

    Raises:
      UserError: as `open_split`.
    """
    source = open_split(net, split)
    return Predictions(predictor(net)(source), source.targets, source, net.meta.words)


def together(
    config: Config, directories: Sequence[pathlib.Path], broadcast: Broadcast = local
) -> tuple[Predictions, list[int]]:
    """Predictions of one net, or of several together, for split `eval.split`; and the nets' steps.

    The probabilities of several nets are averaged, as in the paper's ensembles.

    Raises:
      UserError: a workdir cannot be used; the nets have different classes, or split the data
        differently.
    """
    found, steps, sources_of, words = [], [], [], ()
    for directory in directories:
        net = open_net(config, directory, broadcast)
        words = words or net.meta.words
        sources_of.append(open_split(net, config.eval.split))
        if sources_of[0].fingerprint != sources_of[-1].fingerprint:
            raise UserError(
                f"--workdir={directory} was trained with another data.split or data.split_seed "
                f"than {directories[0]}, and sees other images; an ensemble needs the same"
            )
        found.append(predictor(net)(sources_of[-1]))
        steps.append(net.step)
    source = sources_of[0]
    return Predictions(averaged(found), source.targets, source, words), steps


def evaluate_workdirs(
    config: Config,
    directories: Sequence[pathlib.Path],
    output: pathlib.Path | None = None,
    broadcast: Broadcast = local,
) -> tuple[dict[str, Any], str]:
    """Errors on split `eval.split`, and a table of the classes mistaken most often.

    Args:
      output: an .npz or .csv file to write probabilities and labels to.
      broadcast: `Job.broadcast`, if all ranks of a job evaluate.

    Returns:
      split, num_examples, num_crops, loss, top1_error, top5_error, and each checkpoint's step; then
      the table. The loss of ten crops and of several nets is that of the averaged probability.

    Raises:
      UserError: as `together`.
      FailedError: a net has probabilities that are not finite.
    """
    found, steps = together(config, directories, broadcast)
    check_finite(found.log_probabilities, directories)
    if output is not None:
        _write(output, found)
    sums = [
        metrics.sums(
            jnp.asarray(found.log_probabilities[first : first + 4096]),
            jnp.asarray(found.targets[first : first + 4096]),
        )
        for first in range(0, len(found.targets), 4096)
    ]
    values = {
        "split": config.eval.split,
        "num_examples": len(found.targets),
        "num_crops": config.eval.num_crops,
        **metrics.errors(metrics.added(sums)),
    }
    if len(directories) == 1:
        return values | {"step": steps[0]}, class_table(found)
    names = [str(directory) for directory in directories]
    return values | {"steps": steps, "workdirs": names}, class_table(found)


def confusion(found: Predictions) -> np.ndarray:
    """(classes, classes) int64: examples of each class (row) predicted as each class (column)."""
    count = found.log_probabilities.shape[1]
    best = np.argmax(found.log_probabilities, axis=1)
    return np.bincount(found.targets * count + best, minlength=count**2).reshape(count, count)


def class_table(found: Predictions) -> str:
    """The MOST_CLASSES classes with the highest errors, and what they are most often taken for."""
    counts, classes = confusion(found), [shortened(name, 24) for name in found.words]
    examples, right = counts.sum(1), np.diag(counts)
    errors = 1 - right / np.maximum(examples, 1)
    wrong = counts - np.diag(right)
    order = np.argsort(-errors, kind="stable")
    missing = [classes[row] for row in order if not examples[row]]
    order = order[examples[order] > 0]
    lines = [f"{'class':24} examples   error  most often taken for"]
    for row in order[:MOST_CLASSES]:
        taken = int(np.argmax(wrong[row]))
        mistake = f"{classes[taken]} ({wrong[row, taken]})" if wrong[row, taken] else ""
        lines.append(f"{classes[row]:24} {examples[row]:8} {errors[row]:7.1%}  {mistake}")
    if len(order) > MOST_CLASSES:
        lines.append(f"... of {len(order)} classes; all of them by --output=FILE.npz")
    if missing:
        more = ", ..." if len(missing) > 5 else ""
        lines.append(f"without examples: {len(missing)}, {', '.join(missing[:5])}{more}")
    return "\n".join(lines)


def _write(output: pathlib.Path, found: Predictions) -> None:
    """Write probabilities, labels and names of all examples to an .npz or .csv file."""
    probabilities = np.exp(found.log_probabilities)
    labels, source = found.source.labels, found.source
    names = example_names(source)
    if output.suffix == ".npz":
        write_arrays(
            output,
            probabilities=probabilities,
            targets=found.targets,
            labels=np.array(labels),
            names=np.array(names),
            confusion=confusion(found),
        )
        return
    how: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with whole(output) as partial, open(partial, "w", **how) as file:
        table = csv.writer(file)
        table.writerow(["name", "label", *labels])
        for name, target, row in zip(names, found.targets, probabilities):
            table.writerow([name, labels[target], *(f"{value:.9g}" for value in row)])
