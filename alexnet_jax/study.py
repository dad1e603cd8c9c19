"""Studies: runs that differ in one thing, and a table that compares them.

  python -m alexnet_jax.study --study=NAME --config=configs/FILE.py --workdir=DIR
      [--seeds=1,2,3] [--variants=A,B] [--config.SECTION.FIELD=VALUE ...]

Trains every variant with every seed, one run after another, in DIR/VARIANT/SEED; if stopped, the
same command resumes. DIR/table.md, table.csv, runs.csv, errors.png and errors.svg cover all
finished runs in DIR, including those of other commands: a study may be spread over several.
Exit status: as for `python -m alexnet_jax.main`.
"""

import dataclasses
import itertools
import json
import logging
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from alexnet_jax import interrupts

if __name__ == "__main__":
    interrupts.at_once()

import jax
from absl import flags

from alexnet_jax import command, evaluate, figures, loop, mesh, report, setup, tables, workdir
from alexnet_jax import config as configs
from alexnet_jax.cluster import Job, leave
from alexnet_jax.config import Config
from alexnet_jax.data import sources
from alexnet_jax.errors import UserError
from alexnet_jax.files import expanded, write_text, writing
from alexnet_jax.models.nets import layers
from alexnet_jax.studies import STUDIES, Settings, Study

log = logging.getLogger(__name__)

CLAIM = "study.json"


