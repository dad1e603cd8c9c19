"""Every setting's name, default, unit, source and rule; the presets; conversion from ConfigDict.

A config file starts from `blank()`, a ConfigDict in which every field is None and typed, and sets
what it wants. `resolve` then fills each field: what the user set wins, then the preset's table,
then the default below. The result is frozen and is what `config.json` holds.

Sources: "paper" is Krizhevsky, Sutskever, Hinton, NIPS 2012; "source" is the original, its code.
"""

import dataclasses
import difflib
import functools
import json
import math
import operator
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_type_hints

import ml_collections
import numpy as np
from ml_collections import config_dict

from alexnet_jax.errors import UserError

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
SHARES_ENTRY = {"conv6": "conv5", "fc4": "fc8"}  # layers using another's entry in per-layer tuples
CIFAR_FIELDS = frozenset({
    "preset", "net", "width", "input_size", "num_classes", "dtype", "towers", "activation", "init",
    "weight_std", "bias",
})  # fmt: skip


class Rule(NamedTuple):
    """A requirement on a value, in words and as a predicate."""

    words: str
    holds: Callable[[Any], bool]


def _setting(default: Any, rule: Rule) -> Any:
    return dataclasses.field(default=default, metadata={"rule": rule})


def _at_least(least: float) -> Rule:
    return Rule(f"at least {least}", lambda value: value >= least)


def _counted(least: int) -> Rule:
    return Rule(f"from {least} to 2**31 - 1", lambda value: least <= value < 2**31)


def _one_of(*names: Any) -> Rule:
    return Rule(f"one of {', '.join(map(str, names))}", lambda value: value in names)


def _numbers(count: int, least: float = -math.inf) -> Rule:
    words = f"{count} numbers" + (f" of at least {least}" if least > -math.inf else "")
    return Rule(words, lambda values: len(values) == count and all(v >= least for v in values))


_POSITIVE = Rule("above 0", lambda value: value > 0)
_FRACTION = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)
_ASCENDING = Rule("in ascending order", lambda values: list(values) == sorted(values))
_STAGE = Rule(
    "of activation, lrn, spatial_lrn and pool, none twice",
    lambda names: (
        set(names) <= {"activation", "lrn", "spatial_lrn", "pool"} and len(names) == len(set(names))
    ),
)
_DROPPED = Rule("of pool5, fc6 and fc7", lambda names: set(names) <= {"pool5", "fc6", "fc7"})
_LEFT_OUT = Rule("of conv2 to conv5, fc6 and fc7", lambda names: set(names) <= set(LAYERS[1:7]))
_SOURCE_NAME = Rule(
    "tfds:NAME, folder:PATH, records:PATH or shapes",
    lambda name: name == "shapes" or re.fullmatch("(tfds|folder|records):.+", name) is not None,
)
_SPLIT = Rule(
    "train, validation and test parts, train above 0, as (6, 2, 2)",
    lambda parts: len(parts) == 3 and parts[0] > 0 and min(parts) >= 0,
)


