"""Images that stay on the devices: the same batches as those that are streamed."""

import os

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alexnet_jax import command, loop, mesh, report, resident
from alexnet_jax.config import Config, Data, Train
from alexnet_jax.data import sources, survey
from alexnet_jax.errors import UserError


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("preset", ["paper", "source2012"])
def test_batches_are_those_of_the_stream_byte_for_byte(
    configured, images, tmp_path, monkeypatch, shards, preset
):
    """Over the end of an epoch, of 48 images put there in three parts, on four devices."""
    monkeypatch.setattr(resident, "READ_AT_ONCE", 20)
    batches = {}
    for on_device in (False, True):
        config = configured(preset, {
            "data.source": f"folder:{images}", "data.cache_dir": str(tmp_path),
            "data.on_device": on_device, "model.input_size": 36, "train.batch_size": 20,
            "mesh.model": shards,
        })  # fmt: skip
        source = sources.open_source(config.data, "train")
        source, statistics = survey.surveyed(source, config.data, config.model)
        devices = mesh.make_mesh(config.mesh, config.model)
        found = list(loop.device_batches(source, statistics, config, devices, 1, 5))
        batches[on_device] = jax.device_get(found)
        assert found[0]["image"].sharding.is_equivalent_to(NamedSharding(devices, P("data")), 4)
    assert len(batches[True]) == 4
    for here, streamed in zip(batches[True], batches[False], strict=True):
        assert here.keys() == streamed.keys()
        for name, values in streamed.items():
            assert here[name].dtype == values.dtype
            np.testing.assert_array_equal(here[name], values)
    assert any(batch["mirror"].any() and not batch["mirror"].all() for batch in batches[True])


def test_a_crop_is_numpys(configured):
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, (5, 9, 9, 3), np.uint8)
    index, offset = np.array([4, 0, 4, 2]), rng.integers(0, 4, (4, 2))
    mirror = np.array([True, False, False, True])
    devices = mesh.make_mesh(configured().mesh, configured().model)
    found = resident.make_cut(devices, 6)(squares, index, offset, mirror)
    for row, (which, (top, left), flip) in enumerate(zip(index, offset, mirror)):
        window = squares[which, top : top + 6, left : left + 6]
        np.testing.assert_array_equal(found[row], window[:, ::-1] if flip else window)


def test_images_are_written_in_place_on_every_device(configured):
    """A split that nearly fills the devices leaves no room for a copy."""
    devices = mesh.make_mesh(configured().mesh, configured().model)
    make, write = resident._filling((6, 5, 5, 3), devices)
    before, part = make(), np.full((2, 5, 5, 3), 7, np.uint8)
    places = [shard.data.unsafe_buffer_pointer() for shard in before.addressable_shards]
    after = write(before, mesh.put_everywhere(part, devices), np.int32(4))
    assert [shard.data.unsafe_buffer_pointer() for shard in after.addressable_shards] == places
    assert len(places) == devices.size > 1
    for shard in after.addressable_shards:
        np.testing.assert_array_equal(shard.data[:4], 0)
        np.testing.assert_array_equal(shard.data[4:], part)


@pytest.mark.parametrize(("stay", "sent"), [(True, 2), (False, 3)])
def test_batches_that_stay_are_sent_once(stay, sent):
    """But for a pass that was interrupted, of which nothing stays."""
    calls = []

    def send():
        calls.append(len(calls))
        return iter([{"label": jax.numpy.full(2, number)} for number in range(3)])

    batches = resident.Batches(send, stay)
    next(iter(batches))
    for _ in range(2):
        assert [int(batch["label"][0]) for batch in batches] == [0, 1, 2]
    assert len(calls) == sent


@pytest.mark.parametrize(("room", "reads"), [(63, 1), (62, 2)])
def test_validation_passes_over_images_that_stay_find_the_same(
    room, reads, run, tmp_path, monkeypatch
):
    """48 images to train on and 15 to validate on, which stay if there is room for all of them."""
    found, lengths = {}, []
    batches = loop.stream.evaluation_batches

    def read(source, *arguments, **options):
        lengths.append(len(source))
        return batches(source, *arguments, **options)

    monkeypatch.setattr(loop.stream, "evaluation_batches", read)
    monkeypatch.setattr(resident, "memory", lambda mesh: room * 41 * 41 * 3 / resident.SHARE)
    for on_device in (False, True):
        workdir = tmp_path / str(on_device)
        lengths.clear()
        asked = ("--config.train.num_steps=12", f"--config.data.on_device={on_device}")
        assert run(workdir, *asked) == 0
        found[on_device] = [
            (record["step"], record["loss"], record["top1_error"], record["num_examples"])
            for record in report.evaluation_records(workdir)
        ]
        assert lengths.count(15) == (reads if on_device else 2)
    assert found[True] == found[False]
    assert [(step, examples) for step, *_, examples in found[True]] == [(6, 15), (12, 15)]


def test_squares_that_do_not_fit_are_refused_with_their_size():
    resident.check_fits((1000, 100, 100, 3), 50_000_001)
    resident.check_fits((10**9, 256, 256, 3), None)  # a device that does not say
    with pytest.raises(UserError, match=r"1,281,167 squares of 256 .* 251\.9 GB, .* 85\.0; set"):
        resident.check_fits((1_281_167, 256, 256, 3), 85_000_000_000)


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ("", "--xla_gpu_deterministic_ops=true"),
        ("--xla_dump_to=x", "--xla_dump_to=x --xla_gpu_deterministic_ops=true"),
        ("--xla_gpu_deterministic_ops", "--xla_gpu_deterministic_ops"),
        ("--xla_gpu_deterministic_ops=false", "--xla_gpu_deterministic_ops=false"),
    ],
)
def test_what_the_user_says_to_xla_stays(monkeypatch, tmp_path, caplog, given, then):
    monkeypatch.setenv("XLA_FLAGS", given)
    config = Config(train=Train(deterministic=True), data=Data(cache_dir=str(tmp_path)))
    command.before_jax(config)
    assert os.environ["XLA_FLAGS"] == then
    told = "overrides train.deterministic=True" in caplog.text
    assert told == ("false" in given)
