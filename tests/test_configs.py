"""The files of configs/: each resolves, each net's size is pinned, none is forgotten."""

import importlib.util
import itertools
import math
import pathlib

import pytest

from alexnet_jax import config as configs
from alexnet_jax.models.nets import layers

FOLDER = pathlib.Path(__file__).parent.parent / "configs"


def parameters(channels, features, conv_inputs, fc6_inputs, classes):
    """Weights and biases of a net, from its widths alone."""
    convolutions = sum(
        window**2 * inputs * outputs + outputs
        for window, inputs, outputs in zip((11, 5, 3, 3, 3), conv_inputs, channels, strict=True)
    )
    widths = (fc6_inputs, *features, classes)
    return convolutions + sum(i * o + o for i, o in itertools.pairwise(widths))


HALF = ((48, 128, 192, 192, 128), (2048, 2048), (3, 24, 128, 96, 96))
QUARTER = ((24, 64, 96, 96, 64), (1024, 1024), (3, 12, 64, 48, 48))
# Classes of the data, and parameters: those of the reference, or of the widths written out.
PINNED = {
    "alexnet": (1000, 60_965_224),
    "imagenette": (10, 60_965_224 - 990 * 4097),
    "caltech101": (102, parameters(*HALF, 3 * 3 * 128, 102)),
    "cifar10": (10, parameters(*HALF, 128, 10)),
    "figure1": (10, 2432 + 25632 + 51264 + 10250),
    "quickstart": (10, parameters(*QUARTER, 64, 10)),
}


def load(path: pathlib.Path) -> configs.Config:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return configs.resolve(module.get_config())


def test_every_config_is_pinned():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(PINNED)


@pytest.mark.parametrize("name", sorted(PINNED))
def test_a_configs_net_has_the_pinned_number_of_parameters(name):
    classes, count = PINNED[name]
    found = layers(load(FOLDER / f"{name}.py").model, classes)
    assert sum(layer.parameters for layer in found) == count
    assert count == sum(math.prod(layer.kernel) + layer.output[-1] for layer in found)


def test_a_config_asks_for_the_devices_its_net_lies_on():
    """(mesh.model, mesh.cpu_devices); ImageNet is for machines that have their own."""
    found = {name: load(FOLDER / f"{name}.py").mesh for name in PINNED}
    assert {name: (mesh.model, mesh.cpu_devices) for name, mesh in found.items()} == {
        "alexnet": (2, 0),
        "imagenette": (1, 0),
        "caltech101": (2, 2),
        "cifar10": (1, 0),
        "figure1": (1, 2),
        "quickstart": (2, 2),
    }


@pytest.mark.parametrize("name", sorted(PINNED))
def test_a_config_opens_with_its_command(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert f"python -m alexnet_jax.main --config=configs/{name}.py" in text
