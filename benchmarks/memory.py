"""Peak memory of a training step of the full paper net, this package and PyTorch.

  python benchmarks/memory.py [--batch 32 128] [--dtype float32] [--forms eager ...] [--json FILE]

Every figure comes from its own process, which runs a few steps: on a CPU its peak resident memory,
libraries included; on a GPU the peak of the framework's allocations for a step, without those for
trying out kernels: PyTorch's peak is that of its last step alone, and this package's, counted from
the start, that of a process that finds its programs compiled.
"""

import argparse
import os
import pathlib
import resource
import subprocess
import sys
import tempfile

import timing
import train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--dtype", choices=timing.DTYPES, default="float32")
    forms = train_step.FORMS
    parser.add_argument("--forms", nargs="*", default=forms[:4], choices=forms)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(peak(options.worker, options.batch[0], options.dtype))
        return
    columns = "".join(f" batch {batch} |" for batch in options.batch)
    print(f"MB, {options.dtype}\n\n| contender |{columns}\n|---|{'---|' * len(options.batch)}")
    table: dict[str, list[float | None]] = {}
    gpu = on_gpu()
    for name in train_step.contenders(options.forms):
        times = 2 if gpu and name == train_step.OURS else 1
        table[name] = [measured(name, batch, options.dtype, times) for batch in options.batch]
        cells = (f" {found / 1e6:,.0f} |" if found else " failed |" for found in table[name])
        print(f"| {name} |{''.join(cells)}", flush=True)
        about = {"dtype": options.dtype, "batch": options.batch}
        timing.keep(options.json, about | {"bytes": table})


def on_gpu() -> bool:
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(ask, stdout=subprocess.PIPE, text=True).stdout.strip() == "gpu"


def measured(name: str, batch: int, dtype: str, times: int) -> float | None:
    """Bytes, measured in a separate process; None if it failed. Of several run in turn, the last
    one's, for which all is compiled."""
    arguments = [f"--worker={name}", f"--batch={batch}", f"--dtype={dtype}"]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryDirectory() as cache:
        if times > 1:
            environment["JAX_COMPILATION_CACHE_DIR"] = cache
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for _ in range(times):
            command = [sys.executable, __file__, *arguments]
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    return None if found.returncode else float(found.stdout.split()[-1])


def peak(name: str, batch: int, dtype: str) -> int:
    """Bytes, after a few steps."""
    made, _ = train_step.make(name, batch, dtype, "train")
    for _ in range(3):
        made.wait(made.call())
    if name == train_step.OURS:
        import jax

        there = jax.devices()[0].memory_stats() or {}
        found = there.get("peak_bytes_in_use", 0)
    else:
        import torch

        found = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            made.wait(made.call())
            found = torch.cuda.max_memory_allocated()
    return found or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
