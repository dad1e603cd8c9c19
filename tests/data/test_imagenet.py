"""ImageNet's tars are read to the byte, portion by portion; what is not whole is refused."""

import gzip
import hashlib
import importlib.util
import io
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile
import textwrap
import tracemalloc
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import scipy.io
import tensorflow_datasets as tfds

from alexnet_jax.data import imagenet, images
from alexnet_jax.data.imagenet import Classes, Scan, Tars
from alexnet_jax.data.tars import Members
from alexnet_jax.errors import UserError

PACKAGE = pathlib.Path(tfds.__file__).parent / "datasets/imagenet2012"
COUNTS = {"n03": 5, "n01": 1, "n04": 7, "n02": 3}  # in no order
IDS = {"n01": 30, "n02": 2, "n03": 4, "n04": 1}  # in no order either
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
Entry = tuple[str, bytes] | tarfile.TarInfo
Files = dict[str, bytes]


def tarred(entries: Iterable[Entry], form: int = tarfile.GNU_FORMAT, packed: str = "") -> bytes:
    """A tar's bytes: (name, data) is a file, a TarInfo a member without data."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{packed}", format=form) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                tar.addfile(info, io.BytesIO(entry[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def pictures_of(counts: dict[str, int], seed: int = 0) -> dict[str, Files]:
    """By class, file names and bytes that occur once in any file; sizes around whole blocks."""
    rng = np.random.default_rng(seed)
    sizes = iter([512, 1, 511, 513, 1024, 2000, 100] * 100)
    return {
        name: {f"{name}_{9 * i + 2}.JPEG": rng.bytes(16 + next(sizes)) for i in range(count)}
        for name, count in counts.items()
    }


def train_tar(classes: dict[str, Files], form: int = tarfile.GNU_FORMAT) -> bytes:
    return tarred([(f"{k}.tar", tarred(v.items(), form)) for k, v in classes.items()], form)


def validation_files(numbers: Iterable[int], seed: int = 1) -> Files:
    rng = np.random.default_rng(seed)
    return {f"ILSVRC2012_val_{n:08d}.JPEG": rng.bytes(600 + n % 13) for n in numbers}


def devkit(synsets: list[dict] | None = None, truth: str = "", leave_out: str = "") -> bytes:
    """A devkit's bytes: leaves of IDS, ordered by id, between them and after them other synsets."""
    if synsets is None:
        synsets = [synset(name, number) for name, number in IDS.items()]
        synsets += [synset("n00", 1001, 4), synset("n09", 3)]
        synsets.sort(key=lambda s: s["ILSVRC2012_ID"])
    fields = [(name, object) for name in synsets[0]]
    table = np.array([tuple(s.values()) for s in synsets], fields)
    mat = io.BytesIO()
    scipy.io.savemat(mat, {"synsets": table.reshape(-1, 1)})
    top = "ILSVRC2012_devkit_t12"
    entries: list[Entry] = [
        special(f"{top}/data", tarfile.DIRTYPE),
        (f"{top}/metadata/meta.mat", b"not this"),
        (f"{top}/data/old_meta.mat", b"nor this"),
        (f"{top}/data/meta.mat", mat.getvalue()),
        (f"{top}/data/ILSVRC2012_validation_ground_truth.txt", truth.encode()),
    ]
    left_out = f"{top}/data/{leave_out}"
    kept = [e for e in entries if isinstance(e, tarfile.TarInfo) or e[0] != left_out]
    return tarred(kept, packed="gz")


def synset(name: str, number: int, num_children: int = 0) -> dict:
    return {
        "ILSVRC2012_ID": float(number),
        "WNID": name,
        "words": f"{name} in words, or so",
        "gloss": "what it is",
        "num_children": float(num_children),
        "children": np.arange(num_children, dtype=float),
        "wordnet_height": 0.0,
        "num_train_images": 1300.0,
    }


def written(root: pathlib.Path, train: bytes, validation: bytes = b"", kit: bytes = b"") -> Tars:
    """The files under their official names."""
    (root / "ILSVRC2012_img_train.tar").write_bytes(train)
    (root / "ILSVRC2012_img_val.tar").write_bytes(validation)
    if kit:
        (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(kit)
    tars = imagenet.find(str(root))
    assert tars is not None
    return tars


def scanned(path: pathlib.Path, targets: np.ndarray | None = None, count: int = 4) -> list[Members]:
    """All portions of a training tar of the classes of COUNTS, or of a validation tar."""
    split = "train" if targets is None else "validation"
    return list(Scan(path, split, Classes(tuple(sorted(COUNTS)), None, None), targets, count))


def everything(portions: Iterable[Members]) -> list[tuple[str, bytes, int]]:
    found = []
    for members in portions:
        assert members.offsets.dtype == members.sizes.dtype == members.targets.dtype == np.int64
        read = [members.read(index) for index in range(len(members))]
        np.testing.assert_array_equal(members.targets, [example.label for example in read])
        np.testing.assert_array_equal(members.sizes, [len(example.data) for example in read])
        found += [(example.name, example.data, example.label) for example in read]
    return found


def refusal(call: Callable, *words: str | pathlib.Path | None) -> None:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


@pytest.fixture
def classes() -> dict[str, Files]:
    return pictures_of(COUNTS)


@pytest.fixture
def tar_path(classes, tmp_path) -> pathlib.Path:
    path = tmp_path / "train.tar"
    path.write_bytes(train_tar(classes))
    return path


def test_the_official_tars_are_those_tensorflow_datasets_knows():
    rows = [line.split() for line in (PACKAGE / "checksums.tsv").read_text("utf-8").splitlines()]
    known = {url.rpartition("/")[2]: (int(size), digest) for url, size, digest in rows}
    for official in imagenet.OFFICIAL.values():
        assert known[official.name] == (official.size, official.sha256)
    assert list(imagenet.OFFICIAL) == ["train", "validation"]


def touched(root: pathlib.Path, *names: str) -> list[pathlib.Path]:
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).touch()
    return [root / name for name in names]


