"""Processes that train one net, real ones over loopback; and what they say to each other."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import pytest

from alexnet_jax import cluster
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.errors import UserError
from alexnet_jax.ops import native

# As `python -m alexnet_jax.main`, but sooner to take a rank for dead, and with a limit on files.
COMMAND = """
import os, resource, sys
from alexnet_jax import cluster, main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ.get("LARGEST_FILE", -1)),) * 2)
cluster.SILENCE = 6.0
cluster.leave(main.main(sys.argv))
"""
SPLIT = ("--config.mesh.model=2", "--config.mesh.data=-1")


class Ranks:
    """The processes of one job, each with one CPU device, and what they said."""

    def __init__(
        self, count: int, flags: Callable[[int], list[str]], variables: Sequence[dict[str, str]]
    ):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            "JAX_COORDINATOR_BIND_ADDRESS": address,
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", COMMAND, f"--coordinator={address}",
                 f"--num_processes={count}", f"--process_id={rank}", *flags(rank)],
                env=environment | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank, own in zip(range(count), variables or [{}] * count, strict=True)
        ]  # fmt: skip
        self.out: list[str] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        for line in self.processes[0].stdout:
            self.out.append(line)

    def await_line(self, words: str) -> None:
        """Until rank 0 says so."""
        deadline = time.monotonic() + 120
        while not any(words in line for line in self.out):
            assert self.processes[0].poll() is None, self.processes[0].stderr.read()
            assert time.monotonic() < deadline, self.out
            time.sleep(0.05)

    def ends(self, *but: int) -> tuple[list[int], list[str]]:
        """Every rank's exit status and errors; those of ranks `but` are not waited for."""
        pairs = [(None, "")] * len(self.processes)
        for rank, process in enumerate(self.processes):
            if rank not in but:
                _, errors = process.communicate(timeout=120) if rank else (None, "")
                errors = errors if rank else process.stderr.read()
                pairs[rank] = (process.wait(120), errors)
        return [status for status, _ in pairs], [errors for _, errors in pairs]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stderr.close()
        self.reader.join()


@pytest.fixture
def start(config_file) -> Iterator[Callable[..., Ranks]]:
    """(count, workdir, flags, ranks' own flags and variables) -> a job that ends with the test."""
    jobs: list[Ranks] = []

    def begin(
        count: int,
        workdir: pathlib.Path,
        *flags: str,
        variables: Sequence[dict[str, str]] = (),
        **own: list[str],
    ) -> Ranks:
        common = [f"--config={config_file}", f"--workdir={workdir}", *SPLIT, *flags]
        jobs.append(Ranks(count, lambda rank: common + own.get(f"rank_{rank}", []), variables))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


