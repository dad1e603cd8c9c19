"""The update against numpy; schedules against published figures and closed forms."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax import checkpoint
from alexnet_jax.config import Optim, Train
from alexnet_jax.train import optim
from alexnet_jax.train.calendar import Calendar, make_calendar
from alexnet_jax.train.optim import Plateau

N, B = 1000, 10  # examples in an epoch and in a batch: 100 steps an epoch


def rates_at(schedule: optim.Schedule, step: int, scale: float = 1.0) -> dict[str, float]:
    rates = schedule(jnp.int32(step), jnp.float32(scale))
    assert all(rate.dtype == jnp.float32 and rate.shape == () for rate in rates.values())
    return {name: float(rate) for name, rate in rates.items()}


def kernel_rates(schedule: optim.Schedule, steps: list[int]) -> list[float]:
    return [rates_at(schedule, step)["kernel"] for step in steps]


# ------------------------------------------------------------------------------------ the update


def test_every_layer_moves_by_its_own_rate_also_those_that_share_anothers():
    """conv6 takes conv5's entry, and fc4, figure 1's last layer, fc8's."""
    layer_rates = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    expected = {"conv1": 0.1, "conv5": 0.5, "conv6": 0.5, "fc4": 0.8, "fc8": 0.8}
    params = {layer: {"kernel": jnp.ones(2), "bias": jnp.ones(2)} for layer in expected}
    settings = Optim(layer_rates=layer_rates, weight_decay=0.0)
    update = optim.make_optimizer(settings)
    given = {"kernel": jnp.float32(1), "bias": jnp.float32(2)}
    rates = optim.own_rates(settings, given, params)
    moved, _ = update.update(params, update.init(params), params, rates=rates)
    for layer, rate in expected.items():
        np.testing.assert_allclose(moved[layer]["kernel"], [-rate] * 2, rtol=1e-6)
        np.testing.assert_allclose(moved[layer]["bias"], [-2 * rate] * 2, rtol=1e-6)


@pytest.mark.parametrize("kernels", ["native", "XLA's", "a TPU's", "a GPU's"], indirect=True)
def test_the_update_is_the_papers_over_steps_of_changing_rates(kernels):
    """v = .9 v - .0005 rate w - rate g; biases: no decay; a layer with a rate of its own; none."""
    rng = np.random.default_rng(0)
    params = {
        layer: {"kernel": rng.standard_normal((300, 131)), "bias": rng.standard_normal(131)}
        for layer in ("conv1", "fc8")
    }
    update = jax.jit(optim.make_update(Optim()), donate_argnums=(1, 2))
    found = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    state = optim.make_optimizer(Optim()).init(found)
    velocity = jax.tree.map(np.zeros_like, params)
    for rate in (0.5, 0.05, 0.2, 0.0, 0.01):
        rates = {"kernel": rate, "bias": 2 * rate, "conv1_kernel": 0.3 * rate, "conv1_bias": 0.01}
        grads = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), params)
        given = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), grads)
        rates32 = jax.tree.map(jnp.float32, rates)
        found, state, squares = update(jnp.bool_(True), found, state, given, rates32)
        before = {layer: np.sum(kinds["kernel"] ** 2) for layer, kinds in params.items()}
        for layer, kinds in params.items():
            for kind, w in kinds.items():
                own = rates.get(f"{layer}_{kind}", rates[kind])
                decay = 0.0005 if kind == "kernel" else 0.0
                if own == 0:  # stands still
                    continue
                v = 0.9 * velocity[layer][kind] - decay * own * w - own * grads[layer][kind]
                velocity[layer][kind], params[layer][kind] = v, w + v
            expected = [np.sum(velocity[layer]["kernel"] ** 2), before[layer]]
            rtol = 1e-4 if kernels == "a GPU's" else 1e-5  # a CPU then adds them one by one
            np.testing.assert_allclose(squares[layer], np.multiply(expected, rate > 0), rtol=rtol)
        for (path, expected), actual in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(found), strict=True
        ):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("kernels", ["native", "XLA's", "a TPU's", "a GPU's"], indirect=True)
def test_an_update_that_is_not_good_changes_nothing(kernels):
    """Neither weights, of which one is NaN's neighbour, nor velocities; its squares are zeros."""
    params = {"fc8": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}}
    state = optim.make_optimizer(Optim()).init(params)
    grads = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    rates = {"kernel": jnp.float32(1), "bias": jnp.float32(1)}
    update = jax.jit(optim.make_update(Optim()))
    found = update(jnp.bool_(False), params, state, grads, rates)
    jax.tree.map(np.testing.assert_array_equal, found[:2], (params, state))
    assert jax.tree.map(float, found[2]) == {"fc8": (0.0, 0.0)}


