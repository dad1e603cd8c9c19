"""Whether a long run leaks memory, files or threads: the real command, watched from outside.

python tests/faults/leaks.py --minutes=30 --workdir=DIR [--config.SECTION.FIELD=VALUE ...]

Trains the quickstart's net, which is validated and saved every few seconds, and reads /proc. Prints
a table, and ends with status 1 where the last fifth holds more than the second did: over 5 % more
memory, or over two files or threads, which come and go. (Before that caches fill.) Linux only.
"""

import argparse
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
PAUSE = 10.0  # seconds between two looks


def look(process: int) -> tuple[float, int, int]:
    """Resident memory in MB, open files, threads."""
    folder = pathlib.Path(f"/proc/{process}")
    pages = int((folder / "statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return resident, len(os.listdir(folder / "fd")), len(os.listdir(folder / "task"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--workdir", required=True)
    options, flags = parser.parse_known_args()
    if options.minutes < 1:
        parser.error("--minutes must be at least 1: it takes five looks, each after 10 s")
    command = [sys.executable, "-m", "alexnet_jax.main"]
    command += [f"--config={ROOT}/configs/quickstart.py", f"--workdir={options.workdir}"]
    command += ["--config.train.num_epochs=100000", *flags]
    seen = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60 * options.minutes
        while time.monotonic() < deadline:
            time.sleep(PAUSE)
            if process.poll() is not None:
                print(f"the run ended with status {process.returncode}", file=sys.stderr)
                return 1
            seen.append(look(process.pid))
        process.send_signal(signal.SIGTERM)
        status = process.wait()
    fifth = len(seen) // 5
    parts = [seen[n * fifth : (n + 1) * fifth] for n in range(5)]
    medians = [[statistics.median(column) for column in zip(*part)] for part in parts]
    print("| minutes | resident MB, median | open files | threads |\n|---|---|---|---|")
    for number, (memory, files, threads) in enumerate(medians):
        span = [round(options.minutes * edge / 5) for edge in (number, number + 1)]
        print(f"| {span[0]} to {span[1]} | {memory:,.0f} | {files:.0f} | {threads:.0f} |")
    print(f"first and last look: {seen[0][0]:,.0f} and {seen[-1][0]:,.0f} MB; {len(seen)} looks")
    (memory, *counts), (memory_later, *counts_later) = medians[1], medians[-1]
    leaks = memory_later > 1.05 * memory or any(b > a + 2 for a, b in zip(counts, counts_later))
    print("leaks" if leaks else "no leak", f"(SIGTERM: {status})")
    return int(leaks or status != 143)


if __name__ == "__main__":
    sys.exit(main())
