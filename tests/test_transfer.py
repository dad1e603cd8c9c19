"""What a run takes over from another one, and which layers then move how far."""

import json
import shutil

import numpy as np
import pytest

from alexnet_jax.checkpoint import Checkpoints

BIRDS = ("crow", "duck", "kite", "wren")
CATS = ("lion", "lynx", "puma")
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


@pytest.fixture(scope="module")
def birds(draw_folder):
    """12 training and 3 validation images of each of four other classes."""
    return draw_folder(BIRDS, 12, 3, "png")


def params(workdir, step: int | None = None):
    return Checkpoints(workdir / "checkpoints").read_net(step or -1)[2]


def losses(workdir) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] == "train"]


def assert_equal(one, other) -> None:
    for kind in ("kernel", "bias"):
        np.testing.assert_array_equal(one[kind], other[kind])


def rates(**changed: float) -> str:
    values = tuple(changed.get(layer, 1.0) for layer in LAYERS)
    return f"--config.optim.layer_rates={values}"


def test_other_classes_begin_with_the_weights_and_every_class_equally_probable(
    trained, birds, run, tmp_path, capsys
):
    data = f"--config.data.source=folder:{birds}"
    frozen = rates(**dict.fromkeys(LAYERS[:-1], 0.0))
    begun = [data, f"--config.train.init_from={trained}", "--config.train.num_steps=1"]
    assert run(tmp_path / "still", *begun, frozen) == 0
    assert "new: fc8" in capsys.readouterr().err
    old, new = params(trained), params(tmp_path / "still")
    for layer in LAYERS[:-1]:
        assert_equal(new[layer], old[layer])
    assert new["fc8"]["kernel"].shape[1] == 4
    assert run(tmp_path / "scratch", data, "--config.train.num_steps=1") == 0
    (fine,), (scratch,) = losses(tmp_path / "still"), losses(tmp_path / "scratch")
    assert fine == pytest.approx(np.log(4), rel=1e-6)
    assert fine < scratch


def test_the_same_classes_take_over_everything(trained, run, tmp_path, capsys):
    frozen = rates(**dict.fromkeys(LAYERS, 0.0))
    flags = [f"--config.train.init_from={trained}", "--config.train.num_steps=2", frozen]
    assert run(tmp_path, *flags) == 0
    assert "new: nothing" in capsys.readouterr().err
    for layer, leaves in params(trained).items():
        assert_equal(params(tmp_path)[layer], leaves)


def test_a_net_that_may_know_the_validation_images_is_told(images, run, tmp_path, capsys):
    """Class folders alone are split by data.split_seed, here another one."""
    data = f"--config.data.source=folder:{images / 'train'}"
    begun = f"--config.train.init_from={tmp_path / 'first'}"
    told = "images of its validation split may be among those trained on"
    short = "--config.train.num_steps=1"
    assert run(tmp_path / "first", data, short) == 0
    assert run(tmp_path / "same", data, short, begun) == 0
    assert told not in capsys.readouterr().err
    other = tmp_path / "other", data, "--config.data.split_seed=1"
    assert run(*other, short, begun) == 0
    assert told in capsys.readouterr().err
    assert run(*other, "--mode=eval") == 0
    assert told in capsys.readouterr().err
    third = f"--config.train.init_from={tmp_path / 'other'}"
    assert run(tmp_path / "third", *other[1:], short, third) == 0
    assert told in capsys.readouterr().err


def test_a_net_of_other_classes_cannot_know_them(trained, run, images, tmp_path, capsys):
    for name, other in zip(("cat", "dog", "owl"), ("ant", "bee", "fly"), strict=True):
        shutil.copytree(images / "train" / name, tmp_path / "flat" / other)
    data = f"--config.data.source=folder:{tmp_path / 'flat'}"
    begun = f"--config.train.init_from={trained}"
    assert run(tmp_path / "run", data, begun, "--config.train.num_steps=1") == 0
    assert "those trained on" not in capsys.readouterr().err


def test_a_net_that_gained_a_class_may_know_the_validation_images_too(
    images, run, tmp_path, capsys
):
    """The classes are drawn one after another, so that one more changes the next ones' parts."""
    folder = tmp_path / "flat"
    shutil.copytree(images / "train", folder)
    data, short = f"--config.data.source=folder:{folder}", "--config.train.num_steps=1"
    assert run(tmp_path / "first", data, short) == 0
    shutil.copytree(folder / "dog", folder / "ant")
    capsys.readouterr()
    begun = f"--config.train.init_from={tmp_path / 'first'}"
    assert run(tmp_path / "more", data, short, begun) == 0
    assert "images of its validation split may be among those trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.activation=tanh", "model.activation='relu', not 'tanh'"),
        ("data.mean=channel", "data.mean='central', not 'channel'"),
        ("model.dropout_rule=inverted", "model.dropout_rule='scale_at_test', not 'inverted'"),
        ("model.dropout_after=fc7", "model.dropout_after=('fc6', 'fc7'), not ('fc7',)"),
        ("model.dtype=bfloat16", ""),
        ("model.weight_std=(1,1,1,1,1,1,1,1)", ""),
        ("optim.learning_rate=0.001", ""),
    ],
)
def test_weights_that_now_compute_something_else_are_told(
    setting, words, trained, run, tmp_path, capsys
):
    flags = [f"--config.train.init_from={trained}", "--config.train.num_steps=1"]
    assert run(tmp_path, *flags, f"--config.{setting}") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "was trained with" in line]
    assert len(told) == bool(words)
    assert all(words in line for line in told)


