"""A study's results: a table for people, two for programs, and a figure."""

import csv
import io
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from alexnet_jax import figures, report
from alexnet_jax.errors import UserError, reason
from alexnet_jax.files import write_text
from alexnet_jax.studies import STUDIES, Study

RESULT = "result.json"
CONFIDENCE = 0.95
SPLITS = ("train", "validation")
MEASURES = ("loss", "top1_error", "top5_error", "num_examples")


class Done(NamedTuple):
    """A finished run."""

    variant: str
    seed: int
    result: dict[str, Any]
    epochs_to_target: float | None


def read_runs(directory: pathlib.Path, study: Study) -> list[Done]:
    """The finished runs of a study, by variant and seed.

    Raises:
      UserError: they are of data sets of different sizes.
    """
    found = []
    for name in study.variants:
        for path in (directory / name).glob(f"*/{RESULT}"):
            result = read_json(path, "config", "seed", *SPLITS)
            epochs = epochs_to(path.parent, study.target_error) if study.target_error else None
            found.append(Done(name, result["seed"], result, epochs))
    counts = {tuple(done.result[split]["num_examples"] for split in SPLITS) for done in found}
    if len(counts) > 1:
        words = " and ".join(f"{one:,} with {other:,}" for one, other in sorted(counts))
        raise UserError(
            f"{directory} holds runs of other data: {words} training and validation images, which "
            "do not belong in one table; take the others away, or choose another --workdir"
        )
    order = list(study.variants)
    return sorted(found, key=lambda done: (order.index(done.variant), done.seed))


def read_json(path: pathlib.Path, *names: str) -> dict[str, Any]:
    """The values of `names` in a file that a study wrote.

    Raises:
      UserError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in names}
    except KeyError as error:
        raise UserError(
            f"{path} lacks {error}; remove it, and the same command makes it anew"
        ) from error
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({reason(error)}); remove it, and the same command makes it anew"
        ) from error


def epochs_to(directory: pathlib.Path, target: float) -> float | None:
    """Epochs until the mean training error of an epoch first falls to `target`, a fraction.

    Interpolated linearly between the means, placed at the epochs' ends; None if it never does.
    """
    before = (0, math.inf)
    for epoch, values in report.training_by_epoch(directory).items():
        error = values["top1_error"]
        if error <= target:
            reach = (before[1] - target) / (before[1] - error) if before[1] < math.inf else 1.0
            return before[0] + (epoch - before[0]) * reach
        before = (epoch, error)
    return None


class Difference(NamedTuple):
    """A variant minus the first, over the seeds both have: points of top-1 validation error."""

    count: int
    mean: float
    margin: float  # half the interval's width; infinite for fewer than two seeds

    @property
    def verdict(self) -> str:
        if self.count < 2:
            return "one seed: no interval"
        return "resolved" if 0 < self.margin < abs(self.mean) else "not resolved"


def difference(runs: Sequence[Done], variant: str, reference: str) -> Difference | None:
    """The paired difference, with Student's interval; None if no seed is common."""
    errors: dict[str, dict[int, float]] = {variant: {}, reference: {}}
    for done in runs:
        if done.variant in errors:
            errors[done.variant][done.seed] = 100 * done.result["validation"]["top1_error"]
    common = sorted(errors[variant].keys() & errors[reference].keys())
    if not common:
        return None
    values = np.array([errors[variant][seed] - errors[reference][seed] for seed in common])
    margin = math.inf
    if len(values) > 1:
        quantile = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
        margin = float(quantile * values.std(ddof=1) / math.sqrt(len(values)))
    return Difference(len(values), float(values.mean()), margin)


def write(directory: pathlib.Path, name: str) -> None:
    """Write table.md, table.csv and runs.csv of the finished runs."""
    study = STUDIES[name]
    runs = read_runs(directory, study)
    done = {run.variant for run in runs}
    rows = [_row(study, runs, variant) for variant in study.variants if variant in done]
    write_text(directory / "table.md", _markdown(name, study, runs, rows))
    write_text(directory / "table.csv", _csv(rows))
    singles = [
        {"variant": done.variant, "seed": done.seed}
        | {f"{s}_{k}": done.result[s][k] for s in SPLITS for k in MEASURES}
        | {"epochs_to_target": done.epochs_to_target}
        for done in runs
    ]
    write_text(directory / "runs.csv", _csv(singles))


