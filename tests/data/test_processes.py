"""Real processes, talking over loopback, hold the same global batch as one does, byte for byte."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from alexnet_jax.config import Data
from alexnet_jax.data import sources, stream, survey, workers
from alexnet_jax.data.images import ImageError

BATCH, SIZE, STORED, START, STEPS = 8, 13, 16, 2, 6  # of 11 examples: begins mid-epoch
SCRIPT = """
    import hashlib, json, sys
    import jax
    count, number, port, towers, source, cache, workers, kind = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 1)
    if int(count) > 1:
        jax.distributed.initialize(f"127.0.0.1:{{port}}", int(count), int(number))
    import numpy as np
    from alexnet_jax import config, mesh
    from alexnet_jax.data import sources, stream, survey

    def main():
        data = config.Data(source=source, cache_dir=cache, workers=int(workers), worker_kind=kind)
        grid = mesh.make_mesh(config.Mesh(model=int(towers)), config.Model())
        examples = sources.open_source(data, "train")
        examples, statistics = survey.survey(examples, {stored}, cache, 1)
        rows = stream.Rows({batch}, mesh.local_rows(grid, {batch}))
        found = dict(rows=[rows.local.start, rows.local.stop], train=[], evaluation=[])
        training = stream.train_batches(
            examples, statistics, data, seed=42, size={size}, rows=rows,
            start_step={start}, stop_step={steps},
        )
        evaluation = stream.evaluation_batches(examples, data, stored={stored}, rows=rows)
        for name, batches in (("train", training), ("evaluation", evaluation)):
            for batch in batches:
                placed = mesh.put_batch(batch, grid)
                pieces = dict()
                for field, array in placed.items():
                    (shard,) = array.addressable_shards
                    first = shard.index[0].start or 0
                    digest = hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()
                    pieces[field] = [first, shard.data.shape[0], array.shape[0], digest]
                found[name].append(pieces)
        print(json.dumps(found))

    if __name__ == "__main__":
        main()
"""


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("images")
    pictures.folder(root / "train", {"ant": 4, "bee": 7})
    return root


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> dict[str, list[stream.Batch]]:
    """The global batches, by one process and one thread."""
    data = Data(source=f"folder:{folder}", workers=1)
    source = sources.open_source(data, "train")
    _, statistics = survey.survey(source, STORED, str(tmp_path_factory.mktemp("cache")), 1)
    rows = stream.Rows(BATCH, range(BATCH))
    training = stream.train_batches(
        source, statistics, data, seed=42, size=SIZE, rows=rows, start_step=0, stop_step=STEPS
    )
    evaluation = stream.evaluation_batches(source, data, stored=STORED, rows=rows)
    return {"train": list(training)[START:], "evaluation": list(evaluation)}


def run(folder: pathlib.Path, scratch: pathlib.Path, count: int, towers: int, workers: list[str]):
    """What each of `count` processes found, the two towers on `towers` devices."""
    script = scratch / "process.py"
    sizes = {"batch": BATCH, "size": SIZE, "stored": STORED, "start": START, "steps": STEPS}
    script.write_text(textwrap.dedent(SCRIPT).format(**sizes))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for number in range(count):
        arguments = [count, number, port, towers, f"folder:{folder}", scratch / f"cache{number}"]
        command = [sys.executable, str(script), *map(str, arguments), *workers]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.parametrize(
    ("count", "towers", "workers"),
    [
        (1, 1, ["2", "processes"]),
        (2, 1, ["3", "threads"]),
        (2, 2, ["1", "threads"]),
        (4, 2, ["2", "threads"]),
    ],
)
def test_processes_hold_the_global_batch(folder, whole, tmp_path, count, towers, workers):
    found = run(folder, tmp_path, count, towers, workers)
    share = BATCH * towers // count if count > 1 else BATCH
    expected_rows = [(number // towers * share) for number in range(count)] if count > 1 else [0]
    assert [process["rows"] for process in found] == [[r, r + share] for r in expected_rows]
    for name, batches in whole.items():
        for step, batch in enumerate(batches):
            for process, first in zip(found, expected_rows):
                for field, array in batch.items():
                    rows = np.ascontiguousarray(array[first : first + share])
                    digest = hashlib.sha256(rows.tobytes()).hexdigest()
                    assert process[name][step][field] == [first, share, BATCH, digest], field
        assert {len(process[name]) for process in found} == {len(batches)}
    valid = np.concatenate([batch["valid"] for batch in whole["evaluation"]])
    assert valid.sum() == 11


ENDLESS = """
    import json, multiprocessing, sys
    import numpy as np
    from alexnet_jax import command, config
    from alexnet_jax.data import sources, stream, survey

    def main():
        data = config.Data(source=sys.argv[1], workers=2, worker_kind="processes")
        source = sources.open_source(data, "train")
        _, statistics = survey.survey(source, 16, sys.argv[2], 1)
        batches = stream.train_batches(
            source, statistics, data, seed=0, size=13, rows=stream.Rows(8, range(8)),
            start_step=0, stop_step=10**9,
        )
        next(batches)
        print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
        if sys.argv[3:] == ["and leave"]:
            main.keeps = batches
            return 0
        for _ in batches:
            pass

    if __name__ == "__main__":
        sys.exit(command.status(main))
