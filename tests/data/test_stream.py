"""Batch n is a stretch of one endless stream: whoever reads it, from where, with what around it."""

import dataclasses
import gc
import itertools
import math
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from alexnet_jax.config import Data
from alexnet_jax.data import augment, images, sources, stream, survey, workers
from alexnet_jax.data.examples import Source
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.data.stream import Batch, Rows

EXAMPLES = 11
STORED, SIZE = 16, 13
FIELDS = {"image", "label", "offset", "mirror", "shift", "gain"}


@pytest.fixture(scope="module")
def paths(pictures, tmp_path_factory) -> list[pathlib.Path]:
    """Eleven pictures of two classes, lossless and STORED high, so that nothing is resampled."""
    root = tmp_path_factory.mktemp("images") / "train"
    paths = []
    for index in range(EXAMPLES):
        paths.append(root / ("ant" if index < 4 else "bee") / f"{index:02d}.png")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_bytes(pictures.encode(pictures.rough(STORED, STORED + index, index)))
    return paths


@pytest.fixture(scope="module")
def source(paths) -> Source:
    return sources.open_source(Data(source=f"folder:{paths[0].parents[2]}"), "train")


@pytest.fixture(scope="module")
def statistics(source, tmp_path_factory) -> Statistics:
    return survey.survey(source, STORED, str(tmp_path_factory.mktemp("cache")), 1)[1]


@pytest.fixture(scope="module")
def squares(paths) -> np.ndarray:
    """The middle of every picture, (EXAMPLES, STORED, STORED, 3), by Pillow and numpy alone."""
    result = []
    for path in paths:
        with Image.open(path) as image:
            left = (image.width - STORED) // 2
            result.append(np.asarray(image)[:, left : left + STORED])
    return np.stack(result)


@pytest.fixture(scope="module")
def read(source, statistics) -> Callable[..., list[Batch]]:
    """Batches `start` to `stop` of the training stream."""

    def read(
        start: int,
        stop: int,
        batch_size: int = 4,
        local: range | None = None,
        seed: int = 42,
        origin: int = 0,
        **data,
    ) -> list[Batch]:
        rows = Rows(batch_size, range(batch_size) if local is None else local)
        batches = stream.train_batches(
            source,
            statistics,
            Data(**{"workers": 2} | data),
            seed=seed,
            size=SIZE,
            rows=rows,
            start_step=start,
            stop_step=stop,
            origin=origin,
        )
        return list(batches)

    return read


def joined(batches: list[Batch]) -> Batch:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(one: Batch, other: Batch) -> None:
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].shape == other[name].shape, name
        assert one[name].tobytes() == other[name].tobytes(), name


def which(batch: Batch, squares: np.ndarray) -> list[int]:
    """Which example each row shows, by its pixels, with the crop and mirror the batch states."""
    found = []
    for image, (top, left), mirror in zip(batch["image"], batch["offset"], batch["mirror"]):
        views = squares[:, top : top + SIZE, left : left + SIZE]
        views = np.flip(views, axis=2) if mirror else views
        (index,) = np.flatnonzero((views == image).all(axis=(1, 2, 3)))
        found.append(int(index))
    return found


class Threads:
    """Threads that began after this."""

    def __init__(self) -> None:
        self.before = set(threading.enumerate())

    def __len__(self) -> int:
        return len(set(threading.enumerate()) - self.before)

    def end(self) -> bool:
        """Whether all are gone within five seconds."""
        deadline = time.monotonic() + 5
        while len(self) and time.monotonic() < deadline:
            time.sleep(0.01)
        return len(self) == 0


@pytest.fixture
def threads() -> Threads:
    return Threads()


