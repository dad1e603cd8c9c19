"""What a workdir holds, and which run may go on in it."""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import pathlib
import socket
from collections.abc import Iterator

from alexnet_jax import config as configs
from alexnet_jax.config import Config, UserError
from alexnet_jax.files import write_text

log = logging.getLogger(__name__)

CONFIG_FILE, LABELS_FILE, CHECKPOINTS = "config.json", "labels.txt", "checkpoints"
LOCK = "lock"


def make(workdir: pathlib.Path) -> None:
    """Create the folder, or make sure that it can be written.

    Raises:
      UserError: it cannot.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / CHECKPOINTS).mkdir(exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written ({error.strerror}); choose another"
        ) from error


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Keep a workdir for one run; the lock of a run that is dead, however it died, is void.

    Raises:
      UserError: another run has it.
    """
    with open(workdir / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another run"
            raise UserError(
                f"--workdir={workdir} is in use by {holder}; wait for it, stop it, or choose "
                "another"
            ) from error
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s); start no other run there", workdir, error)
        file.truncate(0)
        started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {started}\n")
        file.flush()
        yield


def check_resume(old: Config, new: Config, allow_config_change: bool) -> set[str]:
    """The settings that a run of config `old` would go on with changed, as section.field.

    Raises:
      UserError: the model changes; or anything else that matters, and it is not allowed.
    """
    refused, asked = configs.changes(old, new)
    if refused:
        raise UserError(
            f"the workdir holds a run of another model ({_listed(refused)}); "
            "choose another --workdir"
        )
    if asked and not allow_config_change:
        raise UserError(
            f"the workdir holds a run with other settings ({_listed(asked)}); "
            "choose another --workdir, or go on with the new ones by --allow_config_change"
        )
    if asked:
        log.warning("going on with changed settings: %s", _listed(asked))
    return set(asked)


def write(workdir: pathlib.Path, config: Config, labels: tuple[str, ...]) -> None:
    """Write config.json and labels.txt, each whole or not at all."""
    contents = {
        CONFIG_FILE: json.dumps(configs.to_dict(config), indent=2) + "\n",
        LABELS_FILE: "".join(f"{label}\n" for label in labels),
    }
    for name, text in contents.items():
        write_text(workdir / name, text)


def _listed(changes: dict[str, tuple]) -> str:
    return ", ".join(f"{name}: {old!r} -> {new!r}" for name, (old, new) in changes.items())
