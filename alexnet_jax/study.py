"""Families of runs that differ in one thing, and the table of what it makes.

  python -m alexnet_jax.study --study=NAME --config=configs/FILE.py --workdir=DIR
      [--seeds=1,2,3] [--variants=A,B] [--config.SECTION.FIELD=VALUE ...]

Trains every variant with every seed, one run after another, in DIR/VARIANT/SEED; the same command
goes on where it was stopped. DIR/table.md, table.csv, runs.csv and errors.png tell of all the runs
in DIR that are done, those of other commands among them: a study may be spread over several.
Exit status: as of `python -m alexnet_jax.main`.
"""

import csv
import dataclasses
import io
import json
import logging
import math
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.stats
from absl import flags

from alexnet_jax import command, figures, loop, mesh, predict, report, setup
from alexnet_jax import config as configs
from alexnet_jax.checkpoint import SaveError
from alexnet_jax.config import Config, UserError
from alexnet_jax.data import sources
from alexnet_jax.data.images import ImageError
from alexnet_jax.files import write_text
from alexnet_jax.studies import STUDIES, Settings, Study

log = logging.getLogger(__name__)

RESULT = "result.json"
CONFIDENCE = 0.95
SPLITS = ("train", "validation")


def main(argv: list[str]) -> int:
    """Run a study and return the exit status; `argv` as in sys.argv."""

    def work() -> int:
        values = parse(argv)
        if values.help:
            names = "".join(f"\n  {name:24}{study.question}" for name, study in STUDIES.items())
            print(f"{__doc__}\nStudies:{names}\n\n{values.main_module_help()}")
            return 0
        return run(values)

    return command.status(work, (loop.TrainingError, SaveError, ImageError, OSError))


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """The command line's flags.

    Raises:
      UserError: as `command.parse`; no such study or variant, no workdir, a seed that is none.
    """
    values = flags.FlagValues()
    command.define_config(values, argv)
    flags.DEFINE_string("study", None, f"one of {', '.join(STUDIES)}", flag_values=values)
    flags.DEFINE_string("workdir", None, "where the runs live", flag_values=values)
    flags.DEFINE_list("seeds", [], "the config's, unless named", flag_values=values)
    flags.DEFINE_list("variants", [], "all, unless named", flag_values=values)
    rest = command.parse(values, argv)
    if values.help:
        return values
    if rest:
        raise UserError(f"argument {rest[0]!r} is not understood; flags are --name=value")
    if values.study not in STUDIES:
        raise UserError(f"--study={values.study}: must be one of {', '.join(STUDIES)}")
    if not values.workdir:
        raise UserError("--workdir is missing: the runs live there")
    known = STUDIES[values.study].variants
    for name in values.variants:
        if name not in known:
            raise UserError(f"--variants={name}: must be one of {', '.join(known)}")
    for seed in values.seeds:
        if not seed.isdecimal():
            raise UserError(f"--seeds={seed}: must be whole numbers with commas between")
    return values


def run(values: flags.FlagValues) -> int:
    """The study that the flags ask for."""
    study, directory = STUDIES[values.study], pathlib.Path(values.workdir)
    names = values.variants or list(study.variants)
    seeds = [int(seed) for seed in values.seeds] or [configs.resolve(values.config).seed]
    chosen = {name: _config(values.config, study.variants[name]) for name in names}
    mesh.start_cpu_devices(next(iter(chosen.values())).mesh.cpu_devices)
    for config in chosen.values():  # none is trained where one cannot be
        mesh.make_mesh(config.mesh, config.model)
        labels = sources.open_source(config.data, "train").labels
        setup.check_parameters(setup.with_classes(config, labels))
    rates = {name: _best_rate(study, values.config, name, directory) for name in names}
    for seed in seeds:
        for name in names:
            settings = {**study.variants[name], **rates[name], "seed": seed}
            place = directory / name / str(seed)
            print(f"{values.study}: {name}, seed {seed}, in {place}", flush=True)
            stopped = _run(_config(values.config, settings), place)
            if stopped:
                return stopped
            write_tables(directory, values.study)
    try:
        figures.save(draw(directory, study), directory / "errors")
    except UserError as error:  # a table is worth having without
        log.warning("no figure: %s", error)
    print((directory / "table.md").read_text(encoding="utf-8"))
    return 0


