"""A trace of ten training steps by JAX's profiler, and where the device's time goes.

  python benchmarks/step_trace.py --output=FOLDER [--batch 128] [--dtype bfloat16] [--top 25]
      [--json FILE]

FOLDER gets `trace.json.gz`, for https://ui.perfetto.dev, and `steps.xplane.pb`, for XProf. Prints
the kernels that take the most time, averaged over the steps. On a CPU, whose operations overlap and
nest, it only shows that this works.
"""

import argparse
import collections
import pathlib
import shutil
import tempfile
import time

import jax
import timing
import train_step

STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=timing.DTYPES, default="bfloat16")
    parser.add_argument("--top", type=int, default=25)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    made, device = train_step.ours(options.batch, options.dtype, "train")
    made.warm()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        with jax.profiler.trace(scratch):
            started = time.perf_counter()
            for number in range(STEPS):
                with jax.profiler.StepTraceAnnotation("step", step_num=number):
                    found = made.call()
            made.wait(found)
            seconds = (time.perf_counter() - started) / STEPS
        (written,) = pathlib.Path(scratch).rglob("*.xplane.pb")
        shutil.copy(written, options.output / "steps.xplane.pb")
        for trace in written.parent.glob("*.trace.json.gz"):
            shutil.copy(trace, options.output / "trace.json.gz")
        kernels = totals(written)
    busy = sum(spent for spent, _ in kernels.values())
    print(
        f"batch {options.batch}, {options.dtype}, on {device}: {seconds * 1e3:.3f} ms a step while "
        f"watched, {busy * 1e3:.3f} ms in {sum(calls for _, calls in kernels.values()):g} kernels\n"
    )
    print("| kernel | ms a step | of the kernels | calls a step |\n|---|---|---|---|")
    for name, (spent, calls) in list(kernels.items())[: options.top]:
        share = f"{spent * 1e3:.3f} | {spent / busy:.1%} | {calls:g}"
        print(f"| `{name[:80].replace('|', ' ')}` | {share} |")
    about = {"seconds": seconds, "batch": options.batch}
    timing.keep(options.json, about | {"kernels": kernels})


def totals(trace: pathlib.Path) -> dict[str, tuple[float, float]]:
    """Kernel -> seconds and calls per step, longest first."""
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    spent, calls = collections.Counter(), collections.Counter()
    for plane in devices or [plane for plane in planes if plane.name == "/host:CPU"]:
        lines = [line for line in plane.lines if not devices or line.name.startswith("Stream")]
        for event in (event for line in lines for event in line.events):
            spent[event.name] += event.duration_ns / 1e9 / STEPS
            calls[event.name] += 1 / STEPS
    return {name: (seconds, round(calls[name], 3)) for name, seconds in spent.most_common()}


if __name__ == "__main__":
    main()
