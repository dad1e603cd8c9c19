"""A training step, or an evaluation, of the full paper net: this package and PyTorch in one run.

  python benchmarks/train_step.py [--batch 32 128] [--dtype float32] [--what train evaluate]
      [--rounds 7] [--seconds 4] [--json FILE]

Every contender is a process of its own, with one batch of uint8 images and colour shifts, taken
again and again with the same normalisation, dropout and update at a rate of 0; in a round each runs
in turn while the others wait. Evaluating, this package also cuts its crops and counts top-5 errors.
Printed are medians of the rounds, their spread, and the median ratio to the fastest
`torch.compile`, in its default mode, of the same round. PyTorch is left out where it is not
installed; on a GPU both use it, in float32 with TF32 products.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

FORMS = ("eager", "channels_last", "compile", "compile+channels_last")
OURS = "this package"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--what", nargs="+", default=["train", "evaluate"])
    parser.add_argument("--forms", nargs="*", default=FORMS, choices=FORMS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4, help="at least, of each measurement")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.what[0], options.batch[0], options.dtype, options.seconds)
        return
    found = []
    for what in options.what:
        for batch in options.batch:
            rates = measured(options, what, batch)
            found.append({"what": what, "batch": batch, "dtype": options.dtype, "rates": rates})
            print(table(what, batch, options.dtype, rates), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def contenders(forms: Sequence[str]) -> list[str]:
    """This package, and PyTorch's `forms` where it is installed."""
    return [OURS, *(forms if importlib.util.find_spec("torch") else [])]


def measured(options: argparse.Namespace, what: str, batch: int) -> dict[str, list[float]]:
    """Images a second of every contender, one entry a round."""
    processes = {}
    for name in contenders(options.forms):
        arguments = [f"--worker={name}", f"--what={what}", f"--batch={batch}"]
        arguments += [f"--dtype={options.dtype}", f"--seconds={options.seconds}"]
        processes[name] = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        answer(processes[name])  # compiled and warm before the next one starts
    rates = {name: [] for name in processes}
    for _ in range(options.rounds):
        for name, process in processes.items():
            print("go", file=process.stdin, flush=True)
            rates[name].append(batch / float(answer(process)))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return rates


def answer(process: subprocess.Popen) -> str:
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a contender ended with status {process.wait()}")
    return line


def work(name: str, what: str, batch: int, dtype: str, seconds: float) -> None:
    """A contender: at each line it is sent, the seconds a step takes, median of some."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is not an answer
    step = make(name, batch, dtype, what)
    for _ in range(3):
        step()
    print("ready", file=out, flush=True)
    for _ in sys.stdin:
        times, started = [], time.perf_counter()
        while len(times) < 3 or time.perf_counter() - started < seconds:
            begun = time.perf_counter()
            step()
            times.append(time.perf_counter() - begun)
        print(statistics.median(times), file=out, flush=True)


def make(name: str, batch: int, dtype: str, what: str) -> Callable[[], None]:
    """What makes one step and waits for the end of it."""
    return ours(batch, dtype, what) if name == OURS else torchs(name, batch, dtype, what)


def ours(batch: int, dtype: str, what: str) -> Callable[[], None]:
    import jax
    import numpy as np

    from alexnet_jax import bench, evaluate
    from alexnet_jax import config as configs
    from alexnet_jax.data.augment import Statistics
    from alexnet_jax.mesh import make_mesh, put_batch
    from alexnet_jax.train import optim, state

    user = configs.blank()
    user.model.dtype = dtype
    user.model.num_classes = 1000
    user.train.batch_size = batch
    user.mesh.data = 1
    config = configs.resolve(user)
    mesh = make_mesh(config.mesh, config.model)
    rng = np.random.default_rng(0)
    size = 224 if what == "train" else 256
    mean = np.full((256, 256, 3), 120, np.float32)
    pixels = Statistics(mean, np.ones(3, np.float32), np.eye(3, dtype=np.float32), np.ones(3))
    pixels = jax.device_put(pixels)
    numbers = {
        "image": rng.integers(0, 256, (batch, size, size, 3), np.uint8),
        "label": rng.integers(0, 1000, batch, np.int32),
    }
    if what == "train":
        numbers |= {
            "shift": rng.standard_normal((batch, 3), np.float32),
            "offset": np.full((batch, 2), 16, np.int32),
            "mirror": np.zeros(batch, bool),
            "gain": np.ones(batch, np.float32),
        }
        given = put_batch(numbers, mesh)
        advance = bench.make_advance(config, mesh, pixels, 1_000, 1_000_000, given)
        return lambda: advance(given)
    numbers["valid"] = np.ones(batch, bool)
    given = put_batch(numbers, mesh)
    step = evaluate.make_step(state.make_apply(config.model, 1_000, 1), config, mesh)
    optimizer = optim.make_optimizer(config.optim)
    params = state.put(state.initial_state(config.model, 1_000, optimizer, 0), mesh).params
    return lambda: jax.block_until_ready(step(params, given, pixels))


def torchs(form: str, batch: int, dtype: str, what: str) -> Callable[[], None]:
    import torch_nets

    device = torch_nets.configure()
    return torch_nets.make_step(batch, device, form, dtype == "bfloat16", what == "train")


def table(what: str, batch: int, dtype: str, rates: dict[str, list[float]]) -> str:
    compiled = [rates[name] for name in rates if "compile" in name]
    fastest = [max(pair) for pair in zip(*compiled)] or [float("nan")] * len(rates[OURS])
    lines = [
        f"\n{what}, batch {batch}, {dtype}\n",
        "| contender | images/s | lowest | highest | to torch.compile |\n|---|---|---|---|---|",
    ]
    for name, values in rates.items():
        ratio = statistics.median(value / best for value, best in zip(values, fastest))
        lines.append(
            f"| {name} | {statistics.median(values):,.1f} | {min(values):,.1f} "
            f"| {max(values):,.1f} | {ratio:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
