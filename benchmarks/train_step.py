"""A training step or an evaluation of the full paper net: this package and PyTorch in one run.

  python benchmarks/train_step.py [--batch 32 128] [--dtype float32] [--what train evaluate]
      [--forms eager ...] [--xla=--xla_FLAG=VALUE ...] [--rounds 7] [--seconds 4] [--limit SECONDS]
      [--json FILE]

Every contender runs in its own process, on one batch of uint8 images and colour shifts, which is
used repeatedly, with the same normalisation, dropout and update at a rate of 0; in a round each
runs in turn while the others wait. In evaluation, this package also crops and counts top-5 errors.
Prints medians of the rounds, their spread, and the median ratio to the fastest `torch.compile` of
the same round. PyTorch is skipped if it is not installed. Each --xla adds this package with another
of XLA's flags. A contender that fails is named, and the others continue.

On a GPU both use the first of CUDA_VISIBLE_DEVICES; dtype `float32` multiplies in full precision,
`tf32` as TF32, and in `bfloat16` PyTorch uses autocast. In forms with `+shifts`, PyTorch's
normalisation is computed by shifted sums, not a convolution; in forms with `+towers`, its conv1 by
space-to-depth and its towers one by one, as this package does on a GPU. Forms with `graphs` are
channels_last compiled with mode="reduce-overhead".
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import timing

FORMS = (
    "eager",
    "channels_last",
    "compile",
    "compile+channels_last",
    "compile+channels_last+shifts",
    "compile+channels_last+shifts+towers",
    "graphs",
    "graphs+shifts+towers",
)
OURS = "this package"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--dtype", choices=timing.DTYPES, default="float32")
    parser.add_argument("--what", nargs="+", default=["train", "evaluate"])
    parser.add_argument("--forms", nargs="*", default=FORMS[:4], choices=FORMS)
    parser.add_argument("--xla", action="append", default=[], help="a flag, or several with spaces")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4, help="at least, of each measurement")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds of the whole")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.what[0], options.batch[0], options.dtype, options.seconds)
        return
    options.limit += time.perf_counter()
    found, slowest = [], {}
    for what in options.what:
        for batch in options.batch:
            if time.perf_counter() + slowest.get(OURS, 0) > options.limit:
                print(f"\n{what}, batch {batch}: left out: no time", flush=True)
                continue
            names = [*contenders(options.forms), *(f"{OURS}, {flag}" for flag in options.xla)]
            one = measured(options, what, batch, names, slowest)
            found.append({"what": what, "batch": batch, "dtype": options.dtype, **one})
            print(table(found[-1]), flush=True)
            timing.keep(options.json, found)


def kind(name: str) -> str:
    """Contenders of a kind take about as long to be warm."""
    if name.startswith(OURS):
        return OURS
    return "compiled" if name in FORMS[2:] else "eager"


def contenders(forms: Sequence[str]) -> list[str]:
    """This package, and PyTorch's `forms` if it is installed."""
    return [OURS, *(forms if importlib.util.find_spec("torch") else [])]


