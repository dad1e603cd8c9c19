"""What a config says reaches the step, the evaluations and the checkpoint: by the numpy oracle."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from PIL import Image

from alexnet_jax import inspection, mesh, ops, setup
from alexnet_jax.checkpoint import Checkpoints, Meta
from alexnet_jax.config import Data
from alexnet_jax.data import images, sources, stream
from alexnet_jax.models.layers import initial_parameters
from alexnet_jax.models.nets import layers
from alexnet_jax.train import state, step
from alexnet_jax.train.calendar import Calendar

CLASSES = ("cat", "dog", "owl")
STORED, SIZE, BATCH = 41, 36, 8  # 41 = round(256 * 36 / 224)


def losses(workdir: pathlib.Path) -> dict[str, float]:
    """By split, the last recorded."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["split"]: line["loss"] for line in lines}


def sloped(folder: pathlib.Path, count: int, brightness: int) -> pathlib.Path:
    """`count` images of each class, brighter to the right and the bottom: crops differ by place."""
    rng = np.random.default_rng(brightness)
    slope = np.add.outer(np.arange(48), np.arange(44))[..., None]  # 0..90
    for place, label in enumerate(CLASSES):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            noise = rng.integers(0, 40, (*slope.shape[:2], 3))
            pixels = brightness + slope + noise + 20 * np.eye(3, dtype=int)[place]
            Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{number}.png")
    return folder


