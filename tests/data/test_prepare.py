"""What is prepared is the input's pixels, labels and names, in order, and their statistics."""

import errno
import fcntl
import hashlib
import io
import json
import os
import pathlib
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from preparing import (
    ALLOWED,
    CLASSES,
    PARTS,
    SIZE,
    assert_refused,
    assert_statistics,
    by_pillow,
    files_of,
    pixels,
    shards_of,
    stored,
    tree,
    write_folder,
    write_tars,
)

from alexnet_jax import main as trainer
from alexnet_jax import prepare as command
from alexnet_jax.config import Data, Model
from alexnet_jax.data import imagenet, records, shapes, sources, survey

pytestmark = pytest.mark.usefixtures("shards_by_threads")

LARGER = 64


@pytest.mark.parametrize(("split", "part"), [("train", "train"), ("val", "validation")])
def test_raw_records_are_the_files_pixels_labels_and_names_in_order(folder, raw, split, part):
    paths, content = files_of(folder, split), stored(raw, part)
    assert [record.name for record in content] == [f"{p.parent.name}/{p.name}" for p in paths]
    assert [CLASSES[record.label] for record in content] == [p.parent.name for p in paths]
    for path, record in zip(paths, content, strict=True):
        np.testing.assert_array_equal(pixels(record.image), by_pillow(path))
    assert (raw / "labels.txt").read_text("utf-8").splitlines() == list(CLASSES)