class Contender:
    """A process that answers each line it receives with one line."""

    def __init__(self, name: str, what: str, batch: int, dtype: str, seconds: float):
        arguments = [f"--worker={name}", f"--what={what}", f"--batch={batch}"]
        arguments += [f"--dtype={dtype}", f"--seconds={seconds}"]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        more = name.removeprefix(OURS).removeprefix(", ") if name.startswith(OURS) else ""
        if more:
            environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {more}".strip()
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # holds choices without the flag
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self) -> str:
        """The process's answer.

        Raises:
          RuntimeError: it has ended.
        """
        with contextlib.suppress(BrokenPipeError):  # if it has ended already
            print("go", file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"ended with status {self.process.wait()}")
        return line

    def end(self) -> None:
        """Close its input, so that it ends."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measured(
    options: argparse.Namespace,
    what: str,
    batch: int,
    names: Sequence[str],
    slowest: dict[str, float],
) -> dict[str, dict]:
    """`rates`, images a second of each contender, one entry a round; `devices`; `failed`, why;
    `warm_after`, the seconds until it was compiled and warm, or had failed.

    A contender is not started if it would not be warm within the limit when taking as long as the
    slowest of its kind so far, which `slowest` keeps from call to call; and is ended if it is not
    warm by then, so that those before it are still timed.
    """
    devices, failed, warm_after = {}, {}, {}
    there = {name: Contender(name, what, batch, options.dtype, options.seconds) for name in names}

    def ask(name: str) -> str | None:
        try:
            return there[name].ask().strip()
        except RuntimeError as reason:
            leave(name, str(reason))

    def leave(name: str, reason: str) -> None:
        failed[name] = reason
        there.pop(name).end()

    for name in names:  # compiled and warm before the next begins
        started = time.perf_counter()
        if started + slowest.get(kind(name), 0) > options.limit:
            leave(name, "left out: no time")
            continue
        late = min(options.limit - started, threading.TIMEOUT_MAX)
        killing = threading.Timer(late, there[name].process.kill)
        killing.daemon = True
        killing.start()
        devices[name] = ask(name)
        killing.cancel()
        warm_after[name] = time.perf_counter() - started
        slowest[kind(name)] = max(slowest.get(kind(name), 0), warm_after[name])
        if name in failed and time.perf_counter() >= options.limit:
            failed[name] = "ended: not warm in time"
    rates = {name: [] for name in there}
    for turn in range(options.rounds):  # the first, however late it is
        for name in list(there):
            if turn and time.perf_counter() > options.limit:
                break
            answer = ask(name)
            if answer:
                rates[name].append(batch / float(answer))
    for contender in there.values():
        contender.end()
    return {
        "rates": {name: values for name, values in rates.items() if values},
        "devices": {name: device for name, device in devices.items() if device},
        "failed": failed,
        "warm_after": warm_after,
    }


def work(name: str, what: str, batch: int, dtype: str, seconds: float) -> None:
    """A contender: prints its device when ready, then for each line the seconds per step."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep other output out of the answers
    ours = name.startswith(OURS)
    importlib.import_module("alexnet_jax.setup" if ours else "torch_nets")  # while others do
    if not sys.stdin.readline():
        return
    made, device = make(name, batch, dtype, what)
    made.warm()
    print(device, file=out, flush=True)
    for _ in sys.stdin:
        print(made.median(seconds), file=out, flush=True)


def make(name: str, batch: int, dtype: str, what: str) -> tuple[timing.Work, str]:
    """A repeatable step, and the device it runs on."""
    if name.startswith(OURS):
        return ours(batch, dtype, what)
    import torch_nets

    return torch_nets.make_step(batch, name, dtype, what == "train")


def ours(batch: int, dtype: str, what: str) -> tuple[timing.Work, str]:
    import jax
    import numpy as np

    from alexnet_jax import bench, validate
    from alexnet_jax import config as configs
    from alexnet_jax.data.statistics import Statistics
    from alexnet_jax.mesh import make_mesh, put_batch
    from alexnet_jax.train import state

    user = configs.blank()
    user.model.dtype = timing.set_precision(dtype)
    user.model.num_classes = 1000
    user.train.batch_size = batch
    user.mesh.data = 1
    config = configs.resolve(user)
    mesh = make_mesh(config.mesh, config.model)
    rng = np.random.default_rng(0)
    size = 224 if what == "train" else 256
    mean = np.full((256, 256, 3), 120, np.float32)
    pixels = Statistics(mean, *np.ones((2, 3), np.float32), np.eye(3, dtype=np.float32))
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
        call = functools.partial(advance, given)
    else:
        given = put_batch(numbers | {"valid": np.ones(batch, bool)}, mesh)
        params = state.put(state.initial_state(config.model, 1_000, 0).params, mesh)
        step = validate.make_step(state.make_apply(config.model, 1_000, 1), config, mesh)
        call = functools.partial(step, params, given, jax.device_put(pixels))
    alone = jax.default_backend() == "cpu"
    return timing.Work(call, jax.block_until_ready, alone), jax.devices()[0].device_kind


def table(found: dict) -> str:
    """The results of `measured` as a readable table."""
    rates = found["rates"]
    compiled = [name for name in rates if name in FORMS[2:]]
    others = compiled or [name for name in rates if name == OURS]
    best = [max(turn) for turn in zip(*(rates[name] for name in others))]
    against = "torch.compile" if compiled else OURS
    lines = [
        f"\n{found['what']}, batch {found['batch']}, {found['dtype']}, "
        f"on {' and '.join(sorted(set(found['devices'].values())))}\n",
        f"| contender | images/s | lowest | highest | to {against} |\n|---|---|---|---|---|",
    ]
    for name, values in rates.items():
        ratios = [value / other for value, other in zip(values, best)]
        lines.append(
            f"| {name} | {statistics.median(values):,.1f} | {min(values):,.1f} "
            f"| {max(values):,.1f} | {f'{statistics.median(ratios):.2f}' if ratios else ''} |"
        )
    lines += [f"| {name} | {reason} | | | |" for name, reason in found["failed"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