def test_a_folder_is_looked_through_for_the_official_names(tmp_path, monkeypatch):
    train, validation = touched(tmp_path, "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
    touched(tmp_path, "ILSVRC2012_img_test.tar", "ILSVRC2012_img_train_t3.tar", "other_val.tar")
    assert imagenet.find(str(tmp_path)) == Tars(train, validation, None)
    (kit,) = touched(tmp_path, "ILSVRC2012_devkit_t12.tar.gz")
    tars = imagenet.find(str(tmp_path))
    assert tars is not None
    assert tars == Tars(train, validation, kit)
    assert tars.splits == {"train": train, "validation": validation}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert imagenet.find("~") == tars


def test_a_folder_without_either_tar_is_for_others_to_read(tmp_path):
    (tmp_path / "train/ant").mkdir(parents=True)
    assert imagenet.find(str(tmp_path)) is None
    touched(tmp_path, "ILSVRC2012_devkit_t12.tar.gz", "train.tar")
    (tmp_path / "ILSVRC2012_img_train.tar").mkdir()
    assert imagenet.find(str(tmp_path)) is None


@pytest.mark.parametrize("pair", [("train", "val"), ("val", "train")])
def test_one_tar_alone_is_refused_with_where_to_get_the_other(tmp_path, pair):
    there, lacking = (f"ILSVRC2012_img_{part}.tar" for part in pair)
    (path,) = touched(tmp_path, there)
    for where in (tmp_path, path):
        refusal(lambda where=where: imagenet.find(str(where)), where, lacking, "image-net.org")


def test_files_may_be_listed_in_any_order_and_under_names_of_ones_own(tmp_path):
    val, train, kit = touched(tmp_path / "a,b".replace(",", " "), "my_VAL.x", "Train", "devkit.tgz")
    assert imagenet.find(f"{val}, {train}") == Tars(train, val, None)
    assert imagenet.find(f"{kit},{val},{train},") == Tars(train, val, kit)


def test_the_devkit_is_not_taken_for_validation_by_its_folder(tmp_path):
    val, train, kit = touched(tmp_path / "train_val", "v_val.tar", "t_train.tar", "devkit.tar.gz")
    assert imagenet.find(f"{val},{train},{kit}") == Tars(train, val, kit)


@pytest.mark.parametrize("name", ["images.tar", "trainval.tar", "t12.tar.gz"])
def test_a_listed_file_of_no_clear_name_is_refused(tmp_path, name):
    val, train, odd = touched(tmp_path, "val.tar", "train.tar", name)
    refusal(lambda: imagenet.find(f"{val},{train},{odd}"), odd, "train, val, devkit", "rename")


def test_a_listed_file_that_is_missing_or_there_twice_is_refused(tmp_path):
    val, train, other = touched(tmp_path, "val.tar", "train.tar", "train2.tar")
    gone = tmp_path / "devkit.tar.gz"
    refusal(lambda: imagenet.find(f"{val},{train},{gone}"), gone, "no such file", "image-net.org")
    refusal(lambda: imagenet.find(f"{val},{train},{other}"), train, other, "list one")
    refusal(lambda: imagenet.find(str(tmp_path / "nowhere")), "nowhere", "no such file")
    refusal(lambda: imagenet.find(f"{val},{tmp_path},{train}"), tmp_path)
    refusal(lambda: imagenet.find(""), "train")
    refusal(lambda: imagenet.find("x" * 5000), "no such file")


def test_sizes_are_the_official_ones_or_named(tmp_path):
    tars = written(tmp_path, b"", b"")
    os.truncate(tars.train, 147_897_477_120)  # sparse: takes no room
    os.truncate(tars.validation, 6_744_924_160)
    imagenet.check_sizes(tars)
    os.truncate(tars.validation, 6_744_924_159)
    words = ("validation", "6744924159", "6744924160", "download it again", "--unofficial")
    refusal(lambda: imagenet.check_sizes(tars), *words)
    os.truncate(tars.train, 5)
    refusal(lambda: imagenet.check_sizes(tars), "train", " 5 ", "147897477120", "--unofficial")
    tars.train.unlink()
    refusal(lambda: imagenet.check_sizes(tars), tars.train)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_digest_is_the_official_one_or_named(split):
    imagenet.check_digest(split, imagenet.OFFICIAL[split].sha256)
    other = hashlib.sha256(b"x").hexdigest()
    words = (split, other, imagenet.OFFICIAL[split].sha256, "again", "--unofficial")
    refusal(lambda: imagenet.check_digest(split, other), *words)


def test_labels_are_the_sorted_names_of_the_class_tars(classes, tmp_path):
    tars = written(tmp_path, train_tar(classes))
    assert imagenet.read_classes(tars) == (("n01", "n02", "n03", "n04"), None, None)


def test_the_devkit_names_the_classes_in_the_order_of_labels(classes, tmp_path):
    found = imagenet.read_classes(written(tmp_path, train_tar(classes), kit=devkit()))
    assert found.labels == ("n01", "n02", "n03", "n04")
    assert found.names == tuple(f"n0{k} in words, or so" for k in (1, 2, 3, 4))
    assert found.devkit_ids == (30, 2, 4, 1)


def test_a_devkit_of_one_class_is_read(tmp_path):
    tars = written(tmp_path, train_tar(pictures_of({"n01": 1})), b"", devkit([synset("n01", 7)]))
    assert imagenet.read_classes(tars) == (("n01",), ("n01 in words, or so",), (7,))


def test_a_devkit_that_a_browser_unzipped_is_read(classes, tmp_path):
    plain = gzip.decompress(devkit())
    assert imagenet.read_classes(written(tmp_path, train_tar(classes), b"", plain)).devkit_ids


def test_the_devkits_truth_becomes_labels(classes, tmp_path):
    tars = written(tmp_path, train_tar(classes), kit=devkit(truth="2\n30\n1\n4\n2\n"))
    targets = imagenet.validation_targets(tars, imagenet.read_classes(tars))
    assert targets.dtype == np.int64
    np.testing.assert_array_equal(targets, [1, 0, 3, 2, 1])


def test_without_a_devkit_the_truth_is_tensorflow_datasets(tmp_path):
    wnids = (PACKAGE / "labels.txt").read_text(encoding="utf-8").split()
    rng = np.random.default_rng(0)
    order = [wnids[k] for k in rng.permutation(1000)]
    tars = written(tmp_path, tarred([(f"{name}.tar", b"") for name in order]))
    classes = imagenet.read_classes(tars)
    assert classes.labels == tuple(wnids)
    targets = imagenet.validation_targets(tars, classes)
    assert targets.dtype == np.int64
    assert targets.shape == (50_000,)
    np.testing.assert_array_equal(np.bincount(targets), np.full(1000, 50))
    truth = (PACKAGE / "validation_labels.txt").read_text(encoding="utf-8").split()
    assert [wnids[target] for target in targets] == truth
    assert targets[:3].tolist() == [65, 970, 230]  # as every list of the validation labels begins


def test_a_training_tar_without_a_validation_class_is_refused(classes, tmp_path):
    tars = written(tmp_path, train_tar(classes))
    words = ("validation_labels.txt, line 1", "n01751748", "4 classes", tars.train)
    refusal(lambda: imagenet.validation_targets(tars, imagenet.read_classes(tars)), *words)


@pytest.mark.parametrize(
    ("truth", "line"),
    [("1\n2\n5\n", 3), ("1\nx\n", 2), ("1 2\n", 1), ("", 1), ("1\n\n2\n", 2), ("1001\n", 1),
     ("3\n", 1), ("\xe9\n", 1)],
)  # fmt: skip
def test_a_truth_that_is_no_list_of_class_numbers_is_refused(classes, tmp_path, truth, line):
    tars = written(tmp_path, train_tar(classes), kit=devkit(truth=truth))
    words = (tars.devkit, "ground_truth", f"line {line}:", "4 classes")
    refusal(lambda: imagenet.validation_targets(tars, imagenet.read_classes(tars)), *words)


@pytest.mark.parametrize("there", [None, "empty"])
def test_without_any_list_of_labels_the_ways_out_are_named(monkeypatch, tmp_path, there):
    spec = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec if there else None)
    tars = Tars(tmp_path / "train.tar", tmp_path / "val.tar", None)
    words = ("validation_labels.txt", "install tensorflow-datasets", "devkit_t12.tar.gz")
    refusal(lambda: imagenet.validation_targets(tars, Classes(("a",), None, None)), *words)