def squares_of(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Stored squares (n, 41, 41, 3) float64 and labels (n,) of a split, in order."""
    paths = sorted(folder.glob("*/*.png"))
    decoded = (images.decode(path.read_bytes(), path.name) for path in paths)
    squares = np.stack([images.square(image, STORED) for image in decoded])
    return squares.astype(float), np.array([CLASSES.index(path.parent.name) for path in paths])


def window(square: np.ndarray, top: int, left: int, mirror: bool) -> np.ndarray:
    """A crop (..., 36, 36, 3) of stored squares."""
    crop = square[..., top : top + SIZE, left : left + SIZE, :]
    return crop[..., ::-1, :] if mirror else crop


def first_step(meta: Meta, source: str, seed: int) -> tuple[float, oracle.Params, oracle.Params]:
    """The first step's loss, the parameters before and after it, by the oracle, with `at_crop`.

    The stream's batch, the weights and masks drawn are taken as this seed's: others test them.
    """
    model, data = meta.config.model, Data(source=source)
    rows = stream.Rows(BATCH, range(BATCH))
    batches = stream.train_batches(
        sources.open_source(data, "train"), meta.statistics, data,
        seed=seed, size=SIZE, rows=rows, start_step=0, stop_step=1,
    )  # fmt: skip
    (batch,) = batches
    mean = meta.statistics.mean_image
    means = [window(mean, *at, flip) for at, flip in zip(batch["offset"], batch["mirror"])]
    inputs = batch["image"] - np.array(means) + batch["shift"][:, None, None]
    net = layers(model, len(CLASSES))
    params = {
        layer.name: dict(zip(("kernel", "bias"), initial_parameters(model, layer, seed)))
        for layer in net
    }
    key = jax.random.fold_in(jax.random.key(seed), step.DROPOUT_STREAM)
    masks = {
        layer: ops.keep_mask(
            jax.random.fold_in(key, 0), jnp.arange(BATCH), layer=place, towers=jnp.arange(2),
            shape=(len(params[layer]["bias"]) // 2,), rate=0.5,
        )
        for place, layer in ((1, "fc6"), (2, "fc7"))
    }  # fmt: skip
    loss, grads = oracle.loss_and_grads(params, inputs, batch["label"], "paper", masks)
    still = jax.tree.map(np.zeros_like, params)
    return loss, params, oracle.sgd_update(params, still, grads, learning_rate=0.01)[0]


def loss_on(folder: pathlib.Path, params: oracle.Params, mean: np.ndarray, crops: int) -> float:
    """Of 1 or 10 crops of a split's images, by the oracle, with `at_crop`."""
    squares, labels = squares_of(folder)
    corners = [(0, 0), (0, 5), (5, 0), (5, 5), (2, 2)] if crops == 10 else [(2, 2)]
    views = [(*at, flip) for at in corners for flip in (False, True)[: 2 if crops == 10 else 1]]
    inputs = (window(squares, *view) - window(mean, *view) for view in views)
    logits = (oracle.forward(params, x, "paper", train=False)[0] for x in inputs)
    probabilities = np.mean([np.exp(oracle.log_softmax(one)) for one in logits], axis=0)
    return -np.log(probabilities[np.arange(len(labels)), labels]).mean()


def test_settings_reach_the_first_step_and_every_evaluation(run, tmp_path, capsys, difference):
    """Seed, mean, crops; the images that are subtracted, and their change with the data."""
    data = tmp_path / "data"
    train, val = sloped(data / "train", 10, 20), sloped(data / "val", 4, 90)
    source = f"--config.data.source=folder:{data}"
    flags = [source, "--config.seed=7", "--config.data.mean=at_crop"]
    flags += ["--config.train.accumulation_steps=2", "--config.eval.num_crops=10"]
    workdir = tmp_path / "run"
    assert run(workdir, *flags, "--config.train.num_steps=1") == 0

    _, meta, params = Checkpoints(workdir / "checkpoints").read_net(1)
    mean = squares_of(train)[0].mean(axis=0)
    np.testing.assert_allclose(meta.statistics.mean_image, mean, rtol=1e-6)
    recorded = losses(workdir)
    loss, before, after = first_step(meta, f"folder:{data}", seed=7)
    assert recorded["train"] == pytest.approx(loss, rel=1e-5)
    moved, expected = (jax.tree.map(np.subtract, now, before) for now in (params, after))
    assert difference(moved, expected) < 1e-2  # updates of 1e-6 in weights of 1e-1, as float32
    assert recorded["validation"] == pytest.approx(loss_on(val, params, mean, 10), rel=1e-5)

    def evaluated(*flags: str) -> float:
        assert run(workdir, "--mode=eval", source, *flags) == 0  # nothing said of the mean
        return json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]

    assert evaluated() == pytest.approx(loss_on(val, params, mean, 1), rel=1e-5)
    again = evaluated("--config.eval.num_crops=10")
    assert again == pytest.approx(recorded["validation"], rel=1e-6)

    for split in ("train", "val"):
        (tmp_path / "other" / split).parent.mkdir(exist_ok=True)
        (tmp_path / "other" / split).symlink_to(val)
    flags[0] = f"--config.data.source=folder:{tmp_path / 'other'}"
    assert run(workdir, *flags, "--config.train.num_steps=2", "--allow_config_change") == 0
    renewed = Checkpoints(workdir / "checkpoints").read_meta(2).statistics.mean_image
    np.testing.assert_allclose(renewed, squares_of(val)[0].mean(axis=0), rtol=1e-6)


def test_a_device_takes_its_rows_in_the_parts_asked_for(configured):
    """The update is the same; what shows is the size of what goes through the net at once."""
    values = {"model.width": 1 / 16, "model.input_size": SIZE, "train.accumulation_steps": 2}
    config = configured("paper", values)
    devices = mesh.make_mesh(configured("paper", {"mesh.data": 1}).mesh, config.model)
    apply = state.make_apply(config.model, len(CLASSES), 1)
    train_step = setup.make_step(apply, config, devices, Calendar(48, BATCH, 6))
    _, arguments = inspection.training_step(config, len(CLASSES), devices, BATCH)
    traced = str(train_step.trace(*arguments).jaxpr)
    assert f"f32[{BATCH // 2},{SIZE},{SIZE},3]" in traced
    assert f"f32[{BATCH},{SIZE},{SIZE},3]" not in traced