@pytest.mark.parametrize(("size", "origin"), [(2, 12), (6, -12), (12, -48)])
def test_another_batch_size_goes_on_in_the_same_stream(size, origin, read):
    """From position 24 on: after six batches of four."""
    expected, first = joined(read(6, 12)), (24 - origin) // size
    assert_same(joined(read(first, first + 24 // size, size, origin=origin)), expected)


def test_a_batch_holds_what_it_says(read, squares):
    batch = joined(read(0, 11))
    assert set(batch) == FIELDS
    shapes = {name: (array.shape[1:], str(array.dtype)) for name, array in batch.items()}
    assert shapes == {
        "image": ((SIZE, SIZE, 3), "uint8"),
        "label": ((), "int32"),
        "offset": ((2,), "int32"),
        "mirror": ((), "bool"),
        "shift": ((3,), "float32"),
        "gain": ((), "float32"),
    }
    shown = which(batch, squares)
    np.testing.assert_array_equal(batch["label"], [0 if index < 4 else 1 for index in shown])
    assert set(batch["offset"].ravel().tolist()) == {0, 1, 2, 3}
    assert set(batch["mirror"].tolist()) == {False, True}


@pytest.mark.parametrize("batch_size", [1, 3, 4, 11, 25])
def test_every_epoch_holds_every_example_once_though_batches_straddle_epochs(
    read, squares, batch_size
):
    epochs = 4
    steps = math.ceil(epochs * EXAMPLES / batch_size)
    shown = which(joined(read(0, steps, batch_size)), squares)[: epochs * EXAMPLES]
    orders = [tuple(shown[e * EXAMPLES : (e + 1) * EXAMPLES]) for e in range(epochs)]
    for order in orders:
        assert sorted(order) == list(range(EXAMPLES))
    assert len(set(orders)) == epochs


def test_the_stream_is_the_same_in_batches_of_any_size(read):
    parts = [joined(read(0, 66 // batch_size, batch_size)) for batch_size in (1, 3, 6, 22, 66)]
    for part in parts[1:]:
        assert_same(parts[0], part)


def test_another_seed_gives_another_order_and_other_crops(read, squares):
    one, other = (joined(read(0, 3, 11, seed=seed)) for seed in (42, 43))
    assert which(one, squares) != which(other, squares)
    assert (one["offset"] != other["offset"]).any()
    assert (one["shift"] != other["shift"]).all()


@pytest.mark.parametrize(
    "machine",
    [
        {},
        {"workers": 1, "prefetch": 1},
        {"workers": 5, "prefetch": 3, "worker_kind": "threads"},
        {"workers": 2, "prefetch": 99},
        {"workers": 3, "worker_kind": "processes"},
    ],
    ids=str,
)
@pytest.mark.parametrize("start", [1, 5, 8])
def test_a_stream_begun_at_a_step_goes_on_as_the_undisturbed_one(read, machine, start):
    undisturbed = read(0, 9, crop_share=3)
    resumed = read(start, 9, crop_share=3, **machine)
    assert len(resumed) == 9 - start
    for one, other in zip(undisturbed[start:], resumed):
        assert_same(one, other)


def test_a_stream_far_out_starts_at_once(read, squares):
    """Epoch 90 of ImageNet's length is not reached by walking there."""
    step = 900_000
    (batch,) = read(step, step + 1, 11)
    # 900,000 batches of 11 are whole epochs, so this batch is one as well.
    assert sorted(which(batch, squares)) == list(range(EXAMPLES))


def test_a_finished_stream_is_empty(read):
    assert read(7, 7) == []


@pytest.mark.parametrize(
    "parts", [[range(0, 3), range(3, 6)], [range(0, 1), range(1, 4), range(4, 6)]]
)
@pytest.mark.parametrize("crop_share", [1, 4])
def test_processes_read_disjoint_rows_that_make_up_the_batch(read, parts, crop_share):
    whole = read(2, 8, 6, crop_share=crop_share)
    shares = [read(2, 8, 6, rows, crop_share=crop_share) for rows in parts]
    for batch, *pieces in zip(whole, *shares):
        assert_same(batch, joined(pieces))


def test_two_devices_that_need_the_same_rows_get_the_same_bytes(read):
    for one, other in zip(read(0, 4, 6, range(3, 6)), read(0, 4, 6, range(3, 6))):
        assert_same(one, other)


def test_shared_crops_follow_the_position_in_the_stream(read):
    batch = joined(read(1, 12, 6, crop_share=8))
    views = np.column_stack([batch["offset"], batch["mirror"]])
    runs = np.arange(6, 72) // 8
    for run in np.unique(runs):
        assert len(np.unique(views[runs == run], axis=0)) == 1
    assert len(np.unique(views, axis=0)) > 4
    assert len(np.unique(batch["shift"], axis=0)) == 66


def test_colour_shifts_spread_as_the_statistics_and_sigma_say(source, statistics):
    rows = Rows(600, range(600))
    sigma = 0.3
    batches = stream.train_batches(
        source,
        statistics,
        Data(colour_noise=sigma, workers=1),
        seed=1,
        size=SIZE,
        rows=rows,
        start_step=0,
        stop_step=5,
    )
    shift = joined(list(batches))["shift"]
    values, vectors = statistics.eigenvalues, statistics.eigenvectors
    expected = sigma**2 * (vectors * values) @ vectors.T  # the covariance of the shifts
    deviation = np.sqrt(np.diag(expected))
    covariance = np.cov(shift.T)
    np.testing.assert_allclose(
        covariance / np.outer(deviation, deviation),
        expected / np.outer(deviation, deviation),
        atol=0.1,
    )


def test_without_colour_noise_shifts_are_nothing_and_all_else_is_as_before(read):
    noisy, plain = read(0, 4), read(0, 4, colour_noise=0.0)
    for one, other in zip(noisy, plain):
        assert one["shift"].all()
        assert not other["shift"].any()
        assert_same(one | {"shift": other["shift"]}, other)
        np.testing.assert_array_equal(other["gain"], 1)


def test_colour_noise_ends_with_its_epoch_in_the_middle_of_a_batch(read):
    ending = joined(read(0, 7, colour_noise_epochs=2, colour_noise_divides=True))
    endless = joined(read(0, 7, colour_noise_divides=True))
    last = 2 * EXAMPLES
    assert last % 4
    np.testing.assert_array_equal(ending["shift"][:last], endless["shift"][:last])
    assert ending["shift"][:last].all()
    assert not ending["shift"][last:].any()
    np.testing.assert_array_equal(ending["gain"][last:], 1)
    np.testing.assert_array_equal(ending["gain"][:last], np.float32(1 / 1.1))
    for name in FIELDS - {"shift", "gain"}:
        np.testing.assert_array_equal(ending[name], endless[name])


@pytest.mark.parametrize("sigma", [0.1, 0.25])
def test_where_noise_divides_the_gain_is_one_over_one_plus_sigma(read, sigma):
    (divided,) = read(0, 1, colour_noise=sigma, colour_noise_divides=True)
    np.testing.assert_array_equal(divided["gain"], np.float32(1 / (1 + sigma)))
    (plain,) = read(0, 1, colour_noise=sigma)
    np.testing.assert_array_equal(plain["gain"], 1)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 11, 16])
def test_evaluation_shows_every_example_once_in_order_and_marks_padding(
    source, squares, batch_size
):
    rows = Rows(batch_size, range(batch_size))
    batches = list(stream.evaluation_batches(source, Data(workers=2), stored=STORED, rows=rows))
    assert len(batches) == math.ceil(EXAMPLES / batch_size)
    assert {len(array) for batch in batches for array in batch.values()} == {batch_size}
    whole = joined(batches)
    assert whole["valid"].tolist() == [place < EXAMPLES for place in range(len(whole["valid"]))]
    np.testing.assert_array_equal(whole["image"][whole["valid"]], squares)
    np.testing.assert_array_equal(whole["label"][whole["valid"]], [0] * 4 + [1] * 7)
    assert not whole["image"][~whole["valid"]].any()
    assert (whole["valid"].dtype, whole["label"].dtype) == (np.dtype(bool), np.dtype(np.int32))


@pytest.mark.parametrize("batch_size", [4, 6, 16])
def test_evaluating_processes_make_up_the_batches(source, batch_size):
    def read(local: range) -> list[Batch]:
        rows = Rows(batch_size, local)
        return list(stream.evaluation_batches(source, Data(workers=1), stored=STORED, rows=rows))

    middle = batch_size // 2
    whole = read(range(batch_size))
    for batch, *halves in zip(
        whole, read(range(middle)), read(range(middle, batch_size)), strict=True
    ):
        assert_same(batch, joined(halves))


def test_images_of_other_sizes_become_squares_and_crops(pictures, statistics, tmp_path):
    """The whole way for pictures that are resampled: decode, square, cut."""
    paths = pictures.folder(tmp_path / "train", {"ant": 3, "bee": 2})
    source = sources.open_source(Data(source=f"folder:{tmp_path}"), "train")
    squares = np.stack(
        [images.square(images.decode(path.read_bytes(), "x"), STORED) for path in paths]
    )
    rows = Rows(5, range(5))
    (batch,) = stream.train_batches(
        source, statistics, Data(), seed=0, size=SIZE, rows=rows, start_step=0, stop_step=1
    )
    assert sorted(which(batch, squares)) == [0, 1, 2, 3, 4]
    (batch,) = stream.evaluation_batches(source, Data(), stored=STORED, rows=rows)
    np.testing.assert_array_equal(batch["image"], squares)


@pytest.mark.parametrize("damage", [b"", b"not an image", None])
def test_a_file_that_breaks_after_the_survey_is_an_error_with_its_name(
    pictures, statistics, tmp_path, threads, damage
):
    paths = pictures.folder(tmp_path / "train", {"ant": 6})
    source = sources.open_source(Data(source=f"folder:{tmp_path}"), "train")
    paths[4].write_bytes(paths[4].read_bytes()[:200] if damage is None else damage)
    rows = Rows(3, range(3))
    training = stream.train_batches(
        source, statistics, Data(), seed=0, size=SIZE, rows=rows, start_step=0, stop_step=2
    )
    evaluation = stream.evaluation_batches(source, Data(), stored=STORED, rows=rows)
    for batches in (training, evaluation):
        with pytest.raises(images.ImageError, match=r"004\.png"):
            list(batches)
        with pytest.raises(StopIteration):
            next(batches)
        assert threads.end()


@pytest.fixture
def endless(source, statistics) -> Callable[[], Iterator[Batch]]:
    """Opens a stream that nobody reads to its end, of three workers."""
    return lambda: stream.train_batches(
        source,
        statistics,
        Data(workers=3),
        seed=0,
        size=SIZE,
        rows=Rows(4, range(4)),
        start_step=0,
        stop_step=10**9,
    )


def test_threads_work_ahead_and_end_when_the_stream_is_closed(endless, threads):
    batches = endless()
    next(batches)
    assert 0 < len(threads) <= 3
    batches.close()
    assert threads.end()


def test_threads_end_when_the_loop_is_left_and_the_stream_dropped(endless, threads):
    for _ in itertools.islice(endless(), 3):
        assert len(threads)
    gc.collect()
    assert threads.end()


def test_threads_end_with_the_stream_though_somebody_still_holds_it(source, threads):
    rows = Rows(2, range(2))
    batches = stream.evaluation_batches(source, Data(workers=3), stored=STORED, rows=rows)
    assert len(list(batches)) == 6
    assert threads.end()
    assert next(batches, None) is None


def test_permutations_are_permutations_and_functions_of_seed_and_epoch():
    orders = {(s, e): stream.permutation(s, e, 997) for s in (0, 1, 2**32 - 1) for e in (0, 1, 300)}
    for order in orders.values():
        np.testing.assert_array_equal(np.sort(order), np.arange(997))
    for one, other in itertools.combinations(orders.values(), 2):
        assert (one == other).sum() < 10  # 1 on average
    kept = stream.permutation(0, 1, 997).copy()
    stream.permutation.cache_clear()
    np.testing.assert_array_equal(stream.permutation(0, 1, 997), kept)


def test_order_crops_and_colours_do_not_share_their_random_numbers():
    streams = [augment.CROP_STREAM, augment.COLOUR_STREAM, augment.ORDER_STREAM]
    words = [augment.random_blocks(42, number, 0, 1000).ravel() for number in streams]
    assert len(np.unique(np.concatenate(words))) == 3 * 4000


@pytest.mark.parametrize("asked", [1, 3])
def test_workers_are_as_many_as_asked_for(asked):
    assert workers.count(asked) == asked


@pytest.mark.parametrize(
    ("workers_", "source", "images", "kind"),
    [
        (1, "folder:x", 10**6, "threads"),
        (64, "folder:x", 10**6, "processes"),
        (64, "folder:x", 400, "threads"),  # done before processes have started
        (2, "records:x", 10**6, "processes"),
        (2, "records:x", 400, "threads"),
    ],
)
def test_workers_are_of_the_kind_that_suits_the_stream(workers_, source, images, kind):
    data = Data(workers=workers_, source=source)
    assert workers.kind(data, images) == kind
    for asked in ("threads", "processes"):
        told = dataclasses.replace(data, worker_kind=asked)
        assert workers.kind(told, images) == asked


@pytest.mark.parametrize(
    ("limit", "expected"), [("250000 100000", 3), ("50000 100000", 1), ("max 100000", 64), ("", 64)]
)
def test_workers_are_one_a_core_or_what_a_container_may_use(monkeypatch, tmp_path, limit, expected):
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(workers, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda process: range(64), raising=False)
    assert workers.count(0) == expected


def test_workers_are_at_least_one_by_themselves():
    assert workers.count(0) >= 1
