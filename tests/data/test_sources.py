"""Folders and TFDS give the examples of a split, all of them and no others, or say why not."""

import hashlib
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from alexnet_jax.config import Data
from alexnet_jax.data import shapes, sources
from alexnet_jax.data.examples import Source
from alexnet_jax.errors import UserError

PARTS = ("train", "validation", "test")


def opened(root: pathlib.Path, part: str, **data) -> Source:
    return sources.open_source(Data(source=f"folder:{root}", **data), part)


def names(source: Source) -> list[str]:
    return [source.read(index).name for index in range(len(source))]


def examples(source: Source) -> list[tuple[bytes, str]]:
    """The bytes and the class name of every example, in order."""
    read = (source.read(index) for index in range(len(source)))
    return [(example.data, source.labels[example.label]) for example in read]


def on_disk(root: pathlib.Path) -> list[tuple[bytes, str]]:
    """The same of the files in class folders, by class and name."""
    return [(path.read_bytes(), path.parent.name) for path in sorted(root.glob("*/*.png"))]


def check(source: Source) -> None:
    """What holds for every source: targets are the labels of what is read."""
    labels = [source.read(index).label for index in range(len(source))]
    np.testing.assert_array_equal(source.targets, labels)
    assert isinstance(source.fingerprint, str)


@pytest.fixture
def three_splits(pictures, tmp_path) -> pathlib.Path:
    for number, split in enumerate(("train", "val", "test")):
        pictures.folder(tmp_path / split, {"bee": 2 + number, "ant": 3, "Cat": 1}, seed=number)
    return tmp_path


@pytest.mark.parametrize("split", PARTS)
def test_each_split_is_its_folder(three_splits, split):
    source = opened(three_splits, split)
    folder = {"train": "train", "validation": "val", "test": "test"}[split]
    assert examples(source) == on_disk(three_splits / folder)
    assert names(source) == [str(p) for p in sorted((three_splits / folder).glob("*/*.png"))]
    check(source)


def test_labels_are_the_sorted_class_names_of_every_split(three_splits):
    for split in PARTS:
        assert opened(three_splits, split).labels == ("Cat", "ant", "bee")


@pytest.mark.parametrize("spelling", ["val", "validation", "valid"])
def test_validation_has_three_spellings_and_goes_before_test(pictures, tmp_path, spelling):
    for number, split in enumerate(("train", spelling, "test")):
        pictures.folder(tmp_path / split, {"ant": 2, "bee": 2}, seed=number)
    assert examples(opened(tmp_path, "validation")) == on_disk(tmp_path / spelling)


@pytest.mark.parametrize("pair", [("val", "validation"), ("val", "valid"), ("validation", "valid")])
@pytest.mark.parametrize("with_test", [True, False])
def test_two_spellings_at_once_are_refused(pictures, tmp_path, pair, with_test):
    for split in ("train", *pair, *["test"] * with_test):
        pictures.folder(tmp_path / split, {"ant": 1, "bee": 1})
    with pytest.raises(UserError, match=f"both {pair[0]} and {pair[1]}"):
        opened(tmp_path, "validation")


def test_without_a_validation_folder_test_serves(pictures, tmp_path, caplog):
    for number, split in enumerate(("train", "test")):
        pictures.folder(tmp_path / split, {"ant": 2, "bee": 2}, seed=number)
    for split in ("validation", "test"):
        assert examples(opened(tmp_path, split)) == on_disk(tmp_path / "test")
    assert examples(opened(tmp_path, "train")) == on_disk(tmp_path / "train")
    caplog.set_level(logging.INFO)
    caplog.clear()
    opened(tmp_path, "test")
    assert not caplog.records
    opened(tmp_path, "validation")
    assert "its test split stands in" in caplog.text


def test_test_is_never_served_by_validation(pictures, tmp_path):
    for split in ("train", "val"):
        pictures.folder(tmp_path / split, {"ant": 2})
    with pytest.raises(UserError, match="'test'"):
        opened(tmp_path, "test")


def test_train_alone_does_not_validate_itself(pictures, tmp_path):
    pictures.folder(tmp_path / "train", {"ant": 2})
    with pytest.raises(UserError, match=r"looked for val, validation, valid;.*test split would"):
        opened(tmp_path, "validation")