@dataclasses.dataclass(frozen=True)
class Model:
    """The net.

    Per-layer tuples follow `LAYERS`; conv6 (preset `conv6`) takes conv5's entries, and is padded
    by 1.
    """

    preset: str = "paper"  # a name in PRESETS
    # The paper's net, or figure 1's four layers, which use only the fields in CIFAR_FIELDS, and of
    # `weight_std` and `bias` only the entries of conv1..conv3 and fc8.
    net: str = _setting("alexnet", _one_of("alexnet", "cifar"))
    # Multiplies the channels of every layer but fc8; stds of conv2..fc8 scale by 1/sqrt(width).
    width: float = _setting(1.0, Rule("above 0 and at most 16", lambda value: 0 < value <= 16))
    input_size: int = _setting(224, _at_least(1))  # pixels a side; paper 224, Caffe 227
    num_classes: int = _setting(0, _at_least(0))  # 0: as many as the data has
    # Of activations and products; parameters, LRN sums and the loss stay float32.
    dtype: str = _setting("float32", _one_of("float32", "bfloat16"))
    towers: int = _setting(2, _one_of(1, 2))  # paper, section 3.2
    # Maps of conv1..conv5; units of fc6 and fc7; both towers together; paper, section 3.5.
    channels: tuple[int, ...] = _setting((96, 256, 384, 384, 256), _numbers(5, 1))
    features: tuple[int, ...] = _setting((4096, 4096), _numbers(2, 1))
    conv6: bool = False  # a sixth convolution on both towers' pool5 ("1 CNN*", paper, section 6)
    # Layers left out; their pools stay, so that maps keep their sizes; paper, section 7. Without
    # conv3, where the towers first exchange maps, they do so only at fc6.
    without: tuple[str, ...] = _setting((), _LEFT_OUT)
    # Zeros at each edge, in pixels, conv1..conv5. 0 at conv1 overhangs right and bottom so that no
    # pixel is lost.
    paddings: tuple[int, ...] = _setting((0, 2, 1, 1, 1), _numbers(5, 0))
    activation: str = _setting("relu", _one_of("relu", "tanh"))  # paper, section 3.1
    after_conv1: tuple[str, ...] = _setting(("activation", "lrn", "pool"), _STAGE)  # section 3.3
    after_conv2: tuple[str, ...] = _setting(("activation", "lrn", "pool"), _STAGE)
    after_conv5: tuple[str, ...] = _setting(("activation", "pool"), _STAGE)
    lrn: bool = True  # False drops every response normalisation
    # Window in maps, and the three constants; paper, section 3.3.
    lrn_size: int = _setting(5, Rule("odd and above 0", lambda n: n > 0 and n % 2 == 1))
    lrn_k: float = _setting(2.0, _POSITIVE)
    lrn_alpha: float = _setting(1e-4, _at_least(0))  # multiplies the undivided sum
    lrn_beta: float = _setting(0.75, _POSITIVE)
    lrn_across_towers: bool = False  # the paper normalises each tower by itself
    # Pixels, of pool1, pool2, pool5; paper, section 3.4.
    pool_windows: tuple[int, ...] = _setting((3, 3, 3), _numbers(3, 1))
    pool_strides: tuple[int, ...] = _setting((2, 2, 2), _numbers(3, 1))
    dropout_rate: float = _setting(0.5, _FRACTION)  # paper, section 4.2
    # Scaled by 1 - rate when evaluating, or by its inverse while training.
    dropout_rule: str = _setting("scale_at_test", _one_of("scale_at_test", "inverted"))
    dropout_after: tuple[str, ...] = _setting(("fc6", "fc7"), _DROPPED)
    # Normal with weight_std and constant bias, or uniform +-1/sqrt(fan in) for both.
    init: str = _setting("normal", _one_of("normal", "uniform"))
    weight_std: tuple[float, ...] = _setting(
        (0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01), _numbers(8, 0)
    )  # source; the paper prints .01 for all
    bias: tuple[float, ...] = _setting((0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0), _numbers(8))

    @property
    def splits(self) -> bool:
        """Whether the towers can lie on two devices."""
        return self.towers == 2 and not self.normalises_across

    @property
    def normalises_across(self) -> bool:
        """Whether response normalisation reads both towers' maps."""
        return self.lrn and self.lrn_across_towers


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from and what is done to them."""

    source: str = _setting("shapes", _SOURCE_NAME)
    split: tuple[int, ...] = _setting((6, 2, 2), _SPLIT)  # if the data comes without one
    split_seed: int = _setting(42, _at_least(0))
    # Pixels a side of the square that crops are cut from; 0: 256 for inputs of 224 and 227,
    # otherwise in proportion.
    stored_size: int = _setting(0, _at_least(0))
    random_crop: bool = True  # else the centre; paper, section 4.1
    crop_share: int = _setting(1, _at_least(1))  # successive images that share crop and mirror
    mirror: bool = True  # half of the images, at random; paper, section 4.1
    # Standard deviation of the PCA noise in units of sqrt(eigenvalue); section 4.1; 0: none.
    colour_noise: float = _setting(0.1, _at_least(0))
    colour_noise_divides: bool = False  # then also divide by 1 + colour_noise; source
    colour_noise_epochs: int = _setting(0, _at_least(0))  # noise ends after these; 0: never
    # Subtract the mean image's central crop, its crop at the crop's place, or the channel means
    # (and divide by the channels' standard deviations).
    mean: str = _setting("central", _one_of("central", "at_crop", "channel"))
    workers: int = _setting(0, _at_least(0))  # that read and decode; 0: one per core
    worker_kind: str = _setting("auto", _one_of("auto", "threads", "processes"))
    prefetch: int = _setting(4, _at_least(1))  # batches ready ahead of the step
    on_device: bool = False  # images stay on the devices; the training split must fit
    cache_dir: str = "~/.cache/alexnet_jax"  # drawn shapes, statistics, compiled programs
    tfds_dir: str = ""  # where TFDS looks; "": TFDS_DATA_DIR or ~/tensorflow_datasets


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices: `data` x `model`."""

    model: int = _setting(1, _one_of(1, 2))  # devices the two towers are split over
    # Devices the batch is split over; -1: all that remain.
    data: int = _setting(-1, Rule("-1 or at least 1", lambda value: value == -1 or value >= 1))
    # Virtual devices of all processes together, if the platform is the CPU.
    cpu_devices: int = _setting(0, _at_least(0))
    # Seconds without progress after which a run counts as stuck and ends; 0: never.
    step_timeout: float = _setting(600.0, _at_least(0))


