"""Settings: presets, precedence, rules, round trips."""

import dataclasses
import json
import math

import pytest

from alexnet_jax import config as configs
from alexnet_jax.config import PRESETS, Config, Model, UserError, blank, resolve


def with_preset(name: str) -> Config:
    config = blank()
    config.model.preset = name
    return resolve(config)


def test_a_blank_config_is_the_paper():
    config = resolve(blank())
    assert config == Config()
    assert config.seed == 42
    assert (config.optim.momentum, config.optim.weight_decay) == (0.9, 0.0005)
    assert (config.model.lrn_k, config.model.lrn_alpha, config.model.lrn_beta) == (2, 1e-4, 0.75)
    assert config.train.batch_size == 128


def test_what_the_user_sets_wins_over_the_preset_and_the_preset_over_the_default():
    config = blank()
    config.model.preset = "caffenet"
    config.model.lrn_alpha = 0.5
    resolved = resolve(config).model
    assert resolved.lrn_alpha == 0.5  # the user's
    assert resolved.lrn_k == 1.0  # caffenet's
    assert resolved.lrn_size == 5  # the default


def test_a_setting_equal_to_the_default_still_wins_over_the_preset():
    config = blank()
    config.model.preset = "caffenet"
    config.model.lrn_k = Model.lrn_k
    assert resolve(config).model.lrn_k == 2.0


def test_presets_name_only_fields_that_exist():
    for preset in PRESETS.values():
        assert set(preset) <= set(configs.field_names())


# Reference: the table of presets, one row a test line.
@pytest.mark.parametrize(
    ("preset", "size", "k", "alpha", "across", "fc_std", "biases", "noise", "mean", "rule"),
    [
        ("paper", 224, 2, 1e-4, False, 0.01, 1, 0.1, "central", "scale_at_test"),
        ("source2012", 224, 2, 1e-4 / 5, False, 0.01, 1, 0.1, "central", "scale_at_test"),
        ("caffe_alexnet", 227, 1, 1e-4 / 5, True, 0.005, 0.1, 0, "at_crop", "inverted"),
        ("caffenet", 227, 1, 1e-4 / 5, True, 0.005, 1, 0, "at_crop", "inverted"),
    ],
)
def test_presets_are_the_references_table(
    preset, size, k, alpha, across, fc_std, biases, noise, mean, rule
):
    config = with_preset(preset)
    model, data = config.model, config.data
    assert model.input_size == size
    assert (model.lrn_k, model.lrn_across_towers) == (k, across)
    assert math.isclose(model.lrn_alpha, alpha)
    assert model.weight_std[5:7] == (fc_std, fc_std)
    assert [model.bias[place] for place in (1, 3, 4, 5, 6)] == [biases] * 5
    assert [model.bias[place] for place in (0, 2, 7)] == [0, 0, 0]
    assert (data.colour_noise, data.mean) == (noise, mean)
    assert model.dropout_rule == rule
    assert config.optim.bias_rate_factor == 2