def test_a_class_may_be_missing_from_validation_but_not_be_new_there(pictures, tmp_path):
    pictures.folder(tmp_path / "train", {"ant": 2, "bee": 2, "cat": 2})
    pictures.folder(tmp_path / "val", {"cat": 2, "ant": 1})
    source = opened(tmp_path, "validation")
    assert source.labels == ("ant", "bee", "cat")
    assert [label for _, label in examples(source)] == ["ant", "cat", "cat"]
    assert source.targets.tolist() == [0, 2, 2]
    pictures.folder(tmp_path / "val", {"dog": 1})
    with pytest.raises(UserError, match="'dog'"):
        opened(tmp_path, "validation")


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        opened(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("empty", ["", "train"])
def test_an_empty_folder_is_refused_by_name(tmp_path, empty):
    (tmp_path / empty).mkdir(exist_ok=True)
    with pytest.raises(UserError, match="class folders") as caught:
        opened(tmp_path, "train")
    assert str(tmp_path / empty) in str(caught.value)


def test_loose_images_are_not_a_data_set(pictures, tmp_path):
    (tmp_path / "one.png").write_bytes(pictures.encode(pictures.rough(9, 9)))
    with pytest.raises(UserError, match="class folders"):
        opened(tmp_path, "train")


@pytest.mark.parametrize("split", ["train", ""])
def test_a_class_folder_without_images_is_refused_by_name(pictures, tmp_path, split):
    pictures.folder(tmp_path / split, {"ant": 9, "bee": 0})
    with pytest.raises(UserError, match="bee has no images"):
        opened(tmp_path, "train")


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines"])
def test_a_class_that_a_line_of_text_cannot_hold_is_refused(name, pictures, tmp_path):
    pictures.folder(tmp_path / "train", {"ant": 1, os.fsdecode(name): 1})
    with pytest.raises(UserError, match=r"labels\.txt; rename it"):
        sources.open_source(Data(source=f"folder:{tmp_path}"), "train")


def test_a_class_that_is_a_link_to_nothing_is_not_passed_over(pictures, tmp_path):
    pictures.folder(tmp_path / "train", {"cat": 2})
    (tmp_path / "train" / "dog").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"train/dog is a link to nothing; mend it"):
        opened(tmp_path, "train")


def test_a_split_of_another_name_is_refused(pictures, tmp_path):
    pictures.folder(tmp_path / "train", {"cat": 2})
    with pytest.raises(UserError, match="'val': must be one of train, validation, test"):
        opened(tmp_path, "val")


def test_a_class_with_the_name_of_a_split_needs_a_folder_around_all_classes(pictures, tmp_path):
    pictures.folder(tmp_path, {"bus": 5, "test": 5})
    for split in ("train", "test"):
        with pytest.raises(
            UserError, match=r"if 'test' is a class, put all classes into .*/train$"
        ):
            opened(tmp_path, split)
    pictures.folder(tmp_path, {"train": 5})
    with pytest.raises(UserError, match=r"train has no class folders: .* if a class is called tra"):
        opened(tmp_path, "train")
    pictures.folder(tmp_path / "around" / "train", {"bus": 2, "test": 3, "train": 4})
    assert opened(tmp_path / "around", "train").labels == ("bus", "test", "train")


def test_images_to_evaluate_need_no_training_images_beside_them(pictures, tmp_path):
    pictures.folder(tmp_path / "test", {"ant": 3, "bee": 2})
    for split in ("test", "validation"):  # for which it stands in
        source = opened(tmp_path, split)
        assert (len(source), source.labels) == (5, ("ant", "bee"))
    with pytest.raises(UserError, match="none named train"):
        opened(tmp_path, "train")


def test_a_split_in_capitals_is_not_passed_over(pictures, tmp_path):
    for part in ("train", "Val", "test"):
        pictures.folder(tmp_path / part, COUNTS)
    with pytest.raises(UserError, match="a folder 'Val'; name it 'val'"):
        opened(tmp_path, "validation")


def test_folders_inside_a_class_are_named_in_a_warning(pictures, tmp_path, caplog):
    pictures.folder(tmp_path / "train", {"ant": 3, "bee": 2})
    pictures.folder(tmp_path / "train" / "bee", {"queens": 4})
    source = opened(tmp_path, "train")
    assert len(source) == 5
    assert source.labels == ("ant", "bee")
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert str(tmp_path / "train" / "bee" / "queens") in warning


