"""Studies: which runs they make, and what the tables say of them, worked out by hand."""

import csv
import json
import math
import os
import pathlib
import shutil

import pytest

from alexnet_jax import report, tables
from alexnet_jax import study as command
from alexnet_jax.errors import UserError
from alexnet_jax.models.nets import layers
from alexnet_jax.studies import STUDIES, Study

FIGURE1 = ["--config.model.preset=cifar", "--config.model.input_size=32"]
STEPS = ["--config.train.num_steps=12", "--config.eval.batch_size=8"]


@pytest.fixture(scope="module")
def start(config_file):
    """(study, workdir, further arguments) -> the exit status."""

    def call(name: str, workdir: pathlib.Path, *arguments: str) -> int:
        flags = [f"--study={name}", f"--config={config_file}", f"--workdir={workdir}"]
        return command.main(["study", *flags, *STEPS, *arguments])

    return call


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory) -> pathlib.Path:
    """Response normalisation or none, two seeds."""
    workdir = tmp_path_factory.mktemp("study")
    assert start("lrn", workdir, "--seeds=1,2") == 0
    return workdir


def rows(path: pathlib.Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_variant_is_trained_with_every_seed_and_nothing_else_changes(finished):
    configs = {}
    for name, lrn in (("with_lrn", True), ("without_lrn", False)):
        for seed in (1, 2):
            config = json.loads((finished / name / str(seed) / "config.json").read_text())
            assert (config["seed"], config["model"]["lrn"]) == (seed, lrn)
            del config["seed"], config["model"]["lrn"]
            configs[name, seed] = config
    assert len({json.dumps(config) for config in configs.values()}) == 1


def test_the_tables_hold_what_mode_eval_says_of_each_run(finished, run, capsys):
    found = {(row["variant"], row["seed"]): row for row in rows(finished / "runs.csv")}
    assert len(found) == 4
    for (name, seed), row in found.items():
        for split in ("train", "validation"):
            assert run(finished / name / seed, "--mode=eval", f"--config.eval.split={split}") == 0
            said = json.loads(capsys.readouterr().out.splitlines()[-1])
            for key in ("loss", "top1_error", "top5_error", "num_examples"):
                assert float(row[f"{split}_{key}"]) == pytest.approx(said[key], rel=1e-6)


def test_means_spread_and_paired_interval_are_those_worked_out_by_hand(finished):
    found = rows(finished / "runs.csv")
    errors = {
        name: [100 * float(r["validation_top1_error"]) for r in found if r["variant"] == name]
        for name in ("with_lrn", "without_lrn")
    }
    for row in rows(finished / "table.csv"):
        a, b = errors[row["variant"]]
        assert int(row["n"]) == 2
        assert float(row["validation_top1_mean"]) == pytest.approx((a + b) / 2)
        assert float(row["validation_top1_spread"]) == pytest.approx(abs(a - b) / math.sqrt(2))
    assert errors["with_lrn"] != errors["without_lrn"]
    first, second = (b - a for a, b in zip(errors["with_lrn"], errors["without_lrn"]))
    last = rows(finished / "table.csv")[-1]
    assert float(last["difference"]) == pytest.approx((first + second) / 2)
    # Student's 97.5 % point of one degree of freedom, from tables: 12.706.
    assert float(last["margin"]) == pytest.approx(12.7062 * abs(first - second) / 2, rel=1e-4)
    text = (finished / "table.md").read_text()
    assert "+1.4 / +1.2" in text
    assert last["verdict"] in text


def test_a_difference_is_resolved_only_outside_its_interval():
    def done(name: str, *errors: float) -> list[tables.Done]:
        results = [{"validation": {"top1_error": error}} for error in errors]
        return [tables.Done(name, seed, r, None) for seed, r in enumerate(results)]

    # Differences of 4, 5 and 6 points: mean 5, deviation 1, t(2) = 4.3027, 4.3027 / sqrt(3).
    steady = tables.difference(done("a", 0.10, 0.20, 0.30) + done("b", 0.14, 0.25, 0.36), "b", "a")
    assert steady is not None
    assert (steady.count, steady.verdict) == (3, "resolved")
    assert (steady.mean, steady.margin) == pytest.approx((5, 2.48414), rel=1e-5)
    noisy = tables.difference(done("a", 0.10, 0.20, 0.30) + done("b", 0.14, 0.2, 0.36), "b", "a")
    assert noisy is not None
    assert noisy.verdict == "not resolved"
    equal = tables.difference(done("a", 0.5, 0.75) + done("b", 0.75, 1.0), "b", "a")
    assert equal is not None  # two seeds a quarter apart, whose interval has no width
    assert (equal.mean, equal.margin, equal.verdict) == (25, 0, "not resolved")
    alone = tables.difference(done("a", 0.1) + done("b", 0.3, 0.4), "b", "a")
    assert alone is not None
    assert (alone.count, alone.mean, alone.verdict) == (
        1, pytest.approx(20), "one seed: no interval",
    )  # fmt: skip
    assert tables.difference(done("a", 0.1), "b", "a") is None


def test_the_same_command_does_nothing_again_and_more_seeds_only_those(finished, start, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("result.json")}
    assert start("lrn", finished, "--seeds=1,2") == 0
    assert "compiled" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("result.json")} == before
    assert start("lrn", finished, "--seeds=3", "--variants=with_lrn") == 0
    assert [row["n"] for row in rows(finished / "table.csv")] == ["3", "2"]