@pytest.mark.parametrize(
    ("size", "stored"), [(224, 256), (227, 256), (64, 73), (112, 128), (128, 146), (48, 55)]
)
def test_the_stored_size_follows_the_input(size, stored):
    config = blank()
    config.model.input_size = size
    resolved = resolve(config)
    assert configs.stored_size(resolved.data, resolved.model) == stored


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_config_survives_json(preset):
    config = with_preset(preset)
    text = json.dumps(configs.to_dict(config), allow_nan=False)
    assert configs.from_dict(json.loads(text)) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"modle": {}}, ["modle", "model"]),
        ({"model": {"widht": 1.0}}, ["model.widht", "model.width"]),
        ({"optim": {"momentum": 1.0}}, ["optim.momentum=1.0", "below 1"]),
        ({"optim": {"learning_rate": float("nan")}}, ["optim.learning_rate", "finite"]),
        ({"train": {"batch_size": "many"}}, ["train.batch_size='many'", "whole number"]),
        ({"train": {"batch_size": 1.5}}, ["train.batch_size=1.5", "whole number"]),
        ({"model": {"lrn": 1}}, ["model.lrn=1", "True or False"]),
        ({"model": {"channels": [96, 256]}}, ["model.channels", "5 numbers"]),
        ({"model": {"after_conv1": ["pool", "lnr"]}}, ["model.after_conv1", "lrn"]),
        ({"model": {"pool_strides": [2, 2, 4]}}, ["pool_strides", "window"]),
        ({"model": {"without": ("conv1",)}}, ["model.without=('conv1',)", "conv2 to conv5"]),
        ({"model": {"net": "cifar"}}, ["model.towers=2", "--config.model.preset=cifar"]),
        ({"data": {"source": "imagenet"}}, ["data.source='imagenet'", "folder:PATH"]),
        ({"data": {"source": "folder:"}}, ["data.source='folder:'"]),
        ({"data": {"stored_size": 200}}, ["data.stored_size=200", "model.input_size=224"]),
        ({"eval": {"num_crops": 5}}, ["eval.num_crops=5", "1, 10"]),
        ({"mesh": {"model": 4}}, ["mesh.model=4", "1, 2"]),
        ({"seed": -1}, ["seed=-1"]),
    ],
)
def test_a_mistake_is_named_with_its_value_and_its_rule(values, words):
    with pytest.raises(UserError) as caught:
        configs.from_dict(values)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_setting_the_net_of_figure_1_has_no_use_for_is_refused_but_read(configured):
    with pytest.raises(UserError, match=r"model\.dropout_after=\(\): .* nothing of that"):
        configured("cifar", {"model.dropout_after": ()})
    stored = configs.to_dict(configured("cifar"))
    stored["model"][
        "dropout_after"
    ] = []  # by a run of earlier code, to which it made no difference
    assert configs.from_dict(stored).model.dropout_after == ()


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="nearest is caffenet"):
        with_preset("cafenet")


ASKED = """
    seed model.dtype data.source data.split data.split_seed data.stored_size data.random_crop
    data.crop_share data.mirror data.colour_noise data.colour_noise_divides
    data.colour_noise_epochs data.mean optim.learning_rate optim.momentum optim.weight_decay
    optim.bias_rate_factor optim.schedule optim.drop_factor optim.plateau_patience
    optim.plateau_min_delta optim.plateau_max_drops optim.drop_epochs optim.drop_every_steps
    optim.biases_drop optim.conv1_drop_epoch optim.conv1_freeze_epoch optim.layer_rates
    train.batch_size eval.split eval.num_crops
"""
FREE = """
    data.workers data.worker_kind data.prefetch data.on_device data.cache_dir data.tfds_dir
    mesh.model mesh.data mesh.cpu_devices mesh.step_timeout train.num_epochs train.num_steps
    train.accumulation_steps train.init_from train.max_parameters train.log_every_steps
    train.deterministic eval.batch_size eval.every_epochs checkpoint.every_steps checkpoint.step
"""


def test_every_change_is_refused_asked_for_or_free():
    old, found = Config(), {"refused": set(), "asked": set(), "free": set()}
    for name in configs.field_names():
        section, _, field = name.rpartition(".")
        holder = getattr(old, section) if section else old
        was = getattr(holder, field)
        changed = dataclasses.replace(holder, **{field: "another"})
        new = dataclasses.replace(old, **{section: changed}) if section else changed
        refused, asked = configs.changes(old, new)
        assert {**refused, **asked} in ({}, {name: (was, "another")})
        found["refused" if refused else "asked" if asked else "free"].add(name)
    models = {name for name in configs.field_names() if name.startswith("model.")}
    assert found["refused"] == models - {"model.dtype"}
    assert found["asked"] == set(ASKED.split())
    assert found["free"] == set(FREE.split())
