"""Training as a user starts it, and the means to end it at a moment of one's choice.

A `Life` is one start of the command in a workdir, in a process group of its own. A `Bench` holds
what every life needs: images, a config, the caches they share, and the runs that nobody disturbed,
which `Bench.lost` compares a workdir with.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from PIL import Image

from alexnet_jax import seals
from alexnet_jax.checkpoint import UNFINISHED, Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from alexnet_jax.config import blank


def get_config():
    config = blank()
    config.model.width = 1 / 16
    config.model.input_size = 36
    config.data.source = "folder:{images}"
    config.data.cache_dir = "{cache}"
    config.optim.schedule = "epochs"
    config.train.batch_size = 8
    config.train.num_steps = 60
    config.train.log_every_steps = 1
    config.checkpoint.every_steps = 2
    return config
"""
SHORT = ("--config.train.num_steps=24",)
WIDE = (  # a checkpoint of over 200 MB
    "--config.model.width=1.25",
    "--config.optim.learning_rate=0.001",
    "--config.train.num_steps=18",
    "--config.checkpoint.every_steps=1",
)
HUNG = 124  # as timeout(1) has it
CLASSES, IN_TRAINING, IN_VALIDATION = 3, 16, 5  # images of each class: an epoch is six steps
RECORD = re.compile(r"(train|validation)  step (\d+)/(\d+)  epoch ([\d.]+)")
GOES_ON = re.compile(r"going on from step (\d+)")


