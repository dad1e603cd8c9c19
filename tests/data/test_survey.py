"""What a survey finds is what numpy finds, whoever counts; and broken images are never silent."""

import dataclasses
import logging
import os
import pathlib
import threading
import weakref

import numpy as np
import pytest

from alexnet_jax.config import Data, Model
from alexnet_jax.data import examples, images, sources, statistics, survey
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.errors import UserError

SIZE = 16
COUNTS = {"ant": 70, "bee": 50, "cat": 30}  # more than one chunk of work


@pytest.fixture(scope="module")
def root(pictures, tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("images")
    pictures.folder(root / "train", COUNTS)
    return root


@dataclasses.dataclass
class Counting:
    """A source that counts how often it is read."""

    source: examples.Source
    reads: int = 0

    def __getattr__(self, name: str):
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> examples.Example:
        self.reads += 1
        return self.source.read(index)


def look(
    root: pathlib.Path, cache: pathlib.Path, workers: int = 2
) -> tuple[examples.Source, Statistics, int]:
    """The survey of a folder's training split, and how many images it read for it."""
    source = Counting(sources.open_source(Data(source=f"folder:{root}"), "train"))
    whole, statistics = survey.survey(source, SIZE, str(cache), workers)
    return whole, statistics, source.reads


def squares(source: examples.Source, size: int = SIZE) -> np.ndarray:
    """Every image of a source, (n, size, size, 3) float64."""
    decoded = (images.decode(source.read(i).data, "x") for i in range(len(source)))
    return np.stack([images.square(pixels, size) for pixels in decoded]).astype(np.float64)


def assert_right(statistics: Statistics, pixels: np.ndarray) -> None:
    """The statistics of `pixels`, (n, s, s, 3), by numpy in double precision."""
    expected = pixels.mean(axis=0).astype(np.float32)
    np.testing.assert_array_equal(statistics.mean_image, expected)
    flat = pixels.reshape(-1, 3)
    np.testing.assert_allclose(statistics.channel_std, flat.std(axis=0), rtol=1e-6)
    values, vectors = np.linalg.eigh(np.cov(flat.T, bias=True))
    np.testing.assert_allclose(statistics.eigenvalues, values, rtol=1e-5)
    cosines = (statistics.eigenvectors * vectors).sum(axis=0)  # in columns, up to sign
    np.testing.assert_allclose(abs(cosines), 1, atol=1e-5)
    assert all(field.dtype == np.float32 for field in statistics)


def assert_same(one: Statistics, other: Statistics) -> None:
    for left, right in zip(one, other):
        assert left.tobytes() == right.tobytes()


def test_statistics_are_those_of_the_decoded_squares(root, tmp_path):
    source, statistics, reads = look(root, tmp_path)
    assert len(source) == reads == sum(COUNTS.values())
    assert_right(statistics, squares(source))


def test_the_spectrum_of_correlated_channels_is_found(pictures, tmp_path):
    """Pictures whose channels go together, each by its own amount, have a known first axis."""
    (tmp_path / "set/train/one").mkdir(parents=True)
    axis = np.array([1.0, 0.5, -0.25])
    for index in range(9):
        wave = pictures.rough(SIZE, SIZE, index)[..., :1].astype(float) - 128
        noise = pictures.rough(SIZE, SIZE, 100 + index) / 32.0
        pixels = np.clip(110 + 0.7 * wave * axis + noise, 0, 255).astype(np.uint8)
        (tmp_path / f"set/train/one/{index}.png").write_bytes(pictures.encode(pixels))
    source, statistics, _ = look(tmp_path / "set", tmp_path / "cache")
    assert_right(statistics, squares(source))
    first = statistics.eigenvectors[:, -1]
    assert abs(first @ axis) / np.linalg.norm(axis) == pytest.approx(1, abs=1e-3)
    assert statistics.eigenvalues[-1] > 100 * statistics.eigenvalues[0]


def test_a_colourless_set_has_no_channel_to_divide_by_zero(pictures, tmp_path):
    (tmp_path / "set/train/one").mkdir(parents=True)
    for index in range(3):
        grey = np.full((SIZE, SIZE, 3), 77, np.uint8)
        (tmp_path / f"set/train/one/{index}.png").write_bytes(pictures.encode(grey))
    _, statistics, _ = look(tmp_path / "set", tmp_path / "cache")
    assert (statistics.channel_std > 0).all()
    np.testing.assert_array_equal(statistics.eigenvalues, 0)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_statistics_are_the_same_to_the_bit_for_any_number_of_workers(root, tmp_path, workers):
    _, alone, _ = look(root, tmp_path / "alone", 1)
    _, statistics, reads = look(root, tmp_path / "together", workers)
    assert reads == sum(COUNTS.values())
    assert_same(statistics, alone)


def test_results_do_not_pile_up_behind_a_slow_image(root, tmp_path, monkeypatch):
    """Sums of 256x256 pixels take 1.6 MB."""
    monkeypatch.setattr(survey, "CHUNK", 1)
    source = sources.open_source(Data(source=f"folder:{root}"), "train")
    others, alive, most = threading.Barrier(2), weakref.WeakSet(), []

    class Sums(statistics.Sums):
        def __init__(self, size: int):
            super().__init__(size)
            alive.add(self)

    class Slow(Counting):
        def read(self, index: int) -> examples.Example:
            if index in (0, len(self) - 1):
                others.wait(300)  # the first image is there when the last is
            most.append(len(alive))
            return super().read(index)

    monkeypatch.setattr(survey, "Sums", Sums)
    survey.survey(Slow(source), SIZE, str(tmp_path), 2)
    assert len(most) == len(source)
    assert max(most) <= 2 + 2  # the total, one a worker, and one being let go


def test_a_second_survey_reads_no_image_and_finds_the_same(root, tmp_path):
    _, first, _ = look(root, tmp_path)
    _, second, reads = look(root, tmp_path)
    assert reads == 0
    assert_same(first, second)


def test_a_survey_is_kept_for_every_user_of_the_cache(root, tmp_path):
    before = os.umask(0o022)
    try:
        look(root, tmp_path)
    finally:
        os.umask(before)
    (kept,) = (tmp_path / "surveys").iterdir()
    assert kept.stat().st_mode & 0o777 == 0o644


def test_another_size_is_another_survey(root, tmp_path):
    source = sources.open_source(Data(source=f"folder:{root}"), "train")
    for size in (SIZE, SIZE - 3):
        _, statistics = survey.survey(source, size, str(tmp_path), 1)
        assert_right(statistics, squares(source, size))


def test_statistics_come_from_the_training_split_alone(pictures, tmp_path):
    root = tmp_path / "set"
    pictures.folder(root / "train", {"ant": 3, "bee": 4}, seed=1)
    dark = pictures.encode(np.zeros((SIZE, SIZE, 3), np.uint8))
    for split in ("val", "test"):
        for path in pictures.folder(root / split, {"ant": 2, "bee": 2}):
            path.write_bytes(dark)
    data = Data(source=f"folder:{root}", stored_size=SIZE, cache_dir=str(tmp_path / "cache"))

    def opened(split: str) -> tuple[examples.Source, Statistics]:
        return survey.surveyed(sources.open_source(data, split), data, Model(input_size=13))

    source, statistics = opened("train")
    assert len(source) == 7
    assert_right(statistics, squares(source))
    validation, other = opened("validation")
    assert len(validation) == 4
    assert not other.mean_image.any()


def test_of_class_folders_alone_only_the_training_part_counts(pictures, tmp_path):
    pictures.folder(tmp_path / "set", {"ant": 10, "bee": 20})
    data = Data(source=f"folder:{tmp_path / 'set'}", cache_dir=str(tmp_path / "cache"))
    train = sources.open_source(data, "train")
    assert len(train) == 18
    _, statistics = survey.survey(train, SIZE, str(tmp_path / "cache"), 2)
    assert_right(statistics, squares(train))


def test_the_stored_size_follows_the_input(root, tmp_path):
    data = Data(source=f"folder:{root}", cache_dir=str(tmp_path))
    source = sources.open_source(data, "train")
    _, statistics = survey.surveyed(source, data, Model(input_size=14))
    assert statistics.mean_image.shape == (16, 16, 3)  # 256 * 14 / 224


@pytest.fixture
def partly_broken(pictures, tmp_path) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """A folder of 5 + 6 images, and the two and one of them that are broken."""
    paths = pictures.folder(tmp_path / "set/train", {"ant": 5, "bee": 6})
    broken = [paths[0], paths[3], paths[7]]
    broken[0].write_bytes(b"")
    broken[1].write_bytes(b"not an image at all")
    broken[2].write_bytes(broken[2].read_bytes()[:300])
    return tmp_path / "set", broken


def test_broken_images_are_counted_named_and_left_out_in_every_run(partly_broken, tmp_path, caplog):
    root, broken = partly_broken
    for first in (True, False):
        caplog.clear()
        source, statistics, reads = look(root, tmp_path / "cache")
        assert (reads > 0) == first
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert "3 of 11" in warnings[0]
        for path in broken:
            assert sum(str(path) in warning for warning in warnings) == 1
        (kept,) = (tmp_path / "cache" / "surveys").iterdir()
        assert warnings[4:] == [f"(remembered in {kept}; remove it to have them read again)"]
        names = [source.read(index).name for index in range(len(source))]
        assert len(names) == len(set(names)) == 8
        assert not set(names) & {str(path) for path in broken}
        assert [source.read(i).label for i in range(8)] == [0] * 3 + [1] * 5
        np.testing.assert_array_equal(source.targets, [0] * 3 + [1] * 5)
        assert_right(statistics, squares(source))


def test_whole_images_are_no_reason_to_warn(root, tmp_path, caplog):
    look(root, tmp_path)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_leaving_images_out_changes_the_fingerprint(partly_broken, tmp_path):
    root, _ = partly_broken
    source, _, _ = look(root, tmp_path / "cache")
    assert (
        source.fingerprint
        != sources.open_source(Data(source=f"folder:{root}"), "train").fingerprint
    )


def test_a_class_without_one_whole_image_is_an_error_in_every_run(pictures, tmp_path):
    paths = pictures.folder(tmp_path / "set/train", {"ant": 3, "bee": 2, "cat": 3})
    for path in paths[3:5]:
        path.write_bytes(b"broken")
    for _ in range(2):
        with pytest.raises(UserError, match="bee"):
            look(tmp_path / "set", tmp_path / "cache")


def test_not_one_whole_image_at_all_is_an_error_that_names_one(pictures, tmp_path):
    paths = pictures.folder(tmp_path / "set/train", {"ant": 2})
    for path in paths:
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"none of 2 .*000\.png"):
        look(tmp_path / "set", tmp_path / "cache")


