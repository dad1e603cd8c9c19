"""Several processes that train one net: how they start, what they tell each other, how they end.

Ranks meet in the collectives of the compiled steps, where each waits for ever for one that is stuck
or dead. So beside these every rank writes a note about itself once a second, to the store of JAX's
coordination service, which rank 0 runs, and reads everybody's: who lives, how far it is, what it
was told or why it failed. From the notes ranks know when to stop together, and when to give up.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import distributed  # the rank before devices are started, and the service's store

from alexnet_jax.errors import UserError, exit_status

# What a launcher sets in every process, and where it says how many there are.
LAUNCHERS = {"SLURM_STEP_NODELIST": "SLURM_NTASKS", "OMPI_MCA_orte_hnp_uri": "OMPI_COMM_WORLD_SIZE"}
BEAT = 1.0  # seconds between a rank's notes
SILENCE = 20.0  # seconds without one, after which a rank is taken for dead
JOINING = 300  # seconds for all to come
PATIENCE = 60  # seconds in which JAX ends a rank that hears nothing, should this module not
ENDED = sys.maxsize  # the step of a rank that has no more to do
NOTES, TOLD = "alexnet_jax/notes", "alexnet_jax/told"


def join(coordinator: str, num_processes: int, process_id: int) -> int:
    """Join the other processes, if there are any; to be called before JAX is first used.

    Slurm and Open MPI say themselves where more than one task is started. Where the others do not
    come in time this process ends, with status 1: they may come later.

    Args:
      coordinator: HOST:PORT of process 0; "auto" to have JAX find all three out, as on a TPU pod.
      num_processes, process_id: with HOST:PORT; else 0 and -1.

    Returns:
      How many there are, this one counted.

    Raises:
      UserError: the three do not fit, or JAX finds no cluster.
    """
    explicit = coordinator not in ("", "auto")
    if explicit and not (":" in coordinator and 0 <= process_id < num_processes):
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
        # JAX would take SIGTERM for itself, and knows no Ctrl-C.
        jax.config.update("jax_enable_preemption_service", False)
        told: dict[str, Any] = {}
        if explicit:
            told = {
                "coordinator_address": coordinator,
                "num_processes": num_processes,
                "process_id": process_id,
                "cluster_detection_method": "deactivate",
            }
        giving_up = threading.Timer(JOINING, _nobody_came, (coordinator or "the launcher's",))
        giving_up.daemon = True
        giving_up.start()  # JAX would abort
        try:
            jax.distributed.initialize(
                **told,
                initialization_timeout=JOINING + PATIENCE,
                heartbeat_timeout_seconds=PATIENCE,
            )
        except (RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"no other processes are found ({reason}); give each of them "
                "--coordinator=HOST:PORT --num_processes=N --process_id=0, 1, ..."
            ) from error
        finally:
            giving_up.cancel()
    return distributed.global_state.num_processes


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
    """End this process; where the others failed, without JAX's waiting for them."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class Note(NamedTuple):
    """What a rank tells the others of itself."""

    name: str  # its process and host
    beat: int  # grows while it lives
    turn: int  # grows while it gets on; all ranks take the same turns
    place: str  # what it is at, in words
    signal: int  # that told it to stop; 0: none
    held: int | None  # the last step it has begun, and begins no other until a last is agreed
    status: int  # with which it fails; 0: it does not
    failure: str