def test_tensorflow_datasets_is_not_imported_for_its_list():
    code = """
        import sys
        from alexnet_jax.data import imagenet
        from alexnet_jax.errors import UserError
        tars = imagenet.Tars("train.tar", "val.tar", None)
        try:
            imagenet.validation_targets(tars, imagenet.Classes(("a",), None, None))
        except UserError:
            print(sorted({"tensorflow_datasets", "jax", "tensorflow"} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


BAD_SYNSETS = {
    "a class twice": [synset("n01", 1), synset("n01", 2)],
    "a number twice": [synset("n01", 1), synset("n02", 1)],
    "no number": [{**synset("n01", 1), "ILSVRC2012_ID": np.zeros(0)}],
    "no number but lines": [{**synset("n01", 1), "num_children": "not a\nnumber"}],
    "no field": [{"ILSVRC2012_ID": 1.0, "words": "x"}],
}


@pytest.mark.parametrize("synsets", BAD_SYNSETS.values(), ids=BAD_SYNSETS)
def test_a_devkit_with_a_malformed_table_is_refused(tmp_path, synsets):
    tars = written(tmp_path, train_tar(pictures_of({"n01": 1})), kit=devkit(synsets))
    refusal(lambda: imagenet.read_classes(tars), tars.devkit, "data/meta.mat", "download it again")


def test_a_devkit_that_lacks_a_class_is_refused(tmp_path):
    tars = written(tmp_path, train_tar(pictures_of({"n01": 1, "n00": 1})), kit=devkit())
    refusal(lambda: imagenet.read_classes(tars), "'n00'", tars.train, tars.devkit)  # no leaf


@pytest.mark.parametrize("name", ["meta.mat", "ILSVRC2012_validation_ground_truth.txt"])
def test_a_devkit_without_one_of_its_files_is_refused(classes, tmp_path, name):
    tars = written(tmp_path, train_tar(classes), kit=devkit(leave_out=name))

    def read() -> None:
        imagenet.validation_targets(tars, imagenet.read_classes(tars))

    refusal(read, tars.devkit, name, "ILSVRC2012_devkit_t12.tar.gz")


def test_a_damaged_devkit_is_refused(tmp_path):
    whole = devkit(truth="1\n" * 3000)
    tars = written(tmp_path, train_tar(pictures_of({"n01": 1})), kit=whole)
    assert tars.devkit is not None
    for kept in (0, 1, 100, len(whole) // 4, len(whole) // 2):
        tars.devkit.write_bytes(whole[:kept])
        refusal(lambda: imagenet.read_classes(tars), tars.devkit, "again")
    tars.devkit.write_bytes(b"<html>404</html>" * 99)
    refusal(lambda: imagenet.read_classes(tars), tars.devkit, "again")


def test_a_devkit_with_any_byte_changed_is_refused_or_no_other(classes, tmp_path):
    """Scipy must not see damaged bytes: it can crash on them."""
    tars = written(tmp_path, train_tar(classes), kit=devkit())
    assert tars.devkit is not None
    whole, expected = tars.devkit.read_bytes(), imagenet.read_classes(tars)
    rng = np.random.default_rng(0)
    refused = 0
    for place in [*range(0, 40), *rng.integers(0, len(whole), 60)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        tars.devkit.write_bytes(damaged)
        try:
            assert imagenet.read_classes(tars) == expected
        except UserError:
            refused += 1
    assert refused > 60


@pytest.mark.parametrize("kind", ["empty", "text", "no synsets", "no table", "new format"])
def test_a_devkit_whose_table_is_something_else_is_refused(tmp_path, kind):
    mat = io.BytesIO()
    if kind == "text":
        mat.write(b"ILSVRC2012_ID, WNID, words\n" * 40)
    elif kind == "new format":
        mat.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(512))
    elif kind != "empty":
        scipy.io.savemat(mat, {"synsets" if kind == "no table" else "other": np.eye(3)})
    tars = written(tmp_path, train_tar(pictures_of({"n01": 1})))
    kit = tmp_path / "devkit.tar"
    kit.write_bytes(tarred([("kit/data/meta.mat", mat.getvalue())]))
    words = (kit, "data/meta.mat", "download it again")
    refusal(lambda: imagenet.read_classes(tars._replace(devkit=kit)), *words)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("count", [1, 2, 4, 5, 15, 16, 17, 1000])
def test_a_training_scan_gives_every_image_once_in_the_tars_order(classes, tmp_path, form, count):
    path = tmp_path / "train.tar"
    path.write_bytes(train_tar(classes, form))
    portions = scanned(path, count=count)
    assert [len(portion) for portion in portions[:-1]] == [count] * ((16 - 1) // count)
    assert 1 <= len(portions[-1]) <= count
    expected = [
        (f"{name}/{file}", data, sorted(COUNTS).index(name))
        for name, files in classes.items()
        for file, data in files.items()
    ]
    assert len(expected) == 16
    assert everything(portions) == expected


@pytest.mark.parametrize("block", [7, 1000, 2**22])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_a_portions_fingerprint_is_of_the_bytes_up_to_its_last_image(
    classes, tar_path, count, block, monkeypatch
):
    monkeypatch.setattr(imagenet, "BLOCK_BYTES", block)
    whole = tar_path.read_bytes()
    ends = [whole.index(data) + len(data) for files in classes.values() for data in files.values()]
    scan = Scan(tar_path, "train", Classes(tuple(sorted(COUNTS)), None, None), None, count)
    assert scan.size == len(whole)
    last = [ends[min(start + count, 16) - 1] for start in range(0, 16, count)]
    for end, portion in zip(last, scan, strict=True):
        assert portion.fingerprint == hashlib.sha256(whole[:end]).hexdigest()
        assert end <= scan.position < end + 2048  # no portion waits for the bytes of the next
        assert scan.sha256 == ""
    assert scan.position == len(whole)
    assert scan.sha256 == hashlib.sha256(whole).hexdigest()


def test_a_second_pass_is_as_the_first(tar_path):
    scan = Scan(tar_path, "train", Classes(tuple(sorted(COUNTS)), None, None), None, 3)
    next(iter(scan))
    first = [portion.fingerprint for portion in scan]
    digest = scan.sha256
    assert [portion.fingerprint for portion in scan] == first
    assert scan.sha256 == digest == hashlib.sha256(tar_path.read_bytes()).hexdigest()


def test_bytes_after_the_tars_end_belong_to_the_digest(tar_path):
    with tar_path.open("ab") as file:
        file.write(b"something")
    scan = Scan(tar_path, "train", Classes(tuple(sorted(COUNTS)), None, None), None, 16)
    assert len(list(scan)) == 1
    assert scan.sha256 == hashlib.sha256(tar_path.read_bytes()).hexdigest()


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("count", [1, 4, 9])
def test_a_validation_scan_takes_each_label_by_the_images_number(tmp_path, form, count):
    numbers = [7, 3, 1, 12, 9, 2, 5, 10, 4]  # in no order, and not all of them
    files = validation_files(numbers)
    path = tmp_path / "val.tar"
    path.write_bytes(tarred(files.items(), form))
    targets = np.array([2, 0, 1, 1, 3, 0, 2, 2, 0, 1, 3, 3], np.int64)
    portions = scanned(path, targets, count)
    assert [len(portion) for portion in portions] == [count] * (9 // count) + [9 % count][
        : 9 % count
    ]
    expected = [(n, d, targets[k - 1]) for k, (n, d) in zip(numbers, files.items())]
    assert everything(portions) == expected
    whole = path.read_bytes()
    last = list(files.values())[-1]
    end = whole.index(last) + len(last)
    assert portions[-1].fingerprint == hashlib.sha256(whole[:end]).hexdigest()


def test_folders_around_the_files_and_long_names_are_fine(tmp_path):
    rng = np.random.default_rng(0)
    long = "n01_" + "é" * 150 + ".JPEG"
    first, second = rng.bytes(700), rng.bytes(70)
    inner: list[Entry] = [special("./", tarfile.DIRTYPE), special("./deep", tarfile.DIRTYPE)]
    inner += [(f"./deep/{'x' * 120}/{long}", first), ("n01_1.JPEG", second)]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        outer: list[Entry] = [special(".", tarfile.DIRTYPE)]
        outer.append((f"./{'y' * 150}/n01.tar", tarred(inner, form)))
        path = tmp_path / f"{form}_train.tar"
        path.write_bytes(tarred(outer, form))
        assert imagenet.read_classes(Tars(path, path, None)).labels == ("n01",)
        expected = [(f"n01/{long}", first, 0), ("n01/n01_1.JPEG", second, 0)]
        assert everything(scanned(path, count=1)) == expected


def test_tars_made_by_gnu_tar_are_read(classes, tmp_path):
    for name, files in classes.items():
        (tmp_path / name).mkdir()
        for file, data in files.items():
            (tmp_path / name / file).write_bytes(data)
        subprocess.run(["tar", "cf", f"../{name}.tar", *files], cwd=tmp_path / name, check=True)
    names = [f"{name}.tar" for name in classes]
    subprocess.run(["tar", "cf", "train.tar", *names], cwd=tmp_path, check=True)
    found = everything(scanned(tmp_path / "train.tar"))
    every = {f"{c}/{name}": data for c, files in classes.items() for name, data in files.items()}
    assert {name: data for name, data, _ in found} == every


def test_an_empty_member_is_an_image_and_for_the_decoder_to_refuse(tmp_path):
    path = tmp_path / "val.tar"
    path.write_bytes(tarred([("a_1.JPEG", b""), ("a_2.JPEG", b"x")]))
    found = everything(scanned(path, np.array([0, 1])))
    assert found == [("a_1.JPEG", b"", 0), ("a_2.JPEG", b"x", 1)]


def test_names_that_would_break_a_line_are_escaped(tmp_path):
    files = [("n01_\n1.JPEG", b"1"), (b"n01_\xff.JPEG".decode("utf-8", "surrogateescape"), b"2")]
    path = tmp_path / "train.tar"
    path.write_bytes(tarred([("n01.tar", tarred(files))]))
    assert [name for name, _, _ in everything(scanned(path))] == [
        "n01/n01_\\n1.JPEG", "n01/n01_\\udcff.JPEG"
    ]  # fmt: skip


def test_names_are_no_paths(tmp_path):
    path = tmp_path / "train.tar"
    inner = [("../../n01_1.JPEG", b"1"), ("/etc/n01_2.JPEG", b"2")]
    path.write_bytes(tarred([("../n01.tar", tarred(inner))]))
    found = everything(scanned(path))
    assert found == [("n01/n01_1.JPEG", b"1", 0), ("n01/n01_2.JPEG", b"2", 0)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.tar"]


def test_members_are_read_in_another_process(tar_path):
    portion = scanned(tar_path, count=9)[1]
    code = """
        import pickle, sys
        members = pickle.load(sys.stdin.buffer)
        read = [tuple(members.read(index)) for index in range(len(members))]
        assert "jax" not in sys.modules
        sys.stdout.buffer.write(pickle.dumps(read))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        input=pickle.dumps(portion),
        capture_output=True,
        check=True,
    )
    expected = [portion.read(index) for index in range(len(portion))]
    assert pickle.loads(done.stdout) == [tuple(example) for example in expected]


