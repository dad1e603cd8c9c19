"""Does the same command give the same bits, undisturbed and interrupted?

  python benchmarks/determinism.py --work=FOLDER [--size 256] [--steps 100] [--batch 128]
      [--dtype bfloat16] [--at_once] [--json FILE] [--config.SECTION.FIELD=VALUE ...]

The full paper net trains on the built-in shapes, prepared raw, by `python -m alexnet_jax.main` with
train.deterministic: twice undisturbed, each compiled anew, and once stopped by SIGTERM after a
quarter and restarted. Prints the SHA-256 of all weights and velocities after the last step, and of
the losses, errors and norms of all steps and of the validation. Ends with status 1 if they differ.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import end_to_end
import jax
import numpy as np
import timing

from alexnet_jax import checkpoint, report

RUNS = {"undisturbed": False, "undisturbed again": False, "stopped and started again": True}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--size", type=int, default=256, help="pixels a side, as stored")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--at_once", action="store_true", help="all runs side by side")
    parser.add_argument("--json", type=pathlib.Path)
    options, more = parser.parse_known_args()
    jax.config.update("jax_platforms", "cpu")  # this process only reads checkpoints
    records = end_to_end.prepared(options.work, options.size)
    more = [
        f"--config.data.source=records:{records}",
        f"--config.train.batch_size={options.batch}",
        f"--config.train.num_steps={options.steps}",
        f"--config.model.dtype={options.dtype}",
        "--config.train.deterministic=True",
        "--config.train.log_every_steps=1",
        *more,
    ]

    def one(name: str) -> dict[str, str]:
        folder = options.work.resolve() / "determinism" / name.replace(" ", "_")
        shutil.rmtree(folder, ignore_errors=True)
        run(folder, more, options.steps // 4 if RUNS[name] else 0)
        return hashes(folder / "run", options.steps)

    with concurrent.futures.ThreadPoolExecutor(len(RUNS) if options.at_once else 1) as pool:
        found = dict(zip(RUNS, pool.map(one, RUNS)))
    kinds = list(next(iter(found.values())))
    print(f"{options.steps} steps of {options.batch}, {options.dtype}\n")
    print(f"| run | {' | '.join(kinds)} |\n|---{'|---' * len(kinds)}|")
    for name, values in found.items():
        print(f"| {name} | {' | '.join(values[kind][:16] for kind in kinds)} |")
    same = len(set(map(str, found.values()))) == 1
    print("\nAll are the same." if same else "\nThey are not the same.")
    timing.keep(options.json, {"same": same, "sha256": found})
    return int(not same)


def run(folder: pathlib.Path, flags: list[str], stop_after: int) -> None:
    """Train to the end; stop after the given step and restart, unless it is 0."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = end_to_end.full_net(f"--workdir={folder / 'run'}", *flags)
    command.append(f"--config.data.cache_dir={folder / 'cache'}")
    for stops in [True, False] if stop_after else [False]:
        process = subprocess.Popen(command, stdout=sys.stderr, env=environment)
        while stops and process.poll() is None and last_step(folder / "run") < stop_after:
            time.sleep(0.01)
        if stops:
            process.send_signal(signal.SIGTERM)
        status, wanted = process.wait(), 128 + signal.SIGTERM if stops else 0
        if status != wanted:
            raise SystemExit(f"{' '.join(command)} ended with status {status}, not {wanted}")


def last_step(workdir: pathlib.Path) -> int:
    """The last step in the log; 0 for none."""
    records = report.training_records(workdir)
    return records[-1]["step"] if records else 0


def hashes(workdir: pathlib.Path, step: int) -> dict[str, str]:
    """SHA-256 of the weights, of the velocities, and of everything logged except times."""
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
    found = checkpoints.read_state(step, checkpoints.read_meta(step))
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("images_per_second")
    written = "\n".join(json.dumps(record, sort_keys=True) for record in records)
    return {
        "weights": digest(found.params),
        "velocities": digest(found.opt_state),
        "losses": hashlib.sha256(written.encode()).hexdigest(),
    }


def digest(tree) -> str:
    total = hashlib.sha256()
    for path, leaf in sorted(jax.tree.leaves_with_path(tree), key=lambda entry: str(entry[0])):
        total.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
