"""Time from the command to the end of the full net's first step: first start and second.

python benchmarks/start.py [--repeats=3] [--config.SECTION.FIELD=VALUE ...]

Each repeat begins with an empty folder of compiled programs; images are drawn and surveyed
beforehand. Prints a table of medians, in seconds since the command was typed.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = (
    "data.source=shapes", "model.num_classes=0", "mesh.model=1", "train.batch_size=32",
    "train.num_steps=1000",
)  # fmt: skip
MARKS = {"ready": "preset ", "step compiled": "compiled the", "first step": "step 1/"}


def start(cache: str, flags: list[str]) -> dict[str, float]:
    """Seconds to each mark; the run is ended at the last one."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "alexnet_jax.main", f"--config={ROOT}/configs/alexnet.py"]
        command += [f"--workdir={workdir}", f"--config.data.cache_dir={cache}"]
        command += [*(f"--config.{setting}" for setting in SETTINGS), *flags]
        begun, found = time.perf_counter(), {}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                for mark, words in MARKS.items():
                    if words in line:
                        found.setdefault(mark, time.perf_counter() - begun)
                if len(found) == len(MARKS):
                    process.kill()
        if len(found) < len(MARKS):
            sys.exit(f"error: the run ended before step 1, with status {process.returncode}")
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options, flags = parser.parse_known_args()
    rows: dict[str, list[dict[str, float]]] = {"first": [], "second": []}
    with tempfile.TemporaryDirectory() as cache:
        start(cache, flags)
        for _ in range(options.repeats):
            for path in (pathlib.Path(cache) / "compiled").glob("*"):
                path.unlink()
            for row in rows.values():
                row.append(start(cache, flags))
    print("| start | " + " | ".join(MARKS) + " |\n|---|" + "---|" * len(MARKS))
    for name, found in rows.items():
        medians = [statistics.median(times[mark] for times in found) for mark in MARKS]
        print(f"| {name} | " + " | ".join(f"{seconds:.1f} s" for seconds in medians) + " |")


if __name__ == "__main__":
    main()