def test_members_pickle_small(tmp_path):
    rng = np.random.default_rng(0)
    files = {f"n01_{index}.JPEG": rng.bytes(5000) for index in range(300)}
    path = tmp_path / "train.tar"
    path.write_bytes(train_tar({"n01": files}))
    first, second = scanned(path, count=150)
    assert len(pickle.dumps(first)) < 150 * 60
    assert everything([pickle.loads(pickle.dumps(second))]) == everything([second])


def test_far_into_a_tar_members_are_found(tmp_path):
    path = tmp_path / "far.tar"
    with path.open("wb") as file:
        file.seek(2**37 + 11)  # a hole takes no room
        file.write(b"here it is")
    offsets, sizes = np.array([2**37 + 11]), np.array([10])
    members = Members(str(path), ("a/1.JPEG",), offsets, sizes, np.array([0]), "x")
    assert members.read(0) == (b"here it is", 0, "a/1.JPEG")


def test_a_member_too_large_for_memory_is_a_broken_image(tmp_path):
    sizes = np.array([2**28, 2**28 + 1])
    many = np.zeros(2, np.int64)
    path = tmp_path / "val.tar"
    path.write_bytes(b"short")
    members = Members(str(path), ("a/fits.JPEG", "a/huge.JPEG"), many, sizes, many, "x")
    with pytest.raises(images.ImageError, match=r"a/huge\.JPEG.*268435457.*268435456"):
        members.read(1)
    refusal(lambda: members.read(0), path, "shorter")
    path.unlink()
    refusal(lambda: members.read(0), path)


