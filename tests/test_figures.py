"""What the pictures show: numbers behind them against numpy, and that the right thing is marked."""

import itertools
import json
import pathlib

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from alexnet_jax import figures, gallery
from alexnet_jax.data import images as pictures

NAMES = (
    "errors", "loss", "update_to_weight", "confusion", "kernels", "guesses", "neighbours",
)  # fmt: skip


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


# ------------------------------------------------------------------------------------ by numbers


def test_colour_selectivity_of_grey_pure_and_mixed_kernels():
    rng = np.random.default_rng(0)
    shape = rng.standard_normal((5, 5, 1, 4))
    grey = np.repeat(shape, 3, axis=2)
    opponent = shape * np.array([1.0, -1.0, 0.0])[:, None]  # red against green, no brightness
    red = shape * np.array([1.0, 0.0, 0.0])[:, None]  # a third of its energy is brightness
    assert figures.colour_selectivity(grey) == pytest.approx(0, abs=1e-12)
    assert figures.colour_selectivity(opponent) == pytest.approx(1)
    assert figures.colour_selectivity(red) == pytest.approx(2 / 3)
    both = np.concatenate([grey, 100 * opponent], axis=-1)  # a kernel counts once, however large
    assert figures.colour_selectivity(both) == pytest.approx(0.5)
    noise = rng.standard_normal((11, 11, 3, 400))
    assert figures.colour_selectivity(noise) == pytest.approx(2 / 3, abs=0.005)


def test_kernels_are_drawn_in_order_16_a_row_on_one_scale_for_both_towers():
    rng = np.random.default_rng(0)
    towers = [rng.standard_normal((3, 3, 3, 20)), 4 * rng.standard_normal((3, 3, 3, 20))]
    low, high = min(t.min() for t in towers), max(t.max() for t in towers)
    figure = figures.kernels(towers, ["tower 1", "tower 2"])
    assert [axes.get_title("left") for axes in figure.axes] == ["tower 1", "tower 2"]
    for axes, tower in zip(figure.axes, towers):
        sheet = np.asarray(axes.images[0].get_array())
        assert sheet.shape == (2 * 4 - 1, 16 * 4 - 1, 3)
        for place in range(20):
            top, left = 4 * (place // 16), 4 * (place % 16)
            expected = (tower[..., place] - low) / (high - low)
            np.testing.assert_allclose(sheet[top : top + 3, left : left + 3], expected, atol=1e-9)


def test_the_right_label_is_marked_wherever_it_stands():
    labels, shares = ("owl", "cat", "dog", "elk", "fox"), (0.5, 0.2, 0.15, 0.1, 0.05)
    image = np.zeros((4, 4, 3), np.uint8)
    found = [
        figures.Guess(image, right or "file.jpg", labels, shares, right)
        for right in ("dog", "owl", "bee", None)
    ]
    figure = figures.guesses(found)
    for place, guess in enumerate(found):
        picture, bars = figure.axes[place], figure.axes[len(found) + place]
        assert picture.get_title() == guess.title
        assert [bar.get_width() for bar in bars.patches] == list(shares)
        right = [label == guess.right for label in labels]
        assert [text.get_fontweight() == "bold" for text in bars.texts] == right
        colours = [bar.get_facecolor() for bar in bars.patches]
        assert len(set(colours)) == 1 + any(right)
        assert [colour == colours[right.index(True)] for colour in colours if any(right)] == (
            right if any(right) else []
        )
        assert texts(bars) == [f"{name}  {share:.0%}" for name, share in zip(labels, shares)]


def test_a_label_is_drawn_as_it_is_written_or_cut_where_it_is_long(tmp_path):
    """Not as mathematics, and not as three dots."""
    labels = ("$a_b$", "n02_x" * 9, "é", "w", "v")
    image = np.zeros((4, 4, 3), np.uint8)
    found = figures.Guess(image, "x" * 50, labels, (0.6, 0.1, 0.1, 0.1, 0.1), "é")
    figure = figures.guesses([found])
    words = texts(figure.axes[4])  # below four pictures, of which three are left out
    assert words[0] == "$a_b$  60%"
    assert words[1].startswith("n02_xn02_xn02_x")
    assert len(words[1]) < 30
    assert figure.axes[0].get_title().startswith("xxxxxxxxxxxxxxx")
    figures.save(figure, tmp_path / "one")
    assert "<!-- $a_b$  60% -->" in (tmp_path / "one.svg").read_text()


def test_confusion_is_in_per_cent_of_the_class_and_keeps_the_worst_of_many():
    counts = np.array([[6, 2, 0], [0, 4, 0], [1, 1, 2]])
    figure = figures.confusion(counts, ("a", "b", "c"))
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(drawn, [[75, 25, 0], [0, 100, 0], [25, 25, 50]])
    assert sorted(texts(figure.axes[0])) == sorted(["75", "25", "100", "25", "25", "50"])
    figure = figures.confusion(counts, ("a", "b", "c"), most=2)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "c"]
    assert "the 2 of 3 classes that are mistaken most" in figure.axes[0].get_title()
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(drawn, [[75, 0], [25, 50]])