@dataclasses.dataclass(frozen=True)
class Optim:
    """Stochastic gradient descent with momentum; paper, section 5."""

    learning_rate: float = _setting(0.01, _POSITIVE)  # for the weights, at the start
    momentum: float = _setting(0.9, _FRACTION)
    weight_decay: float = _setting(0.0005, _at_least(0))  # of the weights, never of the biases
    bias_rate_factor: float = _setting(2.0, _at_least(0))  # source: biases .02, weights .01
    # Drops when the validation error stops improving (paper, section 5), at given epochs (source)
    # or every so many steps (Caffe); that of the original's net #170; half a cosine wave (ours).
    schedule: str = _setting(
        "plateau", _one_of("plateau", "epochs", "steps", "exponential", "cosine")
    )
    # For plateau, epochs and steps: what a drop multiplies the rate by.
    drop_factor: float = _setting(0.1, Rule("between 0 and 1", lambda value: 0 < value < 1))
    plateau_patience: int = _setting(5, _at_least(1))  # validation passes; ours
    plateau_min_delta: float = _setting(0.001, _at_least(0))  # top-1 error, a fraction; ours
    plateau_max_drops: int = _setting(3, _at_least(0))  # "reduced three times"
    drop_epochs: tuple[int, ...] = _setting((25, 51, 79), _ASCENDING)  # for epochs; source
    drop_every_steps: int = _setting(100_000, _at_least(1))  # for steps; Caffe
    biases_drop: bool = True  # for epochs: False keeps the biases' rate; source
    conv1_drop_epoch: int = _setting(0, _at_least(0))  # one more drop for conv1's kernel; 0: none
    conv1_freeze_epoch: int = _setting(0, _at_least(0))  # conv1 is frozen from here; 0: never
    # For each of LAYERS, a factor on its learning rates; 0 freezes the layer.
    layer_rates: tuple[float, ...] = _setting((1.0,) * 8, _numbers(8, 0))


@dataclasses.dataclass(frozen=True)
class Train:
    """How long to train, in what batches."""

    batch_size: int = _setting(128, _counted(1))  # images, over all devices; paper, section 5
    num_epochs: float = _setting(
        90.0, Rule("above 0 and at most 1e6", lambda n: 0 < n <= 1e6)
    )  # "roughly 90 cycles"
    num_steps: int = _setting(0, _counted(0))  # overrides num_epochs when set
    accumulation_steps: int = _setting(1, _at_least(1))  # parts that a device splits its rows into
    init_from: str = ""  # workdir whose weights to start from; other classes: a new last layer
    max_parameters: int = _setting(500_000_000, _at_least(1))  # a larger net is refused
    log_every_steps: int = _setting(20, _at_least(1))  # besides every epoch's last
    deterministic: bool = False  # bitwise reproducible on a GPU, at some cost; a CPU always is


