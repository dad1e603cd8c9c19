"""Peak memory of a training step of the full paper net, this package and PyTorch.

  python benchmarks/memory.py [--batch 32 128] [--dtype float32]

Every figure is a process of its own that makes a few steps: on a CPU its peak resident memory, all
of the libraries included; on a GPU the peak of what the framework allocated there.
"""

import argparse
import resource
import subprocess
import sys

import train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(peak(options.worker, options.batch[0], options.dtype))
        return
    columns = "".join(f" batch {batch} |" for batch in options.batch)
    print(f"MB, {options.dtype}\n\n| contender |{columns}\n|---|{'---|' * len(options.batch)}")
    for name in train_step.contenders(train_step.FORMS):
        row = f"| {name} |"
        for batch in options.batch:
            arguments = [f"--worker={name}", f"--batch={batch}", f"--dtype={options.dtype}"]
            found = subprocess.run(
                [sys.executable, __file__, *arguments],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            row += f" {float(found.stdout.split()[-1]) / 1e6:,.0f} |"
        print(row, flush=True)


def peak(name: str, batch: int, dtype: str) -> int:
    """Bytes, after a few steps."""
    step = train_step.make(name, batch, dtype, "train")
    for _ in range(3):
        step()
    if name == train_step.OURS:
        import jax

        there = jax.devices()[0].memory_stats() or {}
        found = there.get("peak_bytes_in_use", 0)
    else:
        import torch

        found = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return found or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
