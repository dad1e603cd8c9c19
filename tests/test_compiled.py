"""How C++ is compiled, kept and done without."""

import concurrent.futures
import ctypes
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence

import pytest

from alexnet_jax import compiled

COMPILER = [os.environ.get("CXX") or "c++"]
needs_compiler = pytest.mark.skipif(not shutil.which(COMPILER[0]), reason="no C++ compiler")


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    """What returns a number of a header's."""
    (tmp_path / "number.h").write_text("enum { kNumber = 42 };")
    path = tmp_path / "number.cc"
    path.write_text('#include "number.h"\nextern "C" int number() { return kNumber; }')
    return path


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Where libraries are kept, with a space in its name."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "com piled"))
    return tmp_path / "com piled"


@needs_compiler
def test_a_library_is_made_once_and_anew_when_damaged(folder, source):
    found, suffix = compiled.library(COMPILER, source, ["number"], [])
    assert found.number() == 42
    (path,) = folder.iterdir()
    assert suffix in path.name
    whole, made = path.read_bytes(), path.stat().st_mtime_ns
    compiled.library(COMPILER, source, ["number"], [])
    assert path.stat().st_mtime_ns == made
    for damaged in (whole[:1000], whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], b""):
        path.unlink()  # what is mapped already stays as it is
        path.write_bytes(damaged)
        found, _ = compiled.library(COMPILER, source, ["number"], [])
        assert found.number() == 42
        assert [other.read_bytes() for other in folder.iterdir()] == [whole]


@needs_compiler
def test_what_could_change_a_library_makes_another(folder, source, tmp_path):
    """gcc and g++ are alike in all but their names."""
    link = tmp_path / "link"
    link.symlink_to(shutil.which(COMPILER[0]))
    suffixes = [
        compiled.library(COMPILER, source, ["number"], [])[1],
        compiled.library([str(link)], source, ["number"], [])[1],
        compiled.library(COMPILER, source, ["number"], ["-ffp-contract=off"])[1],
    ]
    (tmp_path / "number.h").write_text("enum { kNumber = 43 };")
    found, suffix = compiled.library(COMPILER, source, ["number"], [])
    assert found.number() == 43
    assert len({*suffixes, suffix}) == 4
    assert len([*folder.iterdir()]) == 4


@needs_compiler
def test_a_library_that_lacks_what_it_must_have_is_none_and_not_kept(folder, source):
    with pytest.raises(OSError, match="has no letter"):
        compiled.library(COMPILER, source, ["number", "letter"], [])
    assert not [*folder.iterdir()]


@needs_compiler
@pytest.mark.parametrize("place", ["in the way", "gs://bucket/folder", ""])
def test_without_a_folder_to_keep_it_in_a_library_lives_as_long_as_its_process(
    place, source, tmp_path, monkeypatch
):
    """And is there for the processes that this one starts."""
    (tmp_path / "in the way").write_text("a file")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", place)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code = (
        "import os, pathlib, subprocess, sys, time; from alexnet_jax import compiled;"
        f"found, _ = compiled.library({COMPILER}, pathlib.Path({str(source)!r}), ['number'], []);"
        "(kept,) = pathlib.Path(os.environ[compiled.KEPT]).iterdir();"
        "made = kept.stat().st_mtime_ns;"
        "print(found.number(), os.environ[compiled.KEPT]);"
        "sys.argv[1:] and subprocess.run([sys.executable, '-c', sys.argv[1]], check=True);"
        "assert kept.stat().st_mtime_ns == made"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, code], capture_output=True, text=True, check=True
    )
    first, second = ended.stdout.splitlines()
    assert first == second
    number, _, folder = first.partition(" ")
    assert number == "42"
    assert pathlib.Path(folder).parent == tmp_path
    assert not pathlib.Path(folder).exists()


@needs_compiler
def test_a_folder_that_may_not_be_looked_into_is_no_reason_to_go_without(
    folder, source, monkeypatch
):
    """As one of another user's, which root may look into."""

    look = pathlib.Path.glob

    def glob(path: pathlib.Path, pattern: str) -> Iterator[pathlib.Path]:
        if path == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, pattern)

    monkeypatch.setattr(pathlib.Path, "glob", glob)
    monkeypatch.setenv(compiled.KEPT, "")
    assert compiled.library(COMPILER, source, ["number"], [])[0].number() == 42