def test_memory_does_not_grow_with_the_members(tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet, "BLOCK_BYTES", 2**16)
    header = tarred([("n01_1.JPEG", b"x")])[:1024]
    inner = header * 1500 + bytes(1024)
    path = tmp_path / "train.tar"
    path.write_bytes(tarred([("n01.tar", inner), ("n02.tar", inner)]))
    tracemalloc.start()
    total = 0
    for portion in Scan(path, "train", Classes(("n01", "n02"), None, None), None, 100):
        total += len(portion)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 3000
    assert peak < 500_000  # the headers alone, if kept, would be five times that


def test_a_class_tar_is_never_whole_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(imagenet, "BLOCK_BYTES", 2**16)
    files = {f"n01_{index}.JPEG": bytes(2**20) for index in range(12)}
    path = tmp_path / "train.tar"
    path.write_bytes(train_tar({"n01": files}))
    tracemalloc.start()
    imagenet.read_classes(Tars(path, path, None))
    assert sum(map(len, scanned(path, count=5))) == 12
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**19


def test_a_scan_reads_on_only_as_far_as_asked(tar_path):
    scan = Scan(tar_path, "train", Classes(tuple(sorted(COUNTS)), None, None), None, 2)
    assert scan.position == 0
    assert len(next(iter(scan))) == 2
    assert 0 < scan.position < scan.size // 2


