"""Shared by the package's commands: logging, flags, exit status."""

import errno
import io
import itertools
import logging
import os
import pathlib
import re
import select
import sys
import traceback
from collections.abc import Callable, Sequence

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from alexnet_jax import config as configs
from alexnet_jax import interrupts
from alexnet_jax.config import Config
from alexnet_jax.errors import FailedError, UserError, exit_status, reason
from alexnet_jax.files import expanded, make_folder, to_nowhere

# How absl's messages about ill-typed values begin -> what the value must be.
ILL_TYPED = {
    "Non-boolean argument": "True or False",
    "invalid literal for int": "a whole number",
    "could not convert string to float": "a finite number",
    "Error while parsing string": "a list, as (1, 2)",
}
log = logging.getLogger(__name__)
WORTH_KEEPING = 0.2  # seconds of compilation; the full net's step takes under one on a CPU
FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk, and a user's part of it
DETERMINISTIC = "--xla_gpu_deterministic_ops"


def status(work: Callable[[], int]) -> int:
    """Run a command's `work` and return its exit status; an error becomes one line on stderr.

    0: the whole job is done; 1: a failure or, without a line, nobody reads stdout any more, as
    behind `head`; 2: a user error; 130 or 143: ended by a signal.
    """
    if sys.stderr is None:  # it was closed before the start
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may lack characters of file names
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("alexnet_jax")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with interrupts.heard():
            found = work()
            if sys.stdout is not None:
                sys.stdout.flush()
            return found
    except BrokenPipeError as error:
        if not _unread():
            print(f"error: {error}", file=sys.stderr)
        return exit_status(error)
    except (UserError, FailedError, OSError) as error:
        full = isinstance(error, OSError) and error.filename and error.errno in FULL
        way_out = "; make room there, and the same command goes on" if full else ""
        print(f"error: {error}{way_out}", file=sys.stderr)
        return exit_status(error)
    except MemoryError as error:
        print(f"error: there is not enough memory ({error})", file=sys.stderr)
        return exit_status(error)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            f"error: the devices have not enough memory ({reason(error)}); more "
            "--config.train.accumulation_steps take less, or a smaller --config.train.batch_size "
            "and --config.eval.batch_size",
            file=sys.stderr,
        )
        return exit_status(error)
    except KeyboardInterrupt as stop:
        words = "stopped; the same command goes on from what was saved, or starts again"
        print(words, file=sys.stderr)
        return exit_status(stop)


def _unread() -> bool:
    """Whether nobody reads stdout any more; what is left for it then goes nowhere."""
    output = select.poll()
    try:
        output.register(sys.stdout.fileno(), select.POLLOUT)
    except (AttributeError, OSError):  # it is closed, or a notebook's
        return False
    gone = any(found & (select.POLLERR | select.POLLHUP) for _, found in output.poll(0))
    if gone:
        to_nowhere(sys.stdout)
    return gone


def before_jax(config: Config) -> None:
    """Apply the config's settings that JAX must know before its first use."""
    keep_compiled(config.data.cache_dir)
    given = os.environ.get("XLA_FLAGS", "")
    if config.train.deterministic and DETERMINISTIC not in given:
        os.environ["XLA_FLAGS"] = f"{given} {DETERMINISTIC}=true".strip()
    elif config.train.deterministic and re.search(f"{DETERMINISTIC}=(false|0)", given):
        log.warning("XLA_FLAGS=%s overrides train.deterministic=True", given)


def keep_compiled(cache_dir: str) -> None:
    """Keep programs that were slow to compile in `cache_dir`, for later runs and for workers.

    JAX_COMPILATION_CACHE_DIR overrides the folder. JAX warns if it cannot be written.
    """
    told = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if told is None:
        told = str(expanded(cache_dir) / "compiled")
        jax.config.update("jax_compilation_cache_dir", told)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = told
    least = jax.config.jax_persistent_cache_min_compile_time_secs  # pyright: ignore[reportAttributeAccessIssue]
    if least == 1.0:  # JAX's default: nobody set it
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)


