"""Which layouts of devices and processes a net can be trained on."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest

from alexnet_jax import config as configs
from alexnet_jax import inspection, mesh
from alexnet_jax.errors import UserError


@pytest.mark.parametrize(
    ("processes", "even"),
    [
        ([[0, 0]], True),
        ([[0, 1]], True),  # a tower each, the same rows
        ([[0, 0], [1, 1]], True),
        ([[0, 1], [2, 3]], True),
        ([[0], [0], [1], [1]], True),
        ([[0, 0], [0, 1], [1, 1]], False),  # three devices each: a place is shared
        ([[0, 0], [0, 1]], False),
        ([[0], [0], [0], [1]], False),
    ],
)
def test_processes_have_equal_shares_the_same_or_none_in_common(processes, even):
    assert mesh._even(processes) is even


def test_a_net_that_reads_across_its_towers_does_not_split_unless_it_does_not_normalise(configured):
    caffenet, two = configured("caffenet").model, configs.Mesh(model=2, data=1)
    with pytest.raises(UserError, match="normalises across the towers"):
        mesh.make_mesh(two, caffenet)
    assert mesh.make_mesh(two, dataclasses.replace(caffenet, lrn=False)).shape["model"] == 2


def test_devices_that_are_started_stay_as_they_are():
    count = len(jax.devices())
    mesh.start_devices(count + 1, at_least=True)
    assert len(jax.devices()) == count


def test_inspection_takes_the_devices_that_the_config_names(configured):
    """Gradients and metrics are summed over `data`, and nothing else is sent there."""
    config = configured("paper", {"model.width": 1 / 16, "model.input_size": 36, "mesh.data": 2})
    found = inspection.inspect(config)
    assert found["mesh"] == {"data": 2, "model": 2}
    assert found["layers"][-1]["exchanged_bytes"] == 128 * 4
    over_data = found["collectives"].pop("data")
    assert set(over_data) == {"all-reduce"}
    assert found["collectives"] == {"model": {"all-gather": 5, "reduce-scatter": 5}}
    with pytest.raises(UserError, match="has one tower and does not split"):
        inspection.inspect(configured("half", {"mesh.model": 2}))


def test_inspection_tells_of_both_towers_of_an_odd_number_of_classes(configured):
    """101 classes: 51 columns a tower, and 51 logits of four bytes each way."""
    config = configured("caffenet")
    model = dataclasses.replace(
        config.model, lrn=False, width=1 / 16, input_size=36, num_classes=101
    )
    data = dataclasses.replace(config.data, stored_size=41)
    found = inspection.inspect(dataclasses.replace(config, model=model, data=data))
    assert found["mesh"] == {"data": 1, "model": 2}
    assert found["layers"][-1]["output"] == [51]
    assert found["logits"]["exchanged_bytes"] == 51 * 4
    assert found["collectives"] == {"model": {"all-gather": 5, "reduce-scatter": 5}}


def test_the_readmes_exchange_has_the_gradient_it_states():
    """As it stands there, but for the devices, which are already chosen here."""
    text = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    _, lines = re.findall("```python\n(.*?)```", text, re.DOTALL)
    found = {}
    exec(re.sub(r"jax\.config\.update\(.*\)\n", "", lines), found)
    w = np.arange(4, dtype=np.float32)
    assert (np.asarray(found["gradient"](w)) == 2 * w).all()
    traced = str(found["jax"].make_jaxpr(found["gradient"])(w))
    assert traced.count("all_gather[") == traced.count("reduce_scatter[") == 1
