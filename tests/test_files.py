"""Files are written whole or not at all, and a folder's seal tells what has changed in it."""

import concurrent.futures
import errno
import os
import pathlib

import numpy as np
import pytest

from alexnet_jax import files, seals
from alexnet_jax.errors import UserError


def test_a_tilde_is_the_home_folder_and_never_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.expanded("~/a") == tmp_path / "a"
    assert files.expanded("a~b") == pathlib.Path("a~b")
    with pytest.raises(UserError, match="~nobody-here/a: there is no such home folder; set HOME"):
        files.expanded("~nobody-here/a")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_only_a_folder_may_be_on_a_file_system_that_does_not_sync_it(number, tmp_path, monkeypatch):
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=os.strerror(number)):
        files.synced(tmp_path / "file")
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            files.synced(tmp_path)
    else:
        files.synced(tmp_path)


@pytest.mark.parametrize("sync", [False, True])
def test_a_write_that_fails_half_way_leaves_the_file_that_was_there(sync, tmp_path):
    path = tmp_path / "table.md"
    files.write_text(path, "old", sync)

    def fail() -> None:
        with files.whole(path, sync) as partial:
            partial.write_text("ne")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_text() == "old"
    files.write_text(path, "new", sync)
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.md"]


def test_of_many_who_write_one_file_at_once_each_writes_it_whole(tmp_path):
    """Threads have one process id, as processes in containers often have."""
    texts = [str(number) * 1000 for number in range(8)]

    def write(text: str) -> None:
        for _ in range(50):
            files.write_text(tmp_path / "table.md", text)

    with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(write, texts))
    assert (tmp_path / "table.md").read_text() in texts
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.md"]


def test_arrays_are_read_back_without_pickle(tmp_path):
    names = np.array(["a", "é"])
    files.write_arrays(tmp_path / "x.npz", numbers=np.arange(3), names=names)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as found:
        assert found["numbers"].tolist() == [0, 1, 2]
        assert found["names"].tolist() == ["a", "é"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "data").write_bytes(bytes(range(256)))
    (tmp_path / "list").write_text("one\n")
    seals.seal(tmp_path)
    return tmp_path


def test_a_sealed_folder_is_whole_whatever_is_added(folder):
    assert seals.is_sealed(folder)
    assert seals.damage(folder) is None
    (folder / "more").touch()
    assert seals.damage(folder) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.unlink(), "d/data is missing"),
        (lambda path: path.write_bytes(bytes(range(255))), "d/data has 255 bytes, had 256"),
        (lambda path: path.write_bytes(bytes(range(255)) + b"\0"), "d/data has another content"),
    ],
)
def test_what_is_missing_cut_or_changed_is_named(change, words, folder):
    change(folder / "d" / "data")
    assert seals.damage(folder) == words


@pytest.mark.parametrize("text", ["", "[]", '{"list": 3}', '{"list": ["a"]}', "\0"])
def test_a_seal_that_is_damaged_itself_vouches_for_nothing(text, folder):
    (folder / seals.SEAL).write_text(text)
    assert "cannot be read" in (seals.damage(folder) or "")


def test_a_file_that_the_disk_refuses_is_named_and_not_its_seal(folder, monkeypatch):
    def refuse(path: pathlib.Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(seals, "digest", refuse)
    assert seals.damage(folder) == "'d/data' cannot be read ([Errno 13] Permission denied)"