class Life:
    """One start of the command, in a process group of its own, and how to look at it and end it.

    Args:
      processes: that train together, by launch/local.sh; 0: the command itself.
      limit_kb: no file may become larger; 0: no limit.
    """

    def __init__(self, workdir: pathlib.Path, *flags: str, processes: int = 0, limit_kb: int = 0):
        self.workdir, self.processes, self.began = workdir, processes, time.time()
        self.before = newest(workdir)
        line = [sys.executable, "-m", "alexnet_jax.main"]
        if processes:
            line = ["bash", str(ROOT / "launch/local.sh"), str(processes)]
        if limit_kb:
            line = ["bash", "-c", f'ulimit -f {limit_kb}; exec "$@"', "bash", *line]
        path = [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
        settings = {"JAX_NUM_CPU_DEVICES": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self.process = subprocess.Popen(
            [*line, f"--workdir={workdir}", *flags],
            stdout=self.files[0],
            stderr=self.files[1],
            cwd=ROOT,
            env=os.environ | settings | {"PATH": os.pathsep.join(path)},
            start_new_session=True,
        )

    def out(self) -> str:
        """What it said so far, on its standard output."""
        return os.pread(self.files[0].fileno(), 2**24, 0).decode(errors="replace")

    def err(self) -> list[str]:
        return os.pread(self.files[1].fileno(), 2**24, 0).decode(errors="replace").splitlines()

    def step(self) -> int:
        """The last step that it recorded; where it began before that."""
        records = RECORD.findall(self.out())
        return int(records[-1][1]) if records else self.before

    def resumed(self) -> int | None:
        """The step it says it goes on from, 0 for a beginning; None while it has not said."""
        said = self.out()
        found = GOES_ON.search(said)
        begins = "compiled the training step" in said or "nothing to do" in said
        return int(found[1]) if found else 0 if begins else None

    def phases(self) -> list[str]:
        """What it does, or did when it was killed.

        starting, compiling, then training, validating, ending, and of a checkpoint: saving while
        it is not whole, sealing until its checksums are there, removing while one before it goes.
        """
        said = self.out()
        if "compiled the training step" not in said:
            return ["compiling" if "steps of" in said else "starting"]
        folders = [folder for folder in step_folders(self.workdir) if self._touched(folder)]
        sealing = (
            folders and int(folders[-1].name) > self.before and not seals.is_sealed(folders[-1])
        )
        split, step, steps, epoch = (RECORD.findall(said) or [("", "", "last", "0.5")])[-1]
        validating = split == "train" and (step == steps or float(epoch).is_integer())
        found = {
            "saving": self.temporary(),
            "sealing": sealing,
            "removing": sealing and any(map(_lacks_files, folders[:-1])),
            "validating": validating,
            "ending": step == steps and not validating,
        }
        return [name for name, holds in found.items() if holds] or ["training"]

    def temporary(self) -> bool:
        """Whether there are files of a checkpoint that it has not completed."""
        return any(map(self._touched, (self.workdir / "checkpoints").glob(UNFINISHED)))

    def _touched(self, path: pathlib.Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_mtime >= self.began
        return False

    def until(self, condition: Callable[[], bool], seconds: float = 300) -> bool:
        """Waits for something; False where the life, or the time, was over before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True

    def until_saved(self, step: int) -> bool:
        """Waits until a checkpoint of a step, or of a later one, is whole."""
        return self.until(lambda: newest(self.workdir) >= step)

    def until_phase(self, phase: str, times: int = 1) -> bool:
        """Waits until it is in a phase, for the first time or another."""
        for _ in range(times - 1):
            if not self.until(lambda: phase in self.phases()):
                return False
            self.until(lambda: phase not in self.phases())
        return self.until(lambda: phase in self.phases())

    def kill(self) -> None:
        """kill -9 of all its processes."""
        for pid in self.group() if self.processes else [self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def rank(self, number: int) -> int:
        """The process id of one of those that train together, Linux's way."""
        for pid in self.group():
            with contextlib.suppress(OSError):
                line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if f"--process_id={number}".encode() in line:
                    return pid
        raise ProcessLookupError(f"rank {number}")

    def group(self) -> list[int]:
        """Process ids of the living in its session, Linux's way."""
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                status, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and status not in "ZX":
                    found.append(int(path.parent.name))
        return found

    def ended(self, seconds: float = 600) -> int:
        """Its exit status once it is over, or HUNG; then nobody is left of it."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return HUNG
        finally:
            for pid in self.group():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()


class Bench:
    """A folder with all that lives need, made once: images, config, caches, undisturbed runs.

    Args:
      flags: of every life.
    """

    def __init__(self, folder: pathlib.Path, *flags: str):
        self.folder, self.flags, self.lock = folder.absolute(), flags, threading.Lock()
        self.references = self.folder / f"undisturbed-{code()}"  # other code, other runs
        self.config = self.folder / "config.py"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.config.exists():
            _draw(self.folder / "images")
            cache = self.folder / "cache"
            self.config.write_text(CONFIG.format(images=self.folder / "images", cache=cache))

    def start(self, workdir: pathlib.Path, *flags: str, **options: int) -> Life:
        return Life(workdir, f"--config={self.config}", *self.flags, *flags, **options)

    @contextlib.contextmanager
    def workdir(self, lost: list[str]) -> Iterator[pathlib.Path]:
        """A new workdir; it stays, to be looked at, where something is lost in it."""
        folder = pathlib.Path(tempfile.mkdtemp(prefix="trial-", dir=self.folder))
        yield folder / "run"
        if lost:
            lost.append(f"kept in {folder}")
        else:
            shutil.rmtree(folder)

    def undisturbed(self, *flags: str, processes: int = 0) -> pathlib.Path:
        """The workdir of a run that nobody disturbs."""
        key = hashlib.sha256(json.dumps([self.flags, flags, processes]).encode()).hexdigest()[:8]
        workdir = self.references / f"run-{key}"
        with self.lock:
            if not (workdir / "done").exists():
                shutil.rmtree(workdir, ignore_errors=True)
                life = self.start(workdir, *flags, processes=processes)
                assert life.ended() == 0, life.err()
                done = {"digest": digest(workdir), "seconds": time.time() - life.began}
                (workdir / "done").write_text(json.dumps(done))
        return workdir

    def seconds(self, *flags: str) -> float:
        """That an undisturbed run takes, or took when nothing was compiled."""
        return json.loads(_read(self.undisturbed(*flags) / "done"))["seconds"]

    def lost(self, workdir: pathlib.Path, *flags: str, processes: int = 0) -> list[str]:
        """In what a finished run is not the undisturbed run, bit for bit; of the same topology."""
        expected = self.undisturbed(*flags, processes=processes)
        with self.lock:  # Orbax reads in one thread
            same = digest(workdir) == json.loads(_read(expected / "done"))["digest"]
        found = [] if same else ["the final state is another"]
        if records(workdir) != records(expected):
            found.append("the records of losses are others")
        return found


def step_folders(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Of the checkpoints that are whole, in ascending order."""
    with contextlib.suppress(FileNotFoundError):
        names = [name for name in os.listdir(workdir / "checkpoints") if name.isdigit()]
        return [workdir / "checkpoints" / name for name in sorted(names, key=int)]
    return []


def newest(workdir: pathlib.Path) -> int:
    """The step of the newest whole checkpoint: Orbax's renaming makes it so; 0 without one."""
    return max((int(folder.name) for folder in step_folders(workdir)), default=0)


def size(folder: pathlib.Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says, but for the speed."""
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k != "images_per_second"} for record in found]


def digest(workdir: pathlib.Path) -> str:
    """SHA-256 of the newest step, parameters and velocities."""
    checkpoints, step = Checkpoints(workdir / "checkpoints"), newest(workdir)
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(checkpoints.read_state(step, checkpoints.read_meta(step))):
        found.update(np.ascontiguousarray(leaf))
    return found.hexdigest()


def code() -> str:
    """What stands for the package's text, so that figures of another are not taken for its own."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "alexnet_jax").rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _lacks_files(folder: pathlib.Path) -> bool:
    try:
        return not all((folder / name).exists() for name in json.loads(_read(folder / seals.SEAL)))
    except (OSError, ValueError):
        return True


def _read(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8")


def _draw(folder: pathlib.Path) -> None:
    """Noise, of another colour for each class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", IN_TRAINING), ("val", IN_VALIDATION)):
        for label in range(CLASSES):
            place = folder / split / f"class {label}"
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                noise = rng.integers(0, 80, (45 + number, 50, 3)) + 80 * np.eye(3)[label]
                Image.fromarray(noise.astype(np.uint8)).save(place / f"{number:02d}.png")
