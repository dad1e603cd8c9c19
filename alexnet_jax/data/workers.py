"""Threads and processes that read images: how many, of which kind, and how they end."""

import concurrent.futures
import contextlib
import itertools
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

CPU_QUOTA = pathlib.Path("/sys/fs/cgroup/cpu.max")  # microseconds, of so many
MOST_THREADS = 4  # beside each other
WORTH_PROCESSES = 20_000  # images: what threads do while processes start


def count(asked: int) -> int:
    """How many: those asked for, or, if 0, one for each core this process may use."""
    if asked:
        return asked
    allowed = getattr(os, "sched_getaffinity", None)  # Linux
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    try:  # a container shows all cores of its host, and may use the time of fewer
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
        return min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # there is no limit
        return cores


def kind(data: Data, num_images: int) -> str:
    """`threads` or `processes`, for a stream of so many images.

    Decoding and copying leave the interpreter to other threads, what is around them does not:
    beyond a few threads they wait for each other, the more so the less there is to decode, as in
    records. Processes take seconds to start.
    """
    if data.worker_kind != "auto":
        return data.worker_kind
    waiting = count(data.workers) > MOST_THREADS or data.source.startswith("records:")
    return "processes" if waiting and num_images >= WORTH_PROCESSES else "threads"


def _live_with_parent() -> None:
    """Have this process leave Ctrl-C to the one that started it, and end when that does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()  # however it ends
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Progress(Protocol):
    """Where a worker adds up what it has done."""

    value: float


class Pool:
    """Processes that do one job after another, a thread with each. When it ends, they end.

    The pool of concurrent.futures was not up to it: where a process was killed while others
    started, it waited for ever.
    """

    def __init__(self, job: Callable[..., None], count: int):
        """`job` takes what is submitted and a `Progress`; `count` processes start when needed."""
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
        """Have the job done with these once more."""
        with _ctrl_c_later():
            if len(self.progress) < self.count:
                # Without a lock, to be killed with.
                self.progress.append(multiprocessing.get_context("spawn").RawValue("d", 0.0))
                self.workers.start(self.progress[-1])
            self.pending.add(self.threads.submit(self.workers.do, *arguments))

    def wait(self, most: int, tell: Callable[[float], object]) -> None:
        """Until at most `most` are still to be done; `tell` is told of progress.

        Raises what stopped a worker, OSError where it was killed.
        """
        while True:
            enough = len(self.pending) <= most
            with _ctrl_c_later():  # which could leave a lock held that the threads wait for
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
    """What has `job` done by `count` processes, each for one thread at a time; they end with this.

    Grain's own processes were not up to it: where one was killed while it started, the others and
    what waited for them went on for ever. From their start on they leave signals, which a terminal
    or a scheduler may send to all, to the parent.
    """
    workers = _Workers(job, "--config.data.workers")
    # Also where this is never left: multiprocessing, at its end, would wait for what does not hear
    # SIGTERM. Not by a fork of this process.
    end = multiprocessing.util.Finalize(None, workers.end, exitpriority=1)
    try:
        with _unheard(signal.SIGINT, signal.SIGTERM):
            for _ in range(count):
                workers.start()
        yield workers.do
    finally:
        end()


class _Workers:
    """Processes for one job, each for one thread at a time; `flag` sets how many there are."""

    def __init__(self, job: Callable[..., Any], flag: str):
        self.job, self.flag = cloudpickle.dumps(job), flag
        self.started: list[_Worker] = []
        self.free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def start(self, *shared: Any) -> None:
        """One more; its job takes `shared`, too."""
        self.started.append(_Worker(self.job, self.flag, *shared))
        self.free.put(self.started[-1])

    def do(self, *arguments: Any) -> Any:
        """What the job makes of it, done by whichever is free first."""
        worker = self.free.get()
        try:
            return worker.do(*arguments)
        finally:
            self.free.put(worker)

    def end(self) -> None:
        """End all, whatever they are doing."""
        for worker in self.started:
            worker.process.kill()
        for worker in self.started:
            worker.process.join()


class _Worker:
    """A process that does a job again and again, and the pipe to it."""

    def __init__(self, job: bytes, flag: str, *shared: Any):
        """`job`, pickled, takes what `do` does and `shared`."""
        context = multiprocessing.get_context("spawn")
        self.flag, self.unsaid = flag, [job]
        self.connection, theirs = context.Pipe()
        # The job comes by the pipe: were a process killed that is sent much as it starts, the start
        # would wait for ever.
        self.process = context.Process(target=_work, args=(theirs, *shared), daemon=True)
        try:
            self.process.start()
        except BrokenPipeError as ended:  # since Python 3.14
            raise self._killed() from ended
        finally:
            theirs.close()

    def do(self, *arguments: Any) -> Any:
        """What the job makes of it, waited for; raises what stopped it, OSError where killed."""
        # Not send: where it fails, Python 3.12 may crash at what that leaves behind.
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
    """Do what is asked for, until nobody is there to ask."""
    _live_with_parent()
    heard = _heard(connection)
    for job in map(cloudpickle.loads, itertools.islice(heard, 1)):
        for arguments in map(pickle.loads, heard):
            found = error = None
            try:
                found = job(*arguments, *shared)
            except (UserError, FailedError, OSError, MemoryError) as stopped:
                error = stopped
            with contextlib.suppress(ConnectionError):
                connection.send((found, error))


def _heard(connection: Connection) -> Iterator[bytes]:
    """What comes, until nobody is there to send more."""
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            yield connection.recv_bytes()


@contextlib.contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Ctrl-C comes when this ends, and never to processes that are started in it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # others never get it
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
    """Threads that are started in this, and processes that they start, never hear the signals."""
    # They take over what is blocked. The tracker that the first process would bring along would
    # lift it, so it comes before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
