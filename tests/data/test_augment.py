"""Chance is fair, a function of seed and position alone, and colours move as was published."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from alexnet_jax.config import Data
from alexnet_jax.data import augment
from alexnet_jax.data.statistics import Statistics

MARGIN = 32
MANY = 40_000
# Of ImageNet, published with cuda-convnet2: square roots of the eigenvalues, and their vectors.
ROOTS = [19.7208, 37.0939, 121.7801]
VECTORS = [
    [0.41796, -0.81698, 0.39731],
    [-0.71258, -0.02354, 0.70120],
    [-0.56351, -0.57618, -0.59200],
]


@pytest.fixture(scope="module")
def many() -> augment.Draws:
    return augment.draw(42, 0, MANY, MARGIN, Data())


@pytest.fixture
def imagenet() -> Statistics:
    return Statistics(
        mean_image=np.zeros((9, 9, 3), np.float32),
        channel_std=np.ones(3, np.float32),
        eigenvalues=np.square(ROOTS).astype(np.float32),
        eigenvectors=np.array(VECTORS, np.float32).T,
    )


def assert_same(one: augment.Draws, other: augment.Draws) -> None:
    for name, left, right in zip(one._fields, one, other):
        assert left.dtype == right.dtype, name
        np.testing.assert_array_equal(left, right, err_msg=name)


def joined(parts: list[augment.Draws]) -> augment.Draws:
    return augment.Draws(*(np.concatenate(field) for field in zip(*parts)))


def chi_square(values: np.ndarray, kinds: int) -> float:
    """How far `values` of 0..kinds - 1 are from being equally frequent; about kinds - 1 if so."""
    counts = np.bincount(values, minlength=kinds)
    assert len(counts) == kinds
    expected = len(values) / kinds
    return float(((counts - expected) ** 2 / expected).sum())


def uncorrelated(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the correlation is what chance leaves of none, five standard deviations."""
    correlation = np.corrcoef(one.astype(float), other.astype(float))[0, 1]
    return abs(correlation) < 5 / math.sqrt(len(one))


def uniform(values: np.ndarray, kinds: int) -> bool:
    """Whether chi square is within five standard deviations of its mean."""
    return abs(chi_square(values, kinds) - (kinds - 1)) < 5 * math.sqrt(2 * (kinds - 1))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("margin", [1, 3, 7, 32])
def test_offsets_are_equally_likely_from_0_to_the_margin_both_included(axis, margin):
    offset = augment.draw(7, 0, MANY, margin, Data()).offset[:, axis]
    assert (offset.min(), offset.max()) == (0, margin)
    assert uniform(offset, margin + 1)


def test_a_square_no_larger_than_the_crop_leaves_nothing_to_chance():
    assert not augment.draw(7, 0, 50, 0, Data()).offset.any()


def test_half_of_the_images_are_mirrored(many):
    assert many.mirror.dtype == bool
    assert uniform(many.mirror.astype(int), 2)


def test_top_left_and_mirror_do_not_depend_on_each_other_or_on_the_image_before(many):
    fields = [many.offset[:, 0], many.offset[:, 1], many.mirror, *many.colour.T]
    for one, other in itertools.combinations(fields, 2):
        assert uncorrelated(one, other)
    for one, other in itertools.product(fields, fields):
        assert uncorrelated(one[1:], other[:-1])


def test_all_views_of_an_image_are_equally_likely():
    draws = augment.draw(3, 0, MANY, 3, Data())
    views = draws.offset[:, 0] * 8 + draws.offset[:, 1] * 2 + draws.mirror
    assert uniform(views, 4 * 4 * 2)


@pytest.mark.parametrize("data", [Data(), Data(crop_share=32)], ids=["each", "shared"])
@pytest.mark.parametrize("start", [0, 5, 1000, 90 * 1_281_167, 2**40])
def test_a_draw_depends_on_its_position_and_not_on_its_batch(data, start):
    count = 70
    whole = augment.draw(42, start, count, MARGIN, data)
    single = [augment.draw(42, start + i, 1, MARGIN, data) for i in range(count)]
    assert_same(whole, joined(single))
    halves = [augment.draw(42, start + i, 35, MARGIN, data) for i in (0, 35)]
    assert_same(whole, joined(halves))