def test_a_run_that_was_stopped_goes_on_where_it_was(start, run, tmp_path, capsys):
    """As if the first run had been stopped after a step, and its result not written."""
    place = tmp_path / "with_lrn" / "1"
    assert run(place, "--config.seed=1", "--config.train.num_steps=1") == 0
    assert start("lrn", tmp_path, "--seeds=1", "--variants=with_lrn") == 0
    assert "going on from step 1" in capsys.readouterr().out
    assert json.loads((place / "result.json").read_text())["train"]["step"] == 12


def test_the_rate_of_the_lowest_training_error_is_taken(start, tmp_path, monkeypatch, capsys):
    """Of two that train and one that ends in infinity; the error is the last epoch's mean."""
    search = Study("?", {"only": {}}, {}, rates=(1e-9, 0.01, 1e6), search_epochs=2.0)
    monkeypatch.setitem(STUDIES, "search", search)
    assert start("search", tmp_path, "--seeds=5") == 0
    said = capsys.readouterr()
    assert "not finite" in said.err
    errors = {}
    for rate in ("1e-09", "0.01"):
        lines = (tmp_path / "only" / f"rate_{rate}" / "metrics.jsonl").read_text().splitlines()
        steps = [r["top1_error"] for r in map(json.loads, lines) if r["split"] == "train"]
        errors[rate] = sum(steps[6:]) / 6  # 48 images are 6 batches
        assert f"{rate}: {errors[rate]:.2%}" in said.out
    best = min(errors, key=lambda rate: errors[rate])
    assert f"taken: {best}" in said.out
    config = json.loads((tmp_path / "only" / "5" / "config.json").read_text())
    assert (config["seed"], config["optim"]["learning_rate"]) == (5, float(best))


def test_a_search_whose_errors_are_lost_is_named(start, tmp_path, monkeypatch, capsys):
    search = Study("?", {"only": {}}, {}, rates=(0.01,), search_epochs=1.0)
    monkeypatch.setitem(STUDIES, "search", search)
    assert start("search", tmp_path, "--config.train.num_steps=1") == 0
    (tmp_path / "only" / "rate_0.01" / "metrics.jsonl").unlink()
    capsys.readouterr()
    assert start("search", tmp_path, "--config.train.num_steps=1") == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert f"{tmp_path / 'only' / 'rate_0.01'} is trained, but its metrics.jsonl is lost" in line