def _config(user: Any, settings: Settings) -> Config:
    """The user's config with a variant's settings, which win."""
    changed = user.copy_and_resolve_references()
    for name, value in settings.items():
        section, _, field = name.rpartition(".")
        (changed[section] if section else changed)[field] = value
    return configs.resolve(changed)


def _run(config: Config, directory: pathlib.Path) -> int:
    """Train in a workdir unless that is done, and write what came of it to result.json.

    Returns:
      0, or 128 and the number of the signal that stopped it.
    """
    if _is_done(config, directory):
        return 0
    jax.clear_caches()  # of the runs before
    number = loop.train(config, directory)
    if number:
        return 128 + number
    errors = {}
    for split in SPLITS:
        seen = split if split == "train" else config.eval.split
        looking = dataclasses.replace(config, eval=dataclasses.replace(config.eval, split=seen))
        errors[split], _ = predict.evaluate_workdirs(looking, [directory])
    result = {"config": configs.to_dict(config), "seed": config.seed, **errors}
    write_text(directory / RESULT, json.dumps(result, indent=2) + "\n")
    return 0


def _is_done(config: Config, directory: pathlib.Path) -> bool:
    """Whether a workdir holds the result of this very config, but for what does not matter."""
    path = directory / RESULT
    if not path.exists():
        return False
    done = configs.from_dict(json.loads(path.read_text(encoding="utf-8"))["config"])
    length = [(c.train.num_epochs, c.train.num_steps) for c in (done, config)]
    return length[0] == length[1] and not any(configs.changes(done, config))


def _best_rate(study: Study, user: Any, name: str, directory: pathlib.Path) -> Settings:
    """The learning rate that brings a variant's training error lowest in `search_epochs`.

    Nothing where the study searches none.
    """
    found = {}
    for rate in study.rates:
        settings = {**study.variants[name], "optim.learning_rate": rate, "train.num_steps": 0}
        config = _config(user, {**settings, "train.num_epochs": study.search_epochs})
        place = directory / name / f"rate_{rate:g}"
        print(f"{name}: trying learning rate {rate:g} in {place}", flush=True)
        try:
            number = loop.train(config, place)
            if number:
                raise KeyboardInterrupt(number)
            found[rate] = report.training_by_epoch(place)[math.ceil(study.search_epochs)]
        except loop.TrainingError as error:
            log.warning("%s", error)
    if not study.rates:
        return {}
    if not found:
        raise UserError(f"{name}: none of the learning rates {study.rates} trains")
    best = min(found, key=lambda rate: found[rate]["top1_error"])
    tried = ", ".join(f"{rate:g}: {value['top1_error']:.2%}" for rate, value in found.items())
    print(f"{name}: training error by learning rate: {tried}; taken: {best:g}", flush=True)
    return {"optim.learning_rate": best}


class Done(NamedTuple):
    """A run that is done."""

    variant: str
    seed: int
    result: dict[str, Any]
    epochs_to_target: float | None


def read_runs(directory: pathlib.Path, study: Study) -> list[Done]:
    """The runs of a study that are done, variant by variant and by seed."""
    found = []
    for name in study.variants:
        for path in (directory / name).glob(f"*/{RESULT}"):
            result = json.loads(path.read_text(encoding="utf-8"))
            epochs = epochs_to(path.parent, study.target_error) if study.target_error else None
            found.append(Done(name, result["seed"], result, epochs))
    order = list(study.variants)
    return sorted(found, key=lambda done: (order.index(done.variant), done.seed))


def epochs_to(directory: pathlib.Path, target: float) -> float | None:
    """Epochs until the mean training error of an epoch first falls to `target`, a fraction.

    On the line through the epochs' means, drawn at the epochs' ends; None where it never does.
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
    """Of a variant to the first, over the seeds both have: points of top-1 validation error."""

    count: int
    mean: float
    margin: float  # half of the interval; infinite for fewer than two seeds

    @property
    def verdict(self) -> str:
        if self.count < 2:
            return "one seed: no interval"
        return "resolved" if abs(self.mean) > self.margin else "not resolved"


def difference(runs: Sequence[Done], variant: str, reference: str) -> Difference | None:
    """The paired difference, with Student's interval; None where no seed is common."""
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


