"""One workdir, one run."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from alexnet_jax import workdir
from alexnet_jax.config import UserError

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
