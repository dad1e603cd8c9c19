"""Threads and processes that read images: how many, of which kind, and how they end."""

import concurrent.futures
import contextlib
import math
import multiprocessing
import multiprocessing.util
import os
import pathlib
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Protocol

import cloudpickle

from alexnet_jax.config import Data
from alexnet_jax.errors import FailedError, UserError

CPU_QUOTA = pathlib.Path("/sys/fs/cgroup/cpu.max")  # quota and period, in microseconds
MOST_THREADS = 4  # beyond these, processes
WORTH_PROCESSES = 20_000  # images, about what threads read while processes start


def count(asked: int) -> int:
    """The number of workers: `asked`, or, if 0, one for each core this process may use."""
    if asked:
        return asked
    allowed = getattr(os, "sched_getaffinity", None)  # Linux
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    try:  # a container shows all cores of its host, but may have the time of fewer
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
        return min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no quota
        return cores


def kind(data: Data, num_images: int) -> str:
    """`threads` or `processes`, for a stream of `num_images` images.

    Decoding and copying release the interpreter lock, the code around them does not: beyond a few
    threads they wait for each other, the more so the less there is to decode, as in records.
    Processes take seconds to start.
    """
    if data.worker_kind != "auto":
        return data.worker_kind
    waiting = count(data.workers) > MOST_THREADS or data.source.startswith("records:")
    return "processes" if waiting and num_images >= WORTH_PROCESSES else "threads"


def _live_with_parent() -> None:
    """Make this process ignore Ctrl-C, which is its parent's to handle, and end with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()  # however it ends
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Progress(Protocol):
    """The running total of the work a worker has done."""

    value: float


class Pool:
    """Worker processes, with a thread for each, that run one job; they end with the context.

    Not the pool of concurrent.futures, which hung when a process was killed while others started.
    """

    def __init__(self, job: Callable[..., None], count: int):
        """`job` takes the submitted arguments and a `Progress`; at most `count` processes start."""
        self.workers, self.count, self.told = _Workers(job, "--workers"), count, 0.0
        self.progress: list[Any] = []
        self.pending: set[concurrent.futures.Future] = set()
        self.threads = concurrent.futures.ThreadPoolExecutor(count)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.workers.end()
        self.threads.shutdown(cancel_futures=True)

    def submit(self, *arguments: Any) -> None:
        """Queue one more run of the job, with these arguments."""
        with _ctrl_c_later():
            if len(self.progress) < self.count:
                # Raw: a process that is killed cannot leave a lock held.
                self.progress.append(multiprocessing.get_context("spawn").RawValue("d", 0.0))
                self.workers.start(self.progress[-1])
            self.pending.add(self.threads.submit(self.workers.do, *arguments))

    def wait(self, most: int, tell: Callable[[float], object]) -> None:
        """Wait until at most `most` runs are pending, passing the progress made to `tell`.

        Raises the error that stopped a worker, OSError if it was killed.
        """
        while True:
            enough = len(self.pending) <= most
            with _ctrl_c_later():  # it could leave a lock held that the threads wait for
                done, self.pending = concurrent.futures.wait(
                    self.pending,
                    timeout=0 if enough else 0.5,
                    return_when=concurrent.futures.FIRST_COMPLETED,
                )
            total = sum(progress.value for progress in self.progress)
            tell(total - self.told)
            self.told = total
            for future in done:
                future.result()
            if enough:
                return


@contextlib.contextmanager
def elsewhere(job: Callable[[int], Any], count: int) -> Iterator[Callable[[int], Any]]:
    """A callable that runs `job` in one of `count` worker processes; they end with the context.

    A worker serves one thread at a time. Not Grain's own processes: when one was killed while it
    started, the others and whatever waited for them hung. Workers block SIGINT and SIGTERM, which a
    terminal or a scheduler may send to all, from their start; the parent handles them.
    """
    workers = _Workers(job, "--config.data.workers")
    # Also runs at exit if this context is never left: multiprocessing would otherwise wait for
    # workers that block SIGTERM. Does nothing in a fork of this process.
    end = multiprocessing.util.Finalize(None, workers.end, exitpriority=1)
    try:
        with _unheard(signal.SIGINT, signal.SIGTERM):
            for _ in range(count):
                workers.start()
        yield workers.do
    finally:
        end()


class _Workers:
    """Worker processes for one job, each serving one thread at a time; `flag` sets their number."""

    def __init__(self, job: Callable[..., Any], flag: str):
        self.job, self.flag = cloudpickle.dumps(job), flag
        self.started: list[_Worker] = []
        self.free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def start(self, *shared: Any) -> None:
        """Start one more; its job also takes `shared`."""
        self.started.append(_Worker(self.job, self.flag, *shared))
        self.free.put(self.started[-1])

    def do(self, *arguments: Any) -> Any:
        """The job's result, from whichever worker is free first."""
        worker = self.free.get()
        try:
            return worker.do(*arguments)
        finally:
            self.free.put(worker)

    def end(self) -> None:
        """Kill all, whatever they are doing."""
        for worker in self.started:
            worker.process.kill()
        for worker in self.started:
            worker.process.join()


