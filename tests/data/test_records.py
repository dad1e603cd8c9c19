"""Records come back byte for byte, by this reader and ArrayRecord's own; damage is named."""

import concurrent.futures
import errno
import gc
import hashlib
import io
import json
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from alexnet_jax import prepare as command
from alexnet_jax.config import Data, Model
from alexnet_jax.data import images, inputs, prepare, records, sources, survey
from alexnet_jax.data.records import Records
from alexnet_jax.errors import UserError

BLOCK = (1 << 16) - 24  # bytes of data in a block of a Riegeli file
SIZE = 16
COUNTS = {"ant": 9, "bee": 7, "çat 猫": 5}
MANIFEST = "manifest.json"


def by_array_record(path: pathlib.Path) -> list[bytes]:
    reader = ArrayRecordReader(str(path))
    found = reader.read_all() if reader.num_records() else []
    reader.close()
    return found


def round_trip(path: pathlib.Path, contents: list[bytes]) -> None:
    offsets, lengths = records.write_shard(path, contents)
    assert (offsets.dtype, lengths.dtype) == (np.int64, np.int32)
    assert by_array_record(path) == contents
    with open(path, "rb") as file:
        for content, offset, length in zip(contents, offsets, lengths, strict=True):
            read = records.read_record(file.fileno(), int(offset), int(length))
            assert read.dtype == np.uint8
            assert read.tobytes() == content


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_sizes_around_whole_blocks_come_back(tmp_path, blocks):
    """Wherever in a block a record begins or ends, and its chunk's header before it."""
    rng = np.random.default_rng(blocks)
    for difference in range(-130, 66, 3 if blocks > 1 else 1):
        sizes = (blocks * BLOCK + difference, 10, BLOCK - difference, 0, 3 * BLOCK + 1)
        round_trip(tmp_path / "one", [rng.bytes(size) for size in sizes])


