"""Every fault of training, many times; a table of what was tried, how often, and what was lost.

    python tests/faults/long.py --output=DIR [--kills=100] [--large=10] [--times=10] [--only=WORDS]

DIR/trials.jsonl has a line for each trial. Interrupted, the same command goes on counting; trials
of other code than is here do not count. Status 1 where anything was lost.
"""

import argparse
import collections
import concurrent.futures
import itertools
import json
import pathlib
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import trials
from harness import ROOT, SHORT, WIDE, Bench, code, step_folders
from trials import Outcome

MOMENTS = ("random", "saving", "random", "saving", "random", "sealing", "random", "validating")
SIGNALLED = ("training", "saving", "compiling", "validating", "sealing")
TOPOLOGIES = ((1, 1), (1, 2), (2, 1), (2, 2), (2, 4))
LARGE = 200e6  # bytes


class Fault(NamedTuple):
    """A row of the table."""

    name: str
    trial: Callable[[Bench, random.Random, int], Outcome | None]  # the number of the trial
    enough: Callable[[list[Outcome]], bool]
    told: Callable[[list[Outcome]], tuple[str, str]]  # how often, and how it came


def faults(bench: Bench, kills: int, large: int, times: int) -> Iterator[Fault]:
    """All of them, in the order of the table."""

    def small_enough(done: list[Outcome]) -> bool:
        found = _kills(done)
        return len(found) >= kills and sum(k["temporary"] for k in found) >= kills / 2

    def large_enough(done: list[Outcome]) -> bool:
        return sum(k["temporary"] and k["bytes"] > LARGE for k in _kills(done)) >= large

    def often(count: int) -> Callable[[list[Outcome]], bool]:
        return lambda done: len(done) >= count

    yield Fault(
        "`kill -9`",
        lambda b, rng, n: trials.killed(b, rng, moments=MOMENTS[n % 8 :] + MOMENTS[: n % 8]),
        small_enough,
        _told_kills,
    )
    yield Fault(
        "`kill -9`, checkpoints over 200 MB",
        lambda b, rng, n: trials.killed(b, rng, 6, ("saving",), WIDE, spread=1.0),
        large_enough,
        _told_kills,
    )
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        yield Fault(
            f"{number.name}, to end with status {status}",
            lambda b, rng, n, number=number: trials.stopped(
                b, rng, number, SIGNALLED[n % len(SIGNALLED)]
            ),
            often(times),
            _counted("phase"),
        )
    yield Fault(
        "disk full: no file above some size (`ulimit -f`)",
        lambda b, rng, n: trials.limited(b, rng),
        often(times),
        lambda done: (
            str(len(done)),
            f"{min(d['limit_kb'] for d in done)} to {max(d['limit_kb'] for d in done)} KB",
        ),
    )
    yield Fault(
        "disk full: a file system of 16 MB",
        lambda b, rng, n: trials.full(b, rng),
        often(times),
        lambda done: (str(len(done)), "with 0 to 0.6 MB left"),
    )
    harms = [*trials.harmable(step_folders(bench.undisturbed(*SHORT))[-1])]
    yield Fault(
        "a file of the newest checkpoint damaged, each of them in each way",
        lambda b, rng, n: trials.damaged(b, rng, *harms[n % len(harms)]),
        often(len(harms)),
        _counted("damage"),
    )
    yield Fault(
        "a compiled program in the cache damaged",
        lambda b, rng, n: trials.miscached(b, rng, trials.DAMAGES[n % 3]),
        often(times),
        _counted("damage"),
    )
    for words, at_once in (("the second while the first trains", False), ("both at once", True)):
        yield Fault(
            f"two starts in one workdir, {words}",
            lambda b, rng, n, at_once=at_once: trials.twice(b, rng, at_once),
            often(times),
            lambda done: (str(len(done)), "one refused with status 2"),
        )
    if not (ROOT / "launch/local.sh").exists():
        return
    for before, after in TOPOLOGIES:
        yield Fault(
            f"`kill -9` of {before} {'processes' if before > 1 else 'process'}, {after} go on",
            lambda b, rng, n, pair=(before, after): trials.restarted(b, rng, *pair),
            often(max(times // 3, 1)),
            _counted("phase"),
        )
    for words, number in (("killed", signal.SIGKILL), ("stopped (SIGSTOP)", signal.SIGSTOP)):
        yield Fault(
            f"one process of two {words}",
            lambda b, rng, n, number=number: trials.rank_lost(b, rng, number),
            often(max(times // 3, 1)),
            lambda done: (
                str(len(done)),
                f"the other ended after {min(d['waited'] for d in done):.0f} to "
                f"{max(d['waited'] for d in done):.0f} s",
            ),
        )


def _kills(done: Sequence[Outcome]) -> list[Outcome]:
    return [kill for outcome in done for kill in outcome["kills"]]


def _told_kills(done: list[Outcome]) -> tuple[str, str]:
    found = _kills(done)
    with_files = sum(kill["temporary"] for kill in found)
    large = [kill for kill in found if kill["bytes"] > LARGE]
    count = f"{len(found)}, {with_files} with temporary checkpoint files"
    if large:
        both = sum(kill["temporary"] for kill in large)
        count += f" ({both} with a whole one of {large[0]['bytes'] / 1e6:.0f} MB beside them)"
    return count, _counts(kill["phase"] for kill in found)


def _counted(key: str) -> Callable[[list[Outcome]], tuple[str, str]]:
    return lambda done: (str(len(done)), _counts(outcome[key] for outcome in done))


def _counts(names: Iterator[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in collections.Counter(names).most_common())


class Log:
    """The trials of this code that are done, by fault."""

    def __init__(self, path: pathlib.Path):
        self.path, self.code = path, code()
        self.done: dict[str, list[Outcome]] = collections.defaultdict(list)
        for line in path.read_text().splitlines() if path.exists() else ():
            outcome = json.loads(line)
            if outcome["code"] == self.code:
                self.done[outcome["fault"]].append(outcome)

    def add(self, fault: str, number: int, seconds: float, outcome: Outcome) -> None:
        line = {"fault": fault, "trial": number, "seconds": round(seconds, 1), "code": self.code}
        self.done[fault].append(line | outcome)
        with self.path.open("a") as file:
            file.write(json.dumps(line | outcome) + "\n")
        print(json.dumps(line | outcome), flush=True)


def do(fault: Fault, bench: Bench, log: Log, lanes: concurrent.futures.Executor, two: int) -> None:
    """Trials of one fault, until there are enough."""

    def one(number: int) -> tuple[int, float, Outcome | None]:
        since = time.monotonic()
        outcome = fault.trial(bench, random.Random(f"{fault.name} {number}"), number)
        return number, time.monotonic() - since, outcome

    while not fault.enough(log.done[fault.name]):
        tried = {outcome["trial"] for outcome in log.done[fault.name]}
        numbers = itertools.islice((n for n in itertools.count() if n not in tried), two)
        for number, seconds, outcome in lanes.map(one, numbers):
            if outcome is None:  # not possible here
                return
            log.add(fault.name, number, seconds, outcome)


def table(rows: list[Fault], log: Log) -> str:
    lines = ["| fault | how often | how it came | lost |", "|---|---|---|---|"]
    for fault in rows:
        done = log.done[fault.name]
        bad = sum(bool(outcome["lost"]) for outcome in done)
        count, how = fault.told(done) if done else ("0", "not possible here")
        lost = f"**{bad} of {len(done)}**" if bad else "nothing" if done else ""
        lines.append(f"| {fault.name} | {count} | {how} | {lost} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--kills", type=int, default=100, help="half of them while saving")
    parser.add_argument("--large", type=int, default=10, help="while saving over 200 MB")
    parser.add_argument("--times", type=int, default=10, help="of each other fault")
    parser.add_argument("--only", default="", help="rows of the table with this in their name")
    parser.add_argument("--lanes", type=int, default=2, help="trials at once")
    options = parser.parse_args()
    bench = Bench(options.output)
    log = Log(bench.folder / "trials.jsonl")
    rows = [*faults(bench, options.kills, options.large, options.times)]
    rows = [fault for fault in rows if options.only in fault.name]
    with concurrent.futures.ThreadPoolExecutor(options.lanes) as lanes:
        for fault in rows:
            do(fault, bench, log, lanes, options.lanes)
    print(table(rows, log))
    return int(any(outcome["lost"] for fault in rows for outcome in log.done[fault.name]))


if __name__ == "__main__":
    sys.exit(main())
