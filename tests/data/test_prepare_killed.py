"""The command as a user starts it, with its processes, ended in every way at any moment."""

import contextlib
import functools
import os
import pathlib
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator

import pytest
from preparing import CLASSES, SIZE, Ran, assert_refused, tree

from alexnet_jax.data.examples import Example
from alexnet_jax.data.prepare import Settings, write_shard
from alexnet_jax.data.workers import _ctrl_c_later, _Worker  # before a thread stands in for it
from alexnet_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("shards_by_threads")

LARGER = 64


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """By this process and those it starts, though a job in the background starts deaf to it."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def started(*flags: str, workers: int = 2, limit_kb: int = 0) -> subprocess.Popen[str]:
    """The command in a process group of its own; no file may become larger than `limit_kb`."""
    line = [sys.executable, "-m", "alexnet_jax.prepare", f"--workers={workers}", *flags]
    if limit_kb:
        line = ["bash", "-c", f'ulimit -f {limit_kb}; exec "$@"', "bash", *line]
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def ended(process: subprocess.Popen[str]) -> Ran:
    """How it ended; in its group nobody is left."""
    try:
        out, err = process.communicate(timeout=120)
        assert_nobody_left(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return Ran(process.returncode, out, err.splitlines())


def assert_nobody_left(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 20
    while group_of(process):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.01)


def group_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the living in its group, Linux's way; [] elsewhere."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            if int(group) == process.pid and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    found = []
    for number in group_of(process):
        with contextlib.suppress(OSError):
            if b"spawn_main" in pathlib.Path(f"/proc/{number}/cmdline").read_bytes():
                found.append(number)
    return sorted(found)


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.001)


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux's /proc")

NUM_SHARDS = 19 + 12

MANY = ("--format=raw", f"--size={LARGER}", "--shard_size=4")


@pytest.fixture(scope="module")
def many(pictures, tmp_path_factory) -> pathlib.Path:
    """A folder that takes NUM_SHARDS."""
    root = tmp_path_factory.mktemp("many")
    for split, count in (("train", 25), ("val", 15)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                image = pictures.smooth(300, 200 + index, index)
                path = root / split / name / f"{index}.jpg"
                path.write_bytes(pictures.encode(image, "JPEG"))
    return root


@pytest.fixture(scope="module")
def undisturbed(many, tmp_path_factory) -> dict[str, bytes]:
    """What the command makes of `many`."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    ran = ended(started(f"--input={many}", f"--output={output}", *MANY))
    assert ran.status == 0, ran
    assert "train: 75 images" in ran.out
    return tree(output)


def assert_goes_on(many: pathlib.Path, output: pathlib.Path, undisturbed: dict[str, bytes]) -> None:
    """The same command again, or with another number of workers, completes it."""
    ran = ended(started(f"--input={many}", f"--output={output}", *MANY, workers=1))
    assert ran.status == 0, ran
    assert tree(output) == undisturbed
    assert os.listdir(output.parent) == [output.name]


def shards_done(output: pathlib.Path) -> int:
    return len([*output.with_name("out.partial").glob("journal/*.npz")])


def test_processes_write_what_threads_do(many, undisturbed, tmp_path, run):
    flags = (f"--input={many}", f"--output={tmp_path / 'out'}")
    assert run(*flags, *MANY, size=LARGER).status == 0
    assert tree(tmp_path / "out") == undisturbed


def interrupted(
    many: pathlib.Path, output: pathlib.Path, number: int, send: Callable[[subprocess.Popen], None]
) -> Ran:
    """A run that something is sent to when there are workers and `number` shards are done."""
    process = started(f"--input={many}", f"--output={output}", *MANY)
    until(lambda: shards_done(output) >= number and bool(workers_of(process)), process)
    send(process)
    ran = ended(process)
    assert number <= shards_done(output) < NUM_SHARDS
    assert not output.exists()
    return ran


