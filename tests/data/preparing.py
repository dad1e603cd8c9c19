"""What the tests of prepared data make, run and read; nothing here is the package's."""

import io
import json
import pathlib
import struct
import tarfile
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import scipy.io
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

SIZE = 16  # pixels a side of what most tests prepare
CLASSES = ("ant", "bee", "çat 猫")
PARTS = ("train", "validation", "test")
# With these the tars of the fixture are prepared, by the first three but for a broken image.
ALLOWED = ("--unofficial", "--format=raw", "--shard_size=3", "--allow_broken=1")


class Stored(NamedTuple):
    label: int
    name: str
    image: bytes


def stored(output: pathlib.Path, split: str) -> list[Stored]:
    """A prepared split by json, ArrayRecord's own reader and struct."""
    manifest = json.loads((output / "manifest.json").read_text())
    found = []
    for shard in manifest["splits"][split]["shards"]:
        reader = ArrayRecordReader(str(output / shard["file"]))
        assert reader.num_records() == shard["num_examples"]
        for record in reader.read_all() if shard["num_examples"] else []:
            label, length = struct.unpack_from("<iH", record)
            found.append(Stored(label, record[6 : 6 + length].decode(), record[6 + length :]))
        reader.close()
    assert len(found) == manifest["splits"][split]["num_examples"]
    return found


def pixels(image: bytes) -> np.ndarray:
    return np.frombuffer(image, np.uint8).reshape(SIZE, SIZE, 3)


def by_pillow(path: pathlib.Path) -> np.ndarray:
    """The middle of an image whose shorter side is SIZE."""
    with Image.open(path) as image:
        left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
        return np.asarray(image.convert("RGB").crop((left, top, left + SIZE, top + SIZE)))


def tree(root: pathlib.Path) -> dict[str, bytes]:
    """Every file below a folder."""
    found = sorted(path for path in root.rglob("*") if not path.is_dir())
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


class Ran(NamedTuple):
    status: int
    out: str
    err: list[str]  # lines


def assert_refused(ran: Ran, *words: object, status: int = 2) -> None:
    """Ended with `status` and one line, which holds `words`."""
    errors = [line for line in ran.err if line.startswith("error: ")]
    assert ran.status == status, ran
    assert len(errors) == 1, ran.err
    assert ran.err[-1] == errors[0]
    for word in words:
        assert str(word) in errors[0]


def write_folder(pictures, root: pathlib.Path, counts: Mapping[str, int], seed: int) -> None:
    """PNGs that need no resampling; tall, wide and square."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            height, width = [(SIZE, SIZE), (SIZE, SIZE + 5), (SIZE + 8, SIZE)][index % 3]
            image = pictures.rough(height, width, 1000 * seed + 100 * label + index)
            (root / name / f"{index:03d}.png").write_bytes(pictures.encode(image))


def files_of(root: pathlib.Path, split: str) -> list[pathlib.Path]:
    return sorted((root / split).glob("*/*"))


def assert_statistics(output: pathlib.Path, squares: np.ndarray) -> None:
    """statistics.npz is numpy's of squares (n, s, s, 3), in double precision."""
    squares = squares.astype(np.float64)
    flat = squares.reshape(-1, 3)
    values, vectors = np.linalg.eigh(np.cov(flat.T, bias=True))
    with np.load(output / "statistics.npz") as found:
        assert all(found[name].dtype == np.float32 for name in found)
        expected = squares.mean(axis=0).astype(np.float32)
        np.testing.assert_array_equal(found["mean_image"], expected)
        np.testing.assert_allclose(found["channel_std"], flat.std(axis=0), rtol=1e-6)
        np.testing.assert_allclose(found["eigenvalues"], values, rtol=1e-5)
        cosines = (found["eigenvectors"] * vectors).sum(axis=0)  # in columns, up to sign
        np.testing.assert_allclose(abs(cosines), 1, atol=1e-5)


def shards_of(root: pathlib.Path) -> dict[str, tuple[int, int]]:
    """What says that a shard was not written again, by name."""
    found = {}
    for path in root.rglob("*.array_record"):
        found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def tarred(members: Mapping[str, bytes], mode: Literal["w", "w:gz"] = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tars(
    root: pathlib.Path, train: Mapping[str, Mapping[str, bytes]], validation: Mapping[str, bytes]
) -> None:
    root.mkdir(exist_ok=True)
    inner = {f"{name}.tar": tarred(files) for name, files in train.items()}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tarred(inner))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tarred(validation))


def write_devkit(root: pathlib.Path, numbers: Mapping[str, int], truth: list[int]) -> None:
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    rows = [(float(n), name, f"{name} in words", 0.0) for name, n in numbers.items()]
    table = np.array(rows, [*fields, ("num_children", object)])
    mat = io.BytesIO()
    scipy.io.savemat(mat, {"synsets": table.reshape(-1, 1)})
    lines = "".join(f"{number}\n" for number in truth).encode()
    members = {"meta.mat": mat.getvalue(), "ILSVRC2012_validation_ground_truth.txt": lines}
    top = "ILSVRC2012_devkit_t12/data/"
    packed = tarred({top + name: data for name, data in members.items()}, "w:gz")
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(packed)