@pytest.mark.parametrize("layer_rates", [(1.0,) * 8, (0.0, *(1.0,) * 7)])
def test_a_frozen_layer_keeps_the_bits_of_weights_and_velocity(layer_rates, kernels):
    """By its schedule or by its own rate; it goes on from where it was when it moves again."""
    frozen = Optim(layer_rates=layer_rates)
    rng = np.random.default_rng(3)
    params = {
        layer: {"kernel": rng.standard_normal((4, 3)), "bias": rng.standard_normal(3)}
        for layer in ("conv1", "fc8")
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    grads = jax.tree.map(jnp.ones_like, params)
    rates = {"kernel": jnp.float32(0.1), "bias": jnp.float32(0.2)}
    still = {"conv1_kernel": jnp.float32(0), "conv1_bias": jnp.float32(0)}
    still = rates | (still if frozen == Optim() else {})
    moving = jax.jit(optim.make_update(Optim()))
    state = optim.make_optimizer(Optim()).init(params)
    params, state, _ = moving(jnp.bool_(True), params, state, grads, rates)
    held = params["conv1"], optax.tree_utils.tree_get(state, "trace")["conv1"]
    for _ in range(3):
        before = params["fc8"]
        params, state, squares = jax.jit(optim.make_update(frozen))(
            jnp.bool_(True), params, state, grads, still
        )
        now = params["conv1"], optax.tree_utils.tree_get(state, "trace")["conv1"]
        jax.tree.map(np.testing.assert_array_equal, now, held)
        assert (np.asarray(before["kernel"]) != np.asarray(params["fc8"]["kernel"])).all()
        assert [float(square) for square in squares["conv1"]] == [0, 0]
    assert float(abs(held[1]["kernel"]).min()) > 0


def test_a_drop_of_the_rate_leaves_the_velocity_as_it_is():
    """Without gradient and decay a weight coasts at .9 of its last step, whatever the rate."""
    update = optim.make_optimizer(Optim(weight_decay=0.0))
    params = {"fc8": {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}}
    state, steps = update.init(params), []
    for gradient, rate in [(1.0, 0.1), (0.0, 0.1), (0.0, 1e-6)]:
        grads = jax.tree.map(lambda leaf, g=gradient: jnp.full_like(leaf, g), params)
        rates = jax.tree.map(lambda leaf, r=rate: jnp.float32(r), params)
        updates, state = update.update(grads, state, params, rates=rates)
        steps.append(float(updates["fc8"]["kernel"][0, 0]))
    np.testing.assert_allclose(steps, [-0.1, -0.09, -0.081], rtol=1e-6)


def test_the_decay_shrinks_weights_and_never_biases():
    update = optim.make_optimizer(Optim(momentum=0.0, weight_decay=0.5))
    params = {"fc8": {"kernel": jnp.full((1, 1), 3.0), "bias": jnp.full(1, 3.0)}}
    rates = jax.tree.map(lambda leaf: jnp.float32(0.1), params)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = update.update(grads, update.init(params), params, rates=rates)
    np.testing.assert_allclose(updates["fc8"]["kernel"], [[-0.15]], rtol=1e-6)
    np.testing.assert_array_equal(updates["fc8"]["bias"], [0.0])


def test_velocities_have_the_shapes_of_the_parameters():
    params = {"fc8": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    state = optim.make_optimizer(Optim()).init(params)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(state)) == [(2, 3), (3,)]


# ------------------------------------------------------------------------------------- schedules


def test_source2012_follows_the_log_of_net_145(configured):
    """Epoch 25, 51, 79: weights / 10; 67: conv1 / 10; 72: conv1 frozen; biases stay at .02."""
    schedule = optim.make_schedule(configured("source2012").optim, Calendar(N, B, 91 * N // B))
    epochs = [0, 24, 25, 50, 51, 66, 67, 71, 72, 78, 79, 90]
    found = [rates_at(schedule, 100 * epoch) for epoch in epochs]
    drops = [1, 1, 1e-1, 1e-1, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2, 1e-3, 1e-3]
    conv1 = [1, 1, 1e-1, 1e-1, 1e-2, 1e-2, 1e-3, 1e-3, 0, 0, 0, 0]
    frozen = [1] * 8 + [0] * 4
    for name, start, expected in [
        ("kernel", 0.01, drops),
        ("conv1_kernel", 0.01, conv1),
        ("bias", 0.02, [1] * 12),
        ("conv1_bias", 0.02, frozen),
    ]:
        actual = [rates[name] for rates in found]
        np.testing.assert_allclose(actual, start * np.array(expected), rtol=1e-6, err_msg=name)


def test_owt_drops_weights_and_biases_alike_from_one_rate(configured):
    schedule = optim.make_schedule(configured("owt").optim, Calendar(N, B, 9000))
    for step, rate in [(0, 1e-2), (2999, 1e-2), (3000, 1e-3), (5999, 1e-3), (6000, 1e-4)]:
        expected = {"kernel": pytest.approx(rate), "bias": pytest.approx(rate)}
        assert rates_at(schedule, step) == expected


def test_caffe_drops_by_ten_every_hundred_thousand_steps(configured):
    schedule = optim.make_schedule(
        configured("caffe_alexnet").optim, Calendar(1_281_167, 256, 450_000)
    )
    steps = [0, 99_999, 100_000, 199_999, 200_000, 449_999]
    found = [rates_at(schedule, step) for step in steps]
    expected = 0.01 * np.array([1, 1, 1e-1, 1e-1, 1e-2, 1e-4])
    np.testing.assert_allclose([rates["kernel"] for rates in found], expected, rtol=1e-5)
    np.testing.assert_allclose([rates["bias"] for rates in found], 2 * expected, rtol=1e-5)


@pytest.mark.parametrize(
    "late",
    [
        {"schedule": "epochs", "drop_epochs": (300_000, 900_000)},
        {"schedule": "plateau", "conv1_freeze_epoch": 300_000},
        {"schedule": "steps", "drop_every_steps": 10**10},
        {"schedule": "exponential"},
    ],
)
def test_what_comes_after_more_steps_than_are_counted_never_comes(late):
    calendar = make_calendar(Train(batch_size=128, num_epochs=1e6), 1_281_167)
    schedule = optim.make_schedule(Optim(learning_rate=0.01, **late), calendar)
    assert kernel_rates(schedule, [0, 2**31 - 2]) == pytest.approx([0.01, 0.01])


def test_the_exponential_schedule_has_the_published_rates_of_net_170():
    """.01, .00159, .000252, .00004 at 0, 25, 50, 75 %; biases .02, and .002 from 50 %."""
    schedule = optim.make_schedule(Optim(schedule="exponential"), Calendar(N, B, 1000))
    steps = [0, 249, 250, 499, 500, 749, 750, 999]
    found = [rates_at(schedule, step) for step in steps]
    weights = [0.01, 0.01, 0.00159, 0.00159, 0.000252, 0.000252, 0.00004, 0.00004]
    # Printed to three digits.
    np.testing.assert_allclose([rates["kernel"] for rates in found], weights, rtol=4e-3)
    biases = [0.02] * 4 + [0.002] * 4
    np.testing.assert_allclose([rates["bias"] for rates in found], biases, rtol=1e-6)


def test_the_cosine_schedule_is_half_a_wave_that_ends_at_zero():
    schedule = optim.make_schedule(Optim(schedule="cosine", learning_rate=0.4), Calendar(N, B, 90))
    steps = [0, 15, 30, 45, 60, 90, 200]
    expected = [0.2 * (1 + math.cos(math.pi * min(step, 90) / 90)) for step in steps]
    np.testing.assert_allclose(kernel_rates(schedule, steps), expected, atol=1e-8)
    np.testing.assert_allclose(expected[2:5], [0.3, 0.2, 0.1])
    assert rates_at(schedule, 30)["bias"] == pytest.approx(0.6)


@pytest.mark.parametrize("kind", ["plateau", "epochs", "exponential", "cosine", "steps"])
def test_the_scale_multiplies_every_rate(kind):
    schedule = optim.make_schedule(Optim(schedule=kind, conv1_drop_epoch=1), Calendar(N, B, 1000))
    whole, tenth = (rates_at(schedule, 120, scale) for scale in (1.0, 0.1))
    assert len(whole) == 4
    for name, rate in whole.items():
        assert tenth[name] == pytest.approx(0.1 * rate, rel=1e-5)


def test_the_plateau_schedule_itself_is_constant():
    schedule = optim.make_schedule(Optim(), Calendar(N, B, 1000))
    assert kernel_rates(schedule, [0, 500, 10**6]) == [pytest.approx(0.01)] * 3


@pytest.mark.parametrize(
    ("epoch", "examples", "batch"), [(1, 10, 4), (2, 10, 4), (3, 7, 5), (25, 1_281_167, 128)]
)
def test_an_epoch_ends_at_the_first_step_with_so_many_examples_behind_it(epoch, examples, batch):
    least = next(s for s in range(10**6) if s * batch >= epoch * examples)
    assert Calendar(examples, batch, 1).first_step(epoch) == least
    schedule = optim.make_schedule(
        Optim(schedule="epochs", drop_epochs=(epoch,)), Calendar(examples, batch, 10**6)
    )
    expected = [pytest.approx(0.01), pytest.approx(0.001)]
    assert kernel_rates(schedule, [least - 1, least]) == expected


@pytest.mark.parametrize("kind", ["epochs", "exponential", "cosine"])
def test_with_an_origin_rates_are_those_of_as_many_steps_later(kind):
    """The first 100 of 400 steps had 20 images: step n is what n + 100 of 500 would be."""
    settings = Optim(schedule=kind, drop_epochs=(2, 3), conv1_drop_epoch=2, conv1_freeze_epoch=4)
    shifted = optim.make_schedule(settings, Calendar(N, B, 400, origin=100 * B))
    plain = optim.make_schedule(settings, Calendar(N, B, 500))
    steps = [100, 101, 149, 150, 199, 200, 274, 275, 299, 300, 399]
    for step in steps:
        assert rates_at(shifted, step) == pytest.approx(rates_at(plain, step + 100), rel=1e-6)
    assert len({rate for step in steps for rate in rates_at(shifted, step).values()}) > 4


# --------------------------------------------------------------------------------------- plateau


def replay(errors: list[float], settings: Optim) -> tuple[list[int], Plateau]:
    """The passes, counted from 1, after which the rate drops; and the last state."""
    state, drops = Plateau(), []
    for number, error in enumerate(errors, 1):
        before, state = state, optim.plateau_update(state, error, settings)
        if optim.plateau_scale(state, settings) < optim.plateau_scale(before, settings):
            drops.append(number)
    return drops, state


def test_the_rate_drops_after_five_passes_without_an_improvement_of_a_thousandth():
    """By hand: pass 3 is the best; 4..8 are no better by .001, though 6 is by .0009; then 9..13
    are no better than pass 3 either; 14 is, and 15..19 are not; a fourth drop there is none."""
    errors = [0.9, 0.8, 0.7, 0.7, 0.71, 0.6991, 0.8, 0.7]
    errors += [0.75] * 5
    errors += [0.65] + [0.66] * 5
    errors += [0.66] * 20
    drops, last = replay(errors, Optim())
    assert drops == [8, 13, 19]
    assert optim.plateau_scale(last, Optim()) == pytest.approx(1e-3)
    assert last.best == 0.65


def test_an_improvement_of_exactly_the_least_counts_and_starts_the_count_anew():
    settings = Optim(plateau_min_delta=0.125, plateau_patience=2)  # a number floats hold exactly
    drops, last = replay([0.75, 0.75, 0.625, 0.625, 0.5, 0.5, 0.5], settings)
    assert drops == [7]
    assert last == Plateau(best=0.5, passes=0, drops=1)
    for wrong in range(1, 1000):  # of a thousand images; most of these floats hold roughly
        state = Plateau(best=wrong / 1000, passes=1)
        one_better = optim.plateau_update(state, (wrong - 1) / 1000, Optim())
        assert one_better == Plateau(best=(wrong - 1) / 1000)
        one_of_more = optim.plateau_update(state, wrong / 1000 - 0.00099, Optim())
        assert one_of_more == state._replace(passes=2)


def test_small_improvements_add_up_against_the_best_that_counted():
    """.0004 a pass: two passes are .0008, three .0012, which counts; so it never drops."""
    assert replay([0.9 - 0.0004 * n for n in range(60)], Optim())[0] == []


def test_an_error_that_is_not_a_number_is_no_improvement():
    assert replay([0.5] + [math.nan] * 5, Optim())[0] == [6]
    assert replay([math.nan] * 5, Optim())[0] == [5]


@pytest.mark.parametrize("cut", [0, 1, 4, 7, 12, 16])
def test_a_plateau_goes_on_from_a_checkpoint_as_if_nothing_had_been(cut):
    errors = [0.9, 0.8, *[0.8] * 5, *[0.79] * 3, *[0.8] * 7]
    settings = Optim()
    whole = Plateau()
    for number, error in enumerate(errors):
        if number == cut:
            written = json.dumps(checkpoint._plateau_to_json(whole), allow_nan=False)
            restored = checkpoint._plateau_from_json(json.loads(written))
            assert restored == whole
        whole = optim.plateau_update(whole, error, settings)
        if number >= cut:
            restored = optim.plateau_update(restored, error, settings)
    assert restored == whole
    assert whole == Plateau(best=0.79, passes=4, drops=2)