@pytest.mark.parametrize("decoder", ["PIL", "simplejpeg"])
def test_another_decoder_looks_again_at_what_was_broken(decoder, root, tmp_path, monkeypatch):
    _, _, reads = look(root, tmp_path)
    assert look(root, tmp_path)[2] == 0
    monkeypatch.setattr(f"{decoder}.__version__", "99.9")
    assert look(root, tmp_path)[2] == reads > 0


def test_a_changed_file_is_surveyed_again(pictures, tmp_path):
    paths = pictures.folder(tmp_path / "set/train", {"ant": 4, "bee": 4})
    _, before, _ = look(tmp_path / "set", tmp_path / "cache")
    paths[2].write_bytes(pictures.encode(pictures.rough(40, 30, 99)))
    source, after, reads = look(tmp_path / "set", tmp_path / "cache")
    assert reads == 8
    assert (after.mean_image != before.mean_image).any()
    assert_right(after, squares(source))


def test_a_file_of_the_same_size_but_another_time_is_surveyed_again(pictures, tmp_path):
    path, *_ = pictures.folder(tmp_path / "set/train", {"ant": 4})
    look(tmp_path / "set", tmp_path / "cache")
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert look(tmp_path / "set", tmp_path / "cache")[2] == 4


def test_a_removed_and_an_added_file_are_noticed(pictures, tmp_path):
    paths = pictures.folder(tmp_path / "set/train", {"ant": 4})
    look(tmp_path / "set", tmp_path / "cache")
    paths[1].unlink()
    source, statistics, reads = look(tmp_path / "set", tmp_path / "cache")
    assert reads == 3
    assert_right(statistics, squares(source))
    paths[1].with_name("new.png").write_bytes(pictures.encode(pictures.rough(20, 20)))
    assert look(tmp_path / "set", tmp_path / "cache")[2] == 4