@pytest.mark.parametrize(("classes", "new"), [(CATS, "fc4"), (BIRDS, "fc4"), (None, "nothing")])
def test_the_last_layer_of_figure_1s_net_is_new_for_other_classes(
    draw_folder, run, tmp_path, capsys, classes, new
):
    """As many others too: their scores would be those of the classes before."""
    small = ["--config.model.preset=cifar", "--config.model.towers=1", "--config.model.width=0.25",
             "--config.model.input_size=32", "--config.train.num_steps=1"]  # fmt: skip
    assert run(tmp_path / "first", *small) == 0
    data = draw_folder(classes, 4, 2, "png") if classes else None
    begun = [f"--config.train.init_from={tmp_path / 'first'}"]
    begun += [f"--config.data.source=folder:{data}"] if data else []
    capsys.readouterr()
    assert run(tmp_path / "second", *small, *begun) == 0
    assert f"new: {new}\n" in capsys.readouterr().err
    if classes:
        (loss,) = losses(tmp_path / "second")
        assert loss == pytest.approx(np.log(len(classes)), rel=1e-6)


def test_layers_move_as_their_rates_say(run, tmp_path):
    """The first update: nothing at 0, a quarter at a quarter, the same at 1."""
    flags = ["--config.train.num_steps=1", "--config.optim.learning_rate=0.5"]
    assert run(tmp_path / "plain", *flags) == 0
    still = rates(**dict.fromkeys(LAYERS, 0.0))
    assert run(tmp_path / "still", *flags, still) == 0
    assert run(tmp_path / "mixed", *flags, rates(conv2=0.0, fc6=0.25)) == 0
    plain, start, mixed = (params(tmp_path / name) for name in ("plain", "still", "mixed"))
    for layer in LAYERS:
        assert_equal(mixed[layer], start[layer] if layer == "conv2" else mixed[layer])
        factor = {"conv2": 0.0, "fc6": 0.25}.get(layer, 1.0)
        for kind in ("kernel", "bias"):
            moved, expected = mixed[layer][kind] - start[layer][kind], plain[layer][kind]
            expected = factor * (expected.astype(float) - start[layer][kind])
            scale = np.abs(plain[layer][kind] - start[layer][kind]).max()
            assert scale > 0
            np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-3 * scale)


def test_a_sixth_convolution_is_new(trained, run, tmp_path, capsys):
    flags = [f"--config.train.init_from={trained}", "--config.train.num_steps=1"]
    assert run(tmp_path, "--config.model.preset=conv6", *flags, rates(conv1=0.0)) == 0
    assert "new: conv6" in capsys.readouterr().err
    assert_equal(params(tmp_path)["conv1"], params(trained)["conv1"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.train.init_from=/nowhere"], ["/nowhere", "holds no checkpoints"]),
        (["--config.model.width=0.125"], ["kernel", "both nets must be the same"]),
        (["--config.optim.layer_rates=(1,2)"], ["layer_rates", "8 numbers"]),
        (
            ["--config.model.preset=conv6", "--config.optim.layer_rates=(0,0,0,0,0,1,1,1)"],
            ["conv6 has a rate of 0", "new here", "give conv5 a rate"],
        ),
    ],
)
def test_what_does_not_fit_is_refused(trained, run, tmp_path, capsys, flags, words):
    given = [] if "init_from" in flags[0] else [f"--config.train.init_from={trained}"]
    assert run(tmp_path / "new", *given, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in error for word in words)


def test_a_resumed_run_does_not_begin_again(trained, run, tmp_path):
    first = [f"--config.train.init_from={trained}", "--config.train.num_steps=1"]
    assert run(tmp_path, *first) == 0
    one = params(tmp_path)
    assert run(tmp_path, "--config.train.num_steps=2", "--config.checkpoint.every_steps=1") == 0
    assert np.abs(params(tmp_path)["fc8"]["kernel"] - one["fc8"]["kernel"]).max() > 0
    assert len(losses(tmp_path)) == 2


def test_a_run_that_goes_on_keeps_what_it_began_from(trained, run, tmp_path, capsys):
    begun = [f"--config.train.init_from={trained}"]
    for flags, later, origin in (([], begun, ""), (begun, [], str(trained))):
        workdir = tmp_path / str(len(flags))
        assert run(workdir, *flags, "--config.train.num_steps=1") == 0
        assert run(workdir, *later, "--config.train.num_steps=2") == 0
        said = f"train.init_from={trained} is not used" in capsys.readouterr().err
        assert said == bool(later)
        config = json.loads((workdir / "config.json").read_text())
        assert config["train"]["init_from"] == origin
