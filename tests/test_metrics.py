"""Loss and errors against numpy's sort, and what padding, ties and broken rows count for."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from alexnet_jax import metrics


def total(log_probs, labels, valid=None) -> list[float]:
    found = metrics.sums(
        jnp.asarray(log_probs, jnp.float32),
        jnp.asarray(labels, jnp.int32),
        None if valid is None else jnp.asarray(valid),
    )
    return [float(value) for value in found]


def by_sorting(log_probs: np.ndarray, labels: np.ndarray) -> list[float]:
    """Loss, top-1, top-5 and count from a stable sort by descending probability."""
    order = np.argsort(-log_probs, axis=1, kind="stable")
    place = np.argmax(order == labels[:, None], axis=1)
    loss = -sum(row[label] for row, label in zip(log_probs, labels))
    return [loss, np.sum(place == 0), np.sum(place < 5), len(labels)]


@pytest.mark.parametrize("classes", [2, 4, 5, 6, 30])
def test_sums_are_those_of_a_stable_sort_ties_and_all(classes):
    """Whole numbers of a small range, so that most rows have ties; few classes: top-n."""
    rng = np.random.default_rng(classes)
    log_probs = -rng.integers(0, 4, (60, classes)).astype(float)
    labels = rng.integers(0, classes, 60)
    assert total(log_probs, labels) == by_sorting(log_probs, labels)


def test_of_equal_probabilities_the_lower_class_comes_first():
    flat = np.zeros((8, 8))
    found = [total(flat[:1], [label])[1:3] for label in range(8)]
    assert found == [[1, 1], *[[0, 1]] * 4, *[[0, 0]] * 3]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_padding_rows_count_for_nothing_whatever_they_hold(poison):
    rng = np.random.default_rng(1)
    log_probs, labels = rng.standard_normal((4, 7)).astype(np.float32), np.array([6, 0, 3, 3])
    expected = pytest.approx(total(log_probs, labels), rel=1e-6)  # sums in another order
    padded = np.concatenate([log_probs, np.full((3, 7), poison)])
    valid = [True] * 4 + [False] * 3
    assert total(padded, [*labels, 2, 7_000, -9_000], valid) == expected
    assert total(padded[::-1], [-1, 7_000, 2, *labels[::-1]], valid[::-1]) == expected


def test_a_batch_of_padding_alone_sums_to_zero():
    assert total(np.full((2, 3), np.nan), [0, 1], [False, False]) == [0, 0, 0, 0]


@pytest.mark.parametrize(("place", "classes"), [(0, 7), (1, 7), (6, 7), (0, 3), (2, 3)])
def test_a_row_with_a_value_that_is_not_a_number_is_never_right(place, classes):
    row = np.zeros((1, classes))
    row[0, place] = np.nan
    loss, top1, top5, count = total(row, [0])
    assert (top1, top5, count) == (0, 0, 1)
    assert np.isnan(loss) == (place == 0)
    logits = np.zeros((1, classes), np.float32)
    logits[0, place] = np.nan
    assert total(metrics.log_probabilities(jnp.asarray(logits)), [0])[1:] == [0, 0, 1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_log_probabilities_are_float32_and_exact_for_the_logits_given(dtype):
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((5, 9)) * 30, dtype)
    found = metrics.log_probabilities(logits)
    assert found.dtype == jnp.float32
    expected = oracle.log_softmax(np.asarray(logits, float))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_huge_logits_give_finite_losses():
    log_probs = metrics.log_probabilities(jnp.asarray([[1e4, 0.0, -1e4]]))
    np.testing.assert_allclose(total(log_probs, [1]), [1e4, 0, 1, 1])


def test_errors_are_fractions_of_the_examples_counted():
    found = metrics.errors(metrics.Sums(*map(jnp.float32, (12.0, 2.0, 5.0, 8.0))))
    assert found == {"loss": 1.5, "top1_error": 0.75, "top5_error": 0.375}
    found = metrics.errors(metrics.Sums(*map(jnp.float32, (0.0, 945.0, 999.0, 1000.0))))
    assert (found["top1_error"], found["top5_error"]) == (0.055, 0.001)