def write_tables(directory: pathlib.Path, name: str) -> None:
    """Write table.md, table.csv and runs.csv of the runs that are done."""
    study = STUDIES[name]
    runs = read_runs(directory, study)
    rows = [_row(study, runs, variant) for variant in study.variants]
    rows = [row for row in rows if row["n"]]
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
    """Top-1 errors by epoch of each variant, means over the seeds that are done."""
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
    """The mean of several curves, where all of them have a point."""
    found = list(runs)
    common = set[float]().union(*found).intersection(*found)
    return [(epoch, float(np.mean([run[epoch] for run in found]))) for epoch in sorted(common)]


MEASURES = ("loss", "top1_error", "top5_error", "num_examples")


def _row(study: Study, runs: Sequence[Done], variant: str) -> dict[str, Any]:
    """A variant's line of the table; errors in per cent, differences in points."""
    mine = [done for done in runs if done.variant == variant]
    row: dict[str, Any] = {"variant": variant, "n": len(mine)}
    if not mine:
        return row
    for split, measure in (("train", "top1"), ("validation", "top1"), ("validation", "top5")):
        values = np.array([100 * done.result[split][f"{measure}_error"] for done in mine])
        row[f"{split}_{measure}_mean"] = float(values.mean())
        row[f"{split}_{measure}_spread"] = float(values.std(ddof=1)) if len(values) > 1 else None
    reached = [done.epochs_to_target for done in mine if done.epochs_to_target]
    row["epochs_to_target"] = float(np.mean(reached)) if reached else None
    row["learning_rate"] = mine[0].result["config"]["optim"]["learning_rate"]
    first = next(iter(study.variants))
    found = difference(runs, variant, first) if variant != first else None
    row["difference"] = found.mean if found else None
    row["margin"] = found.margin if found and found.count > 1 else None
    row["verdict"] = found.verdict if found else None
    row["paper"] = study.paper.get(variant)
    return row


def _markdown(name: str, study: Study, runs: Sequence[Done], rows: Sequence[dict]) -> str:
    """The table for people, with what it stands on."""
    header = ["variant", "n", "training top-1", "validation top-1", "top-5"]
    header += [f"epochs to {study.target_error:.0%}", "rate"] if study.target_error else []
    header += ["difference in top-1", "", "paper, ImageNet"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [row["variant"], str(row["n"])]
        for key in ("train_top1", "validation_top1", "validation_top5"):
            spread = row[f"{key}_spread"]
            cells.append(f"{row[f'{key}_mean']:.2f}" + (f" ± {spread:.2f}" if spread else ""))
        if study.target_error:
            epochs = row["epochs_to_target"]
            cells += [f"{epochs:.2f}" if epochs else "not reached", f"{row['learning_rate']:g}"]
        margin = f" ± {row['margin']:.2f}" if row["margin"] is not None else ""
        cells.append(f"{row['difference']:+.2f}{margin}" if row["difference"] is not None else "")
        lines.append([*cells, row["verdict"] or "", row["paper"] or ""])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    examples = {done.result["validation"]["num_examples"] for done in runs}
    notes = (
        "Errors in per cent, mean ± standard deviation over n seeds, of whole splits without "
        "dropout or augmentation. Differences to the first variant are paired over the seeds both "
        f"have, in points, with Student's {CONFIDENCE:.0%} interval over seeds. One image of "
        f"{', '.join(map(str, sorted(examples)))} is {100 / max(examples, default=1):.2f} points."
    )
    reached = [row["epochs_to_target"] for row in rows]
    if len(reached) > 1 and all(reached):
        notes += f" The last variant took {reached[-1] / reached[0]:.2f} times the epochs of the "
        notes += "first; an epoch's training error is the mean over it, as it went."
    return f"# {name}\n\n{study.question}\n\n{table}\n\n{notes}\n"


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0]) if rows else []
    lines = [names, *([("" if row[name] is None else row[name]) for name in names] for row in rows)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
