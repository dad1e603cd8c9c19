"""Pictures to test with: of odd sizes, none of one colour, no two alike; ways to keep them."""

import io
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from preparing import CLASSES, SIZE, Ran, write_devkit, write_folder, write_tars

from alexnet_jax import prepare as command


class Pictures:
    """What the data tests make their images and folders with."""

    @staticmethod
    def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
        """(height, width, 3) uint8 of three waves, which JPEG keeps almost as they are."""
        rng = np.random.default_rng((seed, height, width))
        y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
        across, down, phase = rng.uniform(1.5, 6, (3, 3))
        waves = np.sin(x[..., None] * across + y[..., None] * down + phase)
        return (128 + 100 * waves).astype(np.uint8)

    @staticmethod
    def rough(height: int, width: int, seed: int = 0) -> np.ndarray:
        """(height, width, 3) uint8 of noise."""
        rng = np.random.default_rng((seed, height, width))
        return rng.integers(0, 256, (height, width, 3), np.uint8)

    @staticmethod
    def encode(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options) -> bytes:
        """An image file's bytes; `mode` converts first, as CMYK."""
        image = Image.fromarray(pixels)
        buffer = io.BytesIO()
        (image.convert(mode) if mode else image).save(buffer, kind, **options)
        return buffer.getvalue()

    def folder(
        self, root: pathlib.Path, counts: Mapping[str, int], seed: int = 0
    ) -> list[pathlib.Path]:
        """Write `counts[name]` noisy PNGs into root/name; all their paths."""
        paths = []
        for label, (name, count) in enumerate(counts.items()):
            (root / name).mkdir(parents=True)
            for index in range(count):
                number = 1000 * (100 * seed + label) + index
                pixels = self.rough(17 + number % 5, 17 + number % 7, number)
                paths.append(root / name / f"{index:03d}.png")
                paths[-1].write_bytes(self.encode(pixels))
        return paths


@pytest.fixture(scope="session")
def pictures() -> Pictures:
    return Pictures()


@pytest.fixture(scope="session")
def write_tfds() -> Callable[..., None]:
    """A function that prepares a TFDS data set of encoded images and labels without TensorFlow."""
    # Here, since it takes a second and most tests do without.
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info, naming
    from tensorflow_datasets.core import splits as tfds_splits

    def write(
        data_dir: pathlib.Path,
        name: str,
        classes: Sequence[str],
        splits: Mapping[str, Sequence[tuple[bytes, int]]],
        file_format: str = "array_record",
    ) -> None:
        features = tfds.features.FeaturesDict({
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=classes),
        })  # fmt: skip
        out = data_dir / name / "1.0.0"
        out.mkdir(parents=True)
        infos = []
        for split, contents in splits.items():
            path = out / f"{name}-{split}.{file_format}-00000-of-00001"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for image, label in contents:
                example = {"image": io.BytesIO(image), "label": label}
                writer.write(features.serialize_example(example))
            writer.close()
            template = naming.ShardedFileTemplate(
                data_dir=out, dataset_name=name, split=split, filetype_suffix=file_format
            )
            infos.append(tfds.core.SplitInfo(
                name=split, shard_lengths=[len(contents)], num_bytes=1, filename_template=template
            ))  # fmt: skip
        identity = dataset_info.DatasetIdentity(
            name=name, version=tfds.core.Version("1.0.0"), data_dir=str(out), module_name="by_hand"
        )
        info = dataset_info.DatasetInfo(features=features, builder=identity)
        info.set_file_format(file_format)
        info.set_splits(tfds_splits.SplitDict(infos))
        info.write_to_directory(out)

    return write


@pytest.fixture
def run(capsys) -> Callable[..., Ran]:
    """Runs the command in this process, small."""

    def main(*flags: str, size: int = SIZE) -> Ran:
        capsys.readouterr()
        status = command.main(["prepare", f"--size={size}", "--workers=2", *flags])
        printed = capsys.readouterr()
        return Ran(status, printed.out, printed.err.splitlines())

    return main


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("folder")
    write_folder(pictures, root / "train", dict(zip(CLASSES, (7, 5, 4))), 1)
    write_folder(pictures, root / "val", dict(zip(CLASSES, (2, 3, 1))), 2)
    return root


@pytest.fixture(scope="module")
def raw(folder, shards_by_threads, tmp_path_factory) -> pathlib.Path:
    """`folder` as raw pixels, five a shard."""
    output = tmp_path_factory.mktemp("raw") / "out"
    flags = ("--format=raw", "--shard_size=5", f"--size={SIZE}", "--workers=2")
    assert command.main(["x", f"--input={folder}", f"--output={output}", *flags]) == 0
    return output


@pytest.fixture(scope="module")
def tars(pictures, tmp_path_factory) -> pathlib.Path:
    """Three classes, of twelve good images, with a devkit; one of each oddity; one broken."""

    def png(seed: int) -> bytes:
        return pictures.encode(pictures.rough(SIZE, SIZE, seed))

    def jpeg(seed: int, mode: str | None = None, orientation: int = 1) -> bytes:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = pictures.smooth(SIZE, SIZE + 8, seed)
        return pictures.encode(image, "JPEG", mode, quality=97, exif=exif.tobytes())

    root = tmp_path_factory.mktemp("imagenet") / "tars"
    train = {
        "n03": {f"n03_{i}.JPEG": jpeg(i) for i in (5, 3)},
        "n01": {"n01_1.JPEG": png(0), "n01_2.JPEG": jpeg(1, "CMYK"), "n01_3.JPEG": jpeg(2, "L")},
        "n02": {"n02_9.JPEG": jpeg(3, None, 6), "n02_8.JPEG": jpeg(4)[:300], "n02_7.JPEG": jpeg(6)},
    }
    validation = {f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(20 + n) for n in (1, 3, 2, 5, 4)}
    write_tars(root, train, validation)
    write_devkit(root, {"n01": 3, "n02": 1, "n03": 2}, [2, 3, 1, 1, 2])
    return root