def test_random_sizes_come_back(tmp_path):
    rng = np.random.default_rng(0)
    for most in (300, 3000, 200_000):
        for _ in range(8):
            sizes = rng.integers(0, most, 2_000_000 // most // 4 + 3)
            round_trip(tmp_path / "one", [rng.bytes(size) for size in sizes])


@pytest.mark.parametrize(
    "sizes", [[], [0], [0] * 10, [1] * 5000, [2048 * 2048 * 3 + 1000], [5_000_000, 0, 5_000_000]]
)
def test_extreme_sizes_come_back(tmp_path, sizes):
    rng = np.random.default_rng(0)
    round_trip(tmp_path / "one", [rng.bytes(size) for size in sizes])


@pytest.mark.parametrize("label", [0, 7, 2**31 - 1, -1])
@pytest.mark.parametrize("name", ["", "ant/1.jpg", "çat 猫\u2028/\U0001f41c.png", "a\nb\0"])
@pytest.mark.parametrize("image", [b"", b"\xff\xd8\xff", bytes(range(256)) * 300])
def test_a_record_is_label_name_and_image(label, name, image):
    record = records.pack(label, name, image)
    encoded = name.encode()
    assert record == struct.pack("<iH", label, len(encoded)) + encoded + image
    found_label, found_name, pixels = records.unpack(np.frombuffer(record, np.uint8))
    assert (found_label, found_name, pixels.tobytes()) == (label, name, image)


def test_names_too_long_or_of_no_encoding_stand_for_themselves_as_well_as_they_can():
    long = "x" * 2000 + "/ant/1.jpg"
    packed = records.pack(1, long, b"image")
    assert records.unpack(np.frombuffer(packed, np.uint8))[1] == long[-1000:]
    packed = records.pack(1, os.fsdecode(b"\xff1.jpg"), b"image")
    assert packed[6:12] == b"\xff1.jpg"
    label, name, image = records.unpack(np.frombuffer(packed, np.uint8))
    assert (label, name[1:], image.tobytes()) == (1, "1.jpg", b"image")


def test_a_shard_that_cannot_be_written_is_the_disks_refusal(tmp_path):
    with pytest.raises(OSError, match="cannot be written"):
        records.write_shard(tmp_path / "nowhere" / "one", [b"x"])


def test_a_shard_that_ends_early_is_not_read(tmp_path):
    path = tmp_path / "one"
    offsets, lengths = records.write_shard(path, [b"x" * 100_000, b"y" * 100])
    os.truncate(path, int(offsets[0]) + 99_000)
    with open(path, "rb") as file, pytest.raises(OSError, match="ends within the record"):
        records.read_record(file.fileno(), int(offsets[0]), int(lengths[0]))


def test_a_file_system_that_gives_less_than_is_asked_for_is_asked_again(tmp_path, monkeypatch):
    content = np.random.default_rng(1).bytes(200_000)
    (offset,), (length,) = records.write_shard(tmp_path / "one", [content])
    really, random = os.preadv, np.random.default_rng(2)

    def some(file: int, parts: list[memoryview], offset: int) -> int:
        left, chosen = int(random.integers(1, 100_000)), []
        for part in parts:
            chosen.append(part[:left])
            left -= len(chosen[-1])
        return really(file, chosen, offset)

    monkeypatch.setattr(os, "preadv", some)
    with open(tmp_path / "one", "rb") as file:
        for _ in range(20):
            found = records.read_record(file.fileno(), int(offset), int(length))
            assert found.tobytes() == content


@pytest.fixture(scope="module")
def made(pictures, shards_by_threads, tmp_path_factory) -> Callable[..., pathlib.Path]:
    """(splits, format) -> a prepared folder, of three images a shard."""

    def make(splits: Iterable[str] = ("train", "val"), kind: str = "raw") -> pathlib.Path:
        root = tmp_path_factory.mktemp("made")
        for number, split in enumerate(splits):
            pictures.folder(root / "in" / split, COUNTS, seed=number)
        data = Data(source=f"folder:{root / 'in'}")
        settings = prepare.Settings(kind, 95, SIZE, 3)
        given = inputs.SourceInput(data)
        prepare.prepare(given, root / "out", settings, num_workers=2, allow_broken=0)
        return root / "out"

    return make


@pytest.fixture(scope="module")
def raw(made) -> pathlib.Path:
    return made()


@pytest.fixture(scope="module")
def jpeg(made) -> pathlib.Path:
    return made(("train", "test"), "jpeg")


def expected(directory: pathlib.Path, split: str) -> list[tuple[int, str, bytes]]:
    """Label, name and image of every record, by ArrayRecord's own reader and struct."""
    found = []
    for path in sorted(directory.glob(f"{split}-*.array_record")):
        for record in by_array_record(path):
            label, length = struct.unpack_from("<iH", record)
            found.append((label, record[6 : 6 + length].decode(), record[6 + length :]))
    return found


def read(source: Records, index: int) -> tuple[int, str, bytes]:
    data, label, name = source.read(index)
    return label, name, data if isinstance(data, bytes) else data.tobytes()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_of_many_shards_is_read_in_any_order(raw, split):
    source, content = records.open_records(raw, split), expected(raw, split)
    assert len(list(raw.glob(f"{split}-*.array_record"))) == len(source.shards.paths) == 7
    assert len(source) == len(content) == sum(COUNTS.values())
    assert source.labels == tuple(COUNTS)
    for index in np.random.default_rng(0).permutation(len(content)):
        assert read(source, int(index)) == content[index]
    assert source.targets.dtype == np.int64
    assert source.targets.tolist() == [label for label, _, _ in content]


def test_raw_records_are_pixels_and_jpeg_records_are_files(raw, jpeg):
    pixels = records.open_records(raw, "train").read(4).data
    assert isinstance(pixels, np.ndarray)
    assert (pixels.shape, pixels.dtype) == ((SIZE, SIZE, 3), np.uint8)
    data = records.open_records(jpeg, "train").read(4).data
    assert isinstance(data, bytes)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("JPEG", (SIZE, SIZE))


def test_validation_is_test_where_there_is_no_other(raw, jpeg, caplog):
    with caplog.at_level("INFO", "alexnet_jax"):
        source = sources.open_source(Data(source=f"records:{jpeg}"), "validation")
    assert "its test split stands in" in caplog.text
    assert [read(source, i) for i in range(len(source))] == expected(jpeg, "test")
    assert source.fingerprint == records.open_records(jpeg, "test").fingerprint
    with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
        sources.open_source(Data(source=f"records:{raw}"), "test")


def test_fingerprints_tell_splits_and_contents_apart(raw, jpeg):
    opened = [records.open_records(raw, split) for split in ("train", "validation")]
    opened.append(records.open_records(jpeg, "train"))
    assert len({source.fingerprint for source in opened}) == 3
    assert records.open_records(raw, "train").fingerprint == opened[0].fingerprint


def test_some_examples_are_taken_in_the_order_given(raw):
    source, content = records.open_records(raw, "train"), expected(raw, "train")
    indices = np.array([20, 3, 3, 0, 11])
    taken = source.take(indices)
    assert [read(taken, i) for i in range(len(taken))] == [content[i] for i in indices]
    assert taken.targets.tolist() == [content[i][0] for i in indices]
    assert (taken.labels, taken.size, taken.raw) == (source.labels, SIZE, True)
    assert len({source.fingerprint, taken.fingerprint, taken.take(np.arange(5)).fingerprint}) == 3
    assert source.take(indices).fingerprint == taken.fingerprint
    assert [read(taken.take(np.array([4, 0])), i) for i in (0, 1)] == [content[11], content[20]]
    assert len(source.take(np.arange(0))) == 0


def descriptors(root: pathlib.Path) -> int:
    """How many files of a folder this process has open."""
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return sum(os.path.realpath(link).startswith(str(root)) for link in links)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_threads_read_alike_and_open_each_shard_once(raw):
    source, content = records.open_records(raw, "train"), expected(raw, "train")
    gc.collect()
    before = descriptors(raw)
    barrier = threading.Barrier(16)

    def wrong(source: Records, number: int) -> list[int]:
        barrier.wait()
        order = np.random.default_rng(number % 2).permutation(len(content)).tolist()
        return [index for index in order if read(source, index) != content[index]]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(wrong, [source] * 16, range(16))) == [[]] * 16
    assert descriptors(raw) == before + 7
    taken = source.take(np.array([0, 1]))
    del source
    gc.collect()
    assert read(taken, 1) == content[1]
    del taken
    gc.collect()
    assert descriptors(raw) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_a_lost_race_to_open_a_shard_closes_its_file(raw, monkeypatch):
    source = records.open_records(raw, "train")
    before, really = descriptors(raw), os.open

    def slow(path, flags):
        if not source.shards.opened:
            source.shards.opened[0] = really(path, flags)  # another thread's
        return really(path, flags)

    monkeypatch.setattr(os, "open", slow)
    assert read(source, 0) == expected(raw, "train")[0]
    assert descriptors(raw) == before + 1


