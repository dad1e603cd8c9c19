"""What a workdir holds, its lock, and which run may resume in it."""

import contextlib
import datetime
import fcntl
import json
import logging
import pathlib
import socket
import threading
import time
from collections.abc import Iterator

from alexnet_jax import config as configs
from alexnet_jax.cluster import Job, this_process
from alexnet_jax.config import Config
from alexnet_jax.errors import UserError
from alexnet_jax.files import make_folder, write_text

log = logging.getLogger(__name__)

CONFIG_FILE, LABELS_FILE, CHECKPOINTS = "config.json", "labels.txt", "checkpoints"
LOCK = "lock"
LOCK_BEAT, LOST_BEATS = 5.0, 3  # seconds; missed heartbeats after which a run counts as dead


def make(workdir: pathlib.Path) -> None:
    """Create the folder if it is missing, and check that it can be written.

    Raises:
      UserError: it cannot.
    """
    for folder in (workdir, workdir / CHECKPOINTS):
        make_folder(folder, f"--workdir={workdir}", "choose another")


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Lock a workdir for one run; the lock of a run that is dead, however it died, is void.

    For a run on this host the operating system's file lock tells whether it is alive. One on
    another host, or on a file system without locks, counts up a heartbeat in the file.

    Raises:
      UserError: another run holds it.
    """
    path = workdir / LOCK
    with open(path, "a+b") as file:
        known = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(workdir) from error
        except OSError:  # a file system without locks
            known = False
        holder = holder_of(workdir)
        if holder and not (known and f" on {socket.gethostname()} " in holder):
            log.warning("%s was left by %s; seeing whether that lives", path, holder)
            before = path.read_bytes()
            for _ in range(LOST_BEATS):
                time.sleep(LOCK_BEAT)
                if path.read_bytes() != before:
                    raise _in_use(workdir)
        started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        over = threading.Event()
        name = f"{this_process()} since {started}"
        beating = threading.Thread(target=_beat, args=(path, name, over), daemon=True)
        path.write_bytes(_record(name, 0))
        if not known:
            time.sleep(1)  # another run may have found the file empty at the same time
            if holder_of(workdir) != name:
                raise _in_use(workdir)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join()
            file.truncate(0)


def holder_of(workdir: pathlib.Path) -> str:
    """The run that holds a workdir, or held it when it was killed; "" if there is none."""
    try:
        record = (workdir / LOCK).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return record.partition(", beat ")[0]


def check_shared(workdir: pathlib.Path, job: Job) -> None:
    """Raises UserError if the workdir of this rank is not the one that rank 0 has locked."""
    holder = job.broadcast(lambda: holder_of(workdir))
    for _ in range(20):  # network file systems may be seconds behind
        if holder_of(workdir) == holder:
            return
        time.sleep(0.5)
    raise UserError(
        f"--workdir={workdir} of rank {job.rank}, {job.name}, is not the folder that rank 0 has "
        "under that name; choose one on a file system that all processes share"
    )


def _in_use(workdir: pathlib.Path) -> UserError:
    return UserError(
        f"--workdir={workdir} is in use by {holder_of(workdir) or 'another run'}; wait for it, "
        "stop it, or choose another"
    )


def _record(name: str, beat: int) -> bytes:
    return f"{name}, beat {beat:09d}\n".encode()


def _beat(path: pathlib.Path, name: str, over: threading.Event) -> None:
    beat = 0
    while not over.wait(LOCK_BEAT):
        beat += 1
        # Overwritten in place, in one write, so that a heartbeat never leaves the file empty.
        with contextlib.suppress(OSError), open(path, "r+b", buffering=0) as file:
            file.write(_record(name, beat))


def check_resume(old: Config, new: Config, allow_config_change: bool) -> set[str]:
    """The settings that matter and change if a run of `old` resumes with `new`, as section.field.

    Raises:
      UserError: the model changes; or anything else that matters, without `allow_config_change`.
    """
    refused, asked = configs.changes(old, new)
    if refused:
        raise UserError(
            f"the workdir holds a run of another model ({listed(refused)}); "
            "choose another --workdir"
        )
    if asked and not allow_config_change:
        raise UserError(
            f"the workdir holds a run with other settings ({listed(asked)}); "
            "choose another --workdir, or go on with the new ones by --allow_config_change"
        )
    if asked:
        log.warning("going on with changed settings: %s", listed(asked))
    return set(asked)


def write(workdir: pathlib.Path, config: Config, labels: tuple[str, ...]) -> None:
    """Write config.json and labels.txt, each atomically; only for the run that holds the lock."""
    contents = {
        CONFIG_FILE: json.dumps(configs.to_dict(config), indent=2) + "\n",
        LABELS_FILE: "".join(f"{label}\n" for label in labels),
    }
    for name, text in contents.items():
        write_text(workdir / name, text, sync=True)


def listed(changes: dict[str, tuple]) -> str:
    """Changed settings in words."""
    return ", ".join(f"{name}: {old!r} -> {new!r}" for name, (old, new) in changes.items())
