"""The faults: each ends training by force, has it go on, and tells what that lost.

A trial is a function of a `Bench`, a source of random moments and what it varies. It returns what
happened as a dict that JSON can hold; its "lost" lists every promise that was not kept.
"""

import contextlib
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import harness
from harness import SHORT, Bench, Life, newest, step_folders

from alexnet_jax import seals
from alexnet_jax.checkpoint import UNFINISHED

DAMAGES = ("truncated", "missing", "one byte changed")
FIRST, FIRST_TWENTY = 1e-5, 1e-3  # relative differences of losses on another topology
STEPS_AFTER_SIGNAL = 2  # the running one, and one that was already recorded late

Outcome = dict[str, Any]


def killed(
    bench: Bench,
    rng: random.Random,
    kills: int = 10,
    moments: tuple[str, ...] = ("random",),
    flags: tuple[str, ...] = (),
    spread: float = 0.15,
) -> Outcome:
    """kill -9, again and again on the way of one run.

    Args:
      moments: phases to choose from, in which to kill up to `spread` seconds after their
        beginning; or "random", for any moment.
    """
    told, lost, seconds = [], [], bench.seconds(*flags)
    with bench.workdir(lost) as workdir:
        while True:
            life = bench.start(workdir, *flags)
            if len(told) < kills:
                moment = moments[len(told) % len(moments)]
                if moment == "random":
                    life.until(lambda: False, rng.uniform(0, 0.6 * seconds))
                elif life.until_phase(moment, rng.randint(1, 3)):
                    life.until(lambda: False, rng.uniform(0, spread))
                whole = newest(workdir)
                life.kill()
            status = life.ended()
            lost += went_back(life)
            if status != -signal.SIGKILL:
                break
            if newest(workdir) < whole:
                lost.append(f"step {whole} was whole, and after the kill there is no newer one")
            told.append(at_the_kill(life))
        lost += failure(life, status) or bench.lost(workdir, *flags)
    return {"kills": told, "lost": lost}


def at_the_kill(life: Life) -> Outcome:
    """What a killed life leaves."""
    folders = step_folders(life.workdir)
    return {
        "phase": " and ".join(life.phases()),
        "temporary": life.temporary(),
        "from": life.resumed(),
        "step": life.step(),
        "whole": newest(life.workdir),
        "bytes": harness.size(folders[-1]) if folders else 0,
    }


def stopped(
    bench: Bench,
    rng: random.Random,
    number: signal.Signals = signal.SIGTERM,
    phase: str = "training",
) -> Outcome:
    """A signal that asks for an orderly end; training itself saves at the next step."""
    lost: list[str] = []
    with bench.workdir(lost) as workdir:
        life = bench.start(workdir)
        life.until_phase(phase, 1 if phase in ("starting", "compiling") else rng.randint(1, 4))
        life.until(lambda: False, rng.uniform(0, 0.2))
        phases, step = life.phases(), life.step()
        life.process.send_signal(number)
        status = life.ended()
        saved = newest(workdir)
        over = status == 0 and saved == step and "ending" in phases
        if not over and "starting" not in phases:  # then there is nothing to save
            if status != 128 + number:
                lost.append(f"{number.name} ended with status {status}: {life.err()[-1:]}")
            if not step <= saved <= step + STEPS_AFTER_SIGNAL:
                lost.append(f"{number.name} after step {step} saved step {saved}")
            if left := [path.name for path in (workdir / "checkpoints").glob(UNFINISHED)]:
                lost.append(f"{number.name} left {left}")
        lost += finished(bench, workdir)
    return {
        "phase": " and ".join(phases),
        "status": status,
        "step": step,
        "saved": saved,
        "lost": lost,
    }


def limited(bench: Bench, rng: random.Random) -> Outcome:
    """A disk that is full where a file reaches some size, as `ulimit -f` has it."""
    lost: list[str] = []
    with bench.workdir(lost) as workdir:
        begun(bench, rng, workdir)
        limit = rng.randint(4, 250)
        life = bench.start(workdir, limit_kb=limit)
        status = life.ended()
        lost += told_in_one_line(life, status) + finished(bench, workdir)
    return {"limit_kb": limit, "status": status, "said": life.err()[-1:], "lost": lost}


