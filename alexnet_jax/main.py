"""AlexNet in JAX: train, evaluate, predict, inspect, measure.

  python -m alexnet_jax.main --config=configs/NAME.py --workdir=DIR [--mode=MODE]
      [--config.SECTION.FIELD=VALUE ...] [IMAGE ...]

Several processes train one net: under Slurm and Open MPI they find each other; elsewhere give each
--coordinator=HOST:PORT --num_processes=N --process_id=0..N-1, or --coordinator=auto on a TPU pod.

Exit status: 0 the whole job is done; 1 training or internal failure; 2 a user error, explained in
one line; 130 Ctrl-C and 143 SIGTERM, after saving.
"""

import json
import logging
import sys

from alexnet_jax import interrupts

if __name__ == "__main__":
    interrupts.at_once()

from absl import flags

from alexnet_jax import (
    bench,
    cluster,
    command,
    evaluate,
    figures,
    gallery,
    inspection,
    loop,
    mesh,
    predict,
)
from alexnet_jax import config as configs
from alexnet_jax.errors import UserError
from alexnet_jax.files import expanded

MODES = ("train", "eval", "predict", "features", "figures", "inspect", "bench")
WITHOUT_WORKDIR = ("inspect", "bench")
OF_MODES = {
    "output": ("eval", "features"),
    "layer": ("features",),
    "figure": ("predict",),
    "json": ("inspect",),
    "allow_config_change": ("train",),
}
BY_SEVERAL = ("train", "eval")


def main(argv: list[str]) -> int:
    """Run one mode and return the exit status; `argv` as in sys.argv."""

    def work() -> int:
        options, paths = parse(argv)
        return 0 if options is None else run(options, paths)

    return command.status(work)


def parse(argv: list[str]) -> tuple[flags.FlagValues | None, list[str]]:
    """The command line's flags, None if only help was asked for; and the arguments after them.

    Raises:
      UserError: an unknown flag, config file, field, or an ill-typed value.
    """
    values = flags.FlagValues()
    command.define_config(values, argv)
    flags.DEFINE_string("workdir", None, "where the run lives", flag_values=values)
    flags.DEFINE_string("mode", "train", f"one of {', '.join(MODES)}", flag_values=values)
    flags.DEFINE_string(
        "output", None, "eval: .npz or .csv to write; features: .npz", flag_values=values
    )
    flags.DEFINE_string("layer", "fc7", "features: whose output", flag_values=values)
    flags.DEFINE_string("figure", None, "predict: .png or .svg to draw", flag_values=values)
    flags.DEFINE_bool("json", False, "inspect: print JSON, not a table", flag_values=values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, or auto", flag_values=values)
    flags.DEFINE_integer("num_processes", 0, "of one training", flag_values=values)
    flags.DEFINE_integer("process_id", -1, "which of them this is", flag_values=values)
    flags.DEFINE_bool(
        "allow_config_change", False, "go on in a workdir with changed settings", flag_values=values
    )
    rest = command.parse(values, argv)
    if values.help:
        print(f"{__doc__}\n{values.get_help(include_special_flags=False)}")
        return None, []
    if rest and values.mode != "predict":
        raise UserError(f"argument {rest[0]!r} is not understood; flags are --name=value")
    if values.mode not in MODES:
        raise UserError(f"--mode={values.mode}: must be one of {', '.join(MODES)}")
    for flag, modes in OF_MODES.items():
        if values[flag].present and values.mode not in modes:
            raise UserError(
                f"--{flag} is for --mode={' and '.join(modes)}; leave it out of "
                f"--mode={values.mode}"
            )
    if not values.workdir and values.mode not in WITHOUT_WORKDIR:
        raise UserError(f"--workdir is missing: --mode={values.mode} needs one")
    if values.mode == "features" and not values.output:
        raise UserError("--output is missing: --mode=features writes to FILE.npz")
    return values, rest


def run(options: flags.FlagValues, paths: list[str]) -> int:
    """Run the mode that the flags ask for."""
    config = configs.resolve(options.config)
    command.before_jax(config)
    if options.mode == "inspect":
        found = inspection.inspect(config)
        print(json.dumps(found) if options.json else inspection.table(found))
        return 0
    count = cluster.join(options.coordinator, options.num_processes, options.process_id)
    with cluster.Job(config.mesh.step_timeout if options.mode == "train" else 0) as job:
        if count > 1 and options.mode not in BY_SEVERAL:
            raise UserError(
                f"--mode={options.mode} by {count} processes: only {' and '.join(BY_SEVERAL)} are "
                "done together; start one"
            )
        if not job.is_leader:
            logging.getLogger("alexnet_jax").setLevel(logging.ERROR)  # rank 0 says the same
        mesh.start_devices(-(-config.mesh.cpu_devices // count))
        return run_mode(options, paths, config, job)


def run_mode(
    options: flags.FlagValues, paths: list[str], config: configs.Config, job: cluster.Job
) -> int:
    """Run a mode that needs devices."""
    if options.mode == "bench":
        found = bench.bench(config)
        print(bench.table(found))
        print(json.dumps(found))
        return 0
    names = options.workdir.split(",")
    if "" in names:
        raise UserError(f"--workdir={options.workdir}: a name is missing beside a comma")
    directories = [expanded(name) for name in names]
    if options.mode == "eval":
        output = None
        if options.output and job.is_leader:
            output = command.file_to_write("output", options.output, ".npz", ".csv")
        found, classes = evaluate.evaluate_workdirs(config, directories, output, job.broadcast)
        if job.is_leader:
            print(classes)
            print(json.dumps(found))
        return 0
    if options.mode == "predict":
        if options.figure:
            figures.check_installed()
            figure = command.file_to_write("figure", options.figure, ".png", ".svg")
        known, broken = [], []
        for entry in predict.predict_files(config, directories, paths):
            print(json.dumps(entry), flush=True)
            (broken if "error" in entry else known).append(entry)
        if options.figure and known:
            figures.save(gallery.file_guesses(known), figure)
        if broken:
            raise UserError(
                f"{len(broken)} of {len(broken) + len(known)} files are not images that can be "
                f"read, {broken[0]['error']} the first; leave them out or replace them"
            )
        return 0
    if options.mode == "figures":
        print("\n".join(gallery.draw(config, directories)))
        return 0
    if len(directories) > 1:
        raise UserError(f"--workdir={options.workdir}: --mode={options.mode} takes one")
    if options.mode == "features":
        output = command.file_to_write("output", options.output, ".npz")
        found = predict.write_features(config, directories[0], options.layer, output)
        print(json.dumps(found))
        return 0
    number = loop.train(config, directories[0], job, options.allow_config_change)
    return 128 + number if number else 0


if __name__ == "__main__":
    cluster.leave(main(sys.argv))