def test_hidden_files_and_folders_are_no_images_and_no_classes(pictures, tmp_path, caplog):
    pictures.folder(tmp_path / "train", {"ant": 3, ".thumbnails": 2})
    for name in (".DS_Store", "THUMBS.DB", "Thumbs.db", "desktop.ini"):
        (tmp_path / "train" / "ant" / name).write_bytes(b"x")
    (tmp_path / "train" / "ant" / ".cache").mkdir()
    source = opened(tmp_path, "train")
    assert len(source) == 3
    assert source.labels == ("ant",)
    assert not caplog.records


def test_files_are_found_behind_a_tilde(pictures, tmp_path, monkeypatch):
    pictures.folder(tmp_path / "set/train", {"ant": 3})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(sources.open_source(Data(source="folder:~/set"), "train")) == 3


COUNTS = {"ant": 30, "bee": 20, "cat": 11, "dog": 5}


@pytest.fixture
def one_folder(pictures, tmp_path) -> pathlib.Path:
    pictures.folder(tmp_path, COUNTS)
    return tmp_path


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        # Of 11: 20 % is 2.2, 30 % is 3.3. Of 5: 1 and 1.5. Train has the rest.
        ((6, 2, 2), {"ant": (18, 6, 6), "bee": (12, 4, 4), "cat": (7, 2, 2), "dog": (3, 1, 1)}),
        ((5, 3, 2), {"ant": (15, 9, 6), "bee": (10, 6, 4), "cat": (6, 3, 2), "dog": (2, 2, 1)}),
        ((8, 1, 1), {"ant": (24, 3, 3), "bee": (16, 2, 2), "cat": (9, 1, 1)}),
    ],
)
def test_class_folders_alone_are_split_class_by_class(one_folder, split, sizes):
    if "dog" not in sizes:
        for path in (one_folder / "dog").iterdir():
            path.unlink()
        (one_folder / "dog").rmdir()
    parts = [opened(one_folder, name, split=split) for name in PARTS]
    for part in parts:
        check(part)
        assert part.labels == tuple(sorted(sizes))
    for label, expected in zip(sorted(sizes), sizes.values()):
        found = tuple([label for _, label in examples(part)].count(label) for part in parts)
        assert found == expected
    together = [name for part in parts for name in names(part)]
    assert sorted(together) == sorted(str(path) for path in one_folder.glob("*/*.png"))


def test_the_split_is_the_same_every_time_and_another_by_another_seed(one_folder):
    for name in PARTS:
        first = opened(one_folder, name)
        assert names(first) == names(opened(one_folder, name, split_seed=42))
        other = opened(one_folder, name, split_seed=43)
        assert names(first) != names(other)
        assert first.fingerprint != other.fingerprint
        assert len(first) == len(other)


def test_the_split_is_drawn_and_not_cut_by_name(one_folder):
    ants = [name for name in names(opened(one_folder, "train")) if "ant" in name]
    assert ants != sorted(str(path) for path in (one_folder / "ant").iterdir())[:18]


def test_parts_have_fingerprints_of_their_own(one_folder):
    found = {
        opened(one_folder, n, split=s).fingerprint for n in PARTS for s in ((6, 2, 2), (5, 3, 2))
    }
    assert len(found) == 6


def test_a_class_too_small_to_split_is_refused_by_name(pictures, tmp_path):
    pictures.folder(tmp_path, {"ant": 10, "bee": 2})
    with pytest.raises(UserError, match="'bee' has 2 images"):
        opened(tmp_path, "train")


def test_a_part_of_nothing_is_refused_only_when_asked_for(one_folder):
    assert len(opened(one_folder, "train", split=(8, 2, 0))) == sum(COUNTS.values()) - 6 - 4 - 2 - 1
    with pytest.raises(UserError, match=r"data\.split=\(8, 2, 0\)"):
        opened(one_folder, "test", split=(8, 2, 0))
    with pytest.raises(UserError, match=r"data\.split=\(1, 0, 0\) leaves nothing for validation"):
        opened(one_folder, "validation", split=(1, 0, 0))


def test_the_test_part_stands_in_for_a_validation_part_of_nothing(one_folder):
    found = [names(opened(one_folder, part, split=(8, 0, 2))) for part in ("validation", "test")]
    assert found[0] == found[1] != []


def test_a_fingerprint_follows_the_files(three_splits):
    before = opened(three_splits, "train").fingerprint
    assert opened(three_splits, "train").fingerprint == before
    assert opened(three_splits, "test").fingerprint != before
    (three_splits / "train/ant/000.png").rename(three_splits / "train/ant/009.png")
    assert opened(three_splits, "train").fingerprint != before


