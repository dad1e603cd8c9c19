"""--mode=figures: pictures of trained nets, as in the paper, drawn from workdirs."""

import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from alexnet_jax import evaluate, figures, predict, report
from alexnet_jax.config import Config
from alexnet_jax.data import images
from alexnet_jax.data.examples import Source
from alexnet_jax.errors import UserError
from alexnet_jax.evaluate import Predictions
from alexnet_jax.figures import Guess
from alexnet_jax.files import make_folder
from alexnet_jax.models.nets import layers
from alexnet_jax.predict import Net

GUESSES, QUERIES, NEAREST = 8, 5, 6  # as in figure 4
MOST_FILES = 64  # in one picture

log = logging.getLogger(__name__)


def draw(config: Config, directories: Sequence[pathlib.Path]) -> list[str]:
    """Draw everything into `figures/` of the first workdir; errors and loss are of all workdirs.

    Returns:
      The files written, PNG and SVG.

    Raises:
      UserError: a workdir holds no run, the first one's data cannot be opened, or there is no
        matplotlib.
    """
    figures.check_installed()
    for directory in directories:
        if not report.training_records(directory):
            raise UserError(f"--workdir={directory} holds no {report.METRICS_FILE}; train there")
    net = predict.open_net(config, directories[0])
    folder = directories[0] / "figures"
    make_folder(folder, str(folder), "make room for it, or copy the workdir to where you may write")
    found = evaluate.predictions(net, config.eval.split)
    size = net.meta.statistics.stored_size
    drawn = {
        "errors": learning(directories, "top1_error", "top-1 error"),
        "loss": learning(directories, "loss", "loss, nats"),
        **ratios(directories[0]),
        "confusion": figures.confusion(evaluate.confusion(found), found.words),
        "kernels": kernels(net),
        "guesses": figures.guesses(guesses(found, size)),
        "neighbours": neighbours(net, found, size),
    }
    return [path for name, one in drawn.items() for path in figures.save(one, folder / name)]


def learning(directories: Sequence[pathlib.Path], value: str, ylabel: str) -> Any:
    """Training and validation curves by epoch, of one run or several."""
    runs = names(directories)
    training = {
        name: [(epoch, found[value]) for epoch, found in report.training_by_epoch(place).items()]
        or [(record["epoch"], record[value]) for record in report.training_records(place)]
        for name, place in runs.items()
    }
    passes = {name: report.evaluation_records(place) for name, place in runs.items()}
    validation = {
        name: [(record["epoch"], record[value]) for record in found]
        for name, found in passes.items()
    }
    splits = {name: found[-1]["split"] for name, found in passes.items() if found}
    return figures.curves(training, validation, ylabel=ylabel, splits=splits)


def names(directories: Sequence[pathlib.Path]) -> dict[str, pathlib.Path]:
    """The workdirs by the shortest path suffixes that distinguish them."""
    parts = {place: pathlib.Path(os.path.abspath(place)).parts for place in directories}
    for length in range(1, 64):
        found = {"/".join(parts[place][-length:]): place for place in directories}
        if len(found) == len(set(directories)):
            return found
    return {str(place): place for place in directories}


def ratios(directory: pathlib.Path) -> dict[str, Any]:
    """Each layer's update, relative to its weights, by epoch; empty if none is logged."""
    records = report.training_records(directory)
    names = [name for name in records[-1] if name.startswith(report.RATIO)]
    lines = {
        name.removeprefix(report.RATIO): [(r["epoch"], r[name]) for r in records if r.get(name)]
        for name in names
    }
    if not any(lines.values()):
        return {}
    drawn = figures.curves(lines, {}, ylabel="|update| / |weights|, a step", logarithmic=True)
    return {"update_to_weight": drawn}


def kernels(net: Net) -> Any:
    """conv1's kernels, tower by tower, with each tower's colour selectivity."""
    kernel = np.asarray(net.params["conv1"]["kernel"])
    towers = np.split(kernel, net.config.model.towers, axis=-1)
    titles = [
        f"tower {place}: colour selectivity {figures.colour_selectivity(tower):.2f} "
        "(grey 0, noise 0.67)"
        for place, tower in enumerate(towers, 1)
    ]
    return figures.kernels(towers, titles)


def guesses(found: Predictions, size: int) -> list[Guess]:
    """Examples spread over a split, with their five best classes.

    Args:
      size: pixels a side of the squares drawn.
    """
    drawn = []
    for index in _spread(len(found.source), GUESSES):
        image, label = _picture(found.source, index, size, found.words)
        best = predict.best_labels(np.exp(found.log_probabilities[index]), found.words, ())
        drawn.append(Guess(image, label, right=label, **best))
    return drawn


def file_guesses(found: Sequence[dict[str, Any]]) -> Any:
    """Predictions of `predict.predict_files`, drawn as in the paper's figure 4."""
    drawn = []
    if len(found) > MOST_FILES:
        log.warning("the first %d of %d images are drawn", MOST_FILES, len(found))
    for entry in found[:MOST_FILES]:
        pixels = images.decode(pathlib.Path(entry["file"]).read_bytes(), entry["file"])
        name = pathlib.Path(entry["file"]).name
        square = images.square(pixels, 256)
        best = entry.get("words", entry["labels"])
        drawn.append(Guess(square, name, best, entry["probabilities"], None))
    return figures.guesses(drawn)


def neighbours(net: Net, found: Predictions, size: int) -> Any:
    """Examples of a split with the training images nearest to them in the last hidden layer.

    By Euclidean distance (paper, section 6.1), of fc7 if the net has it.
    """
    layer = layers(net.config.model, len(net.meta.labels))[-2].name
    queries, training = found.source, predict.open_split(net, "train")
    places = _spread(len(queries), QUERIES)
    asked = predict.features(net, queries.take(np.array(places)), layer).reshape(len(places), -1)
    distances = np.concatenate(
        [
            np.linalg.norm(part.reshape(len(part), 1, -1) - asked, axis=-1)
            for part in predict.feature_batches(net, training, layer)
        ]
    )  # (n, queries)
    if net.config.eval.split == "train":  # nearest to each is itself
        distances[places, np.arange(len(places))] = np.inf
    nearest = np.argsort(distances, axis=0, kind="stable")[:NEAREST].T
    return figures.neighbours(
        [_picture(queries, place, size, found.words) for place in places],
        [[_picture(training, int(place), size, found.words) for place in row] for row in nearest],
    )


def _spread(length: int, count: int) -> list[int]:
    """Up to `count` indices spread evenly over `length`, without repeats."""
    return sorted({int(place) for place in (np.arange(count) + 0.5) / count * length})


def _picture(source: Source, index: int, size: int, words: Sequence[str]) -> tuple[np.ndarray, str]:
    """An example's square of `size` pixels a side, and its class name."""
    example = source.read(index)
    pixels = images.decode(example.data, example.name)
    square = images.square(pixels, size)
    return square, words[example.label]