"""


def alive(number: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def endless(folder: pathlib.Path, scratch: pathlib.Path, *how: str) -> subprocess.Popen:
    """A process that reads without end, by two others; what it says is in scratch/said.

    "and leave": it reads one batch, and ends without a word to those who read.
    """
    script = scratch / "endless.py"
    script.write_text(textwrap.dedent(ENDLESS))
    command = [sys.executable, str(script), f"folder:{folder}", str(scratch / "cache"), *how]
    with open(scratch / "said", "w") as said:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)


def told(scratch: pathlib.Path) -> str:
    return (scratch / "said").read_text().splitlines()[-1]


def children_of(process: subprocess.Popen) -> list[int]:
    """Those that read, dead ones too."""
    listed = pathlib.Path(f"/proc/{process.pid}/task").glob("*/children")
    found = []
    for number in " ".join(path.read_text() for path in listed).split():
        with contextlib.suppress(FileNotFoundError):  # another child, that has come and gone
            if b"spawn_main" in pathlib.Path(f"/proc/{number}/cmdline").read_bytes():
                found.append(int(number))
    return found


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_readers_that_are_signalled_while_they_start_do_not_hang(number, pictures, tmp_path):
    """A killed one is told of; others, as when all of a group are sent it, are not even hit."""
    pictures.folder(tmp_path / "images/train", {"ant": 1500})  # whose names no pipe holds
    process = endless(tmp_path / "images", tmp_path)
    assert process.stdout is not None
    try:
        deadline = time.monotonic() + 60
        while not (starting := children_of(process)) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(starting[0], number)
        if number == signal.SIGKILL:
            assert process.wait(60) == 1
            assert told(tmp_path).startswith("error: a worker was killed")
        else:
            assert starting[0] in json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="reads Linux's /proc")
def test_a_process_that_ends_amid_a_stream_ends(folder, tmp_path):
    process = endless(folder, tmp_path, "and leave")
    assert process.stdout is not None
    try:
        children = json.loads(process.stdout.readline())
        assert process.wait(30) == 0, told(tmp_path)
        assert not any(alive(child) for child in children)
    finally:
        process.kill()
        process.wait()


def squared(number: int) -> int:
    if number == 0:
        raise EOFError("a bug")
    if number < 0:
        raise ImageError(f"{number}.jpg is gone")
    return number**2


def test_what_stops_a_reader_is_raised_here(capfd):
    with workers.elsewhere(squared, 1) as found:
        assert found(3) == 9
        with pytest.raises(ImageError, match=r"-1\.jpg is gone"):
            found(-1)
        assert found(4) == 16
        with pytest.raises(RuntimeError, match="above"):  # no mistake of the user's, but of ours
            found(0)
    assert "EOFError: a bug" in capfd.readouterr().err


def test_a_reader_that_is_killed_before_it_is_told_anything_is_told_of(monkeypatch):
    """As Python 3.14 says it."""

    def start(process: multiprocessing.context.SpawnProcess) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", start)
    with pytest.raises(OSError, match=r"worker was killed.*--config\.data\.workers="):
        workers.elsewhere(abs, 2).__enter__()


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("killed", ["parent", "reader"])
def test_reading_processes_and_their_parent_end_together(killed, folder, tmp_path):
    process = endless(folder, tmp_path)
    assert process.stdout is not None
    children = json.loads(process.stdout.readline())
    assert len(children) == 2
    assert all(alive(child) for child in children)
    os.kill(process.pid if killed == "parent" else children[0], signal.SIGKILL)
    assert process.wait(60) == (-signal.SIGKILL if killed == "parent" else 1)
    deadline = time.monotonic() + 10
    while any(alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(child) for child in children)
    assert killed == "parent" or told(tmp_path).startswith("error: a worker was killed")
