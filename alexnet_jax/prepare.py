"""Prepare images for training: store them once as small squares, with their mean and colours.

  python -m alexnet_jax.prepare --input=INPUT --output=DIR [--format=raw] ...
  python -m alexnet_jax.prepare --verify=DIR

INPUT is a folder that holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (and, for the
classes' names, ILSVRC2012_devkit_t12.tar.gz) or these files separated by commas; or a folder of
images, tfds:NAME, or shapes. Train on DIR with --config.data.source=records:DIR.

If killed at any moment, the same command resumes. Exit status: 0 all is prepared or verified; 1 too
many broken images, wrong checksums, or a disk error; 2 a user error, explained in one line.
"""

import pathlib
import re
import sys
import time

from alexnet_jax import interrupts

if __name__ == "__main__":
    interrupts.at_once()

from absl import flags
from tqdm import tqdm

from alexnet_jax import command
from alexnet_jax.cluster import leave
from alexnet_jax.config import Data
from alexnet_jax.data import inputs, prepare, records, workers
from alexnet_jax.errors import UserError, printable
from alexnet_jax.files import expanded

SHARD_SIZE = 4096  # images: a few hundred files for ImageNet, each quick to redo


def main(argv: list[str]) -> int:
    """Prepare or verify, and return the exit status; `argv` as in sys.argv."""

    def work() -> int:
        values = parse(argv)
        if values.help:
            print(f"{__doc__}\n{values.get_help(include_special_flags=False)}")
            return 0
        return verify(_path(values.verify)) if values.verify else run(values)

    return command.status(work)


def parse(argv: list[str]) -> flags.FlagValues:
    """The command line's flags.

    Raises:
      UserError: an unknown flag, or an invalid value.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("input", None, "what to prepare", flag_values=values)
    flags.DEFINE_string("output", None, "folder to write, whole or not at all", flag_values=values)
    flags.DEFINE_string("verify", None, "prepared folder to check", flag_values=values)
    flags.DEFINE_enum("format", "jpeg", ["jpeg", "raw"], "of stored images", flag_values=values)
    flags.DEFINE_integer("quality", 95, "of JPEG, 1 to 100", 1, 100, flag_values=values)
    flags.DEFINE_integer("size", 256, "pixels a side", 8, 2048, flag_values=values)
    flags.DEFINE_integer("shard_size", SHARD_SIZE, "images a file", 1, flag_values=values)
    flags.DEFINE_integer("workers", 0, "processes; 0: one a core", 0, flag_values=values)
    flags.DEFINE_integer("allow_broken", 0, "images that may be left out", 0, flag_values=values)
    flags.DEFINE_bool("unofficial", False, "take tars of other sizes", flag_values=values)
    flags.DEFINE_string("tfds_dir", "", "where tfds:NAME lies", flag_values=values)
    flags.DEFINE_string(
        "cache_dir", Data.cache_dir, "of drawn and compiled things", flag_values=values
    )
    flags.DEFINE_list("split", "6,2,2", "of a folder that comes without", flag_values=values)
    flags.DEFINE_bool("help", False, "print this", short_name="h", flag_values=values)
    try:
        rest = values(argv)
    except flags.Error as error:
        raise UserError(command.flag_error(error)) from error
    if len(rest) > 1:
        raise UserError(f"argument {rest[1]!r} is not understood; flags are --name=value")
    if not values.help and not values.verify and not (values.input and values.output):
        raise UserError("--input and --output are needed, or --verify=DIR; see --help")
    return values


def run(values: flags.FlagValues) -> int:
    """Prepare the input that the flags name."""
    started = time.perf_counter()
    command.keep_compiled(values.cache_dir)
    output = _path(values.output)
    try:
        given = inputs.open_input(
            values.input,
            official=not values.unofficial,
            split=values.split,
            tfds_dir=values.tfds_dir,
            cache_dir=values.cache_dir,
        )
    except UserError as error:  # which names training's flags
        own = re.sub(r"--config\.data\.(split|tfds_dir|cache_dir)=", r"--\1=", str(error))
        raise UserError(own) from error
    if isinstance(given, inputs.SourceInput) and given.folder in (output, *output.parents):
        raise UserError(
            f"--output={values.output} lies in the folder that is read, where it would be taken "
            "for a class; choose another"
        )
    manifest = prepare.prepare(
        given,
        output,
        prepare.Settings(values.format, values.quality, values.size, values.shard_size),
        num_workers=workers.count(values.workers),
        allow_broken=values.allow_broken,
    )
    for name, split in manifest["splits"].items():
        size = sum(shard["bytes"] for shard in split["shards"])
        odd = ", ".join(f"{count} {oddity}" for oddity, count in split["oddities"].items())
        print(
            f"{name}: {split['num_examples']:,} images, {size / 1e6:,.1f} MB; "
            f"{odd}; {len(split['broken'])} broken left out"
        )
        for message in split["broken"]:
            print(f"  {message}")
    print(f"{values.output}: done in {time.perf_counter() - started:.1f} s")
    return 0


def _path(text: str) -> pathlib.Path:
    """A folder to write or verify, as an absolute path."""
    path = expanded(text).resolve()
    if not path.name:
        raise UserError(f"{text} is the root of the file system; name a folder in it")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{printable(str(path))} is not in UTF-8, which ArrayRecord needs; choose another name"
        ) from error
    return path


def verify(directory: pathlib.Path) -> int:
    """Check every file of a prepared folder; returns 1 if one is not as it was written."""
    found = [*tqdm(records.verify(directory), unit="file", disable=None)]
    problems = [problem for problem in found if problem]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    whole = len(found) - len(problems)
    print(f"{directory}: {whole} of {len(found)} files are as they were written")
    return 1 if problems else 0


if __name__ == "__main__":
    leave(main(sys.argv))