@dataclasses.dataclass(frozen=True)
class Eval:
    """How errors are measured, while training and by --mode=eval."""

    num_crops: int = _setting(1, _one_of(1, 10))  # centre, or also corners, mirrored; section 4.1
    split: str = _setting("validation", _one_of("train", "validation", "test"))
    batch_size: int = _setting(0, _at_least(0))  # images, over all devices; 0: train.batch_size
    every_epochs: int = _setting(1, _at_least(1))  # between validation passes


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When to save, and what to read."""

    every_steps: int = _setting(0, _at_least(0))  # besides each validation pass; 0: no more
    step: int = _setting(-1, _at_least(-1))  # for all modes but train; -1: newest


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run; made by `resolve` and `from_dict`, written by `to_dict`."""

    seed: int = _setting(42, Rule("at least 0 and below 2**32", lambda seed: 0 <= seed < 2**32))
    model: Model = Model()
    data: Data = Data()
    mesh: Mesh = Mesh()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()


# What each preset changes, as section.field, from the defaults above, preset `paper`'s.
_SOURCE = {
    "model.after_conv1": ("lrn", "pool", "activation"),
    "model.after_conv2": ("activation", "lrn", "spatial_lrn", "pool"),
    "model.after_conv5": ("pool", "activation"),
    "model.lrn_alpha": 2e-5,  # 1e-4 over the window of 5
    "data.crop_share": 32,
    "data.colour_noise_divides": True,
    "data.colour_noise_epochs": 67,
    "optim.schedule": "epochs",
    "optim.biases_drop": False,
    "optim.conv1_drop_epoch": 67,
    "optim.conv1_freeze_epoch": 72,
    "train.num_epochs": 91.0,
}
_CAFFENET = {
    "model.input_size": 227,
    "model.after_conv1": ("activation", "pool", "lrn"),
    "model.after_conv2": ("activation", "pool", "lrn"),
    "model.lrn_k": 1.0,
    "model.lrn_alpha": 2e-5,
    "model.lrn_across_towers": True,
    "model.dropout_rule": "inverted",
    "model.weight_std": (0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01),
    "data.colour_noise": 0.0,
    "data.mean": "at_crop",
    "optim.schedule": "steps",
    "train.batch_size": 256,
}
PRESETS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "paper": {},
        "source2012": _SOURCE,
        "caffenet": _CAFFENET,
        "caffe_alexnet": _CAFFENET
        | {
            "model.after_conv1": ("activation", "lrn", "pool"),
            "model.after_conv2": ("activation", "lrn", "pool"),
            "model.bias": (0.0, 0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.0),
        },
        "owt": {
            "model.towers": 1,
            "model.channels": (64, 192, 384, 256, 256),
            "model.paddings": (2, 2, 1, 1, 1),
            "model.after_conv1": ("activation", "pool"),
            "model.after_conv2": ("activation", "pool"),
            "model.lrn": False,
            "model.dropout_rule": "inverted",
            "model.dropout_after": ("pool5", "fc6"),
            "model.init": "uniform",
            "data.colour_noise": 0.0,
            "data.mean": "channel",
            "optim.bias_rate_factor": 1.0,
            "optim.schedule": "epochs",
            "optim.drop_epochs": (30, 60),
        },
        "half": {"model.towers": 1, "model.channels": (48, 128, 192, 192, 256)},
        "conv6": {"model.conv6": True},
        "cifar": {
            "model.net": "cifar",
            "model.input_size": 32,
            "model.towers": 1,
            "model.weight_std": (0.0001, 0.01, 0.01, 0.0, 0.0, 0.0, 0.0, 0.01),
            "model.bias": (0.0,) * 8,
            "data.stored_size": 32,
            "data.random_crop": False,
            "data.mirror": False,
            "data.colour_noise": 0.0,
            "optim.learning_rate": 0.001,
            "optim.weight_decay": 0.0,
            "optim.plateau_max_drops": 0,
        },
    }
)