@needs_proc
def test_killed_the_same_command_goes_on(many, undisturbed, tmp_path):
    for number in (1, 10):
        ran = interrupted(many, tmp_path / "out", number, subprocess.Popen.kill)
        assert ran.status == -signal.SIGKILL
    assert_goes_on(many, tmp_path / "out", undisturbed)


@needs_proc
def test_a_worker_killed_the_command_says_so_and_goes_on(many, undisturbed, tmp_path):
    def kill_worker(process: subprocess.Popen) -> None:
        os.kill(workers_of(process)[-1], signal.SIGKILL)

    for number in (0, 10):
        ran = interrupted(many, tmp_path / "out", number, kill_worker)
        assert_refused(ran, "a worker was killed", "--workers=N", status=1)
        assert "Traceback" not in "\n".join(ran.err)
    assert_goes_on(many, tmp_path / "out", undisturbed)


@needs_proc
def test_ctrl_c_ends_all_processes_quietly(many, undisturbed, tmp_path):
    """A terminal sends it to every process of the group; workers may have just been started."""

    def interrupt(process: subprocess.Popen, seconds: float) -> None:
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)

    for number, seconds in ((0, 0.0), (0, 0.15), (10, 0.0)):
        send = functools.partial(interrupt, seconds=seconds)
        ran = interrupted(many, tmp_path / "out", number, send)
        assert ran.status == 130
        assert (
            ran.err[-1] == "stopped; the same command goes on from what was saved, or starts again"
        )
        assert not [line for line in ran.err if "Traceback" in line or "Interrupt" in line]
    assert_goes_on(many, tmp_path / "out", undisturbed)


@needs_proc
def test_ctrl_c_never_reaches_a_worker(many, tmp_path):
    """It is blocked from the moment a worker is there, long before it could ignore it itself."""

    def look_and_kill(process: subprocess.Popen) -> None:
        for number in workers_of(process):
            status = pathlib.Path(f"/proc/{number}/status").read_text()
            (blocked,) = [line for line in status.splitlines() if line.startswith("SigBlk:")]
            found.append(int(blocked.split()[1], 16) >> (signal.SIGINT - 1) & 1)
        process.kill()

    found: list[int] = []
    interrupted(many, tmp_path / "out", 0, look_and_kill)
    assert found
    assert all(found)


AMID_LOCKS = """
import concurrent.futures._base, os, signal, time
from alexnet_jax.data import workers

class Acquire(concurrent.futures._base._AcquireFutures):
    def __enter__(self):
        super().__enter__()
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass  # where Python hears it

with workers.Pool(lambda seconds, progress: time.sleep(seconds), 2) as pool:
    pool.submit(0.1)
    pool.submit(0.1)
    concurrent.futures._base._AcquireFutures = Acquire
    pool.wait(0, lambda more: None)
"""


def test_ctrl_c_while_futures_are_locked_ends_it_all_the_same():
    """The threads of a pool wait for these locks, and the end of the pool for the threads."""
    ran = subprocess.run([sys.executable, "-c", AMID_LOCKS], stderr=subprocess.PIPE, timeout=60)
    assert ran.returncode == -signal.SIGINT
    assert ran.stderr.endswith(b"KeyboardInterrupt\n")


def test_ctrl_c_waits_while_a_worker_is_started():
    went_on: list[int] = []
    usual = signal.getsignal(signal.SIGINT)

    def start() -> None:
        with _ctrl_c_later():
            os.kill(os.getpid(), signal.SIGINT)  # to any thread: blocking it in one is not enough
            went_on.extend(range(1000))

    with pytest.raises(KeyboardInterrupt):
        start()
    assert len(went_on) == 1000
    assert signal.getsignal(signal.SIGINT) is usual
    with _ctrl_c_later():
        pass
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


