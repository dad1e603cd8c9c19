"""Training as a user starts it, ended by force; what it lost. `long.py` does the same for hours."""

import pathlib
import random
import shutil
from collections.abc import Iterator

import pytest
import trials
from harness import SHORT, Bench, step_folders

from alexnet_jax import seals
from alexnet_jax.checkpoint import Saver

pytestmark = pytest.mark.skipif(
    not pathlib.Path("/proc/self/stat").exists(), reason="needs Linux's /proc"
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # less time to compile
        yield Bench(tmp_path_factory.mktemp("bench"), *SHORT)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(1)


def test_killed_in_the_middle_of_saving_nothing_is_lost(bench, rng):
    found = trials.killed(bench, rng, kills=3, moments=("saving", "sealing", "saving"))
    assert found["lost"] == []
    assert len(found["kills"]) == 3
    assert any(kill["temporary"] for kill in found["kills"])


def test_a_signal_ends_it_after_saving_the_next_step(bench, rng):
    found = trials.stopped(bench, rng, phase="saving")
    assert found["lost"] == []
    assert found["status"] == 143


def test_a_full_disk_is_told_in_one_line_and_older_checkpoints_stay_whole(bench, rng):
    assert trials.limited(bench, rng)["lost"] == []


def test_a_second_start_is_refused_and_does_the_first_no_harm(bench, rng):
    assert trials.twice(bench, rng)["lost"] == []


@pytest.mark.parametrize("damage", trials.DAMAGES)
def test_whatever_file_is_damaged_the_checkpoint_before_is_taken(damage, bench, rng, tmp_path):
    folders = step_folders(bench.undisturbed())
    *_, older, last = (int(folder.name) for folder in folders)
    found = {}
    for name, harm in trials.harmable(folders[-1]):
        if harm == damage:
            copy = shutil.copytree(folders[-1].parent, tmp_path / str(len(found)))
            trials.harm(copy / str(last) / name, damage, rng)
            try:
                with Saver(copy) as checkpoints:
                    found[name] = checkpoints.newest_whole()
            except Exception as error:
                found[name] = repr(error)
    unsealed = {seals.SEAL: last} if damage == "missing" else {}  # is read whole, and counts
    assert found == dict.fromkeys(found, older) | unsealed
    assert len(found) > 20