def define_config(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Adds --config=FILE, its --config.SECTION.FIELD=VALUE, and --help to a command's flags.

    Raises:
      UserError: a --flagfile cannot be read.
    """
    try:
        config_flags.DEFINE_config_file(
            "config", None, "a file of configs/", flag_values=values, sys_argv=list(argv)
        )
    except flags.Error as error:
        raise UserError(reason(error)) from error
    flags.DEFINE_bool("help", False, "print this", short_name="h", flag_values=values)


def parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Reads flags into `values`; returns the arguments after them.

    Raises:
      UserError: an unknown flag, config file, field, or an ill-typed value; no config, unless
        only help is asked for.
    """
    names = configs.field_names()
    for argument in itertools.takewhile("--".__ne__, argv):
        field = re.match(r"--?config\.([^=]+)", argument)
        if field and field[1] not in names:
            raise UserError(configs.no_field(field[1]))
    whole = False
    try:
        rest = values(argv)
        config = values.config
        if not isinstance(config, Config | None):  # `in` raises what went wrong in the file
            whole = isinstance(config, ConfigDict) & all(name in config for name in configs.blank())
    except Exception as error:  # from absl, or anything the config file raises
        raise UserError(flag_error(error)) from error
    if not values.help and not values["config"].present:
        raise UserError("--config is missing; try --config=configs/quickstart.py")
    if not values.help and not whole:
        raise UserError(
            f"the file of --config returns no whole config but {type(config).__name__}; begin it "
            "with blank(), as configs/"
        )
    return rest[1:]


def file_to_write(flag: str, text: str, *suffixes: str) -> pathlib.Path:
    """The file that a flag names; creates its folder.

    Raises:
      UserError: it ends in none of `suffixes`, or cannot be written.
    """
    path = expanded(text)
    if path.suffix not in suffixes:
        raise UserError(f"--{flag}={text}: must end in {' or '.join(suffixes)}")
    make_folder(path.parent, f"--{flag}={text}", "choose another")
    if path.is_dir():
        raise UserError(f"--{flag}={text}: is a folder; choose another name")
    return path


def flag_error(error: Exception) -> str:
    """Reduce an error of absl or ml_collections to one line, with the nearest field name."""
    text = " ".join(str(error.args[0] if error.args else error).split())
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.name in ("<module>", "get_config")]
    if isinstance(error, SyntaxError):
        inside = [error]
    if inside and "ml_collections" not in frames[-1].filename:
        place = f"{inside[-1].filename}, line {inside[-1].lineno}"
        return f"the --config file fails ({place}: {type(error).__name__}: {text})"
    # For a TypeError or ValueError in the file, ml_collections passes on only the text.
    places = re.findall(r'File "([^"]+)", line (\d+), in (?:<module>|get_config)\b', str(error))
    if "Error whilst parsing config file" in text and places:
        said = str(error).rstrip().splitlines()[-1]
        return f"the --config file fails ({places[-1][0]}, line {places[-1][1]}: {said})"
    ill_typed = re.match(r"flag --(config\.)?([\w.]+)=(.*?): \W*(.*)", text)
    for said, words in ILL_TYPED.items():
        if ill_typed and ill_typed[4].startswith(said):
            _, name, value, _ = ill_typed.groups()
            shown = name if ill_typed[1] else f"--{name}"
            return f"{shown}={value!r}: must be {words}; set --{ill_typed[1] or ''}{name}=..."
    if "get_config" in text:
        return (
            "the --config file has no get_config(), or none that takes what follows a colon; "
            "write it as those of configs/ are"
        )
    if text.startswith("FrozenConfigDict"):
        return "the --config file returns a FrozenConfigDict; return what blank() gives"
    if isinstance(error, OSError):
        what = re.search(r"""\[Errno \d+\] (.*?): (?:'(.*)'|"(.*)")$""", text)
        if not what:
            return text
        name = what[2] or what[3]
        where = "" if os.path.isabs(name) else f" in {os.getcwd()}"
        said = f"{what[1][0].lower()}{what[1][1:]}{where}"
        return f"--config={name}: {said}; quickstart.py is in the repository's configs/"
    if isinstance(error, AttributeError | KeyError):
        return configs.no_field(text.removeprefix("'Key ").strip("'\"").split()[0].strip("'\""))
    return text