@needs_proc
def test_workers_do_not_outlive_the_command_though_in_the_middle_of_a_shard(many, tmp_path):
    """Or they would write into what the same command, started again, goes on with."""
    output = tmp_path / "out"
    flags = ("--size=2048", "--shard_size=100")  # a shard takes a quarter of a minute
    process = started(f"--input={many}", f"--output={output}", *flags, workers=1)
    begun = output.with_name("out.partial") / "data/train-00000.array_record.tmp"
    until(begun.exists, process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while group_of(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not group_of(process)
    assert ended(process).status == -signal.SIGKILL
    assert shards_done(output) == 0


def test_a_full_disk_is_told_in_one_line_and_then_goes_on(many, undisturbed, tmp_path):
    """Here it is full where a file reaches 40 KB, as a shard does."""
    output = tmp_path / "out"
    ran = ended(started(f"--input={many}", f"--output={output}", *MANY, workers=1, limit_kb=40))
    assert_refused(ran, "cannot be written", status=1)
    assert "Traceback" not in "\n".join(ran.err)
    assert not output.exists()
    assert_goes_on(many, output, undisturbed)


class Faulty:
    """A portion that cannot be read."""

    fingerprint = "x"

    def __init__(self, error: Exception):
        self.error = error

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> Example:
        raise self.error


def test_what_stops_a_worker_is_raised_here(tmp_path, capfd):
    progress = types.SimpleNamespace(value=0.0)
    worker = _Worker(pickle.dumps(write_shard), "--workers", progress)
    rest = (tmp_path / "shard", tmp_path / "entry.npz", Settings("raw", 95, SIZE, 5), True, 1.0)
    for error in (
        UserError("the tar is gone"),
        OSError("the disk is gone"),
        MemoryError("is gone"),
    ):
        with pytest.raises(type(error), match="is gone"):
            worker.do(Faulty(error), *rest)
    with pytest.raises(RuntimeError, match="above"):  # no mistake of the user's, but of ours
        worker.do(Faulty(ZeroDivisionError("a bug")), *rest)
    assert "ZeroDivisionError: a bug" in capfd.readouterr().err
    assert not (tmp_path / "shard").exists()


@pytest.mark.slow
@needs_proc
def test_all_processes_together_take_less_than_a_gibibyte(pictures, tmp_path):
    """At the default sizes, four workers."""
    (tmp_path / "in/train/ant").mkdir(parents=True)
    for index in range(600):
        data = pictures.encode(pictures.smooth(375, 500, index), "JPEG")
        (tmp_path / f"in/train/ant/{index}.jpg").write_bytes(data)
    larger = pictures.encode(pictures.smooth(3000, 4000), "JPEG")  # ImageNet has some
    (tmp_path / "in/train/ant/larger.jpg").write_bytes(larger)
    flags = (f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--shard_size=60")
    process, peak = started(*flags, workers=4), 0
    while process.poll() is None:
        peak = max(peak, sum(map(resident, group_of(process))))
        time.sleep(0.01)
    assert ended(process).status == 0
    assert 100 * 2**20 < peak < 2**30


def resident(number: int) -> int:
    """Bytes of memory that a process has, Linux's way."""
    with contextlib.suppress(OSError):
        pages = pathlib.Path(f"/proc/{number}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    return 0


@pytest.mark.slow
@needs_proc
def test_killed_twenty_times_it_still_goes_on(many, undisturbed, tmp_path):
    """At moments drawn over a whole run; each fourth time a worker is killed instead."""
    rng, start = random.Random(0), time.monotonic()
    flags = (f"--input={many}", *MANY)
    assert ended(started(*flags, f"--output={tmp_path / 'first/out'}")).status == 0
    whole = time.monotonic() - start
    output = tmp_path / "second/out"
    for number in range(20):
        process = started(*flags, f"--output={output}")
        time.sleep(rng.uniform(0, 1) * whole)
        found = workers_of(process)
        victim = rng.choice(found) if number % 4 == 3 and found else process.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        ran = ended(process)
        assert ran.status in (-signal.SIGKILL, 0, 1), ran
        assert "Traceback" not in "\n".join(ran.err) or victim == process.pid
        if output.exists():
            assert tree(output) == undisturbed
            shutil.rmtree(output)
    assert_goes_on(many, output, undisturbed)