def full(bench: Bench, rng: random.Random) -> Outcome | None:
    """A file system that is full; None where none can be mounted."""
    lost: list[str] = []
    with bench.workdir(lost) as workdir, mounted(workdir, megabytes=16) as works:
        if not works:
            return None
        life = bench.start(workdir)
        life.until_saved(rng.randint(2, 20))
        left = rng.randint(0, 600) * 1024  # less than a checkpoint takes
        with (workdir / "ballast").open("ab", buffering=0) as ballast:
            while life.process.poll() is None:  # what an older checkpoint frees is taken too
                found = os.statvfs(workdir)
                with contextlib.suppress(OSError):
                    ballast.write(bytes(max(found.f_bavail * found.f_frsize - left, 0)))
                time.sleep(0.01)
        status = life.ended()
        lost += told_in_one_line(life, status)
        (workdir / "ballast").unlink()
        lost += finished(bench, workdir)
    return {"left": left, "status": status, "said": life.err()[-1:], "lost": lost}


def damaged(bench: Bench, rng: random.Random, name: str, damage: str) -> Outcome:
    """A file of the newest checkpoint that is not as it was; a checkpoint before is there."""
    lost: list[str] = []
    with bench.workdir(lost) as workdir:
        shutil.copytree(bench.undisturbed(*SHORT), workdir)
        *_, older, last = (int(folder.name) for folder in step_folders(workdir))
        harm(workdir / "checkpoints" / str(last) / name, damage, rng)
        life = bench.start(workdir, *SHORT)
        status = life.ended()
        unsealed = name == seals.SEAL and damage == "missing"  # is read whole, and counts
        expected = last if unsealed else older
        if life.resumed() != expected:
            lost.append(f"went on from step {life.resumed()}, not {expected}")
        if not unsealed and not any("IS DAMAGED" in line for line in life.err()):
            lost.append("the damage was not told of")
        lost += failure(life, status) or bench.lost(workdir, *SHORT)
    return {"file": name, "damage": damage, "from": life.resumed(), "lost": lost}


def harm(path: pathlib.Path, damage: str, rng: random.Random) -> None:
    """Truncate a file, take it away, or change a bit of it."""
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


