"""Checkpoints: whole, portable between meshes, the newest and the best kept."""

import dataclasses
import gc
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from alexnet_jax import seals
from alexnet_jax.checkpoint import Checkpoints, Meta, NewestAndBest, SaveError, Saver
from alexnet_jax.config import Config
from alexnet_jax.data.statistics import Statistics
from alexnet_jax.errors import UserError
from alexnet_jax.train.optim import Plateau
from alexnet_jax.train.state import initial_state, natural_state, put

CLASSES = 7  # odd: two shards hold eight columns
MODEL = dataclasses.replace(Config().model, width=1 / 16, input_size=36)
CONFIG = dataclasses.replace(Config(), model=MODEL)


@dataclasses.dataclass
class Saved:
    """What Orbax hands to a preservation policy."""

    step: int
    metrics: dict[str, float] | None


@pytest.fixture(scope="module")
def state() -> Any:
    state = initial_state(MODEL, CLASSES, seed=3)
    rng = np.random.default_rng(1)
    velocities = jax.tree.map(lambda v: rng.normal(size=v.shape).astype(v.dtype), state.opt_state)
    return state._replace(step=np.int32(5), opt_state=velocities)


@pytest.fixture(scope="module")
def meta() -> Meta:
    rng = np.random.default_rng(2)
    shapes = Statistics(*((41, 41, 3), (3,), (3,), (3, 3)))
    statistics = Statistics(*(rng.uniform(size=shape).astype(np.float32) for shape in shapes))
    labels = tuple(f"class {number}" for number in range(CLASSES))
    return Meta(CONFIG, labels, statistics, Plateau(0.25, 3, 1))


def make_mesh(data: int, model: int) -> Mesh:
    devices = np.asarray(jax.devices()[: data * model]).reshape(data, model)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def plus_one(state: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf + leaf.dtype.type(1), state)


def save_two(folder: pathlib.Path, state: Any, meta: Meta) -> None:
    """Steps 1 and 2, of which 1 is the best."""
    with Saver(folder) as checkpoints:
        for step, error in ((1, 0.1), (2, 0.2)):
            placed = put(state, make_mesh(1, 1))
            checkpoints.save(step, placed, meta, error)


def assert_equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("saver", [(2, 2), (1, 1)], ids=["from 2x2", "from 1x1"])
@pytest.mark.parametrize("reader", [(2, 2), (1, 2), (1, 1), (4, 1)], ids=str)
def test_what_one_mesh_saves_another_reads(saver, reader, state, meta, tmp_path):
    placed = put(state, make_mesh(*saver))
    with Saver(tmp_path) as checkpoints:
        checkpoints.save(5, natural_state(placed, CLASSES), meta)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest_whole() == 5
    found = checkpoints.read_state(5, meta)
    assert_equal(checkpoints.read_params(5), state.params)
    assert found.params["fc8"]["kernel"].shape[-1] == CLASSES
    assert_equal(found, state)
    placed = put(found, make_mesh(*reader))
    assert placed.params["fc8"]["bias"].shape == (CLASSES + CLASSES % reader[1],)
    assert_equal(natural_state(placed, CLASSES), state)


def test_a_checkpoint_holds_all_that_evaluation_needs(state, meta, tmp_path):
    with Saver(tmp_path) as checkpoints:
        checkpoints.save(5, put(state, make_mesh(1, 1)), meta)
    found = Checkpoints(tmp_path).read_meta(5)
    assert (found.config, found.labels, found.plateau) == (meta.config, meta.labels, meta.plateau)
    assert_equal(found.statistics, meta.statistics)


def test_a_checkpoint_of_earlier_code_is_read(state, meta, tmp_path, monkeypatch):
    """Which did not keep some things."""
    with Saver(tmp_path) as checkpoints:
        checkpoints.save(5, put(state, make_mesh(1, 1)), dataclasses.replace(meta, words=("a",)))
    load = Checkpoints._load

    def earlier(self, step, names):
        found = load(self, step, names)
        assert found["meta"].pop("words") == ["a"]
        del found["meta"]["pool"], found["meta"]["origin"], found["meta"]["mixed"]
        return found

    monkeypatch.setattr(Checkpoints, "_load", earlier)
    found = Checkpoints(tmp_path).read_meta(5)
    assert (found.labels, found.words, found.origin) == (meta.labels, (), 0)
    assert (found.drawn_from, found.mixed, found.drawing) == (None, False, None)