def draw(directory: pathlib.Path, study: Study) -> Any:
    """Draw top-1 errors by epoch of each variant, means over its finished seeds."""
    places: dict[str, list[pathlib.Path]] = {name: [] for name in study.variants}
    for done in read_runs(directory, study):
        places[done.variant].append(directory / done.variant / str(done.seed))
    training = {
        name: _mean(
            {epoch: values["top1_error"] for epoch, values in report.training_by_epoch(run).items()}
            for run in runs
        )
        for name, runs in places.items()
    }
    validation = {
        name: _mean(
            {record["epoch"]: record["top1_error"] for record in report.evaluation_records(run)}
            for run in runs
        )
        for name, runs in places.items()
    }
    if study.target_error:
        return figures.curves(training, {}, ylabel="training error", target=study.target_error)
    return figures.curves(training, validation, ylabel="top-1 error")


def _mean(runs: Iterable[Mapping[float, float]]) -> figures.Curve:
    """The mean of several curves, at the epochs that all of them have."""
    found = list(runs)
    common = set[float]().union(*found).intersection(*found)
    return [(epoch, float(np.mean([run[epoch] for run in found]))) for epoch in sorted(common)]


def _row(study: Study, runs: Sequence[Done], variant: str) -> dict[str, Any]:
    """A variant's row of the table; errors in per cent, differences in points."""
    mine = [done for done in runs if done.variant == variant]
    row: dict[str, Any] = {"variant": variant, "n": len(mine)}
    for split, measure in (("train", "top1"), ("validation", "top1"), ("validation", "top5")):
        values = np.array([100 * done.result[split][f"{measure}_error"] for done in mine])
        row[f"{split}_{measure}_mean"] = float(values.mean())
        row[f"{split}_{measure}_spread"] = float(values.std(ddof=1)) if len(values) > 1 else None
    reached = [done.epochs_to_target for done in mine if done.epochs_to_target]
    row["reached_target"] = len(reached)
    row["epochs_to_target"] = float(np.mean(reached)) if len(reached) == len(mine) else None
    rates = {done.result["config"]["optim"]["learning_rate"] for done in mine}
    row["learning_rate"] = ", ".join(f"{rate:g}" for rate in sorted(rates))
    first = next(iter(study.variants))
    found = difference(runs, variant, first) if variant != first else None
    row["difference"] = found.mean if found else None
    row["margin"] = found.margin if found and found.count > 1 else None
    row["verdict"] = found.verdict if found else None
    row["paper"] = study.paper.get(variant)
    return row


def _markdown(name: str, study: Study, runs: Sequence[Done], rows: Sequence[dict]) -> str:
    """The table for people, with notes on how it was computed."""
    (split,) = {done.result["validation"]["split"] for done in runs}
    header = ["variant", "n", "training top-1", f"{split} top-1", "top-5"]
    header += [f"epochs to {study.target_error:.0%}", "rate"] if study.target_error else []
    header += ["difference in top-1", "", "paper, ImageNet"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [row["variant"], str(row["n"])]
        for key in ("train_top1", "validation_top1", "validation_top5"):
            spread = row[f"{key}_spread"]
            around = f" ± {spread:.2f}" if spread is not None else ""
            cells.append(f"{row[f'{key}_mean']:.2f}{around}")
        if study.target_error:
            epochs = row["epochs_to_target"]
            reached = f"by {row['reached_target']} of {row['n']}"
            cells += [f"{epochs:.2f}" if epochs else reached, row["learning_rate"]]
        margin = f" ± {row['margin']:.2f}" if row["margin"] is not None else ""
        cells.append(f"{row['difference']:+.2f}{margin}" if row["difference"] is not None else "")
        lines.append([*cells, row["verdict"] or "", row["paper"] or ""])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    examples = runs[0].result["validation"]["num_examples"]
    notes = (
        "Errors in per cent, mean ± standard deviation over n seeds, of whole splits without "
        "dropout or augmentation. Differences to the first variant are paired over the seeds both "
        f"have, in points, with Student's {CONFIDENCE:.0%} interval over seeds. One image of "
        f"{examples} is {100 / examples:.2f} points."
    )
    reached = [row["epochs_to_target"] for row in rows]
    if len(reached) > 1 and all(reached):
        notes += f" The last variant took {reached[-1] / reached[0]:.2f} times the epochs of the "
        notes += "first; an epoch's training error is the mean over it, as it went."
    return f"# {name}\n\n{study.question}\n\n{table}\n\n{notes}\n"


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
