"""Stream and step together, from prepared raw records: --mode=bench, on device and on disk.

  python benchmarks/end_to_end.py --work=FOLDER [--size 256] [--batch 128 1024]
      [--dtype bfloat16] [--limit 480] [--json FILE] [--config.SECTION.FIELD=VALUE ...]

The built-in shapes are prepared raw at 256x256 in FOLDER, unless already there, and the full paper
net (with 10 classes) is measured on them: kept on the device, and read by workers.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import timing

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--size", type=int, default=256, help="pixels a side, as stored")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--limit", type=float, default=480, help="seconds, to begin another in")
    parser.add_argument("--json", type=pathlib.Path)
    options, more = parser.parse_known_args()
    started, table = time.perf_counter(), []
    records = prepared(options.work, options.size)
    print(f"records ready after {time.perf_counter() - started:.0f} s; {options.dtype}\n")
    rates = "input, not sent | input alone | step alone | both"
    print(f"| batch | images | {rates} | waited | of a matrix product |")
    print("|---|---|---|---|---|---|---|---|")
    for batch in options.batch:
        for on_device in (True, False):
            place = f"| {batch} | {'on the device' if on_device else 'read'} |"
            if time.perf_counter() - started > options.limit:
                print(f"{place} left out: no time | | | | | |")
                continue
            flags = [
                f"--config.data.source=records:{records}",
                f"--config.data.on_device={on_device}",
                f"--config.train.batch_size={batch}",
                f"--config.model.dtype={options.dtype}",
            ]
            found = bench(*flags, *more)
            table.append({"batch": batch, "on_device": on_device, **found})
            timing.keep(options.json, table)
            if "failed" in found:
                print(f"{place} {found['failed']} | | | | | |", flush=True)
                continue
            rates = [found[name]["images_per_second"] for name in ("input", "step", "both")]
            rates.insert(0, found["input"]["unsent_images_per_second"])
            shares = (found["both"]["waited"], found["step"]["share_of_matmul"])
            cells = [*(f"{rate:,.0f}" for rate in rates), *(f"{share:.1%}" for share in shares)]
            print(f"{place} {' | '.join(cells)} |", flush=True)
    return int(any("failed" in found for found in table))


def prepared(work: pathlib.Path, size: int) -> pathlib.Path:
    """The built-in shapes as raw records of `size` pixels a side."""
    folder = work.resolve() / f"shapes{size}"
    if not (folder / "manifest.json").exists():
        flags = ("--input=shapes", f"--output={folder}", "--format=raw", f"--size={size}")
        command = [sys.executable, "-m", "alexnet_jax.prepare", *flags]
        subprocess.run(command, stdout=sys.stderr, check=True)
    return folder


def full_net(*flags: str) -> list[str]:
    """The command for the full paper net on one device, with the data's classes."""
    config = f"--config={ROOT}/configs/alexnet.py"
    own = ("--config.mesh.model=1", "--config.mesh.data=1", "--config.model.num_classes=0")
    return [sys.executable, "-m", "alexnet_jax.main", config, *own, *flags]


def bench(*flags: str) -> dict:
    """Result of --mode=bench; `failed` and its status if it failed."""
    done = subprocess.run(full_net("--mode=bench", *flags), stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr)
    if done.returncode:
        return {"failed": f"ended with status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