def test_a_state_donated_right_after_its_save_is_saved_as_it_was(state, meta, tmp_path):
    change = jax.jit(plus_one, donate_argnums=0)
    placed, expected = change(put(state, make_mesh(1, 2))), plus_one(state)
    with Saver(tmp_path) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, natural_state(placed, CLASSES), meta)
            between = change(placed)
            placed = change(between)
            jax.block_until_ready(placed)
            assert between.params["fc6"]["kernel"].is_deleted()
            checkpoints.wait()
            assert_equal(checkpoints.read_state(step, meta), expected)
            expected = plus_one(plus_one(expected))


@pytest.mark.parametrize(
    ("history", "kept"),
    [
        ([(1, 0.5)], [1]),
        ([(1, 0.5), (2, 0.4), (3, 0.6)], [2, 3]),
        ([(1, 0.5), (2, 0.4), (3, 0.4), (4, 0.6), (5, 0.7)], [2, 4, 5]),  # of equals the earlier
        ([(1, None), (2, 0.9), (3, None), (4, None)], [2, 3, 4]),  # never validated: not the best
        ([(1, float("nan")), (2, 0.9), (3, 0.95), (4, 0.95)], [2, 3, 4]),
        ([(1, 0.5), (2, 0.4), (3, 0.3)], [2, 3]),  # the newest is the best
        ([], []),
    ],
)
def test_the_two_newest_and_the_best_are_kept(history, kept):
    saved = [Saved(step, None if e is None else {"top1_error": e}) for step, e in history]
    answers = NewestAndBest().should_preserve(saved, context=None)
    assert [item.step for item, keep in zip(saved, answers, strict=True) if keep] == kept


def test_only_the_two_newest_and_the_best_stay_on_disk(state, meta, tmp_path):
    placed = put(state, make_mesh(1, 1))
    with Saver(tmp_path) as checkpoints:
        for step, error in ((1, 0.5), (2, 0.2), (3, 0.2), (4, 0.4), (5, 0.3)):
            checkpoints.save(step, placed, meta, error)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4, 5]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["2", "4", "5"]


def test_what_a_killed_save_left_is_no_checkpoint_and_for_its_run_to_clean(state, meta, tmp_path):
    with Saver(tmp_path) as checkpoints:
        checkpoints.save(1, put(state, make_mesh(1, 1)), meta)
    leftover = tmp_path / "2.orbax-checkpoint-tmp"
    leftover.mkdir()
    (leftover / "half").touch()
    assert Checkpoints(tmp_path).steps() == [1]
    assert leftover.exists()  # a reader cannot know that no save is under way
    with Saver(tmp_path) as checkpoints:
        checkpoints.clean()
        assert checkpoints.steps() == [1]
    assert not leftover.exists()


def test_a_save_that_fails_is_not_silent(state, meta, tmp_path):
    placed = put(state, make_mesh(1, 1))
    checkpoints = Saver(tmp_path / "run")
    checkpoints.save(1, placed, meta)
    checkpoints.wait()
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").touch()  # a file where the folder was
    with pytest.raises(SaveError, match="step 2"):
        checkpoints.save(2, placed, meta)


def test_saving_a_step_twice_is_an_error(state, meta, tmp_path):
    placed = put(state, make_mesh(1, 1))
    with Saver(tmp_path) as checkpoints:
        checkpoints.save(1, placed, meta)
        checkpoints.wait()
        with pytest.raises(SaveError, match="step 1"):
            checkpoints.save(1, placed, meta)


def test_a_save_leaves_nothing_behind_in_memory(state, meta, tmp_path):
    placed = put(state, make_mesh(1, 1))

    def objects_after(steps: range) -> int:
        for step in steps:
            checkpoints.save(step, placed, meta)
            checkpoints.wait()
        gc.collect()
        return len(gc.get_objects())

    with Saver(tmp_path) as checkpoints:
        before = objects_after(range(1, 4))
        assert objects_after(range(4, 14)) - before < 50  # 440, when it leaked


