"""How fast images arrive: the stream, the bare decoder and PyTorch's DataLoader, in one run.

  python benchmarks/input.py --images=FOLDER [--rounds=5] [--seconds=4] [--json=FILE]

FOLDER holds image files, at any depth; they are copied until there are 1,000, and prepared as
records of each kind, in a temporary folder. Every contender produces the same: batches of 128 uint8
crops of 224 from squares of 256, mirrored at random, with a label and a colour shift for each
image, using as many workers as there are cores. In a round each runs once, in turn; medians of the
rounds are printed. PyTorch is skipped if it is not installed.
"""

import argparse
import collections
import concurrent.futures
import io
import itertools
import pathlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import simplejpeg
import timing
from PIL import Image

from alexnet_jax.config import Data
from alexnet_jax.data import images, sources, stream, survey, workers
from alexnet_jax.data.examples import Source
from alexnet_jax.prepare import main as prepare

try:
    import torch
except ImportError:
    torch = None

BATCH, SIZE, STORED, FILES = 128, 224, 256, 1000
FIRST = 16  # batches, which touch memory for the first time
KINDS = {"jpeg q90": ["--quality=90"], "jpeg q95": ["--quality=95"], "raw": ["--format=raw"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True, type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        contenders = make_contenders(options.images, pathlib.Path(scratch))
        rates = collections.defaultdict(list)
        for _ in range(options.rounds):
            for name, run in contenders.items():
                rates[name].append(run(options.seconds))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\nimages/s, {workers.count(0)} workers, medians of {options.rounds} rounds\n")
    print("| images | contender | images/s | lowest | highest |\n|---|---|---|---|---|")
    for (kind, name), values in rates.items():
        print(
            f"| {kind} | {name} | {medians[kind, name]:,.0f} | {min(values):,.0f} "
            f"| {max(values):,.0f} |"
        )
    table = {f"{kind}: {name}": values for (kind, name), values in rates.items()}
    timing.keep(options.json, table)


def make_contenders(
    given: pathlib.Path, scratch: pathlib.Path
) -> dict[tuple[str, str], Callable[[float], float]]:
    """(images, contender) -> a function that runs for some seconds and returns images/s."""
    found = sorted(path for path in given.rglob("*") if path.is_file())
    if not found:
        sys.exit(f"error: --images={given} holds no files")
    folder = scratch / "images" / "train" / "all"
    folder.mkdir(parents=True)
    for number, path in zip(range(FILES), itertools.cycle(found)):
        (folder / f"{number:04d}.jpg").write_bytes(path.read_bytes())
    data = {"original jpeg": f"folder:{folder.parents[1]}"}
    for kind, flags in KINDS.items():
        output = scratch / kind
        prepare(["prepare", f"--input={folder.parents[1]}", f"--output={output}", *flags])
        data[kind] = f"records:{output}"
    contenders = {}
    for kind, text in data.items():
        source = sources.open_source(Data(source=text), "train")
        if kind != "raw":
            files = [source.read(index).data for index in range(len(source))]
            contenders[kind, "decode alone"] = bare(files, decode)
        if kind == "original jpeg":
            contenders[kind, "decode and square alone"] = bare(files, square)
        for worker in ("threads", "processes"):
            contenders[kind, f"this package, {worker}"] = ours(source, scratch, worker)
        if torch is not None:
            decoders = {"": raw} if kind == "raw" else {", PIL": pil, ", simplejpeg": simple}
            for name, decoder in decoders.items():
                contenders[kind, f"PyTorch DataLoader{name}"] = torch_loader(source, decoder)
    return contenders


def rate(batches: Iterator, seconds: float) -> float:
    """Images per second, counted after the FIRST batches."""
    for _ in range(FIRST):
        next(batches)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(batches)
        count += BATCH
    return count / (time.perf_counter() - started)


def decode(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "RGB")


def square(data: bytes) -> np.ndarray:
    return images.square(images.decode(data, ""), STORED)


def bare(files: list, work: Callable) -> Callable[[float], float]:
    """The bare work on files in memory, in as many threads as there are cores."""

    def loop(seconds: float) -> float:
        started, count = time.perf_counter(), 0
        for data in itertools.cycle(files):
            work(data)
            count += 1
            if time.perf_counter() - started > seconds:
                break
        return count / (time.perf_counter() - started)

    def run(seconds: float) -> float:
        threads = workers.count(0)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(loop, [seconds] * threads))

    return run


def ours(source: Source, scratch: pathlib.Path, worker: str) -> Callable[[float], float]:
    """The package's stream."""
    _, found = survey.survey(source, STORED, str(scratch / "cache"), workers.count(0))

    def run(seconds: float) -> float:
        batches = stream.train_batches(
            source,
            found,
            Data(worker_kind=worker),
            seed=0,
            size=SIZE,
            rows=stream.Rows(BATCH, range(BATCH)),
            start_step=0,
            stop_step=10**6,
        )
        result = rate(batches, seconds)
        batches.close()
        return result

    return run


def pil(data: bytes) -> Image.Image:
    """As in torchvision's transforms: decode, bilinear resize of the shorter side to 256."""
    return resized(Image.open(io.BytesIO(data)).convert("RGB"))


def simple(data: bytes) -> Image.Image:
    """Like `pil`, with a faster decoder."""
    return resized(Image.fromarray(simplejpeg.decode_jpeg(data, "RGB")))


def resized(image: Image.Image) -> Image.Image:
    shorter = min(image.size)
    if shorter == STORED:
        return image
    width, height = (round(side * STORED / shorter) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def raw(pixels: np.ndarray) -> np.ndarray:
    return pixels


class TorchImages:
    """A PyTorch data set over a source: the paper's crop, mirror and colour shift."""

    def __init__(self, source: Source, decoder: Callable):
        self.source, self.decoder = source, decoder

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int):
        example = self.source.read(index % len(self.source))
        image = self.decoder(example.data)
        top, left = (random.randrange(STORED - SIZE + 1) for _ in range(2))
        mirror = random.random() < 0.5
        if isinstance(image, Image.Image):
            left += (image.width - STORED) // 2
            top += (image.height - STORED) // 2
            image = image.crop((left, top, left + SIZE, top + SIZE))
            if mirror:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            pixels = torch.from_numpy(np.array(image))
        else:
            pixels = torch.from_numpy(image)[top : top + SIZE, left : left + SIZE]
            pixels = pixels.flip(1) if mirror else pixels
        return pixels, example.label, 0.1 * torch.randn(3)


def torch_loader(source: Source, decoder: Callable) -> Callable[[float], float]:
    def run(seconds: float) -> float:
        loader = torch.utils.data.DataLoader(
            TorchImages(source, decoder),
            BATCH,
            num_workers=workers.count(0),
            sampler=iter(lambda: random.randrange(len(source)), -1),
            prefetch_factor=4,
        )
        batches = iter(loader)
        result = rate(batches, seconds)
        del batches
        return result

    return run


if __name__ == "__main__":
    sys.exit(main())
