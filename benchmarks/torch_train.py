"""Repeat a finished run's recipe in PyTorch: does it reach the same level?

  python benchmarks/torch_train.py --workdir=RUN [--form compile+channels_last] [--json FILE]
      [--figure FILE.png]

Reads RUN's config.json and trains the net of `torch_nets.py` with the same update rule, rates and
number of steps, from the same initial weights, on the same batches of this package's stream, and
evaluates it on the same centre crops as often. Dropout masks and all arithmetic are PyTorch's own;
bfloat16 is autocast. Writes RUN/pytorch.jsonl. A row and a record are written after each
validation, so that a time limit loses nothing.
"""

import argparse
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
import timing
import torch
import torch.nn.functional as F  # noqa: N812  (so PyTorch calls it)
import torch_nets
import train_step

from alexnet_jax import config as configs
from alexnet_jax import figures, report
from alexnet_jax.config import Config
from alexnet_jax.data import sources, stream, survey
from alexnet_jax.models.nets import layers
from alexnet_jax.train import optim, state
from alexnet_jax.train.calendar import make_calendar
from alexnet_jax.workdir import CONFIG_FILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--form", choices=train_step.FORMS, default="compile+channels_last")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--figure", type=pathlib.Path, help="both validation curves")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # it only draws the weights and computes the rates
    if not (options.workdir / CONFIG_FILE).exists():
        sys.exit(f"error: --workdir={options.workdir} holds no run; train there first")
    config = configs.from_dict(json.loads((options.workdir / CONFIG_FILE).read_text()))
    found = {"this package": report.evaluation_records(options.workdir), "PyTorch": []}
    print("| | epoch | loss | top-1 error | top-5 error | lowest top-1 |")
    print("|---|---|---|---|---|---|")
    if found["this package"]:
        print(row("this package", found["this package"]), flush=True)
    for record in trained(config, options.form, options.workdir / "pytorch.jsonl"):
        found["PyTorch"].append(record)
        print(row("PyTorch", found["PyTorch"]), flush=True)
        timing.keep(options.json, found)
    if options.figure:
        figures.save(figures.curves(
            {}, {name: [(record["epoch"], record["top1_error"]) for record in records]
                 for name, records in found.items()}, ylabel="top-1 error",
        ), options.figure)  # fmt: skip


def row(name: str, records: list[dict[str, float]]) -> str:
    """The last record, and the lowest error of all."""
    last, least = records[-1], min(record["top1_error"] for record in records)
    errors = f"{last['top1_error']:.2%} | {last['top5_error']:.2%} | {least:.2%}"
    return f"| {name} | {last['epoch']:.1f} | {last['loss']:.4f} | {errors} |"


def trained(config: Config, form: str, path: pathlib.Path) -> Iterator[dict[str, float]]:
    """Train; the results of each validation."""
    assert (config.model.preset, config.data.mean) == ("paper", "central")
    assert config.optim.schedule != "plateau", "its rates are no function of the step"
    source = sources.open_source(config.data, "train")
    source, statistics = survey.surveyed(source, config.data, config.model)
    validation = sources.open_source(config.data, config.eval.split)
    validation, _ = survey.surveyed(validation, config.data, config.model)
    batch_size, size = config.train.batch_size, config.model.input_size
    calendar = make_calendar(config.train, len(source))
    schedule = jax.jit(optim.make_schedule(config.optim, calendar))
    run = Run(config, len(source.labels), np.asarray(statistics.mean_image), form)
    rows = stream.Rows(batch_size, range(batch_size))
    batches = stream.train_batches(
        source, statistics, config.data, seed=config.seed, size=size, rows=rows,
        start_step=0, stop_step=calendar.num_steps,
    )  # fmt: skip
    started = time.perf_counter()
    with path.open("w") as file:
        for step, batch in enumerate(batches, 1):
            rates = schedule(step - 1, 1.0)
            run.train(batch, float(rates["kernel"]), float(rates["bias"]))
            if calendar.epoch_ends(step, config.eval.every_epochs):
                stored = statistics.stored_size
                count = config.eval.batch_size or batch_size
                held_out = stream.evaluation_batches(
                    validation, config.data, stored=stored, rows=stream.Rows(count, range(count))
                )
                record = {"step": step, "epoch": calendar.epochs(step), **run.evaluate(held_out)}
                record["seconds"] = time.perf_counter() - started
                print(json.dumps(record), file=file, flush=True)
                yield record