@needs_compiler
def test_a_folder_that_may_only_be_read_is_searched_too(folder, source, tmp_path, monkeypatch):
    compiled.library(COMPILER, source, ["number"], [])
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    monkeypatch.setattr(compiled, "_kept", lambda: pytest.fail("it is compiled again"))
    assert compiled.library(COMPILER, source, ["number"], [])[0].number() == 42


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="the system does not tell")
@pytest.mark.parametrize("barred", ["TMPDIR", "JAX_COMPILATION_CACHE_DIR"])
def test_nothing_is_loaded_from_where_programs_may_not_run(
    barred, folder, source, tmp_path, monkeypatch
):
    """Such as a /tmp that is mounted noexec."""
    folder.mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)  # forgets what TMPDIR was
    monkeypatch.setenv(compiled.KEPT, "")  # to be restored, whatever is kept there
    where, load = pathlib.Path(os.environ[barred]), compiled._loaded

    def loaded(path: pathlib.Path, symbols: Sequence[str]) -> ctypes.CDLL:
        if path.is_relative_to(where):
            raise OSError("failed to map segment from shared object")
        return load(path, symbols)

    def statvfs(path: str | pathlib.Path) -> types.SimpleNamespace:
        inside = pathlib.Path(path).is_relative_to(where)
        return types.SimpleNamespace(f_flag=os.ST_NOEXEC if inside else 0)

    monkeypatch.setattr(compiled, "_loaded", loaded)
    monkeypatch.setattr(os, "statvfs", statvfs)
    assert compiled.library(COMPILER, source, ["number"], [])[0].number() == 42
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda **_: pytest.fail("made again"))
    assert compiled.library(COMPILER, source, ["number"], [])[0].number() == 42


def test_many_who_ask_at_once_have_it_made_once(source, monkeypatch):
    made = []

    def library(*arguments: object) -> tuple[None, str]:
        time.sleep(0.05)
        made.append(arguments)
        return None, "made"

    monkeypatch.setattr(compiled, "library", library)
    monkeypatch.setenv("CXX", "true")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(compiled.load, source, ["number"], [], "") for _ in range(8)]
    assert {future.result() for future in asked} == {(None, "made")}
    assert len(made) == 1


@needs_compiler
def test_an_error_in_the_source_is_said_and_is_no_failure(source, folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("alexnet_jax"), "propagate", True)
    caplog.set_level(logging.INFO)
    source.write_text("int number( {")
    assert compiled.load(source, ["number"], [], "fingers are used") == (None, "")
    assert "number.cc:1" in caplog.text
    assert "fingers are used" in caplog.text
    with pytest.raises(subprocess.CalledProcessError):
        compiled.library(COMPILER, source, ["number"], [])


@needs_compiler
@pytest.mark.parametrize("cxx", [None, "no-such-compiler"])
def test_the_compiler_of_package_ziglang_serves_where_there_is_no_other(
    cxx, source, folder, tmp_path, monkeypatch
):
    """Here a package of that name runs the machine's own. What CXX names is not replaced."""
    asked, where = tmp_path / "asked", os.environ["PATH"]
    (tmp_path / "packages/ziglang").mkdir(parents=True)
    (tmp_path / "packages/ziglang/__init__.py").touch()
    (tmp_path / "packages/ziglang/__main__.py").write_text(
        f"import os, sys; open({str(asked)!r}, 'a').write(sys.argv[1] + ' ');"
        f"os.environ['PATH'] = {where!r};"
        f"os.execvp({COMPILER[0]!r}, [{COMPILER[0]!r}, *sys.argv[2:]])"
    )
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if cxx:
        monkeypatch.setenv("CXX", cxx)
    found, _ = compiled.load(source, ["number"], [], "fingers are used")
    if cxx:
        assert found is None
        assert not asked.exists()
    else:
        assert found is not None
        assert found.number() == 42
        assert asked.read_text() == "c++ c++ "  # what it is, and the library


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", "false -with arguments", "'"])
def test_without_a_compiler_that_works_the_log_says_what_is_done(
    compiler, source, monkeypatch, caplog
):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(logging.getLogger("alexnet_jax"), "propagate", True)
    caplog.set_level(logging.INFO)
    assert compiled.load(source, ["number"], [], "fingers are used") == (None, "")
    assert "fingers are used" in caplog.text
    assert "CXX" in caplog.text
    assert "ziglang" not in caplog.text  # it does not replace what CXX names
