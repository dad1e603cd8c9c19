"""What a workdir holds, and which run may go on in it."""

import json
import logging
import os
import pathlib

from alexnet_jax import config as configs
from alexnet_jax.config import Config, UserError

log = logging.getLogger(__name__)

CONFIG_FILE, LABELS_FILE, CHECKPOINTS = "config.json", "labels.txt", "checkpoints"


def make(workdir: pathlib.Path) -> None:
    """Create the folder, or make sure that it can be written.

    Raises:
      UserError: it cannot.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written ({error.strerror}); choose another"
        ) from error


def read_config(workdir: pathlib.Path) -> Config:
    """The config of the run in `workdir`.

    Raises:
      UserError: there is no run.
    """
    path = workdir / CONFIG_FILE
    try:
        return configs.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"--workdir={workdir} holds no run: {path} is missing") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it or choose another") from error


def check_resume(workdir: pathlib.Path, config: Config, allow_config_change: bool) -> None:
    """Raises UserError where the run in `workdir` may not go on with `config`."""
    refused, asked = configs.changes(read_config(workdir), config)
    if refused:
        raise UserError(
            f"--workdir={workdir} holds a run of another model ({_listed(refused)}); "
            "choose another --workdir"
        )
    if asked and not allow_config_change:
        raise UserError(
            f"--workdir={workdir} holds a run with other settings ({_listed(asked)}); "
            "choose another --workdir, or go on with the new ones by --allow_config_change"
        )
    if asked:
        log.warning("going on with changed settings: %s", _listed(asked))


def write(workdir: pathlib.Path, config: Config, labels: tuple[str, ...]) -> None:
    """Write config.json and labels.txt, each whole or not at all."""
    contents = {
        CONFIG_FILE: json.dumps(configs.to_dict(config), indent=2) + "\n",
        LABELS_FILE: "".join(f"{label}\n" for label in labels),
    }
    for name, text in contents.items():
        partial = workdir / f"{name}.tmp"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, workdir / name)


def _listed(changes: dict[str, tuple]) -> str:
    return ", ".join(f"{name}: {old!r} -> {new!r}" for name, (old, new) in changes.items())
