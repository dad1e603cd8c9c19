"""Prepare a pair of tars nested like ImageNet's, once undisturbed and once killed repeatedly.

  python benchmarks/prepare.py --images=FOLDER [--kills=20] [--format=raw] [--seed=0]

FOLDER holds JPEG files, at any depth. They are packed, over and over, into a training tar of 1,000
class tars and a flat validation tar with a devkit, odd files among them. The command runs once to
its end, while the memory of all its processes is watched, and once more, killed by SIGKILL at
random moments, the given number of times. The two outputs must be identical, byte for byte.
"""

import argparse
import io
import itertools
import os
import pathlib
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time

import numpy as np
import scipy.io
from PIL import Image

CLASSES, TRAIN, VALIDATION = 1000, 6000, 1000
SHARD = 250
IMAGENET = {"train": 1_281_167, "validation": 50_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True, type=pathlib.Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--format", default="jpeg")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    files = [path.read_bytes() for path in sorted(options.images.rglob("*")) if path.is_file()]
    if not files:
        sys.exit(f"error: --images={options.images} holds no files")
    with tempfile.TemporaryDirectory() as scratch:
        root = pathlib.Path(scratch)
        write_tars(root / "tars", files)
        command = [
            *(sys.executable, "-m", "alexnet_jax.prepare", f"--input={root / 'tars'}"),
            *(f"--format={options.format}", f"--shard_size={SHARD}", "--unofficial"),
        ]
        seconds, peak = undisturbed([*command, f"--output={root / 'one'}"])
        count, size = TRAIN + VALIDATION, sum(p.stat().st_size for p in (root / "one").iterdir())
        cores = len(os.sched_getaffinity(0))
        rate = count / seconds / cores
        print(f"undisturbed: {count} images in {seconds:.1f} s, {rate:.0f} images/s a core")
        print(f"peak resident memory of all its processes: {peak / 2**20:.0f} MiB")
        kills = disturbed([*command, f"--output={root / 'two'}"], options, seconds)
        one, two = (
            {path.name: path.read_bytes() for path in (root / name).iterdir()}
            for name in ("one", "two")
        )
        left = [path.name for path in root.iterdir() if path.name not in ("tars", "one", "two")]
        other = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
        print(f"killed {kills} times: {len(two)} files, other than undisturbed: {other or 'none'}")
        print(f"left beside the outputs: {left or 'nothing'}")
        images = sum(IMAGENET.values())
        print(
            f"ImageNet at this rate and size: {images / rate / 3600:.2f} core hours, "
            f"{images * size / count / 1e9:.0f} GB"
        )
        if kills < options.kills:
            print(f"it was done before it was killed {options.kills} times; try another --seed")
        if other or left or kills < options.kills:
            sys.exit(1)


def write_tars(folder: pathlib.Path, files: list[bytes]) -> None:
    """The two tars and the devkit; every 500th file is odd."""
    folder.mkdir()
    wnids = [f"n{1_440_764 + 137 * label:08d}" for label in range(CLASSES)]
    stream = enumerate(itertools.cycle(files))
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w", format=tarfile.GNU_FORMAT) as outer:
        for wnid in wnids:
            inner_file = io.BytesIO()
            with tarfile.open(fileobj=inner_file, mode="w", format=tarfile.GNU_FORMAT) as inner:
                for number in range(TRAIN // CLASSES):
                    add(inner, f"{wnid}_{number}.JPEG", odd(*next(stream)))
            add(outer, f"{wnid}.tar", inner_file.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(1, VALIDATION + 1):
            add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", odd(*next(stream)))
    ids = np.random.default_rng(0).permutation(CLASSES) + 1
    synsets = np.zeros(CLASSES, [(name, "O") for name in ("ILSVRC2012_ID", "WNID", "words")]
                       + [("num_children", "O")])  # fmt: skip
    for row, wnid, number in zip(synsets, wnids, ids):
        row["ILSVRC2012_ID"], row["WNID"] = int(number), wnid
        row["words"], row["num_children"] = f"thing {number}", 0
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    truth = "".join(f"{ids[number % CLASSES]}\n" for number in range(VALIDATION))
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        truth_name = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
        add(tar, truth_name, truth.encode())


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def odd(number: int, data: bytes) -> bytes:
    """In turn a CMYK JPEG, a PNG, a greyscale JPEG, a rotated JPEG; mostly the file itself."""
    if number % 500:
        return data
    image, out = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    kind = number // 500 % 4
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind == 1:
        image.save(out, "PNG")
    else:
        image = image.convert({0: "CMYK", 2: "L", 3: "RGB"}[kind])
        image.save(out, "JPEG", **({"exif": exif} if kind == 3 else {}))
    return out.getvalue()


def undisturbed(command: list[str]) -> tuple[float, int]:
    """Seconds, and peak total resident bytes of the command and its children."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command)
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            peak = max(peak, sum(resident(number) for number in family(process.pid)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    assert status == 0
    return seconds, peak


def family(number: int) -> list[int]:
    """A process and all its descendants."""
    try:
        children = pathlib.Path(f"/proc/{number}/task/{number}/children").read_text().split()
    except OSError:
        return []
    return [number, *itertools.chain.from_iterable(family(int(child)) for child in children)]


def resident(number: int) -> int:
    try:
        pages = int(pathlib.Path(f"/proc/{number}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def disturbed(command: list[str], options: argparse.Namespace, seconds: float) -> int:
    """Kill the command that many times, then let it end; how often it was killed."""
    rng, kills = random.Random(options.seed), 0
    while True:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if kills == options.kills:
            assert process.wait() == 0
            return kills
        try:
            # Few late moments, or it would finish before it was killed often enough.
            process.wait(rng.uniform(0.3, 2 + 2 * seconds / options.kills))
            return kills
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1


if __name__ == "__main__":
    main()
