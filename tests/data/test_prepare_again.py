"""What may go on does, without doing work again; the rest is refused in one line, untouched."""

import fcntl
import os
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest
from preparing import (
    ALLOWED,
    assert_refused,
    assert_statistics,
    files_of,
    pixels,
    shards_of,
    stored,
    tree,
    write_devkit,
    write_folder,
)

from alexnet_jax import prepare as command
from alexnet_jax.data import records

pytestmark = pytest.mark.usefixtures("shards_by_threads")


@pytest.fixture
def with_broken(folder, tmp_path) -> pathlib.Path:
    root = tmp_path / "in"
    shutil.copytree(folder, root)
    (root / "train/bee/002.png").write_bytes(b"no image")
    (root / "val/ant/001.png").write_bytes(b"")
    return root


def test_broken_images_are_named_and_counted_and_may_be_allowed(with_broken, raw, run, tmp_path):
    flags = (f"--input={with_broken}", f"--output={tmp_path / 'out'}", "--format=raw")
    flags = (*flags, "--shard_size=5")
    words = ("2 broken images, 0 allowed", "train/bee/002.png", "val/ant/001.png", "allow_broken=2")
    assert_refused(run(*flags), *words, status=1)
    assert not (tmp_path / "out").exists()
    before = shards_of(tmp_path)
    assert len(before) == 6
    assert_refused(run(*flags, "--allow_broken=1"), "2 broken images, 1 allowed", status=1)
    ran = run(*flags, "--allow_broken=2")
    assert ran.status == 0
    assert "train: 15 images" in ran.out
    assert ran.out.count("1 broken left out") == 2
    assert "002.png: not a whole image (of no known format)" in ran.out
    assert shards_of(tmp_path) == before  # no work was done again
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    for part, name in (("train", "bee/002.png"), ("validation", "ant/001.png")):
        expected = [record for record in stored(raw, part) if record.name != name]
        assert stored(tmp_path / "out", part) == expected
    assert_statistics(
        tmp_path / "out", np.stack([pixels(r.image) for r in stored(tmp_path / "out", "train")])
    )


def test_a_shard_of_nothing_but_broken_images_is_no_trouble(with_broken, run, tmp_path):
    for path in files_of(with_broken, "train")[4:8]:
        path.write_bytes(b"\xff\xd8\xff")
    flags = (f"--input={with_broken}", f"--output={tmp_path / 'out'}", "--shard_size=2")
    assert run(*flags, "--allow_broken=6").status == 0
    source = records.open_records(tmp_path / "out", "train")
    assert [source.read(index).label for index in range(len(source))] == [0] * 4 + [1] * 3 + [2] * 4
    assert command.main(["prepare", f"--verify={tmp_path / 'out'}"]) == 0


@pytest.mark.parametrize("lost", ["ant", "bee", ""])
def test_a_class_that_loses_all_its_training_images_is_refused(with_broken, run, tmp_path, lost):
    for path in files_of(with_broken, "train"):
        if path.parent.name.startswith(lost):
            path.write_bytes(b"")
    flags = (f"--input={with_broken}", f"--output={tmp_path / 'out'}", "--allow_broken=99")
    assert_refused(run(*flags), f"class '{lost or 'ant'}'", "no training image")


