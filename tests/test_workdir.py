"""One workdir, one run."""

import contextlib
import errno
import itertools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from alexnet_jax import workdir
from alexnet_jax.config import Config
from alexnet_jax.errors import UserError

HOLD = """
import pathlib, sys, time
from alexnet_jax import workdir
with workdir.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has the lock of tmp_path."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_run_in_a_live_workdir_is_refused_and_changes_nothing(
    holder, run, tmp_path, capsys
):
    assert run(tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"in use by process {holder.pid} on {socket.gethostname()} since 20" in error
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "config.json").exists()


def test_the_lock_of_a_killed_run_is_not_in_the_way(holder, tmp_path):
    with pytest.raises(UserError, match="in use"), workdir.locked(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with workdir.locked(tmp_path):
        text = pathlib.Path(tmp_path / "lock").read_text()
        assert text.startswith(f"process {os.getpid()} on ")
        assert text.count("\n") == 1


def test_a_workdir_is_free_again_when_its_run_is_over(tmp_path):
    for _ in range(2):
        with workdir.locked(tmp_path):
            pass


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(workdir, "LOCK_BEAT", 0.05)


@pytest.fixture
def lockless(monkeypatch) -> None:
    """A file system without locks."""

    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workdir.fcntl, "flock", refuse)


@contextlib.contextmanager
def elsewhere(path: pathlib.Path, lives: bool) -> Iterator[None]:
    """The lock of a run on another host, which goes on counting if it lives."""
    over = threading.Event()
    record = "process 7 on elsewhere since 2012, beat {:09d}\n"
    path.write_text(record.format(0))

    def count() -> None:
        with path.open("r+b", buffering=0) as file:  # in place: it is never seen empty
            for beat in itertools.count(1):
                if over.wait(0.01) or not lives:
                    return
                file.seek(0)
                file.write(record.format(beat).encode())

    counting = threading.Thread(target=count)
    counting.start()
    yield
    over.set()
    counting.join()


@pytest.mark.usefixtures("quick")
def test_a_run_that_lives_on_another_host_is_not_disturbed(tmp_path):
    with (
        elsewhere(tmp_path / "lock", lives=True),
        pytest.raises(UserError, match="in use by process 7 on elsewhere since 2012;"),
        workdir.locked(tmp_path),
    ):
        pass


@pytest.mark.usefixtures("quick")
def test_the_lock_of_a_run_that_died_on_another_host_is_void(tmp_path):
    with elsewhere(tmp_path / "lock", lives=False), workdir.locked(tmp_path):
        assert workdir.holder_of(tmp_path).startswith(f"process {os.getpid()} on ")
    assert workdir.holder_of(tmp_path) == ""


@pytest.mark.usefixtures("quick", "lockless")
def test_without_locks_a_live_run_is_known_by_its_count(tmp_path):
    with (
        workdir.locked(tmp_path),
        pytest.raises(UserError, match="in use by process"),
        workdir.locked(tmp_path),
    ):
        pass
    with workdir.locked(tmp_path):  # it is over, and the next begins at once
        pass


@pytest.mark.usefixtures("lockless")
def test_without_locks_of_two_at_the_same_time_one_is_refused(tmp_path, monkeypatch):
    def another_comes(seconds: float) -> None:
        (tmp_path / "lock").write_text("process 7 on elsewhere since 2012, beat 000000000\n")

    monkeypatch.setattr(workdir.time, "sleep", another_comes)
    with pytest.raises(UserError, match="in use by process 7"), workdir.locked(tmp_path):
        pass
    assert "process 7" in (tmp_path / "lock").read_text()


def test_a_run_touches_no_file_of_a_workdir_but_its_own(tmp_path):
    (tmp_path / "notes.tmp").write_text("the user's")
    (tmp_path / "folder.tmp").mkdir()
    (tmp_path / "config.json.tmp").write_text("half")  # left by a run that was killed
    workdir.write(tmp_path, Config(), ("ant", "bee"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "folder.tmp", "labels.txt", "notes.tmp",
    ]  # fmt: skip