def harmable(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Every file of a checkpoint with every damage that it can take."""
    for path in sorted(folder.rglob("*")):
        for damage in DAMAGES if path.is_file() else ():
            if damage == "missing" or path.stat().st_size:
                yield str(path.relative_to(folder)), damage


def miscached(bench: Bench, rng: random.Random, damage: str) -> Outcome:
    """A compiled program in the cache that is not as it was, as a killed run may leave it."""
    lost: list[str] = []
    with bench.workdir(lost) as workdir:
        bench.undisturbed(*SHORT)
        cache = workdir.with_name("cache")
        shutil.copytree(bench.folder / "cache", cache)
        entry = rng.choice(sorted(cache.glob("compiled/jit_*step-*-cache")))
        harm(entry, damage, rng)
        life = bench.start(workdir, *SHORT, f"--config.data.cache_dir={cache}")
        status = life.ended()
        lost += failure(life, status) or bench.lost(workdir, *SHORT)
    return {"file": entry.name.partition("-")[0], "damage": damage, "lost": lost}


def twice(bench: Bench, rng: random.Random, at_once: bool = False) -> Outcome:
    """Two starts in one workdir; the second while the first trains, or both at once."""
    lost: list[str] = []
    with bench.workdir(lost) as workdir:
        lives = [bench.start(workdir)]
        if not at_once:
            lives[0].until_phase("training")
            lives[0].process.send_signal(signal.SIGSTOP)
        lives.append(bench.start(workdir))
        if not at_once:
            lives[1].ended()
            lives[0].process.send_signal(signal.SIGCONT)
        statuses = [life.ended() for life in lives]
        if sorted(statuses) != [0, 2] or (statuses[0] and not at_once):
            lost.append(f"ended with status {statuses}")
        refused = lives[statuses.index(2)] if 2 in statuses else lives[1]
        if len(refused.err()) != 1 or "is in use by process" not in refused.err()[0]:
            lost.append(f"the second said {refused.err()}")
        lost += bench.lost(workdir)
    return {"statuses": statuses, "lost": lost}


def restarted(bench: Bench, rng: random.Random, before: int, after: int) -> Outcome:
    """kill -9 of all processes that train together; another number of them goes on."""
    lost: list[str] = []
    with bench.workdir(lost) as workdir:
        life = bench.start(workdir, processes=before)
        life.until_saved(rng.randint(4, 30))
        life.kill()
        life.ended()
        told = at_the_kill(life)
        life = bench.start(workdir, processes=after)
        status = life.ended()
        lost += went_back(life) + failure(life, status)
        if before == after and not status:
            lost += bench.lost(workdir, processes=before)
        elif not status:
            lost += apart(workdir, bench.undisturbed(processes=before), told["whole"])
    return told | {"processes": [before, after], "lost": lost}


def apart(workdir: pathlib.Path, expected: pathlib.Path, restored: int) -> list[str]:
    """Where losses after a restore on another topology are further off than is promised."""
    pairs = zip(harness.records(workdir), harness.records(expected), strict=True)
    off = {
        a["step"]: abs(a["loss"] - b["loss"]) / abs(b["loss"])
        for a, b in pairs
        if a["split"] == b["split"] == "train" and a["step"] == b["step"]
    }
    lost = [] if max(off) == len(off) else ["steps are missing"]
    twenty = [off[step] for step in range(restored + 1, restored + 21)]
    if any(off[step] for step in range(1, restored + 1)):
        lost.append("records before the restore have changed")
    if twenty[0] > FIRST or max(twenty) > FIRST_TWENTY:
        lost.append(f"losses differ by {twenty[0]:.1e} at first, by {max(twenty):.1e} in twenty")
    return lost


def rank_lost(
    bench: Bench, rng: random.Random, number: signal.Signals, seconds: float = 600
) -> Outcome:
    """One of two processes is killed, or stopped for ever; the other must not wait for ever."""
    lost: list[str] = []
    with bench.workdir(lost) as workdir:
        life = bench.start(workdir, processes=2)
        life.until_saved(rng.randint(4, 30))
        victim, since = rng.randrange(2), time.monotonic()
        os.kill(life.rank(victim), number)
        over = life.until(lambda: False, seconds) or life.process.poll() is not None
        waited = time.monotonic() - since
        status = life.ended()
        if not over or status == 0:
            lost.append(f"ended with status {status} after {waited:.0f} s")
        life = bench.start(workdir, processes=2)
        status_after = life.ended()
        lost += went_back(life)
        lost += failure(life, status_after) or bench.lost(workdir, processes=2)
    return {"rank": victim, "status": status, "waited": round(waited, 1), "lost": lost}


@contextlib.contextmanager
def mounted(folder: pathlib.Path, megabytes: int) -> Iterator[bool]:
    """A small file system of its own in `folder`; False where that is not allowed."""
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    works = subprocess.run(line, capture_output=True).returncode == 0
    try:
        yield works
    finally:
        if works:
            subprocess.run(["umount", str(folder)], check=True)


def begun(bench: Bench, rng: random.Random, workdir: pathlib.Path) -> None:
    """A run that was stopped on its way."""
    life = bench.start(workdir)
    life.until_saved(rng.randint(2, 20))
    life.process.send_signal(signal.SIGTERM)
    life.ended()


def finished(bench: Bench, workdir: pathlib.Path) -> list[str]:
    """What is lost when the same command goes on to the end."""
    life = bench.start(workdir)
    status = life.ended()
    return went_back(life) + (failure(life, status) or bench.lost(workdir))


def went_back(life: Life) -> list[str]:
    """Whether it went on from another step than the newest that was whole."""
    if life.resumed() in (None, life.before):
        return []
    return [f"went on from step {life.resumed()}, and {life.before} was whole"]


def failure(life: Life, status: int) -> list[str]:
    return [f"ended with status {status}: {life.err()[-3:]}"] if status else []


def told_in_one_line(life: Life, status: int) -> list[str]:
    """What was not as it has to be where nothing more could be written."""
    lost, said = [], life.err()
    told = len(said) == 1 and re.match("error: .*(No space left|File too large)", said[0])
    if status != 1 or not told:
        lost.append(f"ended with status {status}: {said}")
    whole = [folder for folder in step_folders(life.workdir) if not seals.damage(folder)]
    if not whole or int(whole[-1].name) < life.before:
        lost.append("an older checkpoint is not whole any more")
    return lost
