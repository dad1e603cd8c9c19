"""What trained nets say of images, against numpy on the files they write and on the pixels."""

import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import oracle
import pytest
from PIL import Image

from alexnet_jax import evaluate, predict
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.config import Config, Data
from alexnet_jax.data import images as pictures
from alexnet_jax.data import sources
from alexnet_jax.prepare import main as prepare
from alexnet_jax.train.state import make_apply

ROOT = pathlib.Path(__file__).parent.parent
CLASSES = ("cat", "dog", "owl")
STORED, SIZE = 41, 36  # round(256 * 36 / 224)


@pytest.fixture(scope="module")
def ensemble(trained, run, tmp_path_factory) -> list[pathlib.Path]:
    """Workdirs of three seeds."""
    others = [tmp_path_factory.mktemp("runs") / f"seed{seed}" for seed in (1, 2)]
    for seed, workdir in enumerate(others, 1):
        assert run(workdir, f"--config.seed={seed}", "--config.train.num_steps=3") == 0
    return [trained, *others]


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def by_oracle(workdir: pathlib.Path, squares: np.ndarray, num_crops: int) -> np.ndarray:
    """Probabilities by the numpy net, crops cut by hand: (n, classes)."""
    _, meta, params = Checkpoints(workdir / "checkpoints").read_net(-1)
    margin = STORED - SIZE
    middle = margin // 2
    mean = meta.statistics.mean_image[middle : middle + SIZE, middle : middle + SIZE]
    places = [(middle, middle)]
    if num_crops == 10:
        places += [(0, 0), (0, margin), (margin, 0), (margin, margin)]
    found = []
    for top, left in places:
        crops = squares[:, top : top + SIZE, left : left + SIZE].astype(float)
        for views in (crops, crops[:, :, ::-1])[: 2 if num_crops == 10 else 1]:
            found.append(softmax(oracle.forward(params, views - mean, "paper", train=False)[0]))
    assert len(found) == num_crops
    return np.mean(found, axis=0)