def test_a_cache_folder_that_cannot_be_written_is_said_before_any_image_is_read(root, tmp_path):
    (tmp_path / "file").touch()
    source = Counting(sources.open_source(Data(source=f"folder:{root}"), "train"))
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        survey.survey(source, SIZE, str(tmp_path / "file" / "cache"), 1)
    assert source.reads == 0


@pytest.mark.parametrize("kept", [0, 1, 100, 2000, -10])
def test_a_truncated_cache_file_is_reported_and_the_survey_repeated(root, tmp_path, caplog, kept):
    _, first, _ = look(root, tmp_path)
    (file,) = (tmp_path / "surveys").iterdir()
    file.write_bytes(file.read_bytes()[:kept])
    _, second, reads = look(root, tmp_path)
    assert reads == sum(COUNTS.values())
    assert str(file) in caplog.text
    assert_same(first, second)
    assert look(root, tmp_path)[2] == 0  # mended


def test_damage_in_a_cache_file_never_passes_for_statistics(root, tmp_path):
    _, first, _ = look(root, tmp_path)
    (file,) = (tmp_path / "surveys").iterdir()
    whole = file.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 12):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        file.write_bytes(damaged)
        _, statistics, _ = look(root, tmp_path)
        assert_same(first, statistics)


def test_nothing_but_the_survey_is_left_in_the_cache(root, tmp_path):
    look(root, tmp_path)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".npz"]