def test_another_seed_or_place_gives_other_draws(many):
    for other in (
        augment.draw(43, 0, 500, MARGIN, Data()),
        augment.draw(42, 1, 500, MARGIN, Data()),
    ):
        assert (other.offset != many.offset[:500]).mean() > 0.9
        assert 0.4 < (other.mirror != many.mirror[:500]).mean() < 0.6
        assert (other.colour != many.colour[:500]).all()


@pytest.mark.parametrize("start", [0, 32, 50, 63])
def test_a_shared_crop_holds_for_32_positions_counted_from_the_first_of_the_stream(start):
    draws = augment.draw(42, start, 3200, MARGIN, Data(crop_share=32))
    runs = np.arange(start, start + 3200) // 32
    changes = np.diff(runs) > 0
    views = np.column_stack([draws.offset, draws.mirror])
    changed = (np.diff(views, axis=0) != 0).any(axis=1)
    assert not changed[~changes].any()
    assert changed[changes].mean() > 0.95  # 2177 of 2178 on average
    assert len(np.unique(draws.offset[:, 0])) > 25


def test_colour_noise_is_never_shared():
    shared = augment.draw(42, 10, 200, MARGIN, Data(crop_share=32))
    each = augment.draw(42, 10, 200, MARGIN, Data())
    np.testing.assert_array_equal(shared.colour, each.colour)
    assert len(np.unique(shared.colour)) == shared.colour.size


def test_without_random_crops_the_centre_is_cut_and_mirrors_are_as_before(many):
    draws = augment.draw(42, 0, 100, 33, Data(random_crop=False))
    np.testing.assert_array_equal(draws.offset, np.full((100, 2), 16))
    np.testing.assert_array_equal(draws.mirror, many.mirror[:100])


def test_without_mirroring_nothing_is_mirrored_and_crops_are_as_before(many):
    draws = augment.draw(42, 0, 100, MARGIN, Data(mirror=False))
    assert not draws.mirror.any()
    np.testing.assert_array_equal(draws.offset, many.offset[:100])


@pytest.mark.parametrize("column", [0, 1, 2])
def test_colour_draws_are_standard_normal(many, column):
    values = many.colour[:, column]
    deviation = 1 / math.sqrt(MANY)
    assert abs(values.mean()) < 5 * deviation
    assert abs(values.var() - 1) < 5 * math.sqrt(2) * deviation
    assert abs((values**3).mean()) < 5 * math.sqrt(15) * deviation
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96) * deviation
    assert scipy.stats.kstest(values, "norm").pvalue > 1e-4


def test_colour_shift_is_the_published_formula(imagenet):
    normals = np.random.default_rng(0).standard_normal((20, 3))
    shift = augment.colour_shift(normals, imagenet, 0.1)
    assert shift.dtype == np.float32
    for row, alphas in enumerate(normals):
        for channel in range(3):
            expected = sum(
                0.1 * alpha * root * vector[channel]
                for alpha, root, vector in zip(alphas, ROOTS, VECTORS)
            )
            assert shift[row, channel] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_colour_shifts_spread_as_the_published_spectrum_says(many, imagenet):
    shift = augment.colour_shift(many.colour, imagenet, 0.1)
    for channel in range(3):
        terms = ((v[channel] * root) ** 2 for v, root in zip(VECTORS, ROOTS))
        assert shift[:, channel].std() == pytest.approx(0.1 * math.sqrt(sum(terms)), rel=0.02)
    assert 6 < shift.std() < 9  # grey levels: some, not a thousand


def test_no_sigma_no_shift(many, imagenet):
    assert not augment.colour_shift(many.colour[:9], imagenet, 0.0).any()


def test_ten_crops_are_the_corners_and_the_centre_and_their_mirror_images():
    places = {(0, 0), (0, 32), (16, 16), (32, 0), (32, 32)}
    crops = augment.test_crops(32, 10)
    assert crops.shape == (10, 3)
    expected = {(*place, mirror) for place in places for mirror in (0, 1)}
    assert {tuple(row) for row in crops.tolist()} == expected


def test_one_crop_is_the_centre_as_it_is():
    assert augment.test_crops(32, 1).tolist() == [[16, 16, 0]]
    assert augment.test_crops(29, 1).tolist() == [[14, 14, 0]]  # 256 to 227