SECTIONS = tuple(f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default))

# A resumed run may change these freely. With --allow_config_change it may change anything else but
# `model`, of which only dtype may change.
FREE_ON_RESUME = frozenset({
    "data.workers", "data.worker_kind", "data.prefetch", "data.on_device", "data.cache_dir",
    "data.tfds_dir", "train.deterministic",
    "train.num_epochs", "train.num_steps", "train.accumulation_steps", "train.log_every_steps",
    "train.init_from", "train.max_parameters", "eval.batch_size", "eval.every_epochs",
})  # fmt: skip
FREE_SECTIONS = frozenset({"mesh", "checkpoint"})


def blank() -> Any:
    """A locked ConfigDict with every field of `Config`, typed and None; the seed is 42."""
    fields: dict[str, Any] = {"seed": Config.seed}
    for section in SECTIONS:
        hints = get_type_hints(type(getattr(Config, section)))
        fields[section] = {
            name: config_dict.placeholder(hint if isinstance(hint, type) else tuple)
            for name, hint in hints.items()
        }
    return ml_collections.ConfigDict(fields).lock()


def resolve(user: Any) -> Config:
    """The frozen config of what `user` sets, the rest from its preset and the defaults.

    Raises:
      UserError: an unknown preset or field, a value of the wrong type or against its rule, or one
        that the net does not use.
    """
    values = user.to_dict()
    preset = (values.get("model") or {}).get("preset") or Model.preset
    if preset not in PRESETS:
        raise UserError(
            f"model.preset={preset!r}: must be one of {', '.join(PRESETS)}; "
            f"nearest is {max(PRESETS, key=functools.partial(_likeness, preset))}"
        )
    config = from_dict(values, PRESETS[preset])
    for field in dataclasses.fields(Model) if config.model.net == "cifar" else ():
        value = getattr(config.model, field.name)
        if field.name not in CIFAR_FIELDS and value != field.default:
            raise UserError(
                f"model.{field.name}={value!r}: the net of figure 1 has nothing of that; leave it "
                f"at {field.default!r}, or set another --config.model.preset"
            )
    for name in ("channels", "features"):
        for count in getattr(config.model, name):
            if count % config.model.towers:
                raise UserError(
                    f"model.{name}: {count} maps cannot be split between {config.model.towers} "
                    f"towers; set --config.model.{name} to even numbers, or "
                    "--config.model.towers=1"
                )
    return config


def from_dict(values: Mapping[str, Any], preset: Mapping[str, Any] | None = None) -> Config:
    """A validated config from nested dicts, as `config.json` holds them; None means not set.

    Raises:
      UserError: as `resolve`.
    """
    preset = preset or {}
    sections = {
        name: _section(type(getattr(Config, name)), f"{name}.", values.get(name) or {}, preset)
        for name in SECTIONS
    }
    config = _section(Config, "", {**values, **sections}, preset)
    stored, size = stored_size(config.data, config.model), config.model.input_size
    if stored < size:
        raise UserError(
            f"data.stored_size={stored}: must be at least model.input_size={size}; "
            "set --config.data.stored_size=0 to have it follow the input"
        )
    if config.model.net == "cifar" and config.model.towers != 1:
        raise UserError(
            f"model.towers={config.model.towers}: the net of figure 1 has one; "
            "set --config.model.preset=cifar"
        )
    for window, stride in zip(config.model.pool_windows, config.model.pool_strides, strict=True):
        if stride > window:
            raise UserError(
                f"model.pool_strides={config.model.pool_strides}: no stride may pass its window "
                f"in model.pool_windows={config.model.pool_windows}, or pixels would be skipped; "
                "set --config.model.pool_strides=(...)"
            )
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dicts of numbers, strings and lists; `from_dict` gives the config back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def field_names() -> list[str]:
    """Every field, as section.field."""
    names = ["seed"]
    for section in SECTIONS:
        fields = dataclasses.fields(getattr(Config, section))
        names += [f"{section}.{field.name}" for field in fields]
    return names


