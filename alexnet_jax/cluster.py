"""Multi-process training of one net: joining, heartbeats, agreeing to stop, giving up.

Ranks meet in the collectives of the compiled steps, which wait forever for a rank that is stuck or
dead. So every rank also writes a heartbeat note once a second to the key-value store of JAX's
coordination service, which rank 0 runs, and reads all others: who is alive, how far each is, which
signal it got, why it failed. From the notes ranks decide when to stop together and when to give up.
"""

import contextlib
import errno
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import distributed  # the rank before devices are started, and the service's store

from alexnet_jax.errors import UserError, exit_status, reason

# A variable that a launcher sets -> the one that holds its number of processes.
LAUNCHERS = {
    "SLURM_STEP_NODELIST": "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
}
BEAT = 1.0  # seconds between a rank's notes
SILENCE = 20.0  # seconds without a note after which a rank counts as dead
JOINING = 300  # seconds for all processes to join
PATIENCE = 60  # seconds, JAX's own heartbeat timeout, should this module's checks fail
ENDED = sys.maxsize  # the step reported by a rank that has finished
NOTES, BROADCASTS = "alexnet_jax/notes", "alexnet_jax/broadcasts"


def join(coordinator: str, num_processes: int, process_id: int) -> int:
    """Join the other processes, if there are any; call before JAX is first used.

    Slurm and Open MPI are detected when they start more than one task. If the others do not join
    in time, this process exits with status 1, not 2: they may come later.

    Args:
      coordinator: HOST:PORT of process 0; "auto" to have JAX find all three, as on a TPU pod.
      num_processes, process_id: with HOST:PORT; otherwise 0 and -1.

    Returns:
      The number of processes, this one included.

    Raises:
      UserError: the three arguments do not fit together, or JAX finds no cluster.
    """
    explicit = coordinator not in ("", "auto")
    host, _, port = coordinator.rpartition(":")
    valid = host and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16
    if explicit and not (valid and 0 <= process_id < num_processes):
        raise UserError(
            f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}"
            ": must be HOST:PORT of process 0, how many there are, and which of 0, 1, ... this is"
        )
    if not explicit and (num_processes, process_id) != (0, -1):
        raise UserError(
            "--num_processes and --process_id take --coordinator=HOST:PORT of process 0 beside them"
        )
    launched = any(name in os.environ and int(os.environ.get(count, 1)) > 1
                   for name, count in LAUNCHERS.items())  # fmt: skip
    if coordinator or launched:
        # JAX's service would take over SIGTERM, and does not handle Ctrl-C.
        jax.config.update("jax_enable_preemption_service", False)
        told: dict[str, Any] = {}
        if explicit:
            if process_id == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
                _check_free(coordinator, int(port))
            told = {
                "coordinator_address": coordinator,
                "num_processes": num_processes,
                "process_id": process_id,
                "cluster_detection_method": "deactivate",
            }
        giving_up = threading.Timer(JOINING, _nobody_came, (coordinator or "the launcher's",))
        giving_up.daemon = True
        giving_up.start()  # before JAX's own timeout, which aborts
        try:
            jax.distributed.initialize(
                **told,
                initialization_timeout=JOINING + PATIENCE,
                heartbeat_timeout_seconds=PATIENCE,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"no other processes are found ({reason(error)}); give each of them "
                "--coordinator=HOST:PORT --num_processes=N --process_id=0, 1, ..."
            ) from error
        finally:
            giving_up.cancel()
    return distributed.global_state.num_processes


def _check_free(coordinator: str, port: int) -> None:
    """Raises UserError if process 0 cannot listen at the port, where JAX itself would crash."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.socket(family) as probe:
        if both:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections may linger
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise UserError(
                    f"--coordinator={coordinator}: process 0 cannot listen there "
                    f"({error.strerror}); choose a port that is free"
                ) from error


def _nobody_came(coordinator: str) -> NoReturn:
    print(
        f"error: not all processes came within {JOINING} s; start all of them, with a coordinator "
        f"(here {coordinator}) that every one can reach",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def leave(status: int) -> NoReturn:
    """End this process with `status`, and once it has one, at any further Ctrl-C.

    One of several processes does without JAX's shutdown, which waits for the others, and one that a
    signal ended without Python's, in which XLA crashes if the signal came while it compiled.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # it may be closed
            stream.flush()
    if jax.distributed.is_initialized() or status > 128:
        os._exit(status)
    sys.exit(status)