def test_where_a_step_is_longer_than_an_epoch_rates_are_compared_by_the_last(
    start, tmp_path, monkeypatch, capsys
):
    """A batch of 96 is two epochs of 48 images, and counts for the first of them."""
    search = Study("?", {"only": {}}, {}, rates=(1e-9, 0.01), search_epochs=4)
    monkeypatch.setitem(STUDIES, "search", search)
    flags = ["--config.train.batch_size=96", "--config.train.num_steps=1"]
    assert start("search", tmp_path, *flags) == 0
    said = capsys.readouterr().out
    for rate in ("1e-09", "0.01"):
        lines = (tmp_path / "only" / f"rate_{rate}" / "metrics.jsonl").read_text().splitlines()
        *_, last = (r for r in map(json.loads, lines) if r["split"] == "train")
        assert (last["step"], last["epoch"]) == (2, 4)
        assert f"{rate}: {last['top1_error']:.2%}" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.train.num_steps=3"], ["train.num_steps: 12 -> 3"]),
        (["--config.eval.num_crops=10"], ["eval.num_crops: 1 -> 10"]),
        (["--config.eval.split=train"], ["eval.split: 'validation' -> 'train'"]),
        (["--config.optim.momentum=0.5"], ["optim.momentum: 0.9 -> 0.5"]),
    ],
)
def test_runs_with_other_settings_do_not_join_the_table(flags, words, finished, start, capsys):
    assert start("lrn", finished, "--seeds=9", *flags) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in [*words, "choose another --workdir"])
    assert not (finished / "with_lrn" / "9").exists()


def test_runs_from_other_weights_do_not_join_the_table(finished, start, trained, capsys):
    assert start("lrn", finished, "--seeds=9", f"--config.train.init_from={trained}") == 2
    assert f"train.init_from: '' -> '{trained}'" in capsys.readouterr().err


def test_a_study_of_epochs_to_an_error_goes_on_where_it_is_made_longer(
    start, tmp_path, monkeypatch
):
    monkeypatch.setitem(STUDIES, "race", Study("?", {"only": {}}, {}, target_error=0.001))
    for steps in (2, 4):
        assert start("race", tmp_path, f"--config.train.num_steps={steps}") == 0
        result = json.loads((tmp_path / "only" / "42" / "result.json").read_text())
        assert result["train"]["step"] == steps


def test_runs_of_more_images_do_not_join_the_table(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "more")
    path = tmp_path / "more/with_lrn/2" / tables.RESULT
    result = json.loads(path.read_text())
    result["train"]["num_examples"] += 12
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"48 with 15 and 60 with 15 .* do not belong in one table"):
        tables.read_runs(tmp_path / "more", STUDIES["lrn"])


def test_another_study_does_not_join_the_table(finished, start, capsys):
    assert start("overlap", finished, "--config.model.input_size=64") == 2
    assert "holds study 'lrn'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        (
            "overlap",
            ["--config.model.input_size=112"],
            ["(3, 3, 16)", "(2, 2, 16)", "224, 128, 64"],
        ),
        ("lrn", ["--seeds=1,4294967296"], ["seed=4294967296", "below 2**32"]),
        ("activation", ["--config.model.net=cifar"], ["model.towers=2", "preset=cifar"]),
        ("lrn", FIGURE1, ["model.lrn=False", "nothing of that"]),
        ("augmentation", FIGURE1, ["variants all and centre_crops are the same"]),
        ("lrn", ["--config.model.preset=owt"], ["variants with_lrn and without_lrn are the same"]),
        ("dropout", ["--config.model.dropout_rate=0"], ["dropout and no_dropout are the same"]),
        ("lrn", ["--config.train.batch_size=7", "--config.train.accumulation_steps=2"], ["7"]),
        ("lrn", ["--config.train.init_from=/nowhere"], ["/nowhere", "holds no checkpoints"]),
    ],
)
def test_a_study_of_which_one_run_cannot_be_is_refused_before_any(
    name, flags, words, start, tmp_path, capsys
):
    workdir = tmp_path / "study"
    assert start(name, workdir, *flags) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not workdir.exists()


