"""What the bench says of a machine whose slow part is known."""

import dataclasses
import json
import time

import numpy as np
import pytest
from PIL import Image

from alexnet_jax import bench, loop
from alexnet_jax import main as command
from alexnet_jax.data import sources
from alexnet_jax.errors import UserError

NAP = 0.05  # seconds


@pytest.fixture
def config(configured, tmp_path):
    rng = np.random.default_rng(0)
    for index in range(12):
        path = tmp_path / "images" / "train" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (44, 50, 3), np.uint8)).save(path)
    values = {
        "model.width": 0.125,
        "model.input_size": 40,
        "data.source": f"folder:{tmp_path / 'images'}",
        "data.cache_dir": str(tmp_path / "cache"),
        "data.workers": 2,
        "mesh.model": 2,
        "mesh.data": 1,
        "train.batch_size": 8,
    }
    return configured("paper", values)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 1.0)
    monkeypatch.setattr(bench, "STAGE_IMAGES", 16)


def test_a_slow_input_is_what_the_devices_wait_for(config, short, monkeypatch):
    read = sources.Folder.read

    def slow(self, index):
        time.sleep(NAP)
        return read(self, index)

    monkeypatch.setattr(sources.Folder, "read", slow)
    found = bench.bench(config)
    most = 2 / NAP  # images a second that two workers can read
    assert 0.6 * most < found["input"]["images_per_second"] <= 1.3 * most
    assert 0.6 * most < found["input"]["unsent_images_per_second"] <= 1.3 * most
    assert 0.6 * most < found["both"]["images_per_second"] <= 1.3 * most
    assert found["input"]["images_per_second_per_worker"] == pytest.approx(
        found["input"]["images_per_second"] / 2
    )
    assert found["input"]["stages"]["read"] == pytest.approx(NAP * 1e6, rel=0.3)
    # A batch of 8 takes two workers four naps, of which the step fills its own time.
    waited = 1 - found["step"]["seconds"] / (4 * NAP)
    assert found["both"]["waited"] == pytest.approx(waited, abs=0.2)
    assert waited > 0
    json.dumps(found)
    assert "the devices waited" in bench.table(found)


def test_a_slow_copy_to_the_devices_is_told_from_slow_reading(config, short, monkeypatch):
    put = loop.put_batch

    def slow(*arguments):
        time.sleep(4 * NAP)
        return put(*arguments)

    monkeypatch.setattr(loop, "put_batch", slow)
    found = bench.bench(config)["input"]
    assert 0.6 * 8 / (4 * NAP) < found["images_per_second"] <= 8 / (4 * NAP)
    assert found["unsent_images_per_second"] > 2 * found["images_per_second"]


def test_a_slow_step_waits_for_nothing(config, short, monkeypatch):
    make = bench.make_advance

    def slow(*arguments):
        advance = make(*arguments)

        def step(batch):
            time.sleep(5 * NAP)
            return advance(batch)

        return step

    monkeypatch.setattr(bench, "make_advance", slow)
    found = bench.bench(config)
    assert found["step"]["seconds"] >= 5 * NAP
    assert found["both"]["waited"] < 0.2


def test_the_command_ends_with_a_line_of_json(config_file, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    assert command.main(["main", f"--config={config_file}", "--mode=bench"]) == 0  # no workdir
    *words, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    for part in ("input", "step", "both"):
        assert found[part]["images_per_second"] > 0
        assert any(line.startswith(part) for line in words)
    assert 0 < found["step"]["share_of_matmul"] < 1
    assert found["matmul"]["flops_per_second"] > 0
    assert 0 <= found["both"]["waited"] < 1


def test_operations_are_counted_as_by_hand(configured):
    # 724,406,816 multiply-adds an image, of them 105,415,200 of conv1, whose input needs no
    # gradient: published counts of the paper's net.
    expected = 2 * (3 * 724_406_816 - 105_415_200)
    assert bench._flops(configured("paper").model, 1000) == expected


def test_images_that_stay_on_the_devices_are_not_said_to_be_read_by_workers(config, short):
    resident = dataclasses.replace(config, data=dataclasses.replace(config.data, on_device=True))
    found = bench.bench(resident)["input"]
    assert (found["workers"], found["kind"]) == (1, "threads")
    assert found["images_per_second_per_worker"] == found["images_per_second"]


def test_a_net_above_the_parameter_limit_is_not_timed(config, short):
    small = dataclasses.replace(config.train, max_parameters=1000)
    with pytest.raises(UserError, match=r"train.max_parameters=1,000"):
        bench.bench(dataclasses.replace(config, train=small))