def test_names_of_many_classes_do_not_run_into_each_other():
    figure = figures.confusion(
        np.eye(40, dtype=int), [f"class of long name {n}" for n in range(40)]
    )
    FigureCanvasAgg(figure).draw()
    tops = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(below.y1 < above.y0 for above, below in itertools.pairwise(tops))


def test_a_class_without_examples_is_left_white():
    drawn = figures.confusion(np.array([[2, 0], [0, 0]]), ("a", "b")).axes[0].images[0]
    np.testing.assert_allclose(np.asarray(drawn.get_array()), [[100, 0], [np.nan, np.nan]])


def test_classes_without_examples_are_not_those_mistaken_most():
    counts = np.diag([0] * 5 + [2] * 45)
    counts[5:7, 5:7] = 1  # the two that are mistaken
    figure = figures.confusion(counts, [f"c{n}" for n in range(50)])
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown[:3] == ["c5", "c6", "c7"]


def test_curves_of_many_runs_differ_in_more_than_colour():
    runs = {f"run {n}": [(1, 0.5), (2, 0.4 - n / 100)] for n in range(8)}
    (axes,) = figures.curves(runs, {}, ylabel="error", target=0.25).axes
    lines = [line for line in axes.lines if line.get_label().startswith("run")]
    looks = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(looks) == 8
    assert axes.lines[-1].get_ydata()[0] == 0.25


def test_the_legend_of_very_many_runs_is_whole():
    runs = {f"run {n}": [(1, 0.5), (2, 0.4)] for n in range(24)}
    figure = figures.curves(runs, runs, ylabel="error")
    FigureCanvasAgg(figure).draw()
    legend = figure.axes[0].get_legend().get_window_extent()
    assert legend.height > 0.7 * figure.bbox.height
    assert figure.bbox.y0 <= legend.y0 < legend.y1 <= figure.bbox.y1


def test_figures_of_others_keep_their_style(tmp_path):
    before = [matplotlib.rcParams[name] for name in figures.STYLE]
    figure = figures.curves({"run": [(1, 0.5), (2, 0.25)]}, {}, ylabel="error")
    assert figure.axes[0].xaxis.label.get_fontsize() != before[0]  # it has one
    figures.save(figure, tmp_path / "curve")
    assert [matplotlib.rcParams[name] for name in figures.STYLE] == before


def test_curves_name_the_split_that_was_measured(tmp_path):
    for name, split in (("one", "test"), ("two", "validation")):
        (tmp_path / name).mkdir()
        lines = [
            {"step": 1, "epoch": 1.0, "split": "train", "loss": 1.0, "top1_error": 0.5,
             "learning_rate": 0.1},
            {"step": 1, "epoch": 1.0, "split": split, "loss": 1.0, "top1_error": 0.5,
             "num_examples": 2},
        ]  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    (axes,) = gallery.learning([tmp_path / "one", tmp_path / "two"], "loss", "loss").axes
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert told == ["one, training", "one, test", "two, training", "two, validation"]