class Run:
    """The net, its velocities, and the operations on a batch of the stream."""

    def __init__(self, config: Config, classes: int, mean: np.ndarray, form: str):
        torch.manual_seed(config.seed)
        bfloat16 = config.model.dtype == "bfloat16"
        self.optim, self.size = config.optim, config.model.input_size
        self.device = torch_nets.configure("bfloat16" if bfloat16 else "tf32")
        self.autocast = torch.autocast(self.device, torch.bfloat16, enabled=bfloat16)
        net_layers = layers(config.model, classes)
        widths = [layer.kernel[-1] for layer in net_layers[:-1]]
        net = torch_nets.Paper(form, classes, self.size, widths)
        params = state.initial_state(config.model, classes, config.seed).params
        with torch.no_grad():
            for name, leaves in params.items():
                layer = getattr(net, name)
                layer.weight.copy_(weight(name, leaves["kernel"], widths[4]))
                layer.bias.copy_(torch.from_numpy(leaves["bias"]))
            margin = (len(mean) - self.size) // 2
            middle = np.array(mean[margin:, margin:][: self.size, : self.size])
            net.mean.copy_(torch.from_numpy(middle).permute(2, 0, 1))
        self.net = net.to(self.device, memory_format=net.memory_format)
        self.logits = torch_nets.compiled(self.net, form)
        self.kernels = [p for name, p in net.named_parameters() if name.endswith("weight")]
        self.biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
        self.velocities = [[*map(torch.zeros_like, part)] for part in (self.kernels, self.biases)]

    def train(self, batch: stream.Batch, rate: float, bias_rate: float) -> None:
        """v <- momentum * v - rate * (gradient + decay * w), w <- w + v; biases do not decay."""
        self.net.train()
        images, shift, labels = self.put(batch["image"], batch["shift"], batch["label"])
        with self.autocast:
            logits = self.logits(images, shift)
        F.cross_entropy(logits.float(), labels).backward()
        with torch.no_grad():
            for parts, speeds, step, decay in zip(
                (self.kernels, self.biases),
                self.velocities,
                (rate, bias_rate),
                (self.optim.weight_decay, 0.0),
                strict=True,
            ):
                slopes = [part.grad for part in parts]
                torch._foreach_add_(slopes, parts, alpha=decay)
                torch._foreach_mul_(speeds, self.optim.momentum)
                torch._foreach_add_(speeds, slopes, alpha=-step)
                torch._foreach_add_(parts, speeds)
                for part in parts:
                    part.grad = None

    @torch.no_grad()
    def evaluate(self, batches: stream.Batches) -> dict[str, float]:
        """Loss and errors of centre crops, every example once."""
        self.net.eval()
        sums, count = np.zeros(3), 0
        for batch in batches:
            margin = (batch["image"].shape[1] - self.size) // 2
            crops = batch["image"][:, margin:, margin:][:, : self.size, : self.size]
            images, labels, valid = self.put(crops, batch["label"], batch["valid"])
            with self.autocast:
                logits = self.logits(images, torch.zeros(len(images), 3, device=self.device))
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            best = logits.float().topk(min(5, logits.shape[1])).indices == labels[:, None]
            parts = (losses, ~best[:, 0], ~best.any(1))
            sums += [float(part[valid].sum()) for part in parts]
            count += int(valid.sum())
        return dict(zip(("loss", "top1_error", "top5_error"), (sums / count).tolist()))

    def put(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        found = []
        for array in arrays:
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            tensor = tensor.long() if tensor.dtype == torch.int32 else tensor
            tensor = tensor.pin_memory() if self.device == "cuda" else tensor
            found.append(tensor.to(self.device, non_blocking=True))  # pinned, it waits for nothing
        return found


def weight(name: str, kernel: np.ndarray, maps: int) -> torch.Tensor:
    """A kernel in PyTorch's layout, in which fc6 reads `maps` maps one after another."""
    if name == "fc6":
        side = math.isqrt(len(kernel) // maps)
        kernel = kernel.reshape(side, side, maps, -1)
    turned = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
    turned = turned.reshape(len(turned), -1) if name == "fc6" else turned
    return torch.from_numpy(np.ascontiguousarray(turned))


if __name__ == "__main__":
    main()