ODD = {
    "symlink": special("odd", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": special("odd", tarfile.LNKTYPE, "n01.tar"),
    "fifo": special("odd", tarfile.FIFOTYPE),
    "character device": special("odd", tarfile.CHRTYPE),
    "block device": special("odd", tarfile.BLKTYPE),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_links_and_devices_are_refused_by_name(tmp_path, odd):
    inner = tarred([("n01_1.JPEG", b"1"), odd])
    outer = tmp_path / "outer.tar"
    outer.write_bytes(tarred([("n01.tar", tarred([("n01_1.JPEG", b"1")])), odd]))
    refusal(lambda: imagenet.read_classes(Tars(outer, outer, None)), outer, "'odd'", "take it out")
    refusal(lambda: scanned(outer), outer, "'odd'", "take it out")
    outer.write_bytes(tarred([("n01.tar", inner)]))
    refusal(lambda: scanned(outer), outer, "n01.tar", "'odd'")
    outer.write_bytes(tarred([("a_1.JPEG", b"1"), odd]))
    refusal(lambda: scanned(outer, np.zeros(3, np.int64)), outer, "'odd'")


def test_a_sparse_member_whose_bytes_lie_elsewhere_is_refused(tmp_path):
    with (tmp_path / "a_1.JPEG").open("wb") as file:
        file.write(b"x" * 4096)
        file.seek(2**20)
        file.write(b"y" * 4096)
    for form in ("gnu", "pax"):
        args = ["tar", "cSf", "val.tar", f"--format={form}", "a_1.JPEG"]
        subprocess.run(args, cwd=tmp_path, check=True)
        path = tmp_path / "val.tar"
        refusal(lambda path=path: scanned(path, np.zeros(1, np.int64)), "a_1.JPEG", "plain")


@pytest.mark.parametrize("name", ["n01_1.JPEG", "n01.tar.gz", "n01", ".tar", "n01.TAR", "n01/x"])
def test_a_training_tar_that_holds_anything_else_is_refused(tmp_path, name):
    path = tmp_path / "train.tar"
    path.write_bytes(tarred([("n02.tar", tarred([("n02_1.JPEG", b"1")])), (name, b"")]))
    words = (path, repr(name), "CLASS.tar")
    refusal(lambda: imagenet.read_classes(Tars(path, path, None)), *words)
    refusal(lambda: scanned(path), *words)


def test_a_class_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "train.tar"
    one = tarred([("n01_1.JPEG", b"1")])
    path.write_bytes(tarred([("n01.tar", one), ("n02.tar", one), ("again/n01.tar", one)]))
    refusal(lambda: imagenet.read_classes(Tars(path, path, None)), path, "'n01' twice")
    refusal(lambda: scanned(path), path, "'n01' twice")


def test_a_class_that_came_later_is_refused(tmp_path):
    path = tmp_path / "train.tar"
    path.write_bytes(train_tar(pictures_of({"n77": 1})))
    refusal(lambda: scanned(path), path, "'n77'")


@pytest.mark.parametrize("inner", [[], [special("n02", tarfile.DIRTYPE)]], ids=["bare", "folder"])
def test_a_class_tar_without_images_is_refused(tmp_path, inner):
    path = tmp_path / "train.tar"
    one = tarred([("n01_1.JPEG", b"1")])
    path.write_bytes(tarred([("n01.tar", one), ("n02.tar", tarred(inner)), ("n03.tar", one)]))
    refusal(lambda: scanned(path), path, "n02.tar", "no images")


def test_tars_without_anything_are_refused(tmp_path):
    path = tmp_path / "empty.tar"
    path.write_bytes(tarred([]))
    refusal(lambda: imagenet.read_classes(Tars(path, path, None)), path, "no class tars")
    refusal(lambda: scanned(path, np.zeros(1, np.int64)), path, "no images")


@pytest.mark.parametrize(
    "data", [b"", b"<html>404 Not Found</html>" * 99, b"\x1f\x8b" + bytes(600)]
)
def test_what_is_no_tar_is_refused(tmp_path, data):
    path = tmp_path / "no.tar"
    path.write_bytes(data)
    refusal(lambda: imagenet.read_classes(Tars(path, path, None)), path, "again")
    refusal(lambda: scanned(path), path, "again")
    refusal(lambda: scanned(path, np.zeros(1, np.int64)), path, "again")
    path.write_bytes(tarred([("n01.tar", data)]))
    refusal(lambda: scanned(path), path, "n01.tar", "again")


@pytest.mark.parametrize("said", ["two\n  lines", ""])
def test_whatever_tarfile_says_becomes_one_line(tmp_path, monkeypatch, said):
    def fail(*_, **__) -> None:
        raise tarfile.ReadError(said)

    path = tmp_path / "a.tar"
    path.write_bytes(tarred([]))
    monkeypatch.setattr(tarfile, "open", fail)
    words = (path, "(two lines)" if said else "(ReadError)")
    refusal(lambda: imagenet.read_classes(Tars(path, path, None)), *words)


def test_a_missing_tar_is_refused(tmp_path):
    path = tmp_path / "gone.tar"
    refusal(lambda: imagenet.read_classes(Tars(path, path, None)), path)
    refusal(lambda: scanned(path), path)


def test_a_tar_cut_short_anywhere_is_refused(tmp_path):
    whole = train_tar(pictures_of({"n01": 2, "n02": 1}))
    path = tmp_path / "train.tar"
    outer_end = 2 * (512 + 10_240)  # two class tars of one record each
    assert not any(whole[outer_end:])
    for kept in range(0, outer_end + 512, 256):
        path.write_bytes(whole[:kept])
        refusal(lambda: scanned(path), path, "again")
        refusal(lambda: imagenet.read_classes(Tars(path, path, None)), path, "again")
    path.write_bytes(whole[: outer_end + 512])
    assert len(everything(scanned(path))) == 3


@pytest.mark.parametrize("count", [1, 2, 50])
def test_a_class_tar_cut_short_anywhere_is_refused_and_gives_no_portion_of_others(tmp_path, count):
    files = pictures_of({"n01": 3, "n02": 2})
    inner, other = (tarred(files[name].items()) for name in ("n01", "n02"))
    expected = [(f"n01/{name}", data, 0) for name, data in files["n01"].items()]
    end = sum(512 + -(-len(data) // 512) * 512 for data in files["n01"].values())
    path = tmp_path / "train.tar"
    for kept in range(0, end + 512, 128):
        path.write_bytes(tarred([("n01.tar", inner[:kept]), ("n02.tar", other)]))
        scan = Scan(path, "train", Classes(("n01", "n02"), None, None), None, count)
        portions: list[Members] = []
        refusal(lambda scan=scan, p=portions: p.extend(scan), path, "n01.tar", "again")
        read = everything(portions)
        assert read == expected[: len(read)]
    path.write_bytes(tarred([("n01.tar", inner[: end + 512]), ("n02.tar", other)]))
    assert everything(scanned(path))[:3] == expected


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_damaged_header_is_refused_and_never_taken_for_the_end(tmp_path, split):
    path = tmp_path / "a.tar"
    names = [f"a_{number}.JPEG" for number in (1, 2, 3)]
    if split == "train":
        outer = [(f"n0{k}.tar", tarred([(name, b"x")])) for k, name in enumerate(names, 1)]
        whole, targets = bytearray(tarred(outer)), None
    else:
        whole, targets = bytearray(tarred([(n, b"x") for n in names])), np.zeros(3, np.int64)
    second = whole.index(b"n02.tar" if split == "train" else b"a_2.JPEG")
    whole[second] ^= 1
    path.write_bytes(whole)
    refusal(lambda: scanned(path, targets), path, f"byte {second}", "again")


def test_a_size_below_zero_does_not_go_round_in_circles(tmp_path):
    whole = bytearray(tarred([("a_1.JPEG", b"x" * 600), ("a_2.JPEG", b"y" * 600)]))
    header = tarfile.TarInfo.frombuf(bytes(whole[1536:2048]), "utf-8", "strict")
    header.size = -1536
    whole[1536:2048] = header.tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "val.tar"
    path.write_bytes(whole)
    refusal(lambda: scanned(path, np.zeros(2, np.int64)), path, "byte 1536", "again")


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_damage_anywhere_raises_nothing_but_a_user_error(tmp_path, form):
    long = "p" * 90 if form == tarfile.USTAR_FORMAT else "p" * 300
    inner = tarred([(f"{long}é{number}.JPEG", b"x" * 300) for number in range(3)], form)
    whole = tarred([("n01.tar", inner), ("n02.tar", inner)], form)
    headers = np.flatnonzero(
        np.frombuffer(whole, np.uint8) * (np.frombuffer(whole, np.uint8) != 120)
    )
    rng = np.random.default_rng(0)
    path, refused = tmp_path / "train.tar", 0
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.choice(headers, rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        scan = Scan(path, "train", Classes(("n01", "n02"), None, None), None, 2)
        try:
            everything(scan)
        except UserError:
            refused += 1
        else:
            assert scan.sha256 == hashlib.sha256(damaged).hexdigest()
    assert refused > 60  # the others hit a name, a date or an owner


BAD_NAMES = ["a.JPEG", "a_.JPEG", "a_1", "a_1.txt", "a_1.JPEG.txt", "readme", "a_x1.JPEG",
             "a_0.JPEG", "a_00000004.JPEG", "a_-1.JPEG", "a_1.JPEG\n", f"a_{'9' * 60}.JPEG",
             "a_٣.JPEG"]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_validation_image_without_a_label_is_refused(tmp_path, name):
    path = tmp_path / "val.tar"
    path.write_bytes(tarred([("a_2.JPEG", b"1"), (name, b"2")]))
    shown = name.replace("\n", "\\\\n")
    refusal(lambda: scanned(path, np.zeros(3, np.int64)), path, shown, "1 to 3", "take it out")


def test_the_first_and_the_last_validation_number_have_labels(tmp_path):
    path = tmp_path / "val.tar"
    path.write_bytes(tarred([("v/A_3.jpg", b"3"), ("v/A_001.JPEG", b"1")]))
    found = everything(scanned(path, np.array([1, 2, 3])))
    assert found == [("A_3.jpg", b"3", 3), ("A_001.JPEG", b"1", 1)]


def test_a_validation_number_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "val.tar"
    path.write_bytes(tarred([("a_1.JPEG", b"1"), ("a_2.JPEG", b"2"), ("b/a_01.JPEG", b"3")]))
    refusal(lambda: scanned(path, np.zeros(3, np.int64)), path, "number 1 twice", "a_01.JPEG")


def test_a_tar_that_changes_while_it_is_scanned_is_refused(tar_path):
    size = tar_path.stat().st_size
    for new_size in (size + 10_240, size - 512):
        scan = Scan(tar_path, "train", Classes(tuple(sorted(COUNTS)), None, None), None, 16)
        iterator = iter(scan)
        next(iterator)
        os.truncate(tar_path, new_size)
        refusal(lambda iterator=iterator: list(iterator), tar_path)
        assert scan.sha256 == ""
        os.truncate(tar_path, size)