def test_a_variant_that_a_trained_net_does_not_fit_is_refused_before_any(
    start, trained, tmp_path, capsys
):
    assert start("depth", tmp_path / "study", f"--config.train.init_from={trained}") == 2
    assert f" of {trained} has a kernel of " in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("sign", ["config.json", "result.json", "lock"])
def test_a_folder_in_which_nothing_was_trained_takes_other_settings(
    sign, start, tmp_path, monkeypatch, capsys
):
    """And none in which something was, is, or is being begun."""
    monkeypatch.setattr(command.loop, "train", lambda *_: 15)
    for momentum in (0.8, 0.7):
        assert start("lrn", tmp_path, f"--config.optim.momentum={momentum}") == 128 + 15
        claimed = json.loads((tmp_path / "study.json").read_text())
        assert claimed["config"]["optim"]["momentum"] == momentum
    (tmp_path / "with_lrn" / "42").mkdir(parents=True)
    (tmp_path / "with_lrn" / "42" / sign).write_text("process 7 on a host, beat 000000003")
    assert start("lrn", tmp_path, "--config.optim.momentum=0.6") == 2
    assert "optim.momentum: 0.7 -> 0.6" in capsys.readouterr().err


def test_only_variants_to_be_trained_need_fit_the_net_they_start_from(
    start, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(command.loop, "train", lambda *_: 15)
    begun = f"--config.train.init_from={trained}"
    assert start("depth", tmp_path / "study", begun, "--variants=all_layers") == 128 + 15


def test_a_signal_that_comes_when_a_run_is_done_stops_the_study(start, tmp_path, monkeypatch):
    begun = []

    def train(config, directory, job) -> int:
        begun.append(directory)
        job.stop(15)
        return 0

    monkeypatch.setattr(command.loop, "train", train)
    assert start("lrn", tmp_path / "study") == 128 + 15
    assert len(begun) == 1


def test_variants_that_are_the_same_are_refused(start, tmp_path, monkeypatch, capsys):
    same = Study("?", {"one": {"model.lrn": True}, "two": {"model.lrn": True}}, {})
    monkeypatch.setitem(STUDIES, "same", same)
    assert start("same", tmp_path / "study") == 2
    assert "variants one and two are the same" in capsys.readouterr().err


def test_the_runs_of_a_study_are_watched(start, tmp_path, monkeypatch):
    watched = []

    def train(config, directory, job) -> int:
        watched.append((job.step_timeout, [thread.is_alive() for thread in job.threads]))
        return 15

    monkeypatch.setattr(command.loop, "train", train)
    assert start("lrn", tmp_path / "study", "--config.mesh.step_timeout=77") == 128 + 15
    assert watched == [(77.0, [True])]


def test_what_must_be_said_before_jax_starts_is_said(start, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    said = []

    def train(config, directory, job) -> int:
        said.append(os.environ["XLA_FLAGS"])
        return 15

    monkeypatch.setattr(command.loop, "train", train)
    assert start("lrn", tmp_path / "study", "--config.train.deterministic=True") == 128 + 15
    assert said == ["--xla_gpu_deterministic_ops=true"]


def test_a_run_that_diverges_is_told_at_the_end_and_the_others_are_made(
    start, tmp_path, monkeypatch, capsys
):
    wild = Study("?", {"wild": {"optim.learning_rate": 1e9}, "calm": {}}, {})
    monkeypatch.setitem(STUDIES, "wild", wild)
    assert start("wild", tmp_path, "--seeds=1", "--config.train.num_steps=4") == 1
    assert "failed: wild, seed 1: step" in capsys.readouterr().err
    assert [(row["variant"], row["n"]) for row in rows(tmp_path / "table.csv")] == [("calm", "1")]


def test_a_study_at_none_of_whose_rates_training_goes_on_has_failed(
    start, tmp_path, monkeypatch, capsys
):
    wild = Study("?", {"one": {}, "other": {"seed": 1}}, {}, rates=(1e30, 1e31))
    monkeypatch.setitem(STUDIES, "wild", wild)
    assert start("wild", tmp_path) == 1
    assert "one: at none of the learning rates (1e+30, 1e+31)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"), [("", "is damaged"), ("[1]", "is damaged"), ("{}", "lacks '")]
)
@pytest.mark.parametrize("name", ["study.json", "with_lrn/1/result.json"])
def test_a_damaged_file_of_a_study_is_named_and_made_anew(
    name, text, words, finished, start, tmp_path, capsys
):
    shutil.copytree(finished, tmp_path / "study")
    (tmp_path / "study" / name).write_text(text)
    again = "lrn", tmp_path / "study", "--seeds=1", "--variants=with_lrn"
    assert start(*again) == 2
    assert f"{name} {words}" in capsys.readouterr().err
    (tmp_path / "study" / name).unlink()
    assert start(*again) == 0
    assert (tmp_path / "study" / name).read_bytes() == (finished / name).read_bytes()