def test_a_broken_image_whose_name_is_no_text_is_named_all_the_same(with_broken, run, tmp_path):
    try:
        (with_broken / "train/ant" / os.fsdecode(b"\xff.jpg")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes no such name")
    flags = (f"--input={with_broken}", f"--output={tmp_path / 'out'}", "--allow_broken=3")
    ran = run(*flags)
    assert ran.status == 0
    assert "\\udcff.jpg" in ran.out
    ran.out.encode("utf-8")


@pytest.fixture
def unfinished(with_broken, run, tmp_path) -> tuple[str, ...]:
    """The flags of a run that ended with everything done but for two broken images."""
    flags = (f"--input={with_broken}", f"--output={tmp_path / 'out'}", "--shard_size=5")
    assert run(*flags).status == 1
    assert (tmp_path / "out.partial").is_dir()
    return flags


@pytest.mark.parametrize("flag", ["--size=24", "--quality=90", "--format=raw", "--shard_size=6"])
def test_other_settings_do_not_go_on(unfinished, run, tmp_path, flag):
    before = tree(tmp_path)
    name, _, value = flag[2:].partition("=")
    assert_refused(run(*unfinished, flag, "--allow_broken=2"), f"{name}: ", f"-> {value}", "output")
    assert tree(tmp_path) == before


def test_another_input_does_not_go_on(unfinished, folder, run):
    words = ("another input", "choose another --output", "remove it")
    assert_refused(run(*unfinished[1:], f"--input={folder}"), *words)


@pytest.mark.parametrize("change", ["touch", "grow", "add", "remove", "rename"])
def test_a_changed_folder_does_not_go_on(unfinished, with_broken, run, change):
    path = with_broken / "val/bee/001.png"
    if change == "touch":
        os.utime(path, (10**9, 10**9))
    elif change == "grow":
        path.write_bytes(path.read_bytes() + b"\0")
    elif change == "remove":
        path.unlink()
    elif change == "rename":
        path.rename(path.with_name("009.png"))
    else:
        shutil.copy2(path, path.with_name("009.png"))
    assert_refused(run(*unfinished, "--allow_broken=2"), "another input, or other files in it")


def test_a_changed_byte_of_a_tar_does_not_go_on(tars, run, tmp_path):
    shutil.copytree(tars, tmp_path / "in")
    flags = (f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", *ALLOWED[:3])
    assert run(*flags).status == 1
    path = tmp_path / "in/ILSVRC2012_img_train.tar"
    data = bytearray(path.read_bytes())
    place = data.rindex(b"\xff\xd9")  # of the last image, in the third shard
    data[place - 20] ^= 1
    path.write_bytes(data)
    words = ("train-00002", "other bytes", f"remove {tmp_path / 'out.partial'}")
    assert_refused(run(*flags, "--allow_broken=1"), *words)


def test_other_labels_of_the_same_tars_do_not_go_on(tars, run, tmp_path):
    shutil.copytree(tars, tmp_path / "in")
    flags = (f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", *ALLOWED[:3])
    assert run(*flags).status == 1
    write_devkit(tmp_path / "in", {"n01": 3, "n02": 1, "n03": 2}, [2, 3, 1, 1, 3])
    assert_refused(run(*flags, "--allow_broken=1"), "another input")


def test_shards_that_are_not_there_any_more_are_written_again(unfinished, run, tmp_path):
    partial = tmp_path / "out.partial"
    (partial / "data/train-00001.array_record").unlink()
    (partial / "journal/validation-00000.npz").unlink()
    before = shards_of(partial)
    assert run(*unfinished, "--allow_broken=2").status == 0
    after = shards_of(tmp_path / "out")
    kept = set(before) - {"validation-00000.array_record"}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    other = f"--output={tmp_path / 'other'}"
    assert run(*unfinished, other, "--allow_broken=2").status == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "other")


def test_files_that_a_killed_worker_left_do_not_stay(unfinished, run, tmp_path):
    (tmp_path / "out.partial/data/train-00001.array_record.tmp").write_bytes(b"half")
    (tmp_path / "out.partial/data/statistics.npz.tmp").write_bytes(b"half")
    (tmp_path / "out.partial/data/manifest.json").write_bytes(b"{}")  # killed before the rename
    assert run(*unfinished, "--allow_broken=2").status == 0
    assert not [path for path in tree(tmp_path / "out") if path.endswith(".tmp")]
    assert command.main(["prepare", f"--verify={tmp_path / 'out'}"]) == 0


def test_what_is_left_where_a_run_was_killed_at_its_very_end_is_removed(unfinished, run, tmp_path):
    shutil.copytree(tmp_path / "out.partial", tmp_path / "kept")
    assert run(*unfinished, "--allow_broken=2").status == 0
    for gone in ((), ("data",), ("data", "journal")):
        shutil.copytree(tmp_path / "kept", tmp_path / "out.partial")
        for name in gone:
            shutil.rmtree(tmp_path / "out.partial" / name)
        assert run(*unfinished, "--allow_broken=2").status == 0
        assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("change", ["settings", "renamed", "grown", "fewer"])
def test_an_output_of_something_else_is_not_taken_for_this(folder, raw, run, tmp_path, change):
    """Though it has as many images."""
    shutil.copytree(folder, tmp_path / "in")
    path = tmp_path / "in/val/bee/001.png"
    if change == "renamed":
        path.rename(path.with_name("0015.png"))
    elif change == "grown":
        path.write_bytes(path.read_bytes() + b"\0")
    elif change == "fewer":
        path.unlink()
    kind = "jpeg" if change == "settings" else "raw"
    flags = (f"--input={tmp_path / 'in'}", f"--output={raw}", f"--format={kind}", "--shard_size=5")
    before = tree(raw)
    assert_refused(run(*flags), "another input, or other settings", "choose another")
    assert tree(raw) == before


def test_a_folder_of_something_else_is_not_written_into(folder, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("years of work")
    for name in ("out", "file"):
        ran = run(f"--input={folder}", f"--output={tmp_path / name}")
        assert_refused(ran, "exists and is no prepared data", "choose another")
    assert sorted(tree(tmp_path)) == ["file", "out/thesis.txt"]


@pytest.mark.parametrize("name", ["thesis.txt", "data/thesis.txt", "journal/thesis.txt"])
@pytest.mark.parametrize("there", [False, True])
def test_files_that_happen_to_lie_where_unfinished_work_would_are_not_touched(
    folder, raw, run, tmp_path, name, there
):
    path = tmp_path / "out.partial" / name
    path.parent.mkdir(parents=True)
    path.write_text("years of work")
    if there:
        shutil.copytree(raw, tmp_path / "out")
    before = tree(tmp_path)
    flags = (f"--input={folder}", f"--output={tmp_path / 'out'}", "--format=raw", "--shard_size=5")
    assert_refused(run(*flags), tmp_path / "out.partial", "move it away")
    assert tree(tmp_path) == before


def test_empty_folders_are_written_into(folder, raw, run, tmp_path):
    flags = (f"--input={folder}", "--format=raw", "--shard_size=5")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("new")
    for name in ("link", "dangling", "some/where/else"):
        assert run(*flags, f"--output={tmp_path / name}").status == 0
        assert tree(tmp_path / name) == tree(raw)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "empty", "link", "new", "some"]


def test_home_and_the_folder_one_is_in_are_places_as_any(folder, raw, run, tmp_path, monkeypatch):
    flags = (f"--input={folder}", "--format=raw", "--shard_size=5")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(*flags, "--output=~/out").status == 0
    assert run("--verify=~/out").status == 0
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(*flags, "--output=.").status == 0
    assert tree(tmp_path / "here") == tree(tmp_path / "out") == tree(raw)
    assert_refused(run(*flags, "--output=/"), "root of the file system")


@pytest.mark.parametrize("place", ["", "out", "ant/out"])
def test_a_folder_is_not_prepared_into_itself(pictures, run, tmp_path, place):
    write_folder(pictures, tmp_path / "in", {"ant": 5, "bee": 5}, 0)
    before = tree(tmp_path)
    ran = run(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'in' / place}")
    assert_refused(ran, "lies in the folder that is read")
    assert tree(tmp_path) == before


def test_two_processes_do_not_write_one_output(unfinished, run, tmp_path):
    descriptor = os.open(tmp_path / "out.partial", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # as another process has it
        assert_refused(run(*unfinished, "--allow_broken=2"), "another process", "wait for it")
    finally:
        os.close(descriptor)
    assert run(*unfinished, "--allow_broken=2").status == 0


class Killed(BaseException):
    """What the package cannot catch."""


# Steps by which something gets its name or goes: the plan, two for each of six shards, indices,
# statistics, the manifest, the output, two folders of what was unfinished.
STEPS = 1 + 2 * 6 + 2 + 1 + 1 + 1 + 2


@pytest.mark.parametrize("moment", range(2 * STEPS))
def test_killed_before_or_after_any_step_it_goes_on(folder, raw, run, tmp_path, moment):
    flags = (f"--input={folder}", f"--output={tmp_path / 'out'}", "--format=raw", "--shard_size=5")
    steps = 0
    calls = ((os, "replace"), (os, "rename"), (shutil, "rmtree"))

    def deadly(call: Callable) -> Callable:
        def step(*arguments, **options):
            nonlocal steps
            steps += 1
            if steps == moment // 2 + 1 and moment % 2:
                call(*arguments, **options)
            if steps > moment // 2:
                raise Killed
            return call(*arguments, **options)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for module, name in calls:
            patch.setattr(module, name, deadly(getattr(module, name)))
        with pytest.raises(Killed):
            run(*flags, "--workers=1")
    assert run(*flags).status == 0
    assert tree(tmp_path / "out") == tree(raw)
    assert os.listdir(tmp_path) == ["out"]


def test_help_names_every_flag(run):
    ran = run("--help")
    assert ran.status == 0
    assert not ran.err
    for flag in ("input", "output", "verify", "format", "quality", "size", "shard_size", "workers",
                 "allow_broken", "unofficial", "tfds_dir", "cache_dir", "split"):  # fmt: skip
        assert f"{flag}:" in ran.out
    assert "python -m alexnet_jax.prepare --input=INPUT --output=DIR" in ran.out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--input and --output", "--verify", "--help"]),
        (["--input=x"], ["--output"]),
        (["--output=x"], ["--input"]),
        (["--inptu=x"], ["inptu", "Did you mean: input"]),
        (["x"], ["'x'", "--name=value"]),
        (["--size=0", "--input=x", "--output=y"], ["size=0", "[8, 2048]"]),
        (["--size=2049", "--input=x", "--output=y"], ["size=2049", "[8, 2048]"]),
        (["--size=x", "--input=x", "--output=y"], ["--size='x': must be a whole number"]),
        (["--quality=101", "--input=x", "--output=y"], ["quality=101", "[1, 100]"]),
        (["--format=png", "--input=x", "--output=y"], ["format=png", "jpeg|raw"]),
        (["--shard_size=0", "--input=x", "--output=y"], ["shard_size=0"]),
        (["--workers=-1", "--input=x", "--output=y"], ["workers=-1"]),
        (["--allow_broken=-1", "--input=x", "--output=y"], ["allow_broken=-1"]),
        (["--input=/nowhere", "--output=y"], ["/nowhere", "no such file or folder"]),
        (
            ["--input=tfds:nothing", "--tfds_dir=/nowhere", "--output=y"],
            ["tfds:nothing", "named by --tfds_dir=DIR"],
        ),
        (["--input=shapes", "--split=0,2,2", "--output=y"], ["set --split=..."]),
        (["--input=records:x", "--output=y"], ["records:x"]),
        (["--input=shapes:x", "--output=y"], ["shapes:x"]),
        (["--verify=/nowhere"], ["/nowhere", "manifest.json"]),
        (["--verify=/"], ["root of the file system"]),
    ],
)
def test_mistakes_are_told_in_one_line(run, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    ran = run(*flags)
    assert_refused(ran, *words)
    assert not ran.out
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("split", ["6,2", "a,b,c", "0,1,1", "6,2,-1", ""])
def test_a_split_that_is_none_is_a_mistake(folder, run, tmp_path, split):
    ran = run(f"--input={folder}", f"--output={tmp_path / 'out'}", f"--split={split}")
    assert_refused(ran, "split")
    assert not os.listdir(tmp_path)


def test_a_folder_that_may_not_be_written_is_told_in_one_line(folder, run, tmp_path):
    (tmp_path / "file").touch()
    ran = run(f"--input={folder}", f"--output={tmp_path / 'file/out'}")
    assert_refused(ran, tmp_path / "file", status=1)