class Note(NamedTuple):
    """A rank's heartbeat message to the others."""

    name: str  # its process and host
    beat: int  # increases while it is alive
    turn: int  # increases as it makes progress, alike on all ranks
    place: str  # what it is doing, in words
    signal: int  # that told it to stop; 0: none
    held: int | None  # its step when it saw a stop; it runs at most one more until all agree
    status: int  # exit status of its failure; 0: none
    failure: str


class Job:
    """The processes of one training run, seen from this one; use as a context manager.

    On exit each waits for the others. A rank that fails, dies or is stuck ends all of them. A
    single process only watches whether it is stuck itself.

    Args:
      step_timeout: seconds without progress after which the job counts as stuck; 0: never.
      joined: object with process_id, num_processes and client, in place of JAX's.
    """

    def __init__(self, step_timeout: float = 0.0, joined: Any = distributed.global_state):
        self.rank, self.count = joined.process_id, joined.num_processes
        self.store: Any = joined.client
        self.is_leader = self.rank == 0  # does what only one rank may do
        self.step_timeout = step_timeout
        self.name = this_process()
        self.beat, self.turn, self.place, self.signal = 0, 0, "starting", 0
        self.step = 0
        self.held: int | None = None
        self.last: int | None = None
        self.status, self.failure, self.broadcasts = 0, "", 0
        self.notes: dict[int, Note] = {}
        self.changed, self.over = threading.Condition(), threading.Event()
        self.threads: list[threading.Thread] = []
        self.exchanged = time.monotonic()
        self.heard = dict.fromkeys(range(self.count), self.exchanged)
        self.moved = dict(self.heard)

    def __enter__(self) -> "Job":
        for work in (self._talk, self._judge) if self.count > 1 else (self._judge,):
            self.threads.append(threading.Thread(target=work, daemon=True))
            self.threads[-1].start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if self.count > 1 and error is not None:
                self._fail(error)
            elif self.count > 1:
                self._await_all()
        finally:
            self.over.set()
        if self.count > 1 and error is None:
            for thread in self.threads:
                thread.join()
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the work is done, whoever fails
                jax.distributed.shutdown()

    def progress(self, place: str) -> None:
        """Report progress; call at every turn of the work, once the training step is compiled.

        No rank counts as stuck before every rank has called this: compiling it may take any time.
        """
        with self.changed:
            self.turn, self.place = self.turn + 1, place
            self.moved[self.rank] = time.monotonic()

    def stop(self, number: int) -> None:
        """Ask all ranks to stop together, because of signal `number`."""
        self.signal = number

    def stops_after(self, step: int) -> int:
        """The signal that makes the job stop after `step`, which has begun; 0 to go on.

        All ranks get the same answer: once one has been told to stop, each waits here until all
        have reported their step; the last step is the one after the highest reported.
        """
        if self.count == 1:
            return self.signal
        with self.changed:
            self.step = step
            while self.held is not None and self.last is None:
                self.changed.wait(BEAT)
            return self._signal() if self.last is not None and step >= self.last else 0

    def broadcast(self, say: Callable[[], str]) -> str:
        """Broadcast rank 0's `say()`; every rank must call this, in the same order."""
        if self.count == 1:
            return say()
        self.broadcasts += 1
        key = f"{BROADCASTS}/{self.broadcasts}"
        if self.is_leader:
            answer = say()
            self.store.key_value_set(key, answer)
            return answer
        while True:  # without a time limit: a failure of rank 0 ends this process
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                return self.store.blocking_key_value_get(key, 10_000)
            time.sleep(BEAT)

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """Run the body on rank 0 first, then on the others, which find the files it left."""
        if not self.is_leader:
            self.broadcast(str)
        yield
        if self.is_leader:
            self.broadcast(str)

    def check_same(self, what: str, value: str, way_out: str) -> None:
        """Raises UserError if this rank's `value` differs from rank 0's."""
        first = self.broadcast(lambda: value)
        if first != value:
            raise UserError(
                f"{what} of rank {self.rank}, {self.name}, is not that of rank 0 ({value!r}, "
                f"{first!r}); {way_out}"
            )

    def _signal(self) -> int:
        return max((note.signal for note in self.notes.values()), default=self.signal)

    # Heartbeats.

    def _talk(self) -> None:
        pause = 0.0
        while not self.over.wait(pause):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # rank 0 may be slow; see _judge
                self._exchange()
            deciding = self.held is not None and self.last is None
            pause = BEAT / 20 if deciding else BEAT

    def _exchange(self) -> None:
        """Write this rank's note and read those of all ranks."""
        self.beat += 1
        note = Note(self.name, self.beat, self.turn, self.place, self.signal, self.held,
                    self.status, self.failure)  # fmt: skip
        self.store.key_value_set(f"{NOTES}/{self.rank}", json.dumps(note), allow_overwrite=True)
        found = {
            int(key.rpartition("/")[2]): Note(*json.loads(text))
            for key, text in self.store.key_value_dir_get(NOTES)
        }
        now = time.monotonic()
        with self.changed:
            for rank, other in found.items():
                before = self.notes.get(rank)
                if before is None or other.beat != before.beat:
                    self.heard[rank] = now
                if before is None or other.turn != before.turn:
                    self.moved[rank] = now
            self.notes, self.exchanged = found, now
            self._agree_to_stop()
        for rank, other in found.items():
            if rank != self.rank and other.status and not self.status:
                self._end(other.status, f"rank {rank}, {other.name}: {other.failure}")

    def _agree_to_stop(self) -> None:
        if self._signal() and self.held is None:
            self.held = self.step
        held = [note.held for note in self.notes.values() if note.held is not None]
        if self.held is not None and len(held) == self.count and self.last is None:
            self.last = max(held) + 1
            self.changed.notify_all()

    # Watchdog.

    def _judge(self) -> None:
        looked = self.exchanged  # this process may have been suspended since __init__
        while not self.over.wait(BEAT / 2):
            now = time.monotonic()
            self._forgive(now - looked - BEAT / 2, now)
            looked = now
            verdict = self._dead(now) or self._stuck(now)
            if verdict and not self.status:
                self._end(1, f"{verdict}; the same command goes on from the newest checkpoint")

    def _forgive(self, slept: float, now: float) -> None:
        """Time this process was suspended is not held against any rank.

        Small delays don't count as suspension, or a slow machine would never time out.
        """
        if slept < BEAT / 2:
            return
        with self.changed:
            self.exchanged = min(self.exchanged + slept, now)
            for clock in (self.heard, self.moved):
                clock.update({rank: min(since + slept, now) for rank, since in clock.items()})

    def _dead(self, now: float) -> str | None:
        """A message naming the rank that has gone silent; None if there is none."""
        if self.count == 1:
            return None
        if now - self.exchanged > SILENCE:
            return (
                f"{self._who(0)}, through which all ranks talk, has not answered for {SILENCE:g} s"
            )
        silent = [rank for rank, heard in self.heard.items() if self.exchanged - heard > SILENCE]
        if not silent:
            return None
        return f"{self._who(silent[0])} is dead or stopped: not heard of for {SILENCE:g} s"

    def _stuck(self, now: float) -> str | None:
        """A message saying that the job is stuck, and which rank is behind; None if it is not."""
        turns = {self.rank: self.turn, **{rank: note.turn for rank, note in self.notes.items()}}
        if not self.step_timeout or len(turns) < self.count or min(turns.values()) == 0:
            return None
        if now - max(self.moved.values()) <= self.step_timeout:
            return None
        behind = min(turns, key=lambda rank: turns[rank])
        which = f"{self._who(behind)} is behind" if len(set(turns.values())) > 1 else "all are even"
        return (
            f"no progress for mesh.step_timeout={self.step_timeout:g} s at {self.place!r}; {which}"
        )

    def _who(self, rank: int) -> str:
        note = self.notes.get(rank)
        return f"rank {rank}" + (f" ({note.name}; {note.place})" if note else "")

    def _end(self, status: int, message: str) -> NoReturn:
        """End this process from a helper thread: the main thread may be stuck."""
        self.status, self.failure = status, message
        print(f"error: {message}", file=sys.stderr, flush=True)
        if self.is_leader and self.count > 1:
            time.sleep(2.5 * BEAT)  # the others still read notes from this process
        os._exit(status)

    def _fail(self, error: BaseException) -> None:
        """Tell the others of this rank's error, unless it only results from another's death."""
        behind = error if isinstance(error, UserError) else error.__cause__ or error
        if isinstance(behind, ValueError | RuntimeError):  # of a collective, perhaps: see _judge
            time.sleep(SILENCE + 5 * BEAT)
        words = (str(error).splitlines() or [""])[0] or type(error).__name__
        if isinstance(error, KeyboardInterrupt):
            words = "told once more to stop"
        self.failure, self.status = words, exit_status(error)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._exchange()
        time.sleep(2.5 * BEAT)
        first = self.notes.get(0)
        if first and not self.is_leader and first.failure == self.failure:
            os._exit(self.status)  # rank 0 prints it

    def _await_all(self) -> None:
        with self.changed:
            self.held = ENDED
        while [note.held for note in self.notes.values()] != [ENDED] * self.count:
            time.sleep(BEAT / 10)