def main(argv: list[str]) -> int:
    """Run a study and return the exit status; `argv` as in sys.argv."""

    def work() -> int:
        values = parse(argv)
        if values.help:
            names = "".join(f"\n  {name:24}{study.question}" for name, study in STUDIES.items())
            print(f"{__doc__}\nStudies:{names}\n\n{values.get_help(include_special_flags=False)}")
            return 0
        return run(values)

    return command.status(work)


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """The command line's flags.

    Raises:
      UserError: as `command.parse`; no such study or variant, no workdir, an invalid seed.
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
        given = "--study is missing" if values.study is None else f"--study={values.study}"
        raise UserError(f"{given}: must be one of {', '.join(STUDIES)}")
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
    """Run the study that the flags ask for."""
    study, directory = STUDIES[values.study], expanded(values.workdir)
    names = values.variants or list(study.variants)
    config = configs.resolve(values.config)
    seeds = [int(seed) for seed in values.seeds] or [config.seed]
    command.before_jax(config)
    check(study, values.config, seeds, names)
    claim(directory, values.study, _config(values.config, next(iter(study.variants.values()))))
    failed = []
    rates = {name: _best_rate(study, values.config, name, directory) for name in names}
    for seed in dict.fromkeys(seeds):
        for name in names:
            settings = {**study.variants[name], **rates[name], "seed": seed}
            place = directory / name / str(seed)
            report.say(f"{values.study}: {name}, seed {seed}, in {place}")
            try:
                stopped = _run(_config(values.config, settings), place)
            except loop.TrainingError as error:  # the other runs are still worth having
                failed.append(f"{name}, seed {seed}: {error}")
                continue
            if stopped:
                return stopped
            tables.write(directory, values.study)
    if tables.read_runs(directory, study):
        try:
            figures.save(tables.draw(directory, study), directory / "errors")
        except UserError as error:  # the table is worth having without it
            log.warning("no figure: %s", error)
        report.say((directory / "table.md").read_text(encoding="utf-8"))
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return int(bool(failed))


def check(study: Study, user: Any, seeds: Sequence[int], names: Sequence[str]) -> None:
    """Refuse the study up front if any of its runs would be refused.

    Args:
      names: of the variants to train now.

    Raises:
      UserError: a setting, a seed, the mesh, the data or a net cannot be used; or two variants
        are the same, or differ in what they should not.
    """
    chosen = {name: _config(user, settings) for name, settings in study.variants.items()}
    for seed in seeds:
        _config(user, {"seed": seed})
    mesh.start_devices(next(iter(chosen.values())).mesh.cpu_devices)
    nets, labels = {}, ()
    for name, config in chosen.items():
        mesh.training_mesh(config)
        labels = labels or sources.open_source(config.data, "train").labels
        config = setup.with_classes(config, labels)
        setup.check_parameters(config)
        setup.check_step(config.checkpoint.step)
        if config.train.init_from and name in names:
            setup.check_init_from(config, labels)
        nets[name] = layers(config.model, len(labels))
    for one, other in itertools.combinations(chosen, 2):
        if _trained(chosen[one]) == _trained(chosen[other]):
            raise UserError(
                f"variants {one} and {other} are the same with this --config, "
                f"whose preset is {chosen[one].model.preset!r}; choose another preset"
            )
    if not study.equal_at:
        return
    maps = {
        name: [layer.stage_output for layer in net if len(layer.kernel) == 4][-1]
        for name, net in nets.items()
    }
    (first, size), *others = maps.items()
    for name, other in others:
        if other != size:
            raise UserError(
                f"model.input_size={chosen[name].model.input_size}: the last maps are {size} in "
                f"variant {first} and {other} in {name}, and should be alike; set "
                f"--config.model.input_size to one of {', '.join(map(str, study.equal_at))}"
            )


def _trained(config: Config) -> Config:
    """The config, ignoring what studies vary without effect.

    That is `random_crop` if a crop is the whole square, `lrn` if no layer is normalised, and
    `dropout_after` at a rate of 0.
    """
    data, model = config.data, config.model
    if configs.stored_size(data, model) == model.input_size:
        data = dataclasses.replace(data, random_crop=False)
    if not {"lrn", "spatial_lrn"} & {*model.after_conv1, *model.after_conv2, *model.after_conv5}:
        model = dataclasses.replace(model, lrn=False)
    if not model.dropout_rate:
        model = dataclasses.replace(model, dropout_after=())
    return dataclasses.replace(config, data=data, model=model)


def claim(directory: pathlib.Path, name: str, reference: Config) -> None:
    """Reserve a folder for one study with one setting of everything else.

    Args:
      reference: the first variant's config.

    Raises:
      UserError: the folder holds another study, or runs with other settings.
    """
    path = directory / CLAIM
    length = () if STUDIES[name].target_error else ("num_epochs", "num_steps")
    if not path.exists() or not _holds_runs(directory):
        claimed = {"study": name, "config": configs.to_dict(reference)}
        with writing(f"--workdir={directory}", "choose another"):
            directory.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(claimed, indent=2) + "\n")
        return
    claimed = tables.read_json(path, "study", "config")
    if claimed["study"] != name:
        raise UserError(f"{directory} holds study {claimed['study']!r}; choose another --workdir")
    old = dataclasses.replace(configs.from_dict(claimed["config"]), seed=reference.seed)
    changed = _differences(old, reference, ("init_from", *length))
    if changed:
        raise UserError(
            f"{directory} holds runs with other settings ({workdir.listed(changed)}), which do not "
            "belong in one table; choose another --workdir"
        )


def _differences(old: Config, new: Config, fields: Sequence[str]) -> dict[str, tuple]:
    """The settings that matter and differ, as name -> (old, new).

    Args:
      fields: of `train`, free in a run that goes on, but not in a table.
    """
    refused, asked = configs.changes(old, new)
    differ = refused | asked
    for field in fields:
        pair = getattr(old.train, field), getattr(new.train, field)
        if pair[0] != pair[1]:
            differ[f"train.{field}"] = pair
    return differ


def _holds_runs(directory: pathlib.Path) -> bool:
    """Whether a run was begun in the folder, or is being begun."""
    begun = [*directory.glob(f"*/*/{workdir.CONFIG_FILE}"), *directory.glob(f"*/*/{tables.RESULT}")]
    locks = directory.glob(f"*/*/{workdir.LOCK}")
    return bool(begun) or any(workdir.holder_of(lock.parent) for lock in locks)


def _config(user: Any, settings: Settings) -> Config:
    """The user's config, overridden by a variant's settings."""
    changed = user.copy_and_resolve_references()
    changed.update_from_flattened_dict(settings)
    return configs.resolve(changed)


def _run(config: Config, directory: pathlib.Path) -> int:
    """Train in a workdir, unless that is done, and write the errors to result.json.

    Returns:
      0, or 128 + the number of the signal that stopped it.
    """
    if _is_done(config, directory):
        return 0
    jax.clear_caches()  # of the runs before
    number = _train(config, directory)
    if number:
        return 128 + number
    errors = {}
    for split in tables.SPLITS:
        seen = split if split == "train" else config.eval.split
        looking = dataclasses.replace(config, eval=dataclasses.replace(config.eval, split=seen))
        errors[split], _ = evaluate.evaluate_workdirs(looking, [directory])
    result = {"config": configs.to_dict(config), "seed": config.seed, **errors}
    write_text(directory / tables.RESULT, json.dumps(result, indent=2) + "\n")
    return 0


def _train(config: Config, directory: pathlib.Path) -> int:
    """`loop.train`, watched as `python -m alexnet_jax.main` watches it; any signal it was sent."""
    with Job(config.mesh.step_timeout) as job:
        return loop.train(config, directory, job) or job.signal


def _is_done(config: Config, directory: pathlib.Path) -> bool:
    """Whether a workdir holds the result of this config, but for settings that do not matter."""
    path = directory / tables.RESULT
    if not path.exists():
        return False
    done = configs.from_dict(tables.read_json(path, "config")["config"])
    return not _differences(done, config, ("num_epochs", "num_steps"))


def _best_rate(study: Study, user: Any, name: str, directory: pathlib.Path) -> Settings:
    """The learning rate that gives a variant the lowest training error in `search_epochs`.

    Empty if the study searches none.
    """
    found = {}
    for rate in study.rates:
        settings = {**study.variants[name], "optim.learning_rate": rate, "train.num_steps": 0}
        config = _config(user, {**settings, "train.num_epochs": study.search_epochs})
        place = directory / name / f"rate_{rate:g}"
        report.say(f"{name}: trying learning rate {rate:g} in {place}")
        try:
            number = _train(config, place)
            if number:
                raise KeyboardInterrupt(number)
            epochs = report.training_by_epoch(place)
            if not epochs:
                raise UserError(
                    f"{place} is trained, but its {report.METRICS_FILE} is lost; take the folder "
                    "away, and this rate is tried again"
                )
            found[rate] = epochs[max(epochs)]
        except loop.TrainingError as error:
            log.warning("%s", error)
    if not study.rates:
        return {}
    if not found:
        raise loop.TrainingError(
            f"{name}: at none of the learning rates {study.rates} can training go on; change "
            "--config, or the rates in studies.py"
        )
    best = min(found, key=lambda rate: found[rate]["top1_error"])
    tried = ", ".join(f"{rate:g}: {value['top1_error']:.2%}" for rate, value in found.items())
    report.say(f"{name}: training error by learning rate: {tried}; taken: {best:g}")
    return {"optim.learning_rate": best}


if __name__ == "__main__":
    leave(main(sys.argv))
