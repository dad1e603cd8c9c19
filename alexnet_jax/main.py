"""AlexNet in JAX: train, evaluate, predict, inspect, measure.

  python -m alexnet_jax.main --config=configs/NAME.py --workdir=DIR [--mode=MODE]
      [--config.SECTION.FIELD=VALUE ...] [IMAGE ...]

Exit status: 0 the whole job is done; 1 training or internal failure; 2 a mistake of the user's,
in one line; 130 Ctrl-C and 143 SIGTERM, after saving.
"""

import json
import logging
import pathlib
import re
import signal
import sys

from absl import flags
from ml_collections import config_flags

from alexnet_jax import bench, inspection, loop, mesh, predict
from alexnet_jax import config as configs
from alexnet_jax.checkpoint import SaveError
from alexnet_jax.config import UserError
from alexnet_jax.data.images import ImageError

MODES = ("train", "eval", "predict", "features", "inspect", "bench")
WITHOUT_WORKDIR = ("inspect", "bench")


def main(argv: list[str]) -> int:
    """Run one mode and return the exit status; `argv` as in sys.argv."""
    _log_to_stderr()
    try:
        options, paths = parse(argv)
        return 0 if options is None else run(options, paths)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (loop.TrainingError, SaveError, ImageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("stopped at once; checkpoints saved before stay", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)


def parse(argv: list[str]) -> tuple[flags.FlagValues | None, list[str]]:
    """The command line's flags, None where only help was asked for; and what stands after them.

    Raises:
      UserError: an unknown flag, config file, field, or an ill-typed value.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "a file of configs/", flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "where the run lives", flag_values=values)
    flags.DEFINE_string("mode", "train", f"one of {', '.join(MODES)}", flag_values=values)
    flags.DEFINE_string(
        "output", None, "eval: .npz or .csv to write; features: .npz", flag_values=values
    )
    flags.DEFINE_string("layer", "fc7", "features: whose output", flag_values=values)
    flags.DEFINE_bool("json", False, "inspect: print JSON, not a table", flag_values=values)
    flags.DEFINE_bool(
        "allow_config_change", False, "go on in a workdir with changed settings", flag_values=values
    )
    flags.DEFINE_bool("help", False, "print this", flag_values=values)
    try:
        rest = values(argv)
        whole = values.config is not None and "model" in values.config  # loads it, at the latest
    except Exception as error:  # of flags, or of whatever the config file does
        raise UserError(_flag_error(error)) from error
    if values.help:
        print(f"{__doc__}\n{values.main_module_help()}")
        return None, []
    if len(rest) > 1 and values.mode != "predict":
        raise UserError(f"argument {rest[1]!r} is not understood; flags are --name=value")
    if values.mode not in MODES:
        raise UserError(f"--mode={values.mode}: must be one of {', '.join(MODES)}")
    if values.config is None:
        raise UserError("--config is missing; try --config=configs/quickstart.py")
    if not whole:
        raise UserError(
            "the file of --config returns no config; begin it with blank(), as configs/"
        )
    if not values.workdir and values.mode not in WITHOUT_WORKDIR:
        raise UserError(f"--workdir is missing: --mode={values.mode} needs one")
    if values.mode == "features" and not values.output:
        raise UserError("--output is missing: --mode=features writes to FILE.npz")
    return values, rest[1:]


def run(options: flags.FlagValues, paths: list[str]) -> int:
    """The mode that the flags ask for."""
    config = configs.resolve(options.config)
    if options.mode == "inspect":
        found = inspection.inspect(config)
        print(json.dumps(found) if options.json else inspection.table(found))
        return 0
    mesh.start_cpu_devices(config.mesh.cpu_devices)
    if options.mode == "bench":
        found = bench.bench(config)
        print(bench.table(found))
        print(json.dumps(found))
        return 0
    directories = [pathlib.Path(part) for part in options.workdir.split(",")]
    if options.mode == "eval":
        output = pathlib.Path(options.output) if options.output else None
        found, classes = predict.evaluate_workdirs(config, directories, output)
        print(classes)
        print(json.dumps(found))
        return 0
    if options.mode == "predict":
        found = list(predict.predict_files(config, directories, paths))
        for entry in found:
            print(json.dumps(entry))
        return int(any("error" in entry for entry in found))
    if len(directories) > 1:
        raise UserError(f"--workdir={options.workdir}: --mode={options.mode} takes one")
    if options.mode == "features":
        output = pathlib.Path(options.output)
        found = predict.write_features(config, directories[0], options.layer, output)
        print(json.dumps(found))
        return 0
    number = loop.train(config, directories[0], options.allow_config_change)
    return 128 + number if number else 0


def _flag_error(error: Exception) -> str:
    """One line for what absl and ml_collections say in several, with the nearest field."""
    text = " ".join(str(error.args[0] if error.args else error).split())
    unknown = re.search(r"Did you mean \"(\w+)\" instead of \"(\w+)\"", text)
    if unknown:
        return f"config field {unknown[2]!r} does not exist; nearest is {unknown[1]!r}"
    if "get_config" in text:
        return "the --config file has no get_config(); write it as those of configs/ are"
    if isinstance(error, OSError):
        missing = re.search(r"No such file or directory: '(.*?)'", text)
        return f"--config={missing[1]}: no such file" if missing else text
    if isinstance(error, AttributeError | KeyError):
        names = configs.field_names()
        wrong = text.strip("'\"").split()[0]
        return f"config field {wrong!r} does not exist; nearest is {configs.nearest(wrong, names)}"
    return text


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("alexnet_jax")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


if __name__ == "__main__":
    sys.exit(main(sys.argv))