def test_the_built_in_shapes_need_nothing_but_a_cache_folder(tmp_path, monkeypatch):
    def write_few(directory: pathlib.Path) -> None:
        for split in shapes.SPLITS:
            shapes.write_split(directory / split, split, 10)

    monkeypatch.setattr(shapes, "write_shapes", write_few)
    for split in PARTS:
        data = Data(source="shapes", cache_dir=str(tmp_path / split))
        source = sources.open_source(data, split)
        assert source.labels == shapes.LABELS
        assert sorted(source.targets) == list(range(10))
        assert all(name.startswith(str(tmp_path / split)) for name in names(source))


def test_shapes_that_cannot_be_written_are_the_users_to_resolve(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--config\.data\.cache_dir"):
        sources.open_source(Data(source="shapes", cache_dir=str(tmp_path / "file")), "train")


CLASSES = ["wasp", "ant", "bee"]  # TFDS keeps its own order


@pytest.fixture(scope="module")
def jpegs(pictures) -> dict[str, list[tuple[bytes, int]]]:
    """Encoded images and labels, for each of four splits."""
    return {
        split: [
            (
                pictures.encode(pictures.rough(11, 13 + i, 50 * number + i), "JPEG"),
                i * (2 + number) % 3,
            )
            for i in range(count)
        ]
        for number, (split, count) in enumerate(
            {"train": 9, "validation": 5, "test": 4, "all": 45}.items()
        )
    }


@pytest.fixture(scope="module")
def prepared(jpegs, write_tfds, tmp_path_factory) -> pathlib.Path:
    """A folder of TFDS data sets, as TFDS lays them out."""
    root = tmp_path_factory.mktemp("tfds")
    three = {split: jpegs[split] for split in PARTS}
    write_tfds(root, "insects", CLASSES, three)
    write_tfds(root, "insects_two", CLASSES, {split: jpegs[split] for split in ("train", "test")})
    write_tfds(root, "insects_one", CLASSES, {"train": jpegs["all"]})
    hidden = three | {"test": [(data, -1) for data, _ in jpegs["test"]]}
    write_tfds(root, "insects_hidden", CLASSES, hidden)
    write_tfds(root, "insects_old", CLASSES, three, "tfrecord")
    return root


def tfds_source(prepared: pathlib.Path, name: str, split: str, **data) -> Source:
    return sources.open_source(Data(source=f"tfds:{name}", tfds_dir=str(prepared), **data), split)


READER = """
    import hashlib, importlib.util, json, sys

    class WithoutTensorflow:
        def __init__(self, finder):
            self.finder = finder

        def __getattr__(self, name):
            return getattr(self.finder, name)

        def find_spec(self, name, *rest):
            if name.partition(".")[0] == "tensorflow":
                return None
            return self.finder.find_spec(name, *rest)

    sys.meta_path[:] = [WithoutTensorflow(finder) for finder in sys.meta_path]
    assert importlib.util.find_spec("tensorflow") is None
    try:
        import tensorflow
        raise SystemExit("tensorflow is not hidden")
    except ImportError:
        pass

    from alexnet_jax.config import Data
    from alexnet_jax.errors import UserError
    from alexnet_jax.data import sources

    found = {}
    for name in ("insects", "insects:1.0.0", "insects_one", "insects_old", "imagenet2012"):
        for split in ("train", "validation", "test"):
            data = Data(source=f"tfds:{name}", tfds_dir=sys.argv[1])
            try:
                source = sources.open_source(data, split)
            except UserError as error:
                found[f"{name} {split}"] = str(error)
                continue
            examples = [source.read(index) for index in range(len(source))]
            found[f"{name} {split}"] = {
                "labels": source.labels,
                "targets": source.targets.tolist(),
                "examples": [[hashlib.sha256(e.data).hexdigest(), e.label] for e in examples],
                "names": [e.name for e in examples],
            }
    found["tensorflow"] = "tensorflow" in sys.modules
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def without_tensorflow(prepared) -> dict:
    """What a process that has no TensorFlow finds of each data set and split."""
    command = [sys.executable, "-c", textwrap.dedent(READER), str(prepared)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def hashes(contents: list[tuple[bytes, int]]) -> list[list]:
    return [[hashlib.sha256(data).hexdigest(), label] for data, label in contents]


@pytest.mark.parametrize("name", ["insects", "insects:1.0.0"])
@pytest.mark.parametrize("split", PARTS)
def test_tfds_is_read_byte_for_byte_without_tensorflow(without_tensorflow, jpegs, name, split):
    assert without_tensorflow["tensorflow"] is False
    found = without_tensorflow[f"{name} {split}"]
    assert found["labels"] == CLASSES
    assert found["examples"] == hashes(jpegs[split])
    assert found["targets"] == [label for _, label in jpegs[split]]
    assert len(set(found["names"])) == len(jpegs[split])
    assert all("insects" in name and split in name for name in found["names"])


def test_tfds_with_train_alone_is_split_class_by_class(without_tensorflow, jpegs):
    parts = [without_tensorflow[f"insects_one {split}"] for split in PARTS]
    assert [part["targets"].count(0) for part in parts] == [9, 3, 3]  # of 15
    assert [part["targets"].count(2) for part in parts] == [9, 3, 3]
    together = [example for part in parts for example in part["examples"]]
    assert sorted(together) == sorted(hashes(jpegs["all"]))


@pytest.mark.parametrize("split", PARTS)
def test_tfds_in_tfrecords_is_refused_with_the_way_out(without_tensorflow, split):
    message = without_tensorflow[f"insects_old {split}"]
    assert "array_record" in message
    assert "tfds.builder('insects_old', data_dir='" in message
    assert "file_format='array_record')" in message
    assert "\n" not in message


def test_imagenet_unprepared_is_refused_with_what_to_fetch_and_where_to_put_it(
    without_tensorflow, prepared
):
    message = without_tensorflow["imagenet2012 train"]
    assert str(prepared) in message
    for needed in (
        "ILSVRC2012_img_train.tar",
        "ILSVRC2012_img_val.tar",
        "image-net.org",
        f"tfds.builder('imagenet2012', data_dir='{prepared}', file_format='array_record')",
        f"{prepared}/downloads/manual",
        "--config.data.tfds_dir",
        "configs/quickstart.py",
    ):
        assert needed in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["cifar10", "no_such_thing", "insects:9.9.9", "a b/c"])
def test_another_data_set_unprepared_is_refused_with_its_own_way_out(prepared, name):
    with pytest.raises(UserError, match=r"not found.*configs/quickstart\.py") as caught:
        tfds_source(prepared, name, "train")
    assert f"tfds.builder('{name}', data_dir='{prepared}'" in str(caught.value)
    assert "ILSVRC" not in str(caught.value)


def test_tfds_without_validation_validates_with_test(prepared, jpegs, caplog):
    caplog.set_level(logging.INFO)
    caplog.clear()
    for split in ("validation", "test"):
        source = tfds_source(prepared, "insects_two", split)
        check(source)
        read = [(source.read(i).data, source.read(i).label) for i in range(len(source))]
        assert read == jpegs["test"]
    assert caplog.text.count("its test split stands in") == 1


def test_a_tfds_split_that_is_not_there_is_refused_with_those_that_are(jpegs, write_tfds, tmp_path):
    two = {split: jpegs[split] for split in ("train", "validation")}
    write_tfds(tmp_path, "insects", CLASSES, two)
    with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
        tfds_source(tmp_path, "insects", "test")


def test_a_tfds_split_of_nothing_is_none(jpegs, write_tfds, tmp_path):
    two = {split: jpegs[split] for split in ("train", "validation")}
    write_tfds(tmp_path, "insects", CLASSES, two | {"test": []})
    with pytest.raises(UserError, match=r"no split 'test'; it has train, validation$"):
        tfds_source(tmp_path, "insects", "test")
    write_tfds(tmp_path, "flies", CLASSES, {"train": jpegs["all"], "test": []})
    assert len(tfds_source(tmp_path, "flies", "test")) == 9  # of 45, as where train is alone


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_tfds_file_is_named_in_one_line(jpegs, write_tfds, tmp_path, damage):
    """Where it is opened or where the example is read; examples before it are as they were."""
    write_tfds(tmp_path, "insects", CLASSES, {"train": jpegs["all"], "test": jpegs["test"]})
    (path,) = tmp_path.glob("insects/*/insects-train*")
    whole = path.read_bytes()
    half = len(whole) // 2
    changed = {"cut": whole[:half], "flipped": whole[:half] + bytes([whole[half] ^ 255])}
    path.write_bytes(changed[damage] + whole[len(changed[damage]) :] * (damage == "flipped"))
    read = []

    def read_all() -> None:
        source = tfds_source(tmp_path, "insects", "train")
        for index in range(len(source)):
            read.append(source.read(index))

    with pytest.raises(
        OSError, match=r"^tfds:insects/1.0.0 train.* cannot be read \(.+build the data"
    ):
        read_all()
    assert [(found.data, found.label) for found in read] == jpegs["all"][: len(read)]


def test_a_tfds_split_without_labels_is_refused(prepared):
    with pytest.raises(UserError, match="without labels"):
        tfds_source(prepared, "insects_hidden", "test")


@pytest.mark.parametrize("hidden", ["validation", "test"])
def test_no_split_stands_in_for_or_is_one_without_labels(jpegs, write_tfds, tmp_path, hidden):
    """Two of three splits: train, and one without labels, beside a labelled test or none."""
    splits = {"train": jpegs["train"], hidden: [(data, -1) for data, _ in jpegs["test"]]}
    splits |= {"test": jpegs["test"]} if hidden == "validation" else {}
    write_tfds(tmp_path, "insects", CLASSES, splits)
    with pytest.raises(UserError, match=f"split '{hidden}' comes without labels"):
        tfds_source(tmp_path, "insects", "validation")


def test_a_tfds_data_set_of_something_else_is_refused(tmp_path, jpegs, write_tfds):
    write_tfds(tmp_path, "insects", CLASSES, {"train": jpegs["train"]})
    import tensorflow_datasets as tfds

    image, label = (
        tfds.features.Image(encoding_format="jpeg"),
        tfds.features.ClassLabel(names=["a"]),
    )
    deep = tfds.features.Image(dtype=np.uint16, encoding_format="png")
    several = tfds.features.Sequence(label)
    for features, words in (
        ({"image": image, "species": label}, "named image and label.*; it has image, species"),
        ({"image": image, "label": tfds.features.Scalar(np.int64)}, "an Image and a ClassLabel"),
        ({"image": image, "label": several}, "an Image and a ClassLabel"),
        ({"image": tfds.features.Text(), "label": label}, "an Image and a ClassLabel"),
        ({"image": deep, "label": label}, "images of uint16; only uint8"),
    ):
        described = json.dumps(tfds.features.FeaturesDict(features).to_json())
        (tmp_path / "insects/1.0.0/features.json").write_text(described)
        with pytest.raises(UserError, match=words):
            tfds_source(tmp_path, "insects", "train")


def test_a_tfds_data_set_built_anew_is_another_one(tmp_path, jpegs, write_tfds):
    """Of as many examples and, as ArrayRecord pads them, bytes."""
    found = []
    for contents in (jpegs["train"], [(data, 2 - label) for data, label in jpegs["train"]]):
        write_tfds(tmp_path, "insects", CLASSES, {"train": contents})
        (path,) = (tmp_path / "insects/1.0.0").glob("*.array_record*")
        found.append((path.stat().st_size, tfds_source(tmp_path, "insects", "train").fingerprint))
        shutil.rmtree(tmp_path / "insects")
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_a_tfds_folder_may_be_named_from_home(prepared, monkeypatch):
    monkeypatch.setenv("HOME", str(prepared.parent))
    data = Data(source="tfds:insects", tfds_dir=f"~/{prepared.name}")
    assert len(sources.open_source(data, "train")) == 9


def test_tfds_is_looked_for_where_its_own_variable_says(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    script = "\n".join([
        "from alexnet_jax.config import Data",
        "from alexnet_jax.data import sources",
        "print(len(sources.open_source(Data(source='tfds:insects'), 'train')))",
    ])  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "9"


def test_splitting_reads_each_tfds_example_once_however_many_classes(prepared, monkeypatch):
    reads = []
    read = sources.Tfds.read
    monkeypatch.setattr(sources.Tfds, "read", lambda s, i: (reads.append(i), read(s, i))[1])
    tfds_source(prepared, "insects_one", "train")
    assert len(reads) <= 45 + 1  # and one look for labels


def test_tfds_fingerprints_tell_splits_and_data_sets_apart(prepared):
    found = {
        tfds_source(prepared, name, split).fingerprint
        for name in ("insects", "insects_one")
        for split in PARTS
    }
    assert len(found) == 6