def losses(workdir: pathlib.Path) -> dict[tuple[str, int], float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {(r["split"], r["step"]): r["loss"] for r in map(json.loads, lines)}


def parameters(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    checkpoints = Checkpoints(workdir / "checkpoints")
    params = checkpoints.read_params(checkpoints.steps()[-1])
    return {f"{name}_{kind}": a for name, kinds in params.items() for kind, a in kinds.items()}


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory) -> pathlib.Path:
    """The workdir of one process that held both towers."""
    workdir = tmp_path_factory.mktemp("alone")
    assert run(workdir) == 0
    return workdir


@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_as_one_does(start, alone, tmp_path, count):
    """Two hold a tower each, four share the batch too."""
    job = start(count, tmp_path)
    assert job.ends()[0] == [0] * count
    found, expected = losses(tmp_path), losses(alone)
    assert found.keys() == expected.keys()
    for key, loss in expected.items():
        assert found[key] == pytest.approx(loss, rel=1e-4)
    assert found["train", 1] == pytest.approx(expected["train", 1], rel=1e-5)
    here, there = parameters(tmp_path), parameters(alone)
    assert here.keys() == there.keys()
    for name, array in there.items():
        np.testing.assert_allclose(here[name], array, rtol=1e-3, atol=1e-5)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(expected)


def test_a_signal_to_one_rank_stops_all_at_one_step_and_another_number_goes_on(
    start, run, tmp_path, capsys
):
    job = start(2, tmp_path, "--config.train.num_steps=100000")
    job.await_line("step 3/")
    job.processes[1].send_signal(signal.SIGTERM)
    statuses, errors = job.ends()
    assert statuses == [143, 143], errors
    (said,) = [line for line in job.out if "SIGTERM: saved step" in line]
    step = int(said.split("saved step")[1].split(";")[0])
    assert max(number for _, number in losses(tmp_path)) == step
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps()[-1] == step
    assert checkpoints.newest_whole() == step
    assert run(tmp_path, f"--config.train.num_steps={step + 3}") == 0  # one process, one device
    assert f"going on from step {step}" in capsys.readouterr().out
    through = tmp_path / "through"
    assert run(through, f"--config.train.num_steps={step + 3}") == 0
    found, expected = losses(tmp_path), losses(through)
    for number in range(step + 1, step + 4):
        assert found["train", number] == pytest.approx(expected["train", number], rel=1e-3)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_dead_or_stopped_is_named_and_ends_the_job(start, tmp_path, number):
    job = start(2, tmp_path, "--config.train.num_steps=100000")
    job.await_line("step 3/")
    job.processes[1].send_signal(number)
    sent = time.monotonic()
    statuses, errors = job.ends(1)
    assert time.monotonic() - sent < 30
    assert statuses[0] == 1
    line = next(line for line in errors[0].splitlines() if line.startswith("error:"))
    assert f"rank 1 (process {job.processes[1].pid} on {socket.gethostname()}; " in line


def test_a_stopped_first_rank_is_named_by_the_others(start, tmp_path):
    job = start(2, tmp_path, "--config.train.num_steps=100000")
    job.await_line("step 3/")
    job.processes[0].send_signal(signal.SIGSTOP)
    _, errors = job.processes[1].communicate(timeout=60)
    assert job.processes[1].returncode == 1
    assert f"error: rank 0 (process {job.processes[0].pid} on " in errors


def test_processes_evaluate_together_and_count_every_example_once(start, alone, run, capsys):
    capsys.readouterr()
    assert run(alone, "--mode=eval") == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    job = start(2, alone, "--mode=eval")
    assert job.ends()[0] == [0, 0]
    job.reader.join()
    found = json.loads(job.out[-1])
    assert found["num_examples"] == expected["num_examples"] == 15
    assert found["top1_error"] == expected["top1_error"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_mistake_of_one_rank_ends_all(start, draw_folder, tmp_path):
    """Other images in a folder of the same name would train a net of nothing anybody knows."""
    other = draw_folder(("cat", "dog", "owl"), 15, 5, "jpg")
    job = start(2, tmp_path / "run", rank_1=[f"--config.data.source=folder:{other}"])
    statuses, errors = job.ends()
    assert statuses == [2, 2]
    for text in errors:
        assert "the data of folder:" in text
        assert "of rank 1" in text


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_ranks_that_would_compute_with_other_kernels_are_refused(start, tmp_path):
    """Their programs would differ, and so might the order in which they wait for each other."""
    job = start(2, tmp_path / "run", variables=[{}, {"CXX": "no-such-compiler"}])
    statuses, errors = job.ends()
    assert statuses == [2, 2]
    assert all("the C++ compiler of rank 1" in text for text in errors)


@pytest.mark.parametrize(
    ("flags", "variables", "words"),
    [
        (["--config.seed=7"], {}, "seed=7 on rank 1, 42 on rank 0; give every process the same"),
        ([], {"JAX_NUM_CPU_DEVICES": "2"}, "the number of devices of rank 1"),
    ],
)
def test_a_rank_that_is_asked_for_something_else_is_refused(
    flags, variables, words, start, tmp_path
):
    job = start(2, tmp_path, rank_1=flags, variables=[{}, variables])
    statuses, errors = job.ends()
    assert statuses == [2, 2]
    assert all(words in error for error in errors)


def test_a_save_that_fails_on_one_rank_ends_all_and_says_why(start, tmp_path):
    """Where Orbax would wait: for ten minutes, and then without the reason."""
    limited = [{}, {"LARGEST_FILE": "20000"}]
    job = start(2, tmp_path, "--config.train.num_steps=1", variables=limited)
    statuses, errors = job.ends()
    assert statuses == [1, 1]
    for error in errors:
        assert "saving step 1 failed" in error
        assert "File too large" in error
    assert "rank 1" in errors[0]


def test_a_workdir_that_is_another_folder_elsewhere_is_refused(start, tmp_path):
    job = start(2, tmp_path / "run", rank_1=[f"--workdir={tmp_path / 'elsewhere'}"])
    statuses, errors = job.ends()
    assert statuses == [2, 2]
    assert all("is not the folder that rank 0 has" in text for text in errors)


def test_what_is_not_done_together_is_refused(start, tmp_path):
    statuses, errors = start(2, tmp_path, "--mode=features", "--output=x.npz").ends()
    assert statuses == [2, 2]
    assert sum("only train and eval are done together" in text for text in errors) >= 1


ALONE = """
import sys
from alexnet_jax import cluster
cluster.JOINING = 3
cluster.join(sys.argv[1], 2, int(sys.argv[2]))
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_whose_others_never_come_ends_with_a_line(rank):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    ended = subprocess.run(
        [sys.executable, "-c", ALONE, address, str(rank)], capture_output=True, text=True,
        env=os.environ | {"JAX_COORDINATOR_BIND_ADDRESS": address}, timeout=50,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "error: not all processes came within 3 s; start all of them" in ended.stderr
    assert address in ended.stderr


def test_a_cluster_that_is_none_is_a_mistake(tmp_path):
    code = "import sys; from alexnet_jax import main; sys.exit(main.main(sys.argv))"
    configs = pathlib.Path(__file__).parents[1] / "configs"
    ended = subprocess.run(
        [sys.executable, "-c", code, f"--config={configs / 'quickstart.py'}",
         f"--workdir={tmp_path}", "--coordinator=auto"], capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "error: no other processes are found" in ended.stderr


def test_a_port_that_is_taken_is_told_of(tmp_path):
    code = "import sys; from alexnet_jax import main; sys.exit(main.main(sys.argv))"
    configs = pathlib.Path(__file__).parents[1] / "configs"
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        ended = subprocess.run(
            [sys.executable, "-c", code, f"--config={configs / 'quickstart.py'}",
             f"--workdir={tmp_path}", f"--coordinator={address}", "--num_processes=2",
             "--process_id=0"], capture_output=True, text=True, timeout=50,
        )  # fmt: skip
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: --coordinator={address}: process 0 cannot listen there")


def test_open_mpi_5_is_noticed_though_its_older_variable_is_missing(tmp_path):
    """JAX 0.10 to 0.12 finds no coordinator then; newer ones may."""
    environment = os.environ | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    code = "from alexnet_jax import cluster; cluster.JOINING = 3; cluster.join('', 0, -1)"
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=50
    )
    assert ended.returncode != 0
    assert "give each of them --coordinator" in ended.stderr or "not all processes" in ended.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--coordinator=localhost"],
        ["--coordinator=localhost:1", "--num_processes=2"],
        ["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"],
        ["--coordinator=localhost:6000x", "--num_processes=2", "--process_id=0"],
        ["--coordinator=localhost:65536", "--num_processes=2", "--process_id=0"],
        ["--coordinator=:6000", "--num_processes=2", "--process_id=0"],
        ["--num_processes=2", "--process_id=0"],
    ],
)
def test_half_an_address_is_refused(run, tmp_path, flags, capsys):
    assert run(tmp_path, *flags) == 2
    assert "--coordinator=" in capsys.readouterr().err


STUCK = """
import sys, time
from alexnet_jax import cluster
with cluster.Job(step_timeout=float(sys.argv[1])) as job:
    job.progress("step 7")
    print("at it", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_a_process_that_gets_no_further_is_ended_and_says_where():
    ended = subprocess.run(
        [sys.executable, "-c", STUCK, "1", "60"], capture_output=True, text=True, timeout=50
    )
    assert ended.returncode == 1
    assert "no progress for mesh.step_timeout=1 s at 'step 7'" in ended.stderr


STOPPED = """
import os, signal, time
from alexnet_jax import cluster
with cluster.Job(step_timeout=5.0) as job:
    job.progress("step 7")
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.6)
"""


def test_sleep_of_the_whole_process_is_no_standstill():
    process = subprocess.Popen([sys.executable, "-c", STOPPED])
    try:
        for pause in (7, 3, 3):  # longer than the timeout at once, and in pieces
            assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
            time.sleep(pause)
            process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
    finally:
        process.kill()


class Store:
    """The service's store, for ranks that are threads."""

    def __init__(self) -> None:
        self.lock, self.values = threading.Lock(), {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self.lock:
            assert allow_overwrite or key not in self.values
            self.values[key] = value

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        with self.lock:
            return [(k, v) for k, v in self.values.items() if k.startswith(f"{prefix}/")]

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        deadline = time.monotonic() + timeout_in_ms / 1000
        while time.monotonic() < deadline:
            with self.lock:
                if key in self.values:
                    return self.values[key]
            time.sleep(0.001)
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")


@pytest.fixture
def job_of(monkeypatch) -> Iterator[Callable[..., list[cluster.Job]]]:
    """(count, step_timeout) -> the jobs of ranks that live in threads, and beat a hundredfold."""
    monkeypatch.setattr(cluster, "BEAT", 0.01)
    monkeypatch.setattr(cluster, "SILENCE", 0.5)
    begun: list[cluster.Job] = []

    def begin(count: int, step_timeout: float = 0.0) -> list[cluster.Job]:
        store = Store()
        for rank in range(count):
            joined = types.SimpleNamespace(process_id=rank, num_processes=count, client=store)
            begun.append(cluster.Job(step_timeout, joined))
        return begun

    yield begin
    for job in begun:
        job.over.set()


@pytest.mark.parametrize("seed", range(12))
def test_all_ranks_stop_after_the_same_step(job_of, seed):
    """Whoever is told, whenever: each waits for the others' steps, but may run two ahead."""
    chance = random.Random(seed)
    jobs, told = job_of(4), chance.randrange(4)
    begun, moved, ended = [0] * 4, threading.Condition(), [0] * 4
    paces = [chance.uniform(0, 0.01) for _ in jobs]

    def work(rank: int) -> None:
        while not ended[rank]:
            with moved:
                moved.wait_for(lambda: min(begun) > begun[rank] - 2, timeout=20)
                begun[rank] += 1
                moved.notify_all()
            time.sleep(chance.random() * paces[rank])
            if jobs[rank].stops_after(begun[rank]):
                ended[rank] = begun[rank]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
    for thread in (*[threading.Thread(target=job._talk, daemon=True) for job in jobs], *threads):
        thread.start()
    time.sleep(chance.uniform(0.05, 0.2))
    jobs[told].stop(signal.SIGTERM)
    for thread in threads:
        thread.join(20)
    assert ended[0] > 0
    assert ended == ended[:1] * 4


def test_a_rank_that_has_ended_does_not_hold_up_the_others(job_of):
    first, second = job_of(2)
    for job in (first, second):
        threading.Thread(target=job._talk, daemon=True).start()
    leaving = threading.Thread(target=first._await_all, daemon=True)
    leaving.start()
    second.stop(signal.SIGTERM)
    time.sleep(0.2)
    assert second.stops_after(9) == 0  # it goes on to the end, as the first did
    assert leaving.is_alive()
    second._await_all()
    leaving.join(5)
    assert not leaving.is_alive()


def test_what_the_first_rank_says_reaches_all_in_order(job_of):
    jobs, heard = job_of(3), [[], [], []]

    def listen(rank: int) -> None:
        for number in range(20):
            heard[rank].append(jobs[rank].broadcast(lambda: f"{rank} says {number}"))  # noqa: B023

    threads = [threading.Thread(target=listen, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert heard == [[f"0 says {number}" for number in range(20)]] * 3


def test_a_value_that_another_rank_does_not_have_is_a_mistake(job_of):
    first, second = job_of(2)
    first.check_same("the data", "a", "share the folder")
    with pytest.raises(UserError, match=r"the data of rank 1, process .*'b', 'a'.; share the"):
        second.check_same("the data", "b", "share the folder")


def verdict(job: cluster.Job, seconds: float) -> str | None:
    """What the rank comes to think of the others in that time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        job._exchange()
        now = time.monotonic()
        found = job._dead(now) or job._stuck(now)
        if found:
            return found
        time.sleep(0.01)
    return None


def test_the_rank_that_is_behind_is_named_and_nobody_while_one_moves(job_of):
    first, second, third = job_of(3, step_timeout=0.6)
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.01):
            second._exchange()
            third._exchange()

    alive = threading.Thread(target=live)
    alive.start()
    with contextlib.closing(types.SimpleNamespace(close=over.set)):
        assert verdict(first, 1.0) is None  # nobody has done a first step, which may take long
        for job in (first, second, third):
            job.progress("step 4")
        for turn in range(10):
            first.progress(f"step {5 + turn}")
            assert verdict(first, 0.1) is None
        third.progress("step 5")
        found = verdict(first, 5)
    alive.join()
    assert found is not None
    assert "rank 1 (process" in found
    assert "step 4) is behind" in found


def test_a_rank_that_says_nothing_is_named_and_the_others_not(job_of):
    first, second, third = job_of(3)
    for job in (second, third):
        job.progress("step 8")
        job._exchange()
    assert verdict(first, 0.3) is None
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.01):
            third._exchange()

    alive = threading.Thread(target=live)
    alive.start()
    found = verdict(first, 5)
    over.set()
    alive.join()
    assert found is not None
    assert found.startswith("rank 1 (process")


def test_processes_go_on_from_a_checkpoint_that_was_not_sealed_and_past_a_damaged_one(
    start, alone, tmp_path
):
    """The newest has a byte changed; the one before was being sealed when the run was killed."""
    job = start(2, tmp_path, "--config.train.num_steps=3", "--config.checkpoint.every_steps=2")
    assert job.ends()[0] == [0, 0]
    steps = {number: tmp_path / "checkpoints" / str(number) for number in (3, 4)}
    shutil.copytree(steps[3], steps[4])
    (steps[3] / "sha256.json").unlink()
    largest = max((path for path in steps[4].rglob("*") if path.is_file()), key=os.path.getsize)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    again = start(2, tmp_path)
    statuses, errors = again.ends()
    assert statuses == [0, 0], errors
    again.reader.join()
    assert "going on from step 3\n" in again.out
    assert "IS DAMAGED" in errors[0]
    assert losses(tmp_path)["train", 6] == pytest.approx(losses(alone)["train", 6], rel=1e-3)


DEVICES = "import jax; from alexnet_jax import mesh; mesh.start_devices({}); "
DEVICES += "print(jax.device_count())"


@pytest.mark.parametrize(
    ("count", "told", "expected"),
    [(0, None, 1), (0, "3", 3), (2, None, 2), (2, "3", 3), (2, "1", 1)],
)
def test_virtual_devices_are_as_many_as_asked_for_unless_jax_was_told(count, told, expected):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    environment |= {"JAX_NUM_CPU_DEVICES": told} if told else {}
    found = subprocess.run(
        [sys.executable, "-c", DEVICES.format(count)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(found.stdout) == expected
