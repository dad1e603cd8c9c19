"""All measurements for a GPU, in parts, each in its own process with a time limit.

  benchmarks/gpu.sh OUT [PART ...] [--tiny] [--limit=SECONDS] [--work=FOLDER]
  benchmarks/gpu.sh OUT train --caltech101=folder:PATH --cifar10=records:PATH

Without a PART, those that take some eight minutes together. `train` is the real runs, to
convergence, and the same recipes in PyTorch. Timed parts run alone; the others follow, side by
side. A part that fails or takes too long is reported and keeps its results so far, and the next one
begins. OUT/results.json and OUT/results.md hold the results of all parts ever run with this OUT;
OUT/parts holds each part's output, log and trace. --limit is divided among the named parts in
proportion, and what one leaves goes to the others. Records, runs and checkpoints, some gigabytes,
are written to --work, OUT/work by default. --tiny only shows that everything works.

Where each command may take ten minutes, with the same OUT and --work: `gpu.sh OUT --limit=500`;
`caltech101 cifar10 ... --limit=560` (unfinished runs continue when named again);
`caltech101-pytorch cifar10-pytorch --limit=560` (PyTorch's start anew); `step-more`;
`step-tf32 flags`; `copies ops-tf32 memory`.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import timing

HERE = pathlib.Path(__file__).resolve().parent
# The most important first: time may run out.
FAST_FORMS = ["compile+channels_last", "compile+channels_last+shifts+towers"]
SOME_FORMS = [*FAST_FORMS, "channels_last", "eager"]
MORE_FORMS = [*FAST_FORMS, "graphs+shifts+towers"]
ALL_FORMS = [
    *MORE_FORMS,
    *("compile+channels_last+shifts", "graphs", "compile", "channels_last", "eager"),
]
FLAGS = [
    "--xla_gpu_deterministic_ops=true",
    "--xla_gpu_exclude_nondeterministic_ops=true",
    "--xla_gpu_autotune_level=4",  # XLA's own choice: what another compilation alone changes
    "--xla_gpu_enable_command_buffer=",  # none
    "--xla_gpu_autotune_level=0",
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_graph_min_graph_size=1",
]
MACHINE = """
import importlib.metadata as m, json, platform, jax
names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "torch", "triton", "numpy")
found = {"python": platform.python_version(), "backend": jax.default_backend()}
found["device"] = jax.devices()[0].device_kind
for name in names:
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps(found))
"""


class Part(NamedTuple):
    """A command in this folder."""

    about: str
    seconds: float  # its share of the time
    command: list[str]  # {limit}: its seconds, less some for ending; none: not possible
    usual: bool = True  # runs when no part is named
    timed: bool = True  # runs alone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--limit", type=float, help="seconds of all parts together")
    parser.add_argument("--work", type=pathlib.Path)
    parser.add_argument("--caltech101", default=os.environ.get("CALTECH101", ""))
    parser.add_argument("--cifar10", default=os.environ.get("CIFAR10", ""))
    options = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    out = options.out.resolve()
    work = (options.work or out / "work").resolve()
    known = measuring(out, work, options.tiny) | training(out, work, options)
    names = [name for name in known if known[name].usual]
    if options.parts:
        several = {"train": [name for name in known if name.startswith(("caltech", "cifar"))]}
        names = [name for part in options.parts for name in several.get(part, [part])]
    for name in names:
        if name not in known:
            parser.error(f"{name}: must be train or of {', '.join(known)}")
    chosen = {name: known[name] for name in names}
    for folder in (out / "parts", work):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "compiled"))
    results = out / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {"parts": {}}
    found["machine"] = machine()
    share = 10 if options.tiny else 1
    alone = [[name] for name in chosen if chosen[name].timed]
    beside = [name for name in chosen if not chosen[name].timed]
    turns = [*alone, beside] if beside else alone
    waiting = sum(turn_seconds(chosen, turn) for turn in turns)
    left = options.limit or share * waiting
    for turn in turns:
        started, seconds = time.perf_counter(), turn_seconds(chosen, turn)
        limit = max(0.0, left * seconds / waiting)
        for name in turn:
            print(f"{name}: {chosen[name].about}; {limit:.0f} s at most", flush=True)
        for name, one in run({name: chosen[name] for name in turn}, out / "parts", limit):
            found["parts"][name] = one
            print(f"{name}: {one['outcome']} after {one['seconds']:.0f} s", flush=True)
            timing.keep(results, found)
            (out / "results.md").write_text(page(found, known, out / "parts"))
        left, waiting = left - (time.perf_counter() - started), waiting - seconds
    print(out / "results.md")
    return int(any(found["parts"][name]["outcome"] != "done" for name in chosen))


def turn_seconds(parts: dict[str, Part], turn: list[str]) -> float:
    return max(parts[name].seconds for name in turn)


def measuring(out: pathlib.Path, work: pathlib.Path, tiny: bool) -> dict[str, Part]:
    """The parts that take some eight minutes together, and further ones.

    The limits allow half a minute for a contender to be imported, compiled and warmed up.
    """
    step = ["train_step.py", "--what=train", "--limit={limit}"]
    small = ["--config.model.width=0.0625", "--config.model.input_size=64"]
    if tiny:
        step += ["--batch", "2", "--rounds=1", "--seconds=0.1", "--forms"]
        forms = more = every = [*step, "eager"]
        flags = [*step, "--xla=--xla_gpu_autotune_level=0", "--xla=--xla_no_such_flag=1"]
        checks, operations, trace = ["--batch=1"], ["--batch=2", "--rounds=1"], ["--batch=2"]
        bits = ["--size=73", "--steps=12", "--batch=8", *small]
        stream, memory = ["--size=73", "--batch", "8", *small], ["--batch", "2", "--forms", "eager"]
        sent = ["--batch=16", "--rounds=1"]
    else:
        step += ["--rounds=5", "--seconds=0.5"]
        forms = [*step, "--batch", "1024", "--forms", *SOME_FORMS]
        more = [*step, "--batch", "128", "2048", "256", "--forms", *MORE_FORMS]
        every = [*step, "--batch", "1024", "--forms", *ALL_FORMS]
        flags = [*step, "--batch", "128", "--forms", *(f"--xla={flag}" for flag in FLAGS)]
        checks, operations, trace = [], ["--batch=1024", "--rounds=5"], ["--batch=1024"]
        bits, stream, sent = ["--at_once"], ["--batch", "1024"], ["--batch=1024"]
        memory = ["--batch", "128", "1024", "--forms", *FAST_FORMS, "eager"]
    at = [f"--work={work}"]
    bf16, tf32 = ["--dtype=bfloat16"], ["--dtype=tf32"]
    return {
        "step-bf16": Part("a training step beside PyTorch's", 195, [*forms, *bf16]),
        "ops": Part("operations and their floors", 95, ["ops.py", *operations, *bf16, "--step"]),
        "profile": Part(
            "a trace of ten steps", 15, ["step_trace.py", f"--output={out}/parts/trace", *trace]
        ),
        "end-to-end": Part(  # last of the timed: it has most use for what the others leave
            "the stream and the step", 95, ["end_to_end.py", "--limit={limit}", *at, *stream]
        ),
        "correctness": Part(
            "every operation against the oracle", 80, ["check_ops.py", *checks], timed=False
        ),
        "determinism": Part(
            "the same bits each time", 80, ["determinism.py", *at, *bits], timed=False
        ),
        "step-tf32": Part("the same, float32 by TF32 products", 195, [*forms, *tf32], usual=False),
        "step-more": Part("more sizes", 540, [*more, *bf16], usual=False),
        "step-every": Part("more forms of PyTorch", 450, [*every, *bf16], usual=False),
        "flags": Part(
            "XLA's flags, one at a time, each to a step", 300, [*flags, *bf16], usual=False
        ),
        "ops-tf32": Part(
            "operations, TF32", 100, ["ops.py", *operations, *tf32, "--step"], usual=False
        ),
        "forms": Part(
            "ways to say a convolution", 130, ["forms.py", *operations, *bf16], usual=False
        ),
        "copies": Part("ways to send a batch", 40, ["copies.py", *sent], usual=False),
        "memory": Part("the peak of a step", 250, ["memory.py", *memory, *bf16], usual=False),
    }


def training(out: pathlib.Path, work: pathlib.Path, options: Any) -> dict[str, Part]:
    """The real runs."""
    small, form = [], []
    if options.tiny:
        small = ["--config.model.width=0.0625", "--config.model.input_size=64"]
        small += ["--config.train.num_steps=6", "--config.train.batch_size=8"]
        form = ["--form=eager"]
    parts = {}
    for name, seconds, again_seconds in (("caltech101", 100, 200), ("cifar10", 240, 450)):
        source, run = getattr(options, name), work / "runs" / name
        ours = ["real_run.py", f"--recipe={name}", f"--source={source}", f"--workdir={run}"]
        ours += [f"--figures={out}/parts/{name}", *small]
        again = ["torch_train.py", f"--workdir={run}", *form]
        if importlib.util.find_spec("matplotlib"):
            again.append(f"--figure={out}/parts/{name}/curves.png")
        told = f"the full net on {name}"
        parts[name] = Part(told, seconds, ours if source else [], usual=False)
        # This measures the level, not time; the runs it repeats are timed, and so come first.
        parts[f"{name}-pytorch"] = Part(
            f"{told}, in PyTorch", again_seconds, again, usual=False, timed=False
        )
    return parts


def run(
    parts: dict[str, Part], folder: pathlib.Path, limit: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run parts side by side; yield each as it ends: outcome in words, seconds, results."""
    started, running = time.perf_counter(), {}
    try:
        for name, part in parts.items():
            if part.command:
                running[name] = start(name, part, folder, limit)
            else:
                why = f"left out: no data; name it by --{name}=folder:PATH"
                yield name, {"outcome": why, "seconds": 0.0}
        while running:
            time.sleep(0.05)
            seconds = time.perf_counter() - started
            for name, process in [*running.items()]:
                status = process.poll()
                if status is None and seconds < limit:
                    continue
                outcome = f"failed, status {status}; see {name}.log" if status else "done"
                if status is None:
                    outcome = f"stopped: it took more than {limit:.0f} s"
                end(process)
                del running[name]
                answer = folder / f"{name}.json"
                found = json.loads(answer.read_text()) if answer.exists() else None
                about = {"seconds": seconds, "command": process.args, "found": found}
                yield name, {"outcome": outcome} | about
    finally:
        for process in running.values():
            end(process)