def test_the_same_numbers_make_the_same_files(tmp_path):
    for name in ("one", "two"):
        figure = figures.curves({"run": [(1, 0.5), (2, 0.25)]}, {}, ylabel="error")
        figures.save(figure, tmp_path / name / "curve")
    for suffix in (".png", ".svg"):
        one, two = ((tmp_path / name / f"curve{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two


# ------------------------------------------------------------------------------- from a workdir


def test_mode_figures_writes_every_picture_twice(trained, run, capsys):
    assert run(trained, "--mode=figures") == 0
    said = capsys.readouterr().out.split()
    folder = trained / "figures"
    assert said == [str(folder / f"{name}{end}") for name in NAMES for end in (".png", ".svg")]
    for name in NAMES:
        with Image.open(folder / f"{name}.png") as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.shape[1] == 1400
        assert pixels.std() > 5  # something is drawn
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edge > 250).mean() > 0.98, name  # and nothing runs over the edge
        assert (folder / f"{name}.svg").read_text().count("<path") > 3


def test_neighbours_are_the_nearest_in_the_features_file(trained, run, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        figures, "neighbours", lambda *given: asked.update(zip(("queries", "nearest"), given))
    )
    monkeypatch.setattr(figures, "save", lambda figure, path: [])
    assert run(trained, "--mode=figures", "--config.eval.batch_size=7") == 0
    arrays = {}
    for split in ("train", "validation"):
        output = tmp_path / f"{split}.npz"
        flags = [f"--output={output}", "--layer=fc7", f"--config.eval.split={split}"]
        assert run(trained, "--mode=features", *flags) == 0
        arrays[split] = np.load(output, allow_pickle=False)
    queries, training = arrays["validation"], arrays["train"]
    assert len(asked["queries"]) == 5
    for (image, label), nearest in zip(asked["queries"], asked["nearest"]):
        (place,) = (
            n for n, name in enumerate(queries["names"]) if np.array_equal(stored(name), image)
        )
        assert label == queries["labels"][queries["targets"][place]]
        distances = ((training["features"] - queries["features"][place]) ** 2).sum(1)
        wanted = np.argsort(distances, kind="stable")[:6]
        for (found, name), index in zip(nearest, wanted, strict=True):
            np.testing.assert_array_equal(found, stored(training["names"][index]))
            assert name == training["labels"][training["targets"][index]]


def test_no_training_image_is_its_own_neighbour(trained, run, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        figures, "neighbours", lambda *given: asked.update(zip(("queries", "nearest"), given))
    )
    monkeypatch.setattr(figures, "save", lambda figure, path: [])
    assert run(trained, "--mode=figures", "--config.eval.split=train") == 0
    for (query, _), nearest in zip(asked["queries"], asked["nearest"], strict=True):
        assert not any(np.array_equal(query, image) for image, _ in nearest)


def stored(name: str) -> np.ndarray:
    with open(name, "rb") as file:
        return pictures.square(pictures.decode(file.read(), name), 41)


def test_guesses_are_spread_over_the_split_with_the_five_best(trained, run, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(figures, "guesses", asked.extend)
    monkeypatch.setattr(figures, "save", lambda figure, path: [])
    output = tmp_path / "found.npz"
    assert run(trained, "--mode=figures") == run(trained, "--mode=eval", f"--output={output}") == 0
    with np.load(output, allow_pickle=False) as file:
        names, labels = file["names"], file["labels"]
        assert len(asked) == 8
        for guess in asked:
            (place,) = (n for n, name in enumerate(names) if (stored(name) == guess.image).all())
            row = file["probabilities"][place]
            assert guess.probabilities == pytest.approx(np.sort(row)[::-1])
            assert list(guess.labels) == labels[np.argsort(-row)].tolist()
            assert guess.right == guess.title == labels[file["targets"][place]]


def test_curves_of_several_runs_are_told_apart_by_the_ends_of_their_paths(tmp_path):
    places = [tmp_path / "relu" / "1", tmp_path / "tanh" / "1"]
    assert list(gallery.names(places)) == ["relu/1", "tanh/1"]
    assert list(gallery.names(places[:1])) == ["1"]


def test_the_current_folder_has_its_own_name_in_a_legend(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert list(gallery.names([pathlib.Path(), pathlib.Path("../there")])) == ["here", "there"]


def test_update_to_weight_ratios_are_logged_for_every_layer(trained):
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["split"] == "train"]
    for record in records:
        found = {name for name in record if name.startswith("update_to_weight/")}
        assert len(found) == 8
        assert all(0 < record[name] < 1 for name in found)


def test_a_run_of_less_than_an_epoch_has_a_curve_of_its_records(trained, tmp_path):
    records = (trained / "metrics.jsonl").read_text().splitlines()[:2]
    (tmp_path / "metrics.jsonl").write_text("\n".join(records) + "\n")
    (axes,) = gallery.learning([tmp_path], "loss", "loss").axes
    expected = [[record["epoch"], record["loss"]] for record in map(json.loads, records)]
    assert axes.lines[0].get_xydata().tolist() == expected


def test_where_nothing_moves_no_ratios_are_drawn(tmp_path):
    record = {"step": 1, "epoch": 1.0, "learning_rate": 0.1, "update_to_weight/conv1": 0.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert gallery.ratios(tmp_path) == {}


def test_predict_draws_the_images_it_names_into_the_file_it_is_given(
    trained, images, run, capsys, tmp_path
):
    paths = sorted(map(str, (images / "val" / "owl").iterdir()))[:3]
    for end in (".png", ".svg"):
        output = tmp_path / end / f"best{end}"
        assert run(trained, "--mode=predict", f"--figure={output}", *paths) == 0
        assert len(capsys.readouterr().out.splitlines()) == 3
        assert list(output.parent.iterdir()) == [output]
    with Image.open(tmp_path / ".png" / "best.png") as image:
        assert image.width == 1400
    assert all(name[-6:] in output.read_text() for name in paths)


def test_figures_of_an_empty_workdir_are_refused_in_one_line(run, capsys, tmp_path):
    assert run(tmp_path / "none", "--mode=figures") == 2
    error = capsys.readouterr().err
    assert "train there" in error
    assert error.count("\n") == 1
