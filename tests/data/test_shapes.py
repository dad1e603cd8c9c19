"""The built-in set `shapes` is reproducible, balanced, whole on disc, and no task for a pixel.

Figures are lighter than what surrounds them as often as darker, so a pixel's value says little;
classifiers of pixels must err on more than half of what they have not seen, chance being 0.9.
"""

import collections
import math
import pathlib

import numpy as np
import pytest
from PIL import Image

from alexnet_jax.data import shapes

SIDE = 32  # pixels of the squares that the pixel classifiers see


def square_pixels(picture: np.ndarray) -> np.ndarray:
    """The middle square of a picture at SIDE x SIDE pixels, flat float32."""
    image = Image.fromarray(picture)
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    box = (left, top, left + short, top + short)
    small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box)
    return np.asarray(small, np.float32).ravel()


def pixels_and_labels(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` pictures of a split: (count, 3072) float32, (count,) int."""
    pictures, labels = zip(*(shapes.draw(split, index) for index in range(count)), strict=True)
    return np.stack([square_pixels(picture) for picture in pictures]), np.array(labels)


def nearest_neighbours_error(
    known: np.ndarray, known_labels: np.ndarray, asked: np.ndarray, labels: np.ndarray, count: int
) -> float:
    distance = (known**2).sum(1) - 2 * asked @ known.T
    nearest = known_labels[np.argsort(distance, axis=1)[:, :count]]
    votes = (nearest[..., None] == np.arange(len(shapes.LABELS))).sum(1)
    return float((votes.argmax(1) != labels).mean())


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def logistic_regression(
    x: np.ndarray, labels: np.ndarray, decay: float
) -> tuple[np.ndarray, float]:
    """Gradient descent with momentum on the L2-penalised loss of linear scores.

    Returns:
      Weights (features, classes), and the last slope's norm as a fraction of the first one's.
    """
    truth = np.eye(len(shapes.LABELS), dtype=np.float32)[labels]
    weights = np.zeros((x.shape[1], truth.shape[1]), np.float32)
    velocity = np.zeros_like(weights)
    # A step of one over the steepest curvature of the loss cannot overshoot.
    direction = np.ones(x.shape[1], np.float32)
    for _ in range(10):
        direction = x.T @ (x @ direction)
        curvature = np.linalg.norm(direction) / len(x)
        direction /= np.linalg.norm(direction)
    rate = 1 / (curvature / 2 + decay)
    steepness = []
    for _ in range(300):
        slope = x.T @ (softmax(x @ weights) - truth) / len(x) + decay * weights
        steepness.append(np.linalg.norm(slope))
        velocity = 0.9 * velocity - rate * slope
        weights += velocity
    return weights, float(steepness[-1] / steepness[0])


@pytest.fixture(scope="module")
def some() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return *pixels_and_labels("train", 1500), *pixels_and_labels("validation", 300)


def test_an_image_depends_on_split_and_index_alone():
    first, label = shapes.draw("train", 7)
    shapes.draw("validation", 3)
    again, same_label = shapes.draw("train", 7)
    np.testing.assert_array_equal(first, again)
    assert label == same_label


@pytest.mark.parametrize("other", [("train", 17, 0), ("test", 7, 0), ("train", 7, 1)])
def test_another_index_split_or_seed_gives_another_image(other):
    assert not np.array_equal(shapes.draw("train", 7)[0], shapes.draw(*other)[0])


def test_a_figure_stands_out_and_is_as_often_darker_as_lighter():
    rng = np.random.default_rng(0)
    luminance = [shapes.palette(rng) @ (0.299, 0.587, 0.114) for _ in range(1000)]
    lighter = sum(figure - max(ground, patch) >= 0.35 for ground, patch, figure in luminance)
    darker = sum(min(ground, patch) - figure >= 0.35 for ground, patch, figure in luminance)
    assert lighter + darker == 1000
    assert abs(lighter - darker) < 5 * math.sqrt(1000)


def test_the_middle_is_as_often_darker_than_the_rest_as_lighter_in_every_class():
    """On the pictures themselves: a disc of half the short side against the corners."""
    lighter = np.zeros(len(shapes.LABELS), int)
    for index in range(40 * len(shapes.LABELS)):
        picture, label = shapes.draw("train", index)
        grey = picture @ np.array([0.299, 0.587, 0.114])
        y, x = (np.arange(side) - (side - 1) / 2 for side in grey.shape)
        distance = np.hypot(y[:, None], x) / min(grey.shape)
        lighter[label] += grey[distance < 0.25].mean() > grey[distance > 0.5].mean()
    assert (abs(lighter - 20) < 4 * math.sqrt(40 / 4)).all()  # of 40; four standard deviations


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="tuple"):
        shapes.draw("holdout", 0)


def test_images_are_8_bit_colour_of_many_sizes():
    pictures = [shapes.draw("train", index)[0] for index in range(60)]
    assert all(p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 for p in pictures)
    heights, widths = zip(*(picture.shape[:2] for picture in pictures), strict=True)
    assert min(heights + widths) >= 72
    assert max(heights + widths) <= 140
    assert len(set(zip(heights, widths, strict=True))) > 40
    assert any(h > w for h, w in zip(heights, widths, strict=True))
    assert any(h < w for h, w in zip(heights, widths, strict=True))


def test_there_are_at_least_ten_sorted_labels_and_every_split_holds_each_equally_often():
    assert len(shapes.LABELS) >= 10
    assert list(shapes.LABELS) == sorted(set(shapes.LABELS))
    labels = collections.Counter(shapes.draw("test", index)[1] for index in range(100))
    assert set(labels) == set(range(len(shapes.LABELS)))
    assert len(set(labels.values())) == 1
    assert shapes.SPLIT_SIZES == {"train": 5000, "validation": 1000, "test": 1000}
    assert all(size % len(shapes.LABELS) == 0 for size in shapes.SPLIT_SIZES.values())


def test_the_mean_colour_carries_no_class_information(some):
    known, known_labels, asked, labels = some
    known, asked = (x.reshape(len(x), -1, 3).mean(1) for x in (known, asked))
    classes = range(len(shapes.LABELS))
    centres = np.stack([known[known_labels == label].mean(0) for label in classes])
    guesses = ((asked[:, None] - centres) ** 2).sum(2).argmin(1)
    assert (guesses != labels).mean() > 0.75  # chance is 0.9


@pytest.mark.parametrize("count", [1, 3, 5, 10])
def test_nearest_neighbours_on_pixels_err_on_more_than_half(some, count):
    assert nearest_neighbours_error(*some, count) > 0.5


@pytest.mark.slow
def test_logistic_regression_on_pixels_errs_on_more_than_half():
    x, known_labels = pixels_and_labels("train", shapes.SPLIT_SIZES["train"])
    asked, labels = pixels_and_labels("validation", shapes.SPLIT_SIZES["validation"])
    mean, deviation = x.mean(0), x.std(0)
    x, asked = (x - mean) / deviation, (asked - mean) / deviation
    for decay in (0.1, 1.0, 10.0):
        weights, slope = logistic_regression(x, known_labels, decay)
        # The loss is convex: where its slope has gone, no other weights would do better. That it
        # beats chance by far on what it learnt from shows that labels and pictures belong together.
        assert slope < 0.15
        assert ((x @ weights).argmax(1) != known_labels).mean() < 0.82
        assert ((asked @ weights).argmax(1) != labels).mean() > 0.5


def test_the_set_on_disc_is_jpeg_files_under_their_labels(tmp_path: pathlib.Path):
    shapes.write_shapes(tmp_path / "cache" / "set", {"train": 100, "test": 10})
    files = sorted((tmp_path / "cache" / "set").rglob("*.jpg"), key=lambda file: file.name)
    assert len(files) == 110
    modes = set()
    for file in files:
        split, name, index = file.parts[-3], file.parts[-2], int(file.stem)
        drawn, label = shapes.draw(split, index)
        assert name == shapes.LABELS[label]
        with Image.open(file) as image:
            assert image.format == "JPEG"
            modes.add(image.mode)
            stored = np.asarray(image.convert("RGB"), float)
        assert stored.shape == drawn.shape
        assert abs(stored - drawn).mean() < 12  # of 255: what JPEG loses, not another picture
    assert modes == {"L", "RGB"}


def test_an_interrupted_write_leaves_nothing(tmp_path: pathlib.Path, monkeypatch):
    def draw(split: str, index: int) -> tuple[np.ndarray, int]:
        if index == 5:
            raise KeyboardInterrupt
        return np.zeros((8, 8, 3), np.uint8), 0

    monkeypatch.setattr(shapes, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        shapes.write_shapes(tmp_path / "set", {"train": 10})
    assert list(tmp_path.iterdir()) == []


def test_a_set_that_exists_is_left_alone(tmp_path: pathlib.Path):
    (tmp_path / "mark").touch()
    shapes.write_shapes(tmp_path, {"train": 10})
    assert [file.name for file in tmp_path.iterdir()] == ["mark"]


def test_a_writer_that_comes_second_keeps_the_first_ones_set(tmp_path: pathlib.Path, monkeypatch):
    directory = tmp_path / "set"
    draw = shapes.draw

    def draw_while_another_finishes(split: str, index: int) -> tuple[np.ndarray, int]:
        directory.mkdir(exist_ok=True)
        (directory / "mark").touch()
        return draw(split, index)

    monkeypatch.setattr(shapes, "draw", draw_while_another_finishes)
    shapes.write_shapes(directory, {"train": 1})
    assert [file.name for file in directory.iterdir()] == ["mark"]
    assert list(tmp_path.iterdir()) == [directory]


def test_a_failed_rename_is_reported(tmp_path: pathlib.Path, monkeypatch):
    def refuse(self: pathlib.Path, target: pathlib.Path) -> None:
        raise PermissionError(target)

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with pytest.raises(PermissionError):
        shapes.write_shapes(tmp_path / "set", {"train": 1})
    assert list(tmp_path.iterdir()) == []


def test_the_directory_is_named_after_the_version(tmp_path: pathlib.Path):
    assert shapes.shapes_directory(tmp_path).parent == tmp_path
    assert shapes.VERSION in shapes.shapes_directory(tmp_path).name