def test_the_readmes_lines_for_python_open_a_net(trained, images, difference):
    """As they stand there, but for the run and its data; against the numpy net."""
    given = Config(data=Data(source=f"folder:{images}"))
    lines, _ = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = lines.replace("config.Config()", "given").replace("runs/quickstart", str(trained))
    found = {"given": given}
    exec(lines, found)
    _, squares = validation_squares(images)
    probabilities = by_oracle(trained, squares, 1)
    assert difference(np.exp(found["log_probabilities"]), probabilities) < 1e-5
    _, meta, params = Checkpoints(trained / "checkpoints").read_net(-1)
    assert (np.asarray(found["kernels"]) == params["conv1"]["kernel"]).all()
    middle = slice((STORED - SIZE) // 2, (STORED - SIZE) // 2 + SIZE)
    crops = squares[:, middle, middle] - meta.statistics.mean_image[middle, middle]
    logits = found["apply"](found["net"].params, crops, None)
    assert difference(softmax(np.asarray(logits)), probabilities) < 1e-5
    assert found["fc7"].shape == (len(squares), params["fc7"]["kernel"].shape[1])


def validation_squares(images: pathlib.Path) -> tuple[list[pathlib.Path], np.ndarray]:
    paths = sorted((images / "val").rglob("*.jpg"))
    decoded = [pictures.decode(path.read_bytes(), path.name) for path in paths]
    return paths, np.stack([pictures.square(image, STORED) for image in decoded])


@pytest.mark.parametrize("num_crops", [1, 10])
@pytest.mark.parametrize("towers", [1, 2])
def test_probabilities_are_those_of_the_numpy_net(
    trained, images, run, capsys, tmp_path, num_crops, towers
):
    output = tmp_path / "new" / "found.npz"
    flags = (f"--config.eval.num_crops={num_crops}", f"--config.mesh.model={towers}")
    # A batch of 4 does not divide 15 examples.
    flags += (f"--output={output}", "--config.eval.batch_size=4")
    assert run(trained, "--mode=eval", *flags) == 0
    found = last_json(capsys)
    paths, squares = validation_squares(images)
    expected = by_oracle(trained, squares, num_crops)
    targets = np.array([CLASSES.index(path.parent.name) for path in paths])
    with np.load(output, allow_pickle=False) as file:
        assert file["probabilities"].dtype == np.float32
        np.testing.assert_allclose(file["probabilities"], expected, rtol=1e-4, atol=1e-6)
        assert file["targets"].tolist() == targets.tolist()
        assert tuple(file["labels"]) == CLASSES
        assert file["names"].tolist() == [str(path) for path in paths]
        confusion = np.zeros((3, 3), int)
        np.add.at(confusion, (targets, file["probabilities"].argmax(1)), 1)
        np.testing.assert_array_equal(file["confusion"], confusion)
    right = expected[np.arange(15), targets]
    assert found["loss"] == pytest.approx(-np.log(right).mean(), rel=1e-4)
    assert found["top1_error"] == pytest.approx(np.mean(expected.argmax(1) != targets))
    assert (found["num_examples"], found["num_crops"]) == (15, num_crops)


def test_an_ensemble_is_the_average_of_its_files_to_the_last_digit(ensemble, run, capsys, tmp_path):
    parts = []
    for number, workdir in enumerate(ensemble):
        output = tmp_path / f"{number}.npz"
        assert run(workdir, "--mode=eval", f"--output={output}") == 0
        parts.append(np.load(output)["probabilities"])
    assert np.abs(parts[0] - parts[1]).max() > 1e-3
    capsys.readouterr()
    together = ",".join(map(str, ensemble))
    assert run(together, "--mode=eval", f"--output={tmp_path / 'all.npz'}") == 0
    found = last_json(capsys)
    mean = ((parts[0].astype(float) + parts[1] + parts[2]) / 3).astype(np.float32)
    with np.load(tmp_path / "all.npz") as file:
        np.testing.assert_allclose(file["probabilities"], mean, rtol=2e-7, atol=0)
        targets = file["targets"]
    assert found["steps"] == [6, 3, 3]
    assert found["loss"] == pytest.approx(-np.log(mean[np.arange(15), targets]).mean(), rel=1e-6)
    assert found["top1_error"] == pytest.approx(np.mean(mean.argmax(1) != targets))


def test_a_table_of_classes_counts_as_numpy_does(trained, run, capsys, tmp_path):
    output = tmp_path / "found.csv"
    assert run(trained, "--mode=eval", f"--output={output}") == 0
    lines = capsys.readouterr().out.splitlines()
    with open(output, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", "label", *CLASSES]
    assert len(rows) == 15
    for label in CLASSES:
        mine = [row for row in rows if row[1] == label]
        best = [CLASSES[np.argmax([float(value) for value in row[2:]])] for row in mine]
        (line,) = [line for line in lines if line.startswith(label)]
        assert line.split()[1:3] == ["5", f"{np.mean([b != label for b in best]):.1%}"]


def test_a_split_of_its_own_is_evaluated_without_being_named_again(images, run, tmp_path, capsys):
    source = f"folder:{images / 'train'}"
    own = ("--config.data.split=(1, 1, 0)", "--config.data.split_seed=3")
    flags = (f"--config.data.source={source}", "--config.train.num_steps=1")
    assert run(tmp_path / "run", *flags, *own) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    validation = json.loads(lines[-1])
    capsys.readouterr()
    output = tmp_path / "found.csv"
    assert run(tmp_path / "run", "--mode=eval", flags[0], f"--output={output}") == 0
    found = last_json(capsys)
    assert found["loss"] == pytest.approx(validation["loss"], rel=1e-6)
    with open(output, newline="", encoding="utf-8") as file:
        names = [row["name"] for row in csv.DictReader(file)]
    trained_on = Data(source=source, split=(1, 1, 0), split_seed=3)
    expected = sources.open_source(trained_on, "validation")
    assert names == [expected.name(index) for index in range(24)]  # half of 48
    training = sources.open_source(trained_on, "train")
    assert not {training.name(index) for index in range(24)} & set(names)


def test_a_table_names_files_as_they_are(tmp_path):
    """Also one that is no UTF-8."""
    odd = os.fsencode(tmp_path) + b"/\xff.png"
    source = sources.Folder(CLASSES, np.array([1]), "", (os.fsdecode(odd),))
    found = evaluate.Predictions(np.zeros((1, 3), np.float32), np.array([1]), source)
    evaluate._write(tmp_path / "found.csv", found)
    assert (tmp_path / "found.csv").read_bytes().splitlines()[1].split(b",")[0] == odd


def test_a_pipe_is_no_image(trained, run, capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert run(trained, "--mode=predict", str(tmp_path / "pipe")) == 2
    assert "pipe: is a pipe or device; save the image" in capsys.readouterr().err


@pytest.mark.parametrize("at_once", [1, 2, 1024])
def test_files_and_folders_are_given_their_best_labels_in_their_order(
    at_once, trained, images, run, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(predict, "FILES_AT_ONCE", at_once)
    (tmp_path / "deep").mkdir()
    one, two = images / "val/cat/03.jpg", tmp_path / "deep" / "photo.png"
    Image.open(images / "val/owl/01.jpg").save(two)
    (tmp_path / "deep" / "notes.txt").write_text("no image")
    assert run(trained, "--mode=predict", str(one), str(tmp_path)) == 2  # of the text
    said = capsys.readouterr()
    assert "error: 1 of 3 files are not images that can be read, " in said.err
    assert str(tmp_path / "deep" / "notes.txt") in said.err
    found = [json.loads(line) for line in said.out.splitlines()]
    squares = [
        pictures.square(pictures.decode(path.read_bytes(), ""), STORED) for path in (one, two)
    ]
    expected = by_oracle(trained, np.stack(squares), 1)
    for entry, path, row in zip((found[0], found[2]), (one, two), expected):
        order = np.argsort(-row)
        assert entry["file"] == str(path)
        assert entry["labels"] == [CLASSES[place] for place in order]  # three classes: three labels
        np.testing.assert_allclose(entry["probabilities"], row[order], rtol=1e-4)
    assert found[1]["file"].endswith("notes.txt")  # before photo.png
    assert "error" in found[1]
    assert run(trained, "--mode=predict", str(one)) == 0


def test_links_in_a_folder_are_followed_once_and_hidden_files_are_not_looked_at(
    trained, images, run, capsys, tmp_path
):
    (tmp_path / "cats").symlink_to(images / "val/cat")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".DS_Store").write_text("no image")
    assert run(trained, "--mode=predict", str(tmp_path)) == 0
    printed = capsys.readouterr()
    found = [json.loads(line)["file"] for line in printed.out.splitlines()]
    assert found == [f"{tmp_path}/cats/{n:02d}.jpg" for n in range(5)]
    assert f"1 links to nothing, pipes or devices are not looked at: {tmp_path}/gone.jpg" in (
        printed.err
    )


def test_a_folder_without_files_is_named(trained, images, run, capsys, tmp_path):
    (tmp_path / "Thumbs.db").write_text("no image")
    assert run(trained, "--mode=predict", str(images / "val"), str(tmp_path)) == 2
    assert f"{tmp_path}: there are no files in it" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_keeps_no_other_from_its_answer(
    trained, images, run, capsys, monkeypatch
):
    """As one of another user; root reads everything."""
    closed = str(images / "val/cat/01.jpg")
    read = sources.read_file

    def refusing(path: str) -> bytes:
        return read("/nowhere" if path == closed else path)

    monkeypatch.setattr(sources, "read_file", refusing)
    assert run(trained, "--mode=predict", str(images / "val/cat")) == 2
    said = capsys.readouterr()
    found = {entry["file"]: entry for entry in map(json.loads, said.out.splitlines())}
    assert len(found) == 5
    assert [path for path, entry in found.items() if "error" in entry] == [closed]
    assert "cannot be read" in found[closed]["error"]


def test_who_reads_only_the_first_answer_gets_no_word_of_the_others(config_file, trained, images):
    line = [sys.executable, "-m", "alexnet_jax.main", f"--config={config_file}"]
    line += [f"--workdir={trained}", "--mode=predict", *[str(images / "train")] * 3]
    read, written = os.pipe()
    os.close(read)
    ended = subprocess.run(line, stdout=written, stderr=subprocess.PIPE, text=True)
    os.close(written)
    assert ended.returncode == 1
    assert "error" not in ended.stderr.lower()


@pytest.mark.parametrize("unbuffered", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_nor_who_reads_nothing(unbuffered):
    """Of what is only written at the end."""
    line = [sys.executable, "-m", "alexnet_jax.main", "--help"]
    read, written = os.pipe()
    os.close(read)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | unbuffered
    ended = subprocess.run(line, stdout=written, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(written)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("layer", ["conv1", "conv4", "conv5", "fc7"])
def test_features_are_the_layers_outputs(trained, images, run, tmp_path, towers, layer):
    output = tmp_path / "features.npz"
    flags = (f"--layer={layer}", f"--output={output}", f"--config.mesh.model={towers}")
    assert run(trained, "--mode=features", *flags) == 0
    with np.load(output, allow_pickle=False) as file:
        found, targets = file["features"], file["targets"]
    _, squares = validation_squares(images)
    middle = (STORED - SIZE) // 2
    crops = squares[:, middle : middle + SIZE, middle : middle + SIZE].astype(float)
    _, meta, params = Checkpoints(trained / "checkpoints").read_net(6)
    mean = meta.statistics.mean_image[middle : middle + SIZE, middle : middle + SIZE]
    _, named = oracle.forward(params, crops - mean, "paper", train=False)
    expected = named[{"conv1": "pool1", "conv5": "pool5"}.get(layer, layer)]
    expected = 0.5 * expected if layer == "fc7" else expected  # dropout's, testing
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert targets.tolist() == [0] * 5 + [1] * 5 + [2] * 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode=eval", "--output=found.txt"], [".npz or .csv"]),
        (["--mode=features", "--output=found.npz", "--layer=fc8"], ["--layer=fc8", "conv1"]),
        (["--mode=features"], ["--output"]),
        (
            ["--mode=features", "--output=/dev/null/a.npz"],
            ["--output=/dev/null/a.npz cannot be written"],
        ),
        (
            ["--mode=eval", "--output=/dev/null/a.csv"],
            ["--output=/dev/null/a.csv cannot be written"],
        ),
        (["--mode=eval", "--output=/"], ["--output=/", ".npz or .csv"]),
        (
            ["--mode=predict", "--figure=/dev/null/a.png"],
            ["--figure=/dev/null/a.png cannot be written"],
        ),
        (["--mode=predict"], ["no image"]),
        (["--mode=predict", "nowhere.jpg"], ["nowhere.jpg", "no such"]),
        (["--mode=eval", "surplus"], ["surplus"]),
    ],
)
def test_mistakes_are_told_in_one_line(trained, run, capsys, arguments, words):
    capsys.readouterr()
    assert run(trained, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words)


def test_nets_of_other_classes_predict_nothing_together(trained, images, run, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "data")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "owl").rename(tmp_path / "data" / split / "rat")
    other = [f"--config.data.source=folder:{tmp_path / 'data'}", "--config.train.num_steps=1"]
    assert run(tmp_path / "other", *other) == 0
    picture = str(next((images / "val" / "cat").iterdir()))
    assert run(f"{trained},{tmp_path / 'other'}", "--mode=predict", picture) == 2
    error = capsys.readouterr().err
    assert f"class 2 is 'rat', in {trained} 'owl'; an ensemble needs the same" in error


def test_an_ensemble_trains_nothing(ensemble, run, capsys):
    assert run(",".join(map(str, ensemble[:2]))) == 2
    assert "takes one" in capsys.readouterr().err


def test_classes_without_examples_take_no_place_in_the_table():
    """Of 60 classes every second is there, all of class 0's and no other's taken for the next."""
    targets = np.repeat(np.arange(0, 60, 2), 2)
    best = np.where(targets == 0, 1, targets)
    log_probabilities = np.log(np.where(np.arange(60) == best[:, None], 0.9, 0.1 / 59))
    labels = ("\x1b[2Jnot\nprintable", *(f"class {number}" for number in range(1, 60)))
    source = sources.Folder(labels, targets, "", ("",) * len(targets))
    table = evaluate.class_table(evaluate.Predictions(log_probabilities, targets, source))
    _, worst, *others, more, last = table.splitlines()
    assert worst.split() == ["\\x1b[2Jnot\\nprintable", "2", "100.0%", "class", "1", "(2)"]
    assert [line.split()[:4] for line in others] == [
        ["class", str(2 * number), "2", "0.0%"] for number in range(1, 20)
    ]
    assert more.startswith("... of 30 classes")
    assert last == "without examples: 30, class 1, class 3, class 5, class 7, class 9, ..."


def test_a_net_shows_itself_in_a_line_and_refuses_images_of_another_size(trained, tmp_path):
    net = predict.open_net(Config(data=Data(cache_dir=str(tmp_path))), trained)
    assert repr(net) == "<Net of preset paper, 3 classes, step 6>"
    apply = make_apply(net.config.model, 3, shards=1)
    with pytest.raises(ValueError, match=r"images of \(2, 40, 36, 3\): must be \(b, 36, 36, 3\)"):
        apply(net.params, np.zeros((2, 40, 36, 3), np.float32), None)


def test_what_a_net_opened_from_python_compiles_is_kept(trained, tmp_path):
    code = f"""
import jax
from alexnet_jax import config, predict
cache = config.Config(data=config.Data(cache_dir={str(tmp_path)!r}))
predict.open_net(cache, {str(trained)!r})
print(jax.config.jax_compilation_cache_dir)
"""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines()[-1] == str(tmp_path / "compiled")


def test_a_split_is_that_of_training_or_it_is_told(images, run, capsys, tmp_path):
    """Class folders alone are split by what is in them and data.split_seed."""
    folder = tmp_path / "flat"
    shutil.copytree(images / "train", folder)
    data = f"--config.data.source=folder:{folder}"
    for seed in (42, 43):
        more = (f"--config.data.split_seed={seed}", "--config.train.num_steps=1")
        assert run(tmp_path / str(seed), data, *more) == 0
    both = f"{tmp_path / '42'},{tmp_path / '43'}"
    assert run(both, data, "--mode=eval") == 2
    assert "another data.split or data.split_seed" in capsys.readouterr().err
    first = min((folder / CLASSES[0]).iterdir())
    assert run(tmp_path / "42", data, "--mode=eval") == 0
    assert "those trained on" not in capsys.readouterr().err
    first.rename(first.with_name("zz.jpg"))  # as many files, in another order
    assert run(tmp_path / "42", data, "--config.train.num_steps=2") == 2
    assert "and images moved from one split to another" in capsys.readouterr().err
    assert run(tmp_path / "42", data, "--mode=eval") == 0
    assert "images of its validation split may be among those trained on" in capsys.readouterr().err
    first.with_name("zz.jpg").rename(first)
    shutil.copyfile(first, first.with_name("aa.jpg"))
    assert run(tmp_path / "42", data, "--config.train.num_steps=2") == 2
    assert "and images moved from one split to another" in capsys.readouterr().err
    prepared = f"{tmp_path / 'records'}"
    assert prepare(["prepare", f"--input={folder}", f"--output={prepared}", "--size=41"]) == 0
    capsys.readouterr()
    assert run(tmp_path / "42", f"--config.data.source=records:{prepared}", "--mode=eval") == 0
    assert f"records:{prepared}: images of its validation split may be" in capsys.readouterr().err


def test_a_run_that_went_on_with_other_splits_says_so_ever_after(images, run, capsys, tmp_path):
    folder, told = tmp_path / "flat", "images of its validation split may be among those trained on"
    shutil.copytree(images / "train", folder)
    again = tmp_path / "run", f"--config.data.source=folder:{folder}"
    assert run(*again, "--config.train.num_steps=1") == 0
    first = min((folder / CLASSES[0]).iterdir())
    shutil.copyfile(first, first.with_name("aa.jpg"))
    assert told not in capsys.readouterr().err
    for steps, allowed in ((2, ["--allow_config_change"]), (3, [])):
        assert run(*again, f"--config.train.num_steps={steps}", *allowed) == 0
        assert told in capsys.readouterr().err
        assert run(*again, "--mode=eval") == 0
        assert told in capsys.readouterr().err
    assert run(*again, "--mode=eval", "--config.eval.split=train") == 0
    assert "those trained on" not in capsys.readouterr().err