class _Worker:
    """A process that runs a job repeatedly, and the pipe to it."""

    def __init__(self, job: bytes, flag: str, *shared: Any):
        """`job`, pickled, takes the arguments of `do`, then `shared`."""
        context = multiprocessing.get_context("spawn")
        self.flag, self.unsaid = flag, [job]
        self.connection, theirs = context.Pipe()
        # The job is sent through the pipe: if a process died while a large job was sent at its
        # start, start() would hang.
        self.process = context.Process(target=_work, args=(theirs, *shared), daemon=True)
        try:
            self.process.start()
        except BrokenPipeError as ended:  # since Python 3.14
            raise self._killed() from ended
        finally:
            theirs.close()

    def do(self, *arguments: Any) -> Any:
        """Wait for the job's result; raises the error that stopped it, OSError if it was killed."""
        # Not send(): if it fails, Python 3.12 may crash on what it leaves behind.
        self.unsaid.append(pickle.dumps(arguments))
        try:
            while self.unsaid:
                self.connection.send_bytes(self.unsaid.pop(0))
            found, error = self.connection.recv()
        except (EOFError, ConnectionError) as ended:
            self.process.join()
            if self.process.exitcode is not None and self.process.exitcode >= 0:
                raise RuntimeError("a worker failed; it says above why") from ended
            raise self._killed() from ended
        if error is not None:
            raise error
        return found

    def _killed(self) -> OSError:
        return OSError(
            "a worker was killed, by lack of memory most often: the same command goes on, with "
            f"fewer by {self.flag}=N"
        )


def _work(connection: Connection, *shared: Any) -> None:
    """Run the job on every request until the parent closes the pipe."""
    _live_with_parent()
    heard = _heard(connection)
    job: Any = next(map(cloudpickle.loads, heard), None)  # None: the parent has ended
    for arguments in map(pickle.loads, heard):
        found = error = None
        try:
            found = job(*arguments, *shared)
        except (UserError, FailedError, OSError, MemoryError) as stopped:
            error = stopped
        with contextlib.suppress(ConnectionError):
            connection.send((found, error))


def _heard(connection: Connection) -> Iterator[bytes]:
    """The messages received until the other end closes."""
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            yield connection.recv_bytes()


@contextlib.contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Defers Ctrl-C to the end of the block; processes started inside never get it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # other threads never get it
        return
    came: list[int] = []
    usual = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        with _unheard(signal.SIGINT):
            yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def _unheard(*signals: signal.Signals) -> Iterator[None]:
    """Blocks the signals; threads and processes started inside inherit that and never get them."""
    # The resource tracker, which the first process would start, would unblock them: start it first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