def start(name: str, part: Part, folder: pathlib.Path, limit: float) -> subprocess.Popen:
    """A part's process, leader of its own process group."""
    answer = folder / f"{name}.json"
    answer.unlink(missing_ok=True)
    enough = str(round(0.85 * limit))
    script, *flags = (word.replace("{limit}", enough) for word in part.command)
    with (folder / f"{name}.md").open("w") as page, (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, str(HERE / script), *flags, f"--json={answer}"],
            stdout=page,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )


def end(process: subprocess.Popen) -> None:
    """End the process and all it started: first by request, with 20 s for training to save."""
    with contextlib.suppress(ProcessLookupError):  # nothing is left of the group
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            until = time.perf_counter() + 20
            while time.perf_counter() < until:
                process.poll()  # it stays in the group until its status is read
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def machine() -> dict[str, str]:
    """The machine of these measurements."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    found = {}
    for command in ([sys.executable, "-c", MACHINE], query):
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120)
            text = done.stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            text = ""
        if text:
            found |= json.loads(text.splitlines()[-1]) if command is not query else {"GPU": text}
    return found


def page(found: dict[str, Any], known: dict[str, Part], folder: pathlib.Path) -> str:
    """Everything as one page of Markdown."""
    machine, parts = found["machine"], found["parts"]
    lines = ["# Measured by benchmarks/gpu.sh", ""]
    if machine.get("backend") != "gpu":
        lines += [f"**Not measured on a GPU: JAX has a {machine.get('backend', 'failure')}.**", ""]
    lines += [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += ["| part | what | outcome | seconds |", "|---|---|---|---|"]
    for name, one in parts.items():
        lines.append(f"| {name} | {known[name].about} | {one['outcome']} | {one['seconds']:.0f} |")
    for name in parts:
        printed = folder / f"{name}.md"
        if printed.exists():
            lines += ["", f"## {name}", "", printed.read_text().strip()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