def test_the_step_to_read_is_the_newest_or_the_one_named(state, meta, tmp_path):
    with Saver(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="holds no checkpoint"):
            checkpoints.chosen_step(-1)
        for step, error in ((3, 0.1), (7, 0.2)):
            placed = put(state, make_mesh(1, 1))
            checkpoints.save(step, placed, meta, error)
        checkpoints.wait()
        assert checkpoints.chosen_step(-1) == 7
        assert checkpoints.chosen_step(3) == 3
        with pytest.raises(UserError, match="holds steps 3, 7"):
            checkpoints.chosen_step(5)


def test_unreadable_metrics_of_one_checkpoint_do_not_cost_the_others(state, meta, tmp_path, caplog):
    placed = put(state, make_mesh(1, 1))
    save_two(tmp_path, state, meta)
    (tmp_path / "2" / "metrics" / "metrics").write_bytes(b"\xff{")
    with Saver(tmp_path) as checkpoints:
        assert checkpoints.newest_whole() == 1
        checkpoints.save(2, placed, meta, 0.3)
        checkpoints.wait()
        assert checkpoints.newest_whole() == 2
    assert f"CHECKPOINT {tmp_path / '2'} IS DAMAGED" in caplog.text
    shutil.copytree(tmp_path / "1", tmp_path / "3")
    (tmp_path / "2" / "metrics" / "metrics").write_bytes(b"{")  # once more
    with Saver(tmp_path) as checkpoints:
        assert checkpoints.newest_whole() == 3
    assert (tmp_path / "2.damaged" / "metrics" / "metrics").read_bytes() == b"{"
    shutil.rmtree(tmp_path / "1")
    with Saver(tmp_path) as checkpoints:  # what was set aside is no more than that
        assert checkpoints.newest_whole() == 3


def test_reading_changes_nothing(state, meta, tmp_path, caplog):
    save_two(tmp_path, state, meta)
    (tmp_path / "2" / "metrics" / "metrics").write_bytes(b"{")
    before = sorted(tmp_path.rglob("*"))
    assert Checkpoints(tmp_path).read_net(-1)[0] == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert "metrics/metrics has" in caplog.text


@pytest.mark.parametrize("part", ["params", "training"])
def test_one_that_was_not_sealed_counts_only_if_all_of_it_can_be_read(part, state, meta, tmp_path):
    save_two(tmp_path, state, meta)
    (tmp_path / "2" / seals.SEAL).unlink()
    assert Checkpoints(tmp_path).newest_whole() == 2
    shutil.rmtree(tmp_path / "2" / part)
    assert Checkpoints(tmp_path).newest_whole() == 1


def test_one_that_is_whole_and_cannot_be_read_ends_the_reading(state, meta, tmp_path):
    save_two(tmp_path, state, meta)
    shutil.rmtree(tmp_path / "2" / "params")
    seals.seal(tmp_path / "2")
    with pytest.raises(UserError, match=r"2 is damaged .* the others are 1"):
        Checkpoints(tmp_path).read_net(-1)


@pytest.mark.parametrize("moment", ["digest", "read_params"])
def test_a_run_that_saves_meanwhile_is_read_at_its_newest(
    moment, state, meta, tmp_path, monkeypatch, caplog
):
    """Step 2 goes and steps 3 and 4 come while 2 is looked at, or read."""
    placed = put(state, make_mesh(1, 1))
    reader, later = Checkpoints(tmp_path), []
    owner = seals if moment == "digest" else reader
    really = getattr(owner, moment)

    def once_saved(*arguments):
        if not later:
            later.extend((3, 4))
            for step in later:
                run.save(step, placed, meta, 0.3)
            run.wait()
        return really(*arguments)

    save_two(tmp_path, state, meta)
    with Saver(tmp_path) as run:
        monkeypatch.setattr(owner, moment, once_saved)
        step, _, params = reader.read_net(-1)
        assert reader.steps() == [1, 3, 4]
    assert step == 4
    assert_equal(params, state.params)
    assert "DAMAGED" not in caplog.text