def test_a_record_counts_for_the_epoch_it_begins_in(tmp_path):
    """487 images in batches of 128: epochs end within steps 4, 8 and 12, at 1.05, 2.10, 3.15."""
    logged = {1: 0.9, 4: 0.6, 6: 0.5, 8: 0.3, 12: 0.2}
    lines = [
        {"step": n, "epoch": n * 128 / 487, "split": "train", "loss": 1.0, "top1_error": error}
        | {"learning_rate": 0.1}
        for n, error in logged.items()
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = report.training_by_epoch(tmp_path)
    errors = [values["top1_error"] for values in found.values()]
    assert list(found) == [1, 2, 3]
    assert errors == pytest.approx([(0.9 + 3 * 0.6) / 4, (2 * 0.5 + 2 * 0.3) / 4, 0.2])


def written(workdir: pathlib.Path, errors: list[float], steps_an_epoch: int = 2) -> pathlib.Path:
    """A metrics.jsonl of training records at every step, an error an epoch."""
    lines = []
    for epoch, error in enumerate(errors):
        for step in range(1, steps_an_epoch + 1):
            place = epoch * steps_an_epoch + step
            wave = 0.02 if step % 2 else -0.02  # evens out over the epoch
            line = {"step": place, "epoch": place / steps_an_epoch, "split": "train", "loss": 1.0}
            lines.append(line | {"top1_error": error + wave, "learning_rate": 0.1})
        lines.append({"step": place, "epoch": epoch + 1, "split": "validation", "top1_error": 0.0,
                      "num_examples": 2})  # fmt: skip
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


@pytest.mark.parametrize(
    ("errors", "epochs"),
    [
        ([0.5, 0.3, 0.2], 2.5),  # halfway from .3 to .2
        ([0.5, 0.25, 0.2], 2.0),
        ([0.2, 0.1], 1.0),
        ([0.5, 0.4], None),
        ([0.5, 0.3, 0.2, 0.4, 0.1], 2.5),  # the first time counts
    ],
)
def test_epochs_to_a_training_error_are_read_off_the_curve(errors, epochs, tmp_path):
    found = tables.epochs_to(written(tmp_path, errors), 0.25)
    assert found == (pytest.approx(epochs) if epochs else None)


def test_the_table_of_figure_1_has_the_epochs_to_its_target(tmp_path):
    """ReLU reaches 25 % halfway from 30 to 20, tanh does so an epoch later: 3.5 / 2.5."""
    passes = {split: {"split": split, "top1_error": 0.2, "top5_error": 0.1, "loss": 1.0,
                      "num_examples": 50} for split in ("train", "validation")}  # fmt: skip
    for name, errors in (("relu", [0.5, 0.3, 0.2]), ("tanh", [0.5, 0.4, 0.3, 0.2])):
        for seed in (1, 2):
            place = written(tmp_path / name / str(seed), errors)
            result = {"seed": seed, "config": {"optim": {"learning_rate": 0.003}}, **passes}
            (place / tables.RESULT).write_text(json.dumps(result))
    tables.write(tmp_path, "figure1")
    lines = (tmp_path / "table.md").read_text().splitlines()
    head, _, relu, tanh = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"
    )
    assert len(head) == len(relu) == len(tanh)
    found = dict(zip(head, relu)), dict(zip(head, tanh))
    assert [row["epochs to 25%"] for row in found] == ["2.50", "3.50"]
    assert [row["rate"] for row in found] == ["0.003", "0.003"]
    assert "1.40 times the epochs" in lines[-1]
    assert [row["epochs_to_target"] for row in rows(tmp_path / "runs.csv")] == [
        "2.5",
        "2.5",
        "3.5",
        "3.5",
    ]
    written(tmp_path / "tanh" / "2", [0.5, 0.4, 0.3])
    tables.write(tmp_path, "figure1")
    assert "| by 1 of 2 | 0.003 |" in (tmp_path / "table.md").read_text()