def _likeness(name: str, known: str) -> float:
    """How much a name is like a known one or its initials: 1 if it is that, 0 if not at all."""
    initials = "".join(word[0] for word in known.split("_"))
    return 1.0 if name == initials else difflib.SequenceMatcher(None, name, known).ratio()


def no_field(name: str) -> str:
    """The error message for `name`, as section.field, which is no field; it names the nearest."""
    names = field_names()
    section, *fields = name.split(".")
    if name in SECTIONS:
        near = [other for other in names if other.startswith(f"{section}.")]
        return f"config.{name} is no field but a section; set one of {', '.join(near)}"

    def likeness(other: str) -> float:
        home, _, field = other.rpartition(".")
        return max(_likeness(word, field) for word in fields or [section]) + (home == section) / 8

    return f"config field {name!r} does not exist; nearest is {max(names, key=likeness)}"


def changes(old: Config, new: Config) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """The settings that a resumed run would change, as name -> (old, new).

    Returns:
      (refused, asked): changes of `model` other than dtype, which no flag allows, and changes that
      need --allow_config_change. The rest is free to change.
    """
    refused, asked = {}, {}
    for name in field_names():
        section, pair = name.partition(".")[0], tuple(map(operator.attrgetter(name), (old, new)))
        if pair[0] != pair[1] and section not in FREE_SECTIONS and name not in FREE_ON_RESUME:
            into = refused if section == "model" and name != "model.dtype" else asked
            into[name] = pair
    return refused, asked


def stored_size(data: Data, model: Model) -> int:
    """Pixels a side of the stored square: as set, or 256 for 224 and 227, else proportional."""
    if data.stored_size:
        return data.stored_size
    return 256 if model.input_size == 227 else round(256 * model.input_size / 224)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type: whole floats pass as ints, lists as tuples."""
    value = value.item() if isinstance(value, np.generic) else value
    if hint is float and type(value) is int:
        return float(value)
    if hint is int and type(value) is float and value.is_integer():
        return int(value)
    if hint is float and type(value) is float and math.isfinite(value):
        return value
    if isinstance(hint, type) and hint is not float and type(value) is hint:
        return value
    if not isinstance(hint, type) and isinstance(value, list | tuple):
        if hint.__args__[0] is str and all(isinstance(entry, str) for entry in value):
            value = re.findall(r"[^\s,()\[\]]+", " ".join(value))  # as a command line's fc6,fc7
        return tuple(_typed(name, entry, hint.__args__[0]) for entry in value)
    wanted = {float: "a finite number", int: "a whole number", bool: "True or False", str: "text"}
    words = wanted[hint] if isinstance(hint, type) else "a list"
    raise UserError(f"{name}={value!r}: must be {words}; set --config.{name}=...")


def _section(kind: type, section: str, given: Mapping, preset: Mapping) -> Any:
    """One section's dataclass from what the user gave, its preset and the defaults."""
    fields = dataclasses.fields(kind)
    hints = get_type_hints(kind)
    for name in given:
        if name not in hints:
            raise UserError(no_field(f"{section}{name}"))
    chosen = {}
    for field in fields:
        if dataclasses.is_dataclass(field.default):
            chosen[field.name] = given[field.name]
            continue
        name = f"{section}{field.name}"
        value = given.get(field.name)
        if value is None:
            value = preset.get(name, field.default)
        value = _typed(name, value, hints[field.name])
        rule = field.metadata.get("rule")
        if rule and not rule.holds(value):
            raise UserError(f"{name}={value!r}: must be {rule.words}; set --config.{name}=...")
        chosen[field.name] = value
    return kind(**chosen)