def test_images_are_stored_as_the_paper_did_unless_told_otherwise(pictures, tmp_path):
    """Squares of 256 pixels a side; section 2."""
    pictures.folder(tmp_path / "in" / "train", {"ant": 1})
    pictures.folder(tmp_path / "in" / "val", {"ant": 1})
    flags = [f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--workers=1"]
    assert command.main(["prepare", *flags]) == 0
    (record,) = stored(tmp_path / "out", "train")
    with Image.open(io.BytesIO(record.image)) as image:
        assert (image.format, image.size) == ("JPEG", (256, 256))


def test_shards_are_cut_by_size(raw):
    manifest = json.loads((raw / "manifest.json").read_text())
    counts = {
        split: [shard["num_examples"] for shard in found["shards"]]
        for split, found in manifest["splits"].items()
    }
    assert counts == {"train": [5, 5, 5, 1], "validation": [5, 1]}


def test_the_manifest_says_what_is_there(raw):
    manifest = json.loads((raw / "manifest.json").read_text())
    settings = {"format": "raw", "quality": 95, "size": SIZE, "shard_size": 5, "version": 1}
    assert {name: manifest[name] for name in settings} == settings
    assert manifest["input"]["num_examples"] == {"train": 16, "validation": 6}
    entries = [*manifest["files"].values()]
    for split in manifest["splits"].values():
        assert split["broken"] == []
        assert split["oddities"] == dict.fromkeys(("greyscale", "cmyk", "misnamed", "rotated"), 0)
        entries += split["shards"]
    assert sorted([entry["file"] for entry in entries] + ["manifest.json"]) == [*tree(raw)]
    for entry in entries:
        data = (raw / entry["file"]).read_bytes()
        assert entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()


def test_raw_statistics_are_numpys_of_the_training_split(folder, raw):
    assert_statistics(raw, np.stack([by_pillow(path) for path in files_of(folder, "train")]))


def test_jpeg_records_are_close_to_the_pixels_and_their_statistics_exact(pictures, run, tmp_path):
    """The statistics are those of what training will decode, not of what was encoded."""
    originals = {}
    for index in range(9):
        path = tmp_path / f"in/train/{'ab'[index % 2]}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        originals[f"{path.parent.name}/{path.name}"] = pictures.smooth(LARGER, LARGER, index)
        path.write_bytes(pictures.encode(originals[f"{path.parent.name}/{path.name}"]))
    qualities = {}
    for quality in (95, 30):
        output = tmp_path / f"out{quality}"
        flags = (f"--input={tmp_path / 'in'}", f"--output={output}", f"--quality={quality}")
        assert run(*flags, "--shard_size=2", size=LARGER).status == 0
        content = stored(output, "train")
        assert [record.name for record in content] == sorted(originals)
        for record in content:
            assert simplejpeg.decode_jpeg_header(record.image)[2:4] == ("YCbCr", "420")
            with Image.open(io.BytesIO(record.image)) as image:
                difference = np.asarray(image, float) - originals[record.name]
            assert np.abs(difference).mean() < (3 if quality == 95 else 12)
        assert_statistics(output, np.stack([simplejpeg.decode_jpeg(r.image) for r in content]))
        qualities[quality] = sum(len(record.image) for record in content)
    assert qualities[30] < 0.8 * qualities[95]


@pytest.mark.parametrize("kind", ["jpeg", "raw"])
def test_larger_and_smaller_images_are_squared_as_they_are_without_preparing(
    pictures, run, tmp_path, kind
):
    """A survey of the folder and of its records finds what the records' statistics are."""
    pictures.folder(tmp_path / "in/train", {"ant": 8, "bee": 6})
    output, cache = tmp_path / "out", tmp_path / "cache"
    flags = (f"--input={tmp_path / 'in'}", f"--output={output}", f"--format={kind}")
    assert run(*flags, "--shard_size=4").status == 0
    found = []
    for source in (f"records:{output}", f"folder:{tmp_path / 'in'}"):
        data = Data(source=source, stored_size=SIZE, cache_dir=str(cache))
        opened = sources.open_source(data, "train")
        if source.startswith("records"):
            found.append(survey.surveyed(opened, data, Model())[1])
            assert not cache.exists()
        found.append(survey.survey(opened, SIZE, str(cache), 2)[1])
    kept, again, without = found
    assert all(a.tobytes() == b.tobytes() for a, b in zip(kept, again, strict=True))
    if kind == "raw":
        assert all(a.tobytes() == b.tobytes() for a, b in zip(kept, without, strict=True))


def test_a_folder_without_splits_is_split_as_training_would(pictures, run, tmp_path):
    write_folder(pictures, tmp_path / "in", dict(zip(CLASSES, (11, 7, 20))), 3)
    flags = (f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--format=raw")
    assert run(*flags, "--split=5,3,2", "--shard_size=4").status == 0
    names = []
    for part in PARTS:
        data = Data(source=f"folder:{tmp_path / 'in'}", split=(5, 3, 2))
        source = sources.open_source(data, part)
        paths = [pathlib.Path(source.read(index).name) for index in range(len(source))]
        content = stored(tmp_path / "out", part)
        assert [r.name for r in content] == [f"{p.parent.name}/{p.name}" for p in paths]
        for path, record in zip(paths, content, strict=True):
            np.testing.assert_array_equal(pixels(record.image), by_pillow(path))
        names += paths
    assert sorted(names) == sorted((tmp_path / "in").glob("*/*"))
    train = [pixels(record.image) for record in stored(tmp_path / "out", "train")]
    assert_statistics(tmp_path / "out", np.stack(train))


def test_a_split_of_nothing_is_left_out(pictures, run, tmp_path):
    write_folder(pictures, tmp_path / "in", {"ant": 5, "bee": 5}, 0)
    flags = (f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
    assert run(*flags, "--split=4,1,0").status == 0
    assert [*json.loads((tmp_path / "out/manifest.json").read_text())["splits"]] == [*PARTS[:2]]


@pytest.mark.parametrize("splits", [PARTS, ("train", "test")])
def test_tfds_is_prepared(pictures, write_tfds, run, tmp_path, splits):
    contents = {
        split: [
            (pictures.encode(pictures.rough(SIZE, SIZE, 100 * seed + index)), (index + seed) % 3)
            for index in range(7 - seed)
        ]
        for seed, split in enumerate(splits)
    }
    write_tfds(tmp_path / "tfds", "insects", CLASSES[::-1], contents)
    flags = ("--input=tfds:insects", f"--tfds_dir={tmp_path / 'tfds'}", "--format=raw")
    assert run(*flags, f"--output={tmp_path / 'out'}", "--shard_size=3").status == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert [*manifest["splits"]] == [*splits]
    assert manifest["input"]["name"] == "insects"
    assert (tmp_path / "out/labels.txt").read_text("utf-8").splitlines() == [*CLASSES[::-1]]
    for split in splits:
        found = stored(tmp_path / "out", split)
        assert [record.label for record in found] == [label for _, label in contents[split]]
        assert len({record.name for record in found}) == len(found)
        for record, (image, _) in zip(found, contents[split], strict=True):
            with Image.open(io.BytesIO(image)) as expected:
                np.testing.assert_array_equal(pixels(record.image), expected)


def test_the_built_in_shapes_are_prepared(run, tmp_path, monkeypatch):
    def write_few(directory: pathlib.Path) -> None:
        if not directory.exists():
            for split in shapes.SPLITS:
                shapes.write_split(directory / split, split, 10)

    monkeypatch.setattr(shapes, "write_shapes", write_few)
    flags = ("--input=shapes", f"--cache_dir={tmp_path / 'cache'}", f"--output={tmp_path / 'out'}")
    assert run(*flags).status == 0
    assert (tmp_path / "out/labels.txt").read_text().split() == list(shapes.LABELS)
    for part in PARTS:
        assert [record.label for record in stored(tmp_path / "out", part)] == list(range(10))


def test_a_split_folder_that_is_wrong_is_not_passed_over(pictures, run, tmp_path):
    write_folder(pictures, tmp_path / "in/train", {"ant": 2}, 0)
    write_folder(pictures, tmp_path / "in/val", {"ant": 2, "dog": 1}, 1)
    flags = (f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
    assert_refused(run(*flags), "'dog'")
    shutil.rmtree(tmp_path / "in/val/dog")
    shutil.copytree(tmp_path / "in/val", tmp_path / "in/valid")
    assert_refused(run(*flags), "both val and valid")


def test_a_copy_of_the_test_split_is_still_a_validation_split(pictures, run, tmp_path):
    write_folder(pictures, tmp_path / "in/train", {"ant": 2}, 0)
    write_folder(pictures, tmp_path / "in/val", {"ant": 2}, 1)
    for path in (tmp_path / "in/val").glob("*/*"):
        os.utime(path, (10**9, 10**9))
    shutil.copytree(tmp_path / "in/val", tmp_path / "in/test")
    assert run(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}").status == 0
    assert [*json.loads((tmp_path / "out/manifest.json").read_text())["splits"]] == [*PARTS]


@pytest.mark.parametrize("name", ["a\u2028b", "a\x85b", "a\rb", " a "])
def test_labels_of_odd_characters_come_back(pictures, run, tmp_path, name):
    write_folder(pictures, tmp_path / "in/train", {name: 1, "zebra": 1}, 0)
    assert run(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}").status == 0
    source = records.open_records(tmp_path / "out", "train")
    assert source.labels == (name, "zebra")
    assert [source.read(index).name for index in (0, 1)] == [f"{name}/000.png", "zebra/000.png"]


@pytest.mark.parametrize("name", ["a\nb", os.fsdecode(b"\xff")])
def test_labels_that_no_line_holds_are_refused_before_the_work(pictures, run, tmp_path, name):
    try:
        write_folder(pictures, tmp_path / "in/train", {name: 1, "zebra": 1}, 0)
    except OSError:
        pytest.skip("this file system takes no such name")
    ran = run(f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}")
    assert_refused(ran, ascii(name)[1:-1], "rename")
    assert os.listdir(tmp_path) == ["in"]


def contents(tars: pathlib.Path, name: str) -> dict[str, bytes]:
    """Files of a tar, and of the tars in it, in order."""
    found = {}
    with tarfile.open(tars / name) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            if member.name.endswith(".tar"):
                with tarfile.open(fileobj=file) as inner:
                    for image in inner:
                        data = inner.extractfile(image)
                        assert data is not None
                        found[f"{member.name[:-4]}/{image.name}"] = data.read()
            else:
                found[member.name] = file.read()
    return found


@pytest.fixture(scope="module")
def from_tars(tars, shards_by_threads, tmp_path_factory) -> pathlib.Path:
    output = tmp_path_factory.mktemp("from_tars") / "out"
    flags = [f"--input={tars}", f"--output={output}", "--size=16", "--workers=2", *ALLOWED]
    assert command.main(["prepare", *flags]) == 0
    return output


def test_imagenets_tars_are_prepared_in_their_order(tars, from_tars):
    assert (from_tars / "labels.txt").read_text() == "n01\nn02\nn03\n"
    lines = [f"n0{k}\t{number}\tn0{k} in words" for k, number in ((1, 3), (2, 1), (3, 2))]
    assert (from_tars / "classes.tsv").read_text().splitlines() == ["wnid\tdevkit_id\tname", *lines]
    train = contents(tars, "ILSVRC2012_img_train.tar")
    del train["n02/n02_8.JPEG"]
    content = stored(from_tars, "train")
    assert [record.name for record in content] == list(train)
    assert [f"n0{record.label + 1}" for record in content] == [name[:3] for name in train]
    content = stored(from_tars, "validation")
    validation = contents(tars, "ILSVRC2012_img_val.tar")
    assert [record.name for record in content] == list(validation)
    # Of the numbers 1, 3, 2, 5, 4 the truth is 2, 1, 3, 2, 1, which are n03, n02, n01, n03, n02.
    assert [record.label for record in content] == [2, 1, 0, 2, 1]


def test_classes_are_called_by_the_devkits_words_where_people_read(
    from_tars, folder, config_file, capsys, tmp_path
):
    def main(*flags: str, runs: str = "run", data: pathlib.Path = from_tars) -> list[str]:
        ran = ["main", f"--config={config_file}", f"--config.data.source=records:{data}", *flags]
        where = ",".join(str(tmp_path / run) for run in runs.split(","))
        assert trainer.main([*ran, f"--workdir={where}"]) == 0
        return capsys.readouterr().out.splitlines()

    def called(**where) -> set[str]:
        _, *table, _ = main("--mode=eval", **where)
        return {line[:12].strip() for line in table}

    def train(steps: int, *flags: str, **where) -> None:
        main("--config.train.batch_size=4", f"--config.train.num_steps={steps}", *flags, **where)

    train(1)
    assert (tmp_path / "run/labels.txt").read_text() == "n01\nn02\nn03\n"
    head, *table, _ = main("--mode=eval", f"--output={tmp_path / 'found.csv'}")
    assert head.startswith("class ")
    assert {line[:12] for line in table} == {f"n0{number} in words" for number in (1, 2, 3)}
    assert (tmp_path / "found.csv").read_text().startswith("name,label,n01,n02,n03\n")
    (line,) = main("--mode=predict", str(next(folder.rglob("*.png"))))
    found = json.loads(line)
    assert sorted(found["labels"]) == ["n01", "n02", "n03"]
    assert found["words"] == [f"{label} in words" for label in found["labels"]]

    # A net, or the data, or one of several nets may know them; a run goes on to.
    plain = tmp_path / "plain"
    shutil.copytree(from_tars, plain)
    manifest = json.loads((plain / "manifest.json").read_text())
    del manifest["files"]["classes.tsv"]
    (plain / "manifest.json").write_text(json.dumps(records.sealed(manifest)))
    train(1, runs="other", data=plain)
    labels, words = ({f"n0{number}{more}" for number in (1, 2, 3)} for more in ("", " in words"))
    assert called(runs="other", data=plain) == labels
    assert called(runs="other") == words
    assert called(runs="other,run", data=plain) == called(runs="run,other", data=plain) == words
    train(2, "--allow_config_change", data=plain)
    assert called(data=plain) == words


def test_classes_of_one_name_are_told_apart():
    names = {
        "crane": "crane (n1)",
        "kit fox, Vulpes macrotis": "kit fox",
        "crane ": "crane (n3)",
        "maillot": "maillot",
        "maillot, tank suit": "maillot, tank suit",
        "": "n6",
    }
    labels = tuple(f"n{number}" for number in range(1, 7))
    head = "wnid\tdevkit_id\tname\n"
    table = head + "".join(f"{label}\t7\t{name}\n" for label, name in zip(labels, names))
    assert records._words(table, labels) == tuple(names.values())
    for wrong in (table.removeprefix(head), table.replace("n2", "n9"), table + "n7\t1\tx\n", ""):
        assert records._words(wrong, labels) == ()


def test_imagenets_odd_images_are_decoded_and_counted(tars, from_tars):
    train = contents(tars, "ILSVRC2012_img_train.tar")
    found = {record.name: pixels(record.image) for record in stored(from_tars, "train")}

    def middle(image: Image.Image) -> np.ndarray:
        upright = np.asarray(image.convert("RGB"), float)
        top, left = (upright.shape[0] - SIZE) // 2, (upright.shape[1] - SIZE) // 2
        return upright[top : top + SIZE, left : left + SIZE]

    for name, square in found.items():
        with Image.open(io.BytesIO(train[name])) as image:
            turned = name == "n02/n02_9.JPEG"
            upright = image.transpose(Image.Transpose.ROTATE_270) if turned else image
            assert np.abs(square - middle(upright)).mean() < 2, name
    np.testing.assert_array_equal(
        found["n01/n01_1.JPEG"], Image.open(io.BytesIO(train["n01/n01_1.JPEG"]))
    )
    splits = json.loads((from_tars / "manifest.json").read_text())["splits"]
    odd = {"greyscale": 1, "cmyk": 1, "misnamed": 1, "rotated": 1}
    assert splits["train"]["oddities"] == odd
    assert splits["validation"]["oddities"] == dict.fromkeys(odd, 0)
    (broken,) = splits["train"]["broken"]
    assert broken.startswith("n02/n02_8.JPEG: ")
    assert_statistics(from_tars, np.stack([*found.values()]))


def test_the_tars_digests_are_kept(tars, from_tars):
    given = json.loads((from_tars / "manifest.json").read_text())["input"]
    names = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
    for split, name in names.items():
        data = (tars / name).read_bytes()
        assert given["sha256"][split] == hashlib.sha256(data).hexdigest()
        assert given["bytes"][split] == len(data)
    assert (given["kind"], given["official"], given["devkit"]) == ("imagenet", False, True)


def test_tars_may_be_listed_and_lie_anywhere(tars, from_tars, run, tmp_path):
    shutil.copytree(tars, tmp_path / "moved")
    names = ("img_val.tar", "devkit_t12.tar.gz", "img_train.tar")
    paths = ",".join(str(tmp_path / "moved" / f"ILSVRC2012_{name}") for name in names)
    output = tmp_path / "moved/out"  # beside the tars is a natural place
    assert run(f"--input={paths}", f"--output={output}", *ALLOWED).status == 0
    assert tree(output) == tree(from_tars)


def test_without_a_devkit_the_labels_are_tensorflow_datasets(pictures, run, tmp_path):
    import tensorflow_datasets

    known = pathlib.Path(tensorflow_datasets.__file__).parent / "datasets/imagenet2012"
    wnids = (known / "labels.txt").read_text().split()
    image = pictures.encode(pictures.rough(8, 8))
    order = np.random.default_rng(0).permutation(1000)
    train = {wnids[k]: {f"{wnids[k]}_1.JPEG": image} for k in order}
    numbers = [50_000, 1, 777]
    write_tars(tmp_path / "in", train, {f"ILSVRC2012_val_{n:08d}.JPEG": image for n in numbers})
    flags = (f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--unofficial")
    assert run(*flags, size=8).status == 0
    assert not (tmp_path / "out/classes.tsv").exists()
    assert [record.label for record in stored(tmp_path / "out", "train")] == order.tolist()
    truth = (known / "validation_labels.txt").read_text().split()
    found = [wnids[record.label] for record in stored(tmp_path / "out", "validation")]
    assert found == [truth[number - 1] for number in numbers]


def test_tars_that_are_not_the_official_ones_are_refused_by_size(tars, run, tmp_path):
    ran = run(f"--input={tars}", f"--output={tmp_path / 'out'}")
    assert_refused(ran, "147897477120", "--unofficial")
    assert not any(tmp_path.iterdir())


def test_a_wrong_digest_is_refused_at_the_end_and_may_be_taken_as_it_is(
    tars, from_tars, run, tmp_path, monkeypatch
):
    official = {
        split: imagenet.Official(name, (tars / name).stat().st_size, "0" * 64)
        for split, (name, _, _) in imagenet.OFFICIAL.items()
    }
    monkeypatch.setattr(imagenet, "OFFICIAL", official)
    flags = [flag for flag in ALLOWED if flag != "--unofficial"]
    flags += [f"--input={tars}", f"--output={tmp_path / 'out'}"]
    assert_refused(run(*flags), "SHA-256", "--unofficial")
    assert not (tmp_path / "out").exists()
    before = shards_of(tmp_path)
    assert before
    ran = run(*flags, "--unofficial")
    assert ran.status == 0
    assert any("going on" in line for line in ran.err)
    assert before.items() <= shards_of(tmp_path).items()
    assert tree(tmp_path / "out") == tree(from_tars)


def test_nothing_but_input_and_settings_shows_in_the_output(folder, raw, run, tmp_path):
    """Not the workers' number, nor when or where it was done, nor where the input lies."""
    shutil.copytree(folder, tmp_path / "in")  # with other modification times, so does the shell
    for path in (tmp_path / "in").rglob("*.png"):
        os.utime(path, (10**9, 10**9))
    flags = ("--format=raw", "--shard_size=5", f"--input={tmp_path / 'in'}")
    for number in (1, 3):
        output = tmp_path / f"out{number}"
        assert run(*flags, f"--output={output}", f"--workers={number}").status == 0
        assert tree(output) == tree(raw)
    for path in raw.glob("*.npz"):
        with zipfile.ZipFile(path) as file:
            assert {info.date_time for info in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_how_it_is_cut_does_not_show_in_statistics_or_contents(folder, raw, run, tmp_path):
    flags = ("--format=raw", f"--input={folder}", f"--output={tmp_path / 'out'}")
    assert run(*flags, "--shard_size=2").status == 0
    for name in ("statistics.npz", "labels.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (raw / name).read_bytes()
    assert len([*(tmp_path / "out").glob("train-*.array_record")]) == 8
    for part in PARTS[:2]:
        assert stored(tmp_path / "out", part) == stored(raw, part)


def test_an_empty_output_folder_that_must_stay_is_refused_before_any_work(
    folder, run, tmp_path, monkeypatch
):
    """A mount point, which only root can make."""
    (tmp_path / "disk").mkdir()

    def busy(old: pathlib.Path, new: pathlib.Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "rename", busy)
    ran = run(f"--input={folder}", f"--output={tmp_path / 'disk'}")
    assert_refused(ran, "disk", os.strerror(errno.EBUSY), "name a folder in it")
    assert os.listdir(tmp_path) == ["disk"]


def test_a_file_system_without_locks_is_written_with_a_warning(folder, run, tmp_path, monkeypatch):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    ran = run(f"--input={folder}", f"--output={tmp_path / 'out'}")
    assert ran.status == 0
    assert any(f"cannot be locked ({os.strerror(errno.ENOLCK)})" in line for line in ran.err)
    assert len(stored(tmp_path / "out", "train")) == 16


@pytest.mark.parametrize("flag", ["--output", "--verify"])
def test_a_folder_whose_name_array_record_cannot_take_is_refused(folder, run, tmp_path, flag):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    given = [f"--input={folder}"] if flag == "--output" else []
    assert_refused(run(*given, f"{flag}={name}"), "caf", "UTF-8")
    assert not os.listdir(tmp_path)


def test_an_output_that_is_there_is_left_as_it_is(folder, raw, run):
    before = {path: path.stat().st_mtime_ns for path in raw.iterdir()}
    flags = (f"--input={folder}", f"--output={raw}", "--format=raw", "--shard_size=5")
    ran = run(*flags)
    assert ran.status == 0
    assert "prepared already" in ran.err[-1]
    assert "train: 16 images" in ran.out
    assert {path: path.stat().st_mtime_ns for path in raw.iterdir()} == before
    assert os.listdir(raw.parent) == [raw.name]
