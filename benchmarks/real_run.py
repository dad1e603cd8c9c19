"""The full paper net, both towers on one device, trained to the end on a small data set.

  python benchmarks/real_run.py --recipe=caltech101 --source=folder:PATH --workdir=RUN
      [--figures=FOLDER] [--json FILE] [--config.SECTION.FIELD=VALUE ...]

Trains (or continues: a run ended by a time limit loses nothing), evaluates ten crops, and draws
errors and conv1's kernels in FOLDER. SIGTERM reaches training, which saves, or evaluation; the
results so far are reported, and the status is 143. `torch_train.py --workdir=RUN` then trains
PyTorch the same way.
"""

import argparse
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import time

import jax
import timing

from alexnet_jax import config as configs
from alexnet_jax import figures, gallery, predict, report
from alexnet_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = {
    "model.width": 1.0,
    "model.input_size": 224,
    "model.dtype": "bfloat16",
    "mesh.model": 1,
    "mesh.data": 1,
    "mesh.cpu_devices": 1,
    "data.on_device": True,
}
# Changes to configs/NAME.py; both use a cosine schedule, so that the end is known beforehand.
RECIPES = {
    "caltech101": {"train.num_epochs": 200, "eval.every_epochs": 10},
    "cifar10": {"train.num_epochs": 40, "eval.every_epochs": 2},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--source", required=True, help="folder:PATH or records:PATH")
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--figures", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path)
    options, more = parser.parse_known_args()
    settings = SHARED | RECIPES[options.recipe] | {"data.source": options.source}
    command = [sys.executable, "-m", "alexnet_jax.main"]
    command += [f"--config={ROOT}/configs/{options.recipe}.py", f"--workdir={options.workdir}"]
    command += [*(f"--config.{name}={value}" for name, value in settings.items()), *more]
    signal.signal(signal.SIGTERM, lambda *_: None)  # the running command gets it too, and ends
    started = time.perf_counter()
    done = subprocess.run(command, stdout=sys.stderr)
    found = {"seconds": time.perf_counter() - started, **levels(options.workdir)}
    if "training" not in found:
        return status(done)
    if not done.returncode:
        crops = [*command, "--mode=eval", "--config.eval.num_crops=10"]
        done = subprocess.run(crops, stdout=subprocess.PIPE, text=True)
        if not done.returncode:
            found["ten crops"] = json.loads(done.stdout.splitlines()[-1])
    print(table(found), flush=True)
    timing.keep(options.json, found)
    if options.figures and not done.returncode:
        draw(options.workdir, options.figures)
    return status(done)


def status(done: subprocess.CompletedProcess) -> int:
    """As a shell reports it: 128 plus the signal's number for a process ended by one."""
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


def draw(workdir: pathlib.Path, folder: pathlib.Path) -> None:
    """Errors by epoch and conv1's kernels. (--mode=figures would search all images for some.)"""
    jax.config.update("jax_platforms", "cpu")
    config = configs.from_dict(json.loads((workdir / "config.json").read_text()))
    try:
        errors = gallery.learning([workdir], "top1_error", "top-1 error")
        figures.save(errors, folder / "errors")
        figures.save(gallery.kernels(predict.open_net(config, workdir)), folder / "kernels")
    except UserError as error:
        print(f"\nThe figures could not be drawn: {error}")


def levels(workdir: pathlib.Path) -> dict:
    """The run's log so far: last records, lowest error, median pace."""
    training, validation = report.training_records(workdir), report.evaluation_records(workdir)
    found = {}
    if training:
        pace = statistics.median(record["images_per_second"] for record in training)
        found |= {"training": training[-1], "images_per_second": pace}
    if validation:
        lowest = min(validation, key=lambda record: record["top1_error"])
        found |= {"validation": validation[-1], "lowest": lowest}
    return found


def table(found: dict) -> str:
    rows = ["| | epoch | loss | top-1 error | top-5 error |", "|---|---|---|---|---|"]
    for name in ("training", "validation", "lowest", "ten crops"):
        if name not in found:
            continue
        record = found[name]
        epoch = f"{record['epoch']:.1f}" if "epoch" in record else ""
        errors = f"{record['top1_error']:.2%} | {record['top5_error']:.2%}"
        rows.append(f"| {name} | {epoch} | {record['loss']:.4f} | {errors} |")
    pace = f"{found['images_per_second']:,.0f} images/s while training"
    return "\n".join([*rows, f"\n{found['seconds']:,.0f} s in this start, {pace} (median)."])


if __name__ == "__main__":
    sys.exit(main())