def test_an_epoch_that_is_not_over_does_not_count(tmp_path):
    written(tmp_path, [0.5, 0.1])
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]))  # the second epoch's first step is the last
    assert tables.epochs_to(tmp_path, 0.25) is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--study=lnr"], ["lnr", "must be one of", "lrn"]),
        (["--study=lrn", "--variants=with"], ["with", "with_lrn, without_lrn"]),
        (["--study=lrn", "--seeds=1,two"], ["two", "whole numbers"]),
        (["--study=lrn", "--config.model.widht=1"], ["widht", "nearest is", "width"]),
        (["--study=lrn", "word"], ["word", "--name=value"]),
    ],
)
def test_a_users_mistake_is_one_line_and_nothing_is_written(
    flags, words, config_file, tmp_path, capsys
):
    workdir = tmp_path / "study"
    arguments = ["study", f"--config={config_file}", f"--workdir={workdir}", *flags]
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words)
    assert not workdir.exists()


def test_a_variant_above_the_parameter_limit_is_refused_before_any_is_trained(
    start, tmp_path, capsys
):
    """pool5 in steps of 1 has 4 x 4 places, so that fc6 is the largest layer but fc7."""
    workdir = tmp_path / "study"
    flags = ["--config.model.input_size=100", "--config.train.max_parameters=130000"]
    assert start("pool_stride", workdir, *flags) == 2
    error = capsys.readouterr().err
    convolutions = (
        (363 * 6 + 6) + (75 * 16 + 16) + (144 * 24 + 24) + (108 * 24 + 24 + 108 * 16 + 16)
    )
    connected = [
        (places * 16 * 256 + 256) + (256 * 256 + 256) + (256 * 3 + 3) for places in (9, 16)
    ]
    assert convolutions + connected[0] < 130_000  # steps of 2 alone would pass
    assert f"{convolutions + connected[1]:,} parameters" in error
    assert f"--config.train.max_parameters={convolutions + connected[1]}" in error
    assert not workdir.exists()


@pytest.mark.parametrize("size", STUDIES["overlap"].equal_at)
def test_with_and_without_overlap_the_last_maps_are_alike(size, configured):
    one, other = (
        layers(configured("paper", {**variant, "model.input_size": size}).model, 10)[4]
        for variant in STUDIES["overlap"].variants.values()
    )
    assert one.stage_output == other.stage_output


def test_pool_strides_change_the_last_pool_alone_unless_told_otherwise():
    for name, value in STUDIES["pool_stride"].variants.items():
        assert value["model.pool_strides"][:2] == (2, 2), name
    everywhere = STUDIES["pool_stride_everywhere"].variants.values()
    assert {value["model.pool_strides"] for value in everywhere} == {
        (stride,) * 3 for stride in (1, 2, 3)
    }


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_every_variant_of_every_study_is_a_config_that_resolves(name, configured):
    for settings in STUDIES[name].variants.values():
        preset = settings.get("model.preset", "paper")
        configured(preset, {k: v for k, v in settings.items() if k != "model.preset"})
    assert set(STUDIES[name].paper) <= set(STUDIES[name].variants)
    assert len(STUDIES[name].rates) <= 5