def test_a_split_of_many_shards_asks_for_as_many_descriptors(raw, monkeypatch):
    """The training split has seven shards."""
    limits = [256, 4096]
    monkeypatch.setattr(records.resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(
        records.resource, "setrlimit", lambda kind, pair: limits.__setitem__(slice(None), pair)
    )
    records.open_records(raw, "train")
    assert limits == [256 + 7, 4096]
    limits[:] = [256, 260]
    records.open_records(raw, "train")
    assert limits == [260, 260]
    limits[:] = [256, records.resource.RLIM_INFINITY]
    records.open_records(raw, "train")
    assert limits == [256 + 7, records.resource.RLIM_INFINITY]

    def refuse(kind, pair):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(records.resource, "setrlimit", refuse)
    assert len(records.open_records(raw, "train")) > 0


def test_a_shard_that_cannot_be_opened_is_not_called_damaged(raw, monkeypatch):
    source = records.open_records(raw, "train")

    def refuse(path, flags):
        raise OSError(24, "Too many open files", path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=r"train-00000.*no more files.*ulimit -n") as caught:
        source.read(0)
    assert "damaged" not in str(caught.value)


def test_opening_leaves_no_file_open_where_it_fails(raw, tmp_path):
    copy = damaged(raw, tmp_path, "statistics.npz", flip)
    before = descriptors(copy)
    for _ in range(3):
        with pytest.raises(UserError):
            records.open_records(copy, "train")
    assert descriptors(copy) == before


def test_a_pickled_copy_reads_in_another_process(raw, tmp_path):
    source = records.open_records(raw, "train")
    read(source, 0)  # what is open here is not open there
    (tmp_path / "source").write_bytes(pickle.dumps(source.take(np.arange(20, -1, -1))))
    code = """if True:
        import hashlib, pickle, sys
        source = pickle.load(open(sys.argv[1], "rb"))
        for index in range(len(source)):
            data, label, name = source.read(index)
            print(label, name.encode().hex(), hashlib.sha256(data).hexdigest())
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "source")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    content = [
        f"{label} {name.encode().hex()} {hashlib.sha256(image).hexdigest()}"
        for label, name, image in reversed(expected(raw, "train"))
    ]
    assert done.stdout.splitlines() == content


# Damage, of one file of a copy.


def flip(path: pathlib.Path) -> None:
    """One bit in the middle, as a bad disk does."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def halve(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def grow(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: pathlib.Path) -> None:
    os.truncate(path, 0)


def remove(path: pathlib.Path) -> None:
    path.unlink()


def replace_by_folder(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


def damaged(
    source: pathlib.Path, to: pathlib.Path, name: str, damage: Callable[[pathlib.Path], None]
) -> pathlib.Path:
    copy = to / "copy"
    shutil.copytree(source, copy)
    damage(copy / name)
    return copy


SMALL = ["labels.txt", "statistics.npz", "train.index.npz", "validation.index.npz"]
SHARD = "train-00003.array_record"
DAMAGE = [flip, cut, grow, empty, remove, replace_by_folder]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", SMALL)
def test_damage_to_a_small_file_is_named_at_opening_and_by_verify(
    raw, tmp_path, capsys, name, damage
):
    copy = damaged(raw, tmp_path, name, damage)
    with pytest.raises(UserError, match=name) as caught:
        records.open_records(copy, "train")
    assert "\n" not in str(caught.value)
    assert command.main(["prepare", f"--verify={copy}"]) == 1
    assert_named(capsys, name)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_a_shard_is_named_at_opening_or_by_verify(raw, tmp_path, capsys, damage):
    copy = damaged(raw, tmp_path, SHARD, damage)
    if damage is not flip:  # which would take to read it whole
        with pytest.raises(UserError, match=SHARD):
            records.open_records(copy, "train")
    assert len(records.open_records(copy, "validation")) == 21  # which is not damaged
    assert command.main(["prepare", f"--verify={copy}"]) == 1
    assert_named(capsys, SHARD)


def assert_named(capsys, name: str) -> None:
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert name in line
    assert "17 of 18 files" in printed.out.splitlines()[-1]  # 14 shards and SMALL


@pytest.mark.parametrize("damage", [flip, halve, empty, remove, replace_by_folder])
def test_damage_to_the_manifest_is_named(raw, tmp_path, capsys, damage):
    copy = damaged(raw, tmp_path, MANIFEST, damage)
    with pytest.raises(UserError, match=MANIFEST):
        records.open_records(copy, "train")
    assert command.main(["prepare", f"--verify={copy}"]) == 2
    assert MANIFEST in capsys.readouterr().err


def edited(change: Callable[[dict], object]) -> Callable[[pathlib.Path], None]:
    def edit(path: pathlib.Path) -> None:
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest, indent=1) + "\n")

    return edit


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(size=8),
        lambda m: m.update(format="jpeg"),
        lambda m: m.update(more=1),
        lambda m: m.pop("splits"),
        lambda m: m.pop("sha256"),
        lambda m: m["splits"].pop("validation"),
        lambda m: m["splits"]["train"]["shards"].reverse(),
        lambda m: m["splits"].update(train=m["splits"]["validation"]),
        lambda m: m["files"].pop("labels.txt"),
    ],
)
def test_an_edited_manifest_is_refused(raw, tmp_path, capsys, change):
    copy = damaged(raw, tmp_path, MANIFEST, edited(change))
    with pytest.raises(UserError, match=r"manifest\.json was changed; prepare it again"):
        records.open_records(copy, "train")
    assert command.main(["prepare", f"--verify={copy}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "was changed" in line


@pytest.mark.parametrize("text", ["[]", "{}", "1", "null", '{"version": 2}', '{"version": "1"}'])
def test_another_version_is_refused(raw, tmp_path, text):
    copy = damaged(raw, tmp_path, MANIFEST, lambda path: path.write_text(text) and None)
    with pytest.raises(UserError, match=r"of version .*, read is 1; prepare it again"):
        records.open_records(copy, "train")


def test_a_folder_that_is_not_prepared_data_is_told_how_to_be(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json.*python -m alexnet_jax\.prepare"):
        records.open_records(tmp_path, "train")


def test_verify_reads_every_file_and_finds_nothing_wrong(raw, jpeg, capsys):
    for directory in (raw, jpeg):
        files = sorted(path.name for path in directory.iterdir() if path.name != MANIFEST)
        assert list(records.verify(directory)) == [""] * len(files)
        assert command.main(["prepare", f"--verify={directory}"]) == 0
        printed = capsys.readouterr()
        assert f"{len(files)} of {len(files)} files are as they were written" in printed.out
        assert not printed.err


def test_verify_names_everything_that_is_wrong(raw, tmp_path, capsys):
    copy = damaged(raw, tmp_path, SHARD, flip)
    remove(copy / "validation-00000.array_record")
    cut(copy / "labels.txt")
    assert command.main(["prepare", f"--verify={copy}"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for name in (SHARD, "validation-00000.array_record", "labels.txt"):
        assert any(name in line for line in lines)


def test_verify_goes_on_behind_a_file_that_the_disk_refuses(raw, tmp_path, monkeypatch, capsys):
    copy = damaged(raw, tmp_path, SHARD, flip)
    read = records.digest

    def refusing(path: pathlib.Path) -> str:
        if path.name == "labels.txt":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(records, "digest", refusing)
    assert command.main(["prepare", f"--verify={copy}"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert f"error: labels.txt cannot be read ({os.strerror(errno.EIO)})" in lines
    assert any(SHARD in line for line in lines)
    assert len(lines) == 2


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_the_statistics_are_those_a_survey_of_the_records_finds(raw, jpeg, tmp_path, kind):
    source = records.open_records({"raw": raw, "jpeg": jpeg}[kind], "train")
    _, statistics = survey.survey(source, SIZE, str(tmp_path), 2)
    for found, kept in zip(statistics, source.statistics, strict=True):
        assert found.tobytes() == kept.tobytes()


def test_training_needs_no_survey(raw, tmp_path, caplog):
    source = records.open_records(raw, "train")
    data = Data(source=f"records:{raw}", stored_size=SIZE, cache_dir=str(tmp_path / "cache"))
    same, statistics = survey.surveyed(source, data, Model())
    assert same is source
    assert statistics is source.statistics
    assert not (tmp_path / "cache").exists()
    pixels = [images.decode(source.read(i).data, "") for i in range(len(source))]
    expected_mean = np.mean(np.stack(pixels).astype(np.float64), axis=0)
    np.testing.assert_array_equal(statistics.mean_image, expected_mean.astype(np.float32))
    assert not caplog.text
    survey.surveyed(
        source, Data(data.source, stored_size=SIZE + 1, cache_dir=data.cache_dir), Model()
    )
    assert f"of {SIZE} pixels are enlarged to {SIZE + 1}" in caplog.text
    _, other = survey.surveyed(source, Data(stored_size=8, cache_dir=data.cache_dir), Model())
    assert other.mean_image.shape == (8, 8, 3)  # records of another size are surveyed