class Job:
    """The processes of one training, of which this is one; use as a context manager.

    At its end each waits for the others, and a failure of one ends all, as does a rank that is
    dead or stuck. Alone, a process only watches itself.

    Args:
      step_timeout: seconds without progress after which the job is stuck; 0: never.
      joined: rank, count and store, where they are not JAX's.
    """

    def __init__(self, step_timeout: float = 0.0, joined: Any = distributed.global_state):
        self.rank, self.count = joined.process_id, joined.num_processes
        self.store: Any = joined.client
        self.leads = self.rank == 0  # writes what is written once
        self.step_timeout = step_timeout
        self.name = this_process()
        self.beat, self.turn, self.place, self.signal = 0, 0, "starting", 0
        self.step = 0
        self.held: int | None = None
        self.last: int | None = None
        self.status, self.failure, self.questions = 0, "", 0
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
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # all is done, whoever fails now
                jax.distributed.shutdown()

    def at(self, place: str) -> None:
        """To be called at every turn of the work, once all is compiled: this rank gets on.

        Nobody is stuck before every rank has called it once: compiling takes as long as it takes.
        """
        with self.changed:
            self.turn, self.place = self.turn + 1, place
            self.moved[self.rank] = time.monotonic()

    def stop(self, number: int) -> None:
        """Ask all ranks to stop together, for the signal `number`."""
        self.signal = number

    def stops_after(self, step: int) -> int:
        """The signal for which the job stops after `step`, which has begun; 0 to go on.

        All ranks get the same answer: once one has been told to stop, each waits here and tells
        how far it is, and the farthest step but one is the last.
        """
        if self.count == 1:
            return self.signal
        with self.changed:
            self.step = step
            while self.held is not None and self.last is None:
                self.changed.wait(BEAT)
            return self._signal() if self.last is not None and step >= self.last else 0

    def told(self, say: Callable[[], str]) -> str:
        """What rank 0 says, to all; every rank is to ask, in the same order."""
        if self.count == 1:
            return say()
        self.questions += 1
        key = f"{TOLD}/{self.questions}"
        if self.leads:
            answer = say()
            self.store.key_value_set(key, answer)
            return answer
        while True:  # as long as it takes; a failure ends this process
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                return self.store.blocking_key_value_get(key, 10_000)
            time.sleep(BEAT)

    @contextlib.contextmanager
    def one_first(self) -> Iterator[None]:
        """Rank 0 alone, then the others: what it leaves in folders they find."""
        if not self.leads:
            self.told(str)
        yield
        if self.leads:
            self.told(str)

    def check_same(self, what: str, value: str, way_out: str) -> None:
        """Raises UserError where this rank has another `value` than rank 0."""
        first = self.told(lambda: value)
        if first != value:
            raise UserError(
                f"{what} of rank {self.rank}, {self.name}, is not that of rank 0 ({value!r}, "
                f"{first!r}); {way_out}"
            )

    def _signal(self) -> int:
        return max((note.signal for note in self.notes.values()), default=self.signal)

    # What the rank says and hears.

    def _talk(self) -> None:
        pause = 0.0
        while not self.over.wait(pause):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # rank 0 may be slow; see _judge
                self._exchange()
            deciding = self.held is not None and self.last is None
            pause = BEAT / 20 if deciding else BEAT

    def _exchange(self) -> None:
        """Write this rank's note and read everybody's."""
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

    # When a rank gives up.

    def _judge(self) -> None:
        looked = self.exchanged  # since the clocks were started, it may have slept already
        while not self.over.wait(BEAT / 2):
            now = time.monotonic()
            self._forgive(now - looked - BEAT / 2, now)
            looked = now
            verdict = self._dead(now) or self._stuck(now)
            if verdict and not self.status:
                self._end(1, f"{verdict}; the same command goes on from the newest checkpoint")

    def _forgive(self, slept: float, now: float) -> None:
        """The seconds for which this process did not run count against nobody.

        To be a little late is not to sleep: else, where that is usual, nothing would ever end.
        """
        if slept < BEAT / 2:
            return
        with self.changed:
            self.exchanged = min(self.exchanged + slept, now)
            for clock in (self.heard, self.moved):
                clock.update({rank: min(since + slept, now) for rank, since in clock.items()})

    def _dead(self, now: float) -> str | None:
        """The rank that is silent, in words."""
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
        """The rank that keeps all from getting on, in words."""
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
        """End this process from a thread beside the one that may be stuck."""
        self.status, self.failure = status, message
        print(f"error: {message}", file=sys.stderr, flush=True)
        if self.leads and self.count > 1:
            time.sleep(2.5 * BEAT)  # the others read their notes from here
        os._exit(status)

    def _fail(self, error: BaseException) -> None:
        """Tell the others of this rank's error, unless the error is that another one is gone."""
        behind = error if isinstance(error, UserError) else error.__cause__ or error
        if isinstance(behind, ValueError | RuntimeError):  # of a collective, it may be
            time.sleep(SILENCE + 5 * BEAT)
        words = (str(error).splitlines() or [""])[0] or type(error).__name__
        if isinstance(error, KeyboardInterrupt):
            words = "told once more to stop"
        self.failure, self.status = words, exit_status(error)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._exchange()
        time.sleep(2.5 * BEAT)
        first = self.notes.get(0)
        if first and not self.leads and first.failure == self.failure:
            os._exit(self.status)  # rank 0 says so

    def _await_all(self) -> None:
        with self.changed:
            self.held = ENDED
        while [note.held for note in self.notes.values()] != [ENDED] * self.count:
            time.sleep(BEAT / 10)
