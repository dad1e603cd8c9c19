"""The table of studies that `python -m alexnet_jax.study` can run.

The paper's findings are in points of top-1 / top-5 error on ImageNet, relative to the first
variant, or in words where it gives no number.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Any]  # section.field -> value
AUGMENTED = {"data.mirror": True, "data.random_crop": True, "data.colour_noise": 0.1}


@dataclasses.dataclass(frozen=True)
class Study:
    """Runs that differ in one thing."""

    question: str
    variants: Mapping[str, Settings]  # what each changes; the first is the baseline
    paper: Mapping[str, str]  # variant -> what the paper found
    # Learning rates tried for each variant, for `search_epochs` each; the one with the lowest
    # training error is used. Empty: the config's.
    rates: tuple[float, ...] = ()
    search_epochs: int = 1
    target_error: float = 0.0  # training error; if set, the table gives the epochs to it
    # Some input sizes at which the last maps are alike; elsewhere two things would differ.
    equal_at: tuple[int, ...] = ()


STUDIES: Mapping[str, Study] = {
    "two_towers": Study(
        "Two towers, or the net of about as many parameters on one device?",
        {
            "two_towers": {"model.towers": 2, "model.channels": (96, 256, 384, 384, 256)},
            "half": {
                "model.towers": 1,
                "model.channels": (48, 128, 192, 192, 256),
                "mesh.model": 1,
            },
        },
        {"half": "+1.7 / +1.2 (section 3.2)"},
    ),
    "lrn": Study(
        "Does response normalisation help?",
        {"with_lrn": {"model.lrn": True}, "without_lrn": {"model.lrn": False}},
        {"without_lrn": "+1.4 / +1.2 (section 3.3)"},
    ),
    "overlap": Study(
        "Do overlapping pools help? Windows of 3 in steps of 2, or of 2 in steps of 2.",
        {
            "overlapping": {"model.pool_windows": (3, 3, 3), "model.paddings": (0, 2, 1, 1, 1)},
            # Paddings that make the last maps of equal size, at some inputs.
            "adjacent": {"model.pool_windows": (2, 2, 2), "model.paddings": (0, 1, 1, 1, 0)},
        },
        {"adjacent": "+0.4 / +0.3 (section 3.4)"},
        equal_at=(224, 128, 64),
    ),
    "pool_stride": Study(
        "How far apart should the last pool's windows of 3 be? Overlap and overfitting.",
        {
            "stride_2": {"model.pool_strides": (2, 2, 2)},
            "stride_1": {"model.pool_strides": (2, 2, 1)},
            "stride_3": {"model.pool_strides": (2, 2, 3)},
        },
        {"stride_3": "overlapping pools overfit slightly less (section 3.4)"},
    ),
    "pool_stride_everywhere": Study(
        "How far apart should all pools' windows of 3 be?",
        {
            "stride_2": {"model.pool_strides": (2, 2, 2)},
            "stride_1": {"model.pool_strides": (1, 1, 1)},
            "stride_3": {"model.pool_strides": (3, 3, 3)},
        },
        {},
    ),
    "colour_noise": Study(
        "Does noise along the principal colours help?",
        {"noise": {"data.colour_noise": 0.1}, "no_noise": {"data.colour_noise": 0.0}},
        {"no_noise": "over +1 / - (section 4.1)"},
    ),
    "augmentation": Study(
        "What does each part of the augmentation bring?",
        {
            "all": AUGMENTED,
            "no_mirrors": AUGMENTED | {"data.mirror": False},
            "centre_crops": AUGMENTED | {"data.random_crop": False},
            "no_colour_noise": AUGMENTED | {"data.colour_noise": 0.0},
            "none": {"data.mirror": False, "data.random_crop": False, "data.colour_noise": 0.0},
        },
        {"none": "substantial overfitting (section 4.1)"},
    ),
    "dropout": Study(
        "Does dropout help?",
        {
            "dropout": {"model.dropout_after": ("fc6", "fc7")},
            "no_dropout": {"model.dropout_after": ()},
        },
        {"no_dropout": "substantial overfitting (section 4.2)"},
    ),
    "activation": Study(
        "ReLU or tanh?",
        {"relu": {"model.activation": "relu"}, "tanh": {"model.activation": "tanh"}},
        {"tanh": "learns several times more slowly (section 3.1)"},
    ),
    "precision": Study(
        "Does a net trained in bfloat16 end worse than one in float32?",
        {"float32": {"model.dtype": "float32"}, "bfloat16": {"model.dtype": "bfloat16"}},
        {},
    ),
    "depth": Study(
        "Does every middle layer count?",
        {"all_layers": {"model.without": ()}}
        | {f"no_{name}": {"model.without": (name,)} for name in ("conv3", "conv4", "conv5", "fc6")}
        | {"no_fc7": {"model.without": ("fc7",)}},
        {f"no_{name}": "about +2 / - (section 7)" for name in ("conv3", "conv4", "conv5")},
    ),
    "figure1": Study(
        "How much sooner does ReLU reach 25 % training error than tanh? (with configs/figure1.py)",
        {"relu": {"model.activation": "relu"}, "tanh": {"model.activation": "tanh"}},
        {"tanh": "six times the epochs (figure 1)"},
        rates=(0.0003, 0.001, 0.003, 0.01, 0.03),
        search_epochs=6,
        target_error=0.25,
    ),
}
