"""The command, as a user types it: what it prints, writes, refuses and returns."""

import concurrent.futures
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from alexnet_jax import command as shared
from alexnet_jax import loop, report, setup
from alexnet_jax import main as command
from alexnet_jax.checkpoint import Checkpoints, Saver
from alexnet_jax.cluster import Job
from alexnet_jax.data import buffers
from alexnet_jax.errors import FailedError
from alexnet_jax.report import Report
from alexnet_jax.train import state
from alexnet_jax.train.calendar import Calendar

ROOT = pathlib.Path(__file__).parent.parent
CLASSES = ("cat", "dog", "owl")


def records(workdir: pathlib.Path, split: str) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def final_state(workdir: pathlib.Path, step: int | None = None) -> state.TrainState:
    checkpoints = Checkpoints(workdir / "checkpoints")
    step = step or checkpoints.steps()[-1]
    return checkpoints.read_state(step, checkpoints.read_meta(step))


def steps(workdir: pathlib.Path) -> list[int]:
    return Checkpoints(workdir / "checkpoints").steps()


def errors(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def assert_equal(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_training_writes_what_the_contract_names(trained):
    assert (trained / "labels.txt").read_text().split() == list(CLASSES)
    assert json.loads((trained / "config.json").read_text())["model"]["num_classes"] == 3
    assert list((trained / "tensorboard").glob("events.out.tfevents.*"))
    train = records(trained, "train")
    assert [record["step"] for record in train] == [1, 2, 3, 4, 5, 6]
    for record in train:
        assert 0 <= record["top1_error"] <= 1
        assert record["top5_error"] == 0  # of three classes: top-3
        assert record["images_per_second"] > 0
        assert record["learning_rate"] == pytest.approx(0.01)
        assert record["epoch"] == pytest.approx(record["step"] * 8 / 48)
    assert abs(train[0]["loss"] - np.log(3)) < 0.5
    (validation,) = records(trained, "validation")
    assert (validation["step"], validation["num_examples"]) == (6, 15)
    assert validation["learning_rate"] == train[-1]["learning_rate"]


def test_the_quickstart_starts_its_two_devices_itself(images, tmp_path):
    """And says how it begins; small, and without images to draw."""
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    small = {
        "data.source": f"folder:{images}", "data.cache_dir": tmp_path / "cache",
        "model.width": 1 / 16, "model.input_size": 36,
        "train.batch_size": 8, "train.num_steps": 1,
    }  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-m", "alexnet_jax.main", "--config=configs/quickstart.py",
         f"--workdir={tmp_path / 'run'}", *(f"--config.{name}={v}" for name, v in small.items())],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "mesh data=1 x model=2" in ended.stdout
    (record,) = records(tmp_path / "run", "train")
    assert (
        f"loss at initialisation {record['loss']:.4f}; a uniform guess has ln(3) = 1.0986"
        in ended.stdout
    )


def test_a_first_step_that_hangs_ends_the_run(run, tmp_path, monkeypatch):
    def hangs(*given):
        ended.wait(60)
        raise FailedError("the step is released")

    def end(job, status, message):
        told.append((status, message))
        ended.set()

    ended, told = threading.Event(), []
    monkeypatch.setattr(command.loop, "_compiled", lambda *given: hangs)
    monkeypatch.setattr(command.cluster.Job, "_end", end)
    assert run(tmp_path, "--config.mesh.step_timeout=0.5") == 1
    status, message = told[0]
    assert status == 1
    assert "no progress for mesh.step_timeout=0.5 s at 'step 1, and the batch after" in message


def test_the_users_cadences_choose_the_records(run, tmp_path):
    """Of three epochs of six steps: the first, every fifth, and the last of each epoch."""
    cadence = ("--config.train.log_every_steps=5", "--config.eval.every_epochs=2")
    assert run(tmp_path, "--config.train.num_steps=18", *cadence) == 0
    assert [record["step"] for record in records(tmp_path, "train")] == [1, 5, 6, 10, 12, 15, 18]
    assert [record["step"] for record in records(tmp_path, "validation")] == [12, 18]


def test_the_split_net_is_inspected_as_published_and_as_the_readme_shows(capsys, monkeypatch):
    """Counts and bytes of the reference, sections 4 and 10; half of 1000 logits, 4 bytes each."""
    monkeypatch.chdir(ROOT)
    arguments = ["main", "--config=configs/alexnet.py", "--mode=inspect"]
    assert command.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sent = {row["name"]: row["exchanged_bytes"] for row in found["layers"]}
    both = {"conv3": 86_528, "fc6": 18_432, "fc7": 8_192, "fc8": 8_192}
    assert sent == dict.fromkeys(("conv1", "conv2", "conv4", "conv5"), 0) | both
    assert found["logits"] == {"exchanged_bytes": 2_000}
    assert found["totals"] == {
        "parameters": 60_965_224, "multiply_adds": 724_406_816, "neurons": 659_272,
        "exchanged_bytes": 123_344,
    }  # fmt: skip
    assert found["collectives"] == {"model": {"all-gather": 5, "reduce-scatter": 5}}
    assert (found["preset"], found["num_classes"]) == ("paper", 1000)
    assert found["mesh"] == {"data": 1, "model": 2}

    assert command.main(arguments) == 0
    said = f"```\n$ python -m alexnet_jax.{' '.join(arguments)}\n{capsys.readouterr().out}```\n"
    assert said in (ROOT / "README.md").read_text()


def test_evaluation_repeats_the_validation_on_other_devices(trained, run, capsys):
    (validation,) = records(trained, "validation")
    for mesh in ("--config.mesh.model=1", "--config.mesh.model=2"):
        assert run(trained, "--mode=eval", mesh, "--config.eval.batch_size=4") == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["split"] == "validation"
        assert (found["num_examples"], found["num_crops"], found["step"]) == (15, 1, 6)
        assert found["loss"] == pytest.approx(validation["loss"], rel=1e-5)
        assert found["top1_error"] == validation["top1_error"]


def test_ten_crops_of_the_training_split_are_evaluated_too(trained, run, capsys):
    arguments = ("--mode=eval", "--config.eval.num_crops=10", "--config.eval.split=train")
    assert run(trained, *arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["num_examples"], found["num_crops"], found["split"]) == (48, 10, "train")
    assert np.isfinite(found["loss"])


@pytest.mark.parametrize("setting", ["JAX_ENABLE_X64=1", "JAX_DEFAULT_PRNG_IMPL=rbg"])
def test_a_run_is_the_same_whatever_numbers_and_keys_jax_makes_by_default(
    setting, trained, run, tmp_path
):
    name, value = setting.lower().split("=")
    before = getattr(jax.config, name)
    jax.config.update(name, type(before)(value))
    try:
        assert run(tmp_path, "--config.train.num_steps=6") == 0
    finally:
        jax.config.update(name, before)
    assert_equal(final_state(tmp_path), final_state(trained))


def test_evaluation_uses_the_devices_there_are(trained, run, capsys):
    assert run(trained, "--mode=eval", "--config.mesh.model=2", "--config.mesh.data=64") == 0
    out, said = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["num_examples"] == 15
    assert "mesh.data=64 takes 128 devices" in said
    assert "until then all devices share the batch" in said


def test_a_run_in_two_parts_is_the_undisturbed_run_bit_for_bit(trained, run, tmp_path):
    assert run(tmp_path, "--config.train.num_steps=4", "--config.checkpoint.every_steps=2") == 0
    assert run(tmp_path, "--config.train.num_steps=6") == 0
    assert_equal(final_state(tmp_path), final_state(trained))
    keys = ("step", "loss", "top1_error", "gradient_norm")
    straight = [[record[key] for key in keys] for record in records(trained, "train")]
    assert [[record[key] for key in keys] for record in records(tmp_path, "train")] == straight


def test_a_run_goes_on_on_another_mesh(trained, run, tmp_path):
    mesh = ("--config.mesh.model=2", "--config.mesh.data=2")
    assert run(tmp_path, "--config.train.num_steps=3", *mesh) == 0
    assert run(tmp_path, "--config.train.num_steps=6") == 0
    pairs = zip(records(tmp_path, "train"), records(trained, "train"), strict=True)
    for found, expected in pairs:
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert {record["step"] for record in records(tmp_path, "train")} == {1, 2, 3, 4, 5, 6}


def test_a_finished_run_started_again_does_nothing(trained, run, capsys):
    before = (trained / "metrics.jsonl").read_text()
    assert run(trained) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (trained / "metrics.jsonl").read_text() == before


def test_records_after_the_restored_step_are_taken_out(run, tmp_path):
    assert run(tmp_path, "--config.train.num_steps=2") == 0
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "epoch": 0.5, "split": "train", "loss": 9.0}\n{"step": 4, "ep')
    assert run(tmp_path, "--config.train.num_steps=3") == 0
    assert [record["step"] for record in records(tmp_path, "train")] == [1, 2, 3]
    assert records(tmp_path, "train")[-1]["loss"] < 9


STOPPED = "stopped; the same command goes on from what was saved, or starts again"

IMPORTING = """
import os, runpy, signal, sys

class CtrlC:
    def find_spec(self, name, path, target=None):
        if name == "jax":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs behind a shell ignores it
sys.meta_path.insert(0, CtrlC())
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("name", ["main", "study", "prepare"])
def test_ctrl_c_ends_a_command_that_is_still_importing_jax(name):
    command = [sys.executable, "-c", IMPORTING, f"alexnet_jax.{name}", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


LOST = """
import gc, signal, sys, time
from alexnet_jax import command

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs behind a shell ignores it

def lose(phase, found):
    gc.callbacks.remove(lose)
    raise KeyboardInterrupt  # Python drops it

def work():
    gc.callbacks.append(lose)
    gc.collect()
    time.sleep(20)
    return 0

sys.exit(command.status(work))
"""


FIRST = """
import os, signal, sys, time
from alexnet_jax import command

def work():
    signal.raise_signal(signal.SIGTERM)
    time.sleep(20)
    return 0

os.getpid = lambda: 1
sys.exit(command.status(work))
"""


def test_the_first_process_of_a_container_listens_to_sigterm():
    """Which the kernel drops where there is no handler; elsewhere it ends Python at once."""
    ended = subprocess.run(
        [sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=50
    )
    assert ended.returncode == 143
    assert (
        ended.stderr == "stopped; the same command goes on from what was saved, or starts again\n"
    )


def test_a_ctrl_c_that_python_drops_comes_again():
    """JAX has such a callback of the garbage collector's."""
    ended = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 130
    assert (
        ended.stderr == "stopped; the same command goes on from what was saved, or starts again\n"
    )


LEFT = """
import atexit, sys
from alexnet_jax import cluster, command

def work():
    atexit.register(print, "shut down")
    print("last words")
    if sys.argv[1] == "stopped":
        raise KeyboardInterrupt
    return int(sys.argv[1])

cluster.leave(command.status(work))
"""


@pytest.mark.parametrize(
    ("how", "status", "shut"), [("stopped", 130, ""), ("143", 143, ""), ("0", 0, "shut down\n")]
)
def test_a_command_that_was_stopped_ends_without_pythons_shutdown(how, status, shut):
    """In which XLA crashes, if it is still compiling."""
    command = [sys.executable, "-c", LEFT, how]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout) == (status, f"last words\n{shut}")


@pytest.mark.parametrize("how", ["stopped", "143", "0"])
def test_a_command_ends_alike_where_its_output_is_closed(how):
    line = shlex.join([sys.executable, "-c", LEFT, how])
    ended = subprocess.run(["sh", "-c", f"{line} >&-"], stderr=subprocess.PIPE, timeout=50)
    assert ended.returncode == {"stopped": 130}.get(how, int(how) if how.isdecimal() else 0)
    assert b"Traceback" not in ended.stderr


def test_which_checkpoints_are_whole_all_ranks_ask_the_first(run, tmp_path, monkeypatch):
    asked, made = [], setup.Saver
    monkeypatch.setattr(setup, "Saver", lambda *given: asked.append(given[1]) or made(*given))
    assert run(tmp_path, "--config.train.num_steps=1") == 0
    assert [ask.__func__ for ask in asked] == [Job.broadcast]


def test_a_pipe_that_breaks_elsewhere_is_told(capsys):
    def work():
        raise BrokenPipeError(32, "Broken pipe")

    assert shared.status(work) == 1
    assert capsys.readouterr().err == "error: [Errno 32] Broken pipe\n"


def test_compiled_programs_are_kept_in_the_cache_unless_jax_was_told_another_place(
    trained, run, tmp_path, monkeypatch
):
    told = jax.config.jax_compilation_cache_dir
    place = f"--config.data.cache_dir={tmp_path}"
    assert run(trained, "--mode=eval", place) == 0
    assert jax.config.jax_compilation_cache_dir == told
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()  # JAX opens it once
        jax.clear_caches()
        assert run(trained, "--mode=eval", place) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", told)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        compilation_cache.reset_cache()
    assert list((tmp_path / "compiled").glob("jit_step-*"))
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "compiled")  # for workers


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
def test_a_signal_at_any_moment_of_a_step_saves_before_it_ends_and_a_second_ends_at_once(
    number, status, times, run, tmp_path, monkeypatch
):
    record, handler = Report.record, signal.getsignal(number)

    def interrupted(self, split, step, *rest):
        record(self, split, step, *rest)
        if step == 2:  # after the step has looked for signals: the next one saves
            for _ in range(times):
                signal.raise_signal(number)

    monkeypatch.setattr(Report, "record", interrupted)
    assert run(tmp_path) == status
    assert steps(tmp_path) == ([3] if times == 1 else [])
    assert signal.getsignal(number) == handler


def test_ctrl_c_saves_also_where_it_ends_who_reads_what_is_said(config_file, trained, tmp_path):
    """As in `... 2>&1 | tee log`."""
    line = [sys.executable, "-m", "alexnet_jax.main", f"--config={config_file}"]
    line += [f"--workdir={tmp_path}", "--config.train.num_steps=100000"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    while "step 2/" not in (said := process.stdout.readline()):
        assert said
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert len(steps(tmp_path)) == 1


@pytest.mark.parametrize(
    ("rate", "words"), [("1e15", "validation loss"), ("1e30", "update is not finite in conv1")]
)
def test_parameters_that_the_last_update_ruined_are_not_saved(rate, words, run, tmp_path, capsys):
    ruin = (f"--config.optim.learning_rate={rate}", "--config.train.num_steps=1")
    assert run(tmp_path, *ruin) == 1
    assert words in capsys.readouterr().err
    assert steps(tmp_path) == []


def test_while_training_no_batch_of_other_processes_is_copied(run, tmp_path, monkeypatch):
    """Each stays in the memory it was made in, of which there is enough for all under way."""
    held, take = [], buffers.Slots.take
    slow = ("--config.model.width=0.5", "--config.train.num_steps=24")
    silent = "--config.train.log_every_steps=6"

    def counted(slots, number):
        held.append(np.count_nonzero(slots.owner == buffers.HELD))
        return take(slots, number)

    monkeypatch.setattr(buffers.Slots, "take", counted)
    assert run(tmp_path, "--config.data.worker_kind=processes", silent, *slow) == 0
    assert len(held) > 24  # of training and validation
    assert max(held) < buffers.LENT


def test_training_in_a_thread_which_signals_do_not_reach(run, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert pool.submit(run, tmp_path, "--config.train.num_steps=1").result() == 0
    assert steps(tmp_path) == [1]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_loss_that_is_not_finite_ends_with_status_1_and_keeps_the_good_checkpoint(
    run, tmp_path, capsys
):
    assert run(tmp_path, "--config.train.num_steps=2") == 0
    good = final_state(tmp_path)
    change = ("--config.optim.learning_rate=1e30", "--allow_config_change")
    assert run(tmp_path, *change) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: step ")
    assert "learning_rate" in error
    assert_equal(final_state(tmp_path), good)


def test_another_model_is_refused_and_other_settings_need_a_flag(trained, run, capsys):
    assert run(trained, "--config.model.width=0.125") == 2
    assert "model.width: 0.0625 -> 0.125" in capsys.readouterr().err
    assert run(trained, "--config.seed=7", "--config.optim.momentum=0.5") == 2
    error = capsys.readouterr().err
    assert "seed: 42 -> 7" in error
    assert "optim.momentum: 0.9 -> 0.5" in error
    assert "--allow_config_change" in error
    assert run(trained, "--config.seed=7", "--allow_config_change") == 0
    assert "going on with changed settings: seed: 42 -> 7\n" in capsys.readouterr().err
    assert run(trained, "--config.seed=42", "--allow_config_change") == 0


@pytest.mark.parametrize("size", [4, 16, 24])
def test_a_run_goes_on_where_it_was_with_another_batch_size(size, run, tmp_path):
    """48 images: six steps of eight are an epoch; the second begins with the changed size."""
    assert run(tmp_path, "--config.train.num_epochs=1", "--config.train.num_steps=0") == 0
    assert records(tmp_path, "train")[-1]["epoch"] == 1
    changed = ("--config.train.num_steps=0", f"--config.train.batch_size={size}")
    changed += ("--config.train.num_epochs=2", "--config.eval.batch_size=8")
    assert run(tmp_path, *changed) == 2
    assert run(tmp_path, *changed, "--allow_config_change") == 0
    found = {record["step"]: record["epoch"] for record in records(tmp_path, "train")}
    assert found == {
        step: pytest.approx(step / 6 if step <= 6 else 1 + (step - 6) * size / 48)
        for step in range(1, 7 + 48 // size)
    }
    assert [record["epoch"] for record in records(tmp_path, "validation")] == [1, 2]
    assert run(tmp_path, *changed) == 0  # once changed, it is the run's own
    back = ("--config.train.num_steps=0", "--config.train.num_epochs=2.5")
    assert run(tmp_path, *back, "--allow_config_change") == 0
    assert records(tmp_path, "train")[-1]["epoch"] == 2.5


def test_the_plateau_drops_the_rate_after_its_pass_and_a_restart_remembers(run, tmp_path):
    """At a rate so small that the loss changes and no error does: the pass at 6 stays the best."""
    schedule = ("--config.optim.schedule=plateau", "--config.optim.learning_rate=1e-3")
    schedule += ("--config.optim.plateau_patience=1", "--config.optim.plateau_min_delta=1e-9")
    assert run(tmp_path, "--config.train.num_steps=14", *schedule) == 0
    assert run(tmp_path, "--config.train.num_steps=20", *schedule) == 0
    passes = records(tmp_path, "validation")
    assert len({record["top1_error"] for record in passes}) == 1
    assert passes[1]["loss"] < passes[0]["loss"] - 0.005  # which is no reason to wait
    rates = {record["step"]: record["learning_rate"] for record in records(tmp_path, "train")}
    # Step 14 is the last of the first run, and so has a pass of its own.
    expected = {step: 1e-3 if step <= 12 else 1e-4 if step <= 14 else 1e-5 for step in range(1, 19)}
    expected |= {19: 1e-6, 20: 1e-6}
    assert rates == pytest.approx(expected)


# No pass after the first can improve by 1, so each of them, at steps 12 and 18, has a drop due.
HOPELESS = ("--config.optim.plateau_patience=1", "--config.optim.plateau_min_delta=1.0")


def test_no_drops_are_counted_for_a_plateau_that_is_chosen_later(run, tmp_path):
    cosine = ("--config.optim.schedule=cosine", "--config.train.num_steps=18", *HOPELESS)
    assert run(tmp_path, *cosine) == 0
    plateau = ("--config.optim.schedule=plateau", "--config.optim.learning_rate=1e-3", *HOPELESS)
    assert run(tmp_path, *plateau, "--config.train.num_steps=20", "--allow_config_change") == 0
    assert records(tmp_path, "train")[-1]["learning_rate"] == pytest.approx(1e-3)


def test_an_epochs_mean_does_not_depend_on_how_often_is_logged(run, tmp_path):
    """Six steps an epoch; records of several epochs would be counted for the first of them."""
    found = {}
    for often in (1, 20):
        workdir = tmp_path / str(often)
        cadence = (f"--config.train.log_every_steps={often}", "--config.eval.every_epochs=3")
        assert run(workdir, "--config.train.num_steps=18", *cadence) == 0
        found[often] = report.training_by_epoch(workdir)
    each = records(tmp_path / "1", "train")
    assert len(each) == 18
    for epoch in (1, 2, 3):
        losses = [record["loss"] for record in each[6 * epoch - 6 : 6 * epoch]]
        for often in (1, 20):
            assert found[often][epoch]["loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_a_ruined_net_is_not_evaluated_and_an_older_checkpoint_goes_on(
    run, images, tmp_path, capsys
):
    ruin = ("--config.checkpoint.every_steps=1", "--config.optim.learning_rate=1e9")
    assert run(tmp_path, "--config.train.num_steps=1", "--config.optim.learning_rate=1e-4") == 0
    assert run(tmp_path, "--config.train.num_steps=5", *ruin, "--allow_config_change") == 1
    assert (
        "--allow_config_change, or to take the last checkpoint's folder away" in errors(capsys)[-1]
    )
    (*_, last) = steps(tmp_path)
    assert last > 1
    picture = str(next((images / "val").rglob("*.jpg")))
    for mode in (["--mode=eval"], ["--mode=predict", picture]):
        assert run(tmp_path, *mode) == 1
        printed = capsys.readouterr()
        assert "NaN" not in printed.out
        assert "its training diverged; set --config.checkpoint.step" in printed.err
    for step in steps(tmp_path)[1:]:
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    lower = ("--config.train.num_steps=3", "--config.optim.learning_rate=1e-4")
    assert run(tmp_path, *lower, "--allow_config_change") == 0
    assert run(tmp_path, "--mode=eval") == 0


@pytest.mark.parametrize(("last", "status"), [(12, 143), (6, 0)])
def test_a_signal_amid_a_pass_stops_after_it_unless_all_is_done(
    last, status, run, tmp_path, monkeypatch, capsys
):
    """The pass after step 6; the job of 6 steps is then done."""
    validate = loop.validate.validate

    def interrupted(*arguments):
        if not records(tmp_path, "validation"):
            signal.raise_signal(signal.SIGTERM)
        return validate(*arguments)

    monkeypatch.setattr(loop.validate, "validate", interrupted)
    assert run(tmp_path, f"--config.train.num_steps={last}") == status
    assert steps(tmp_path)[-1] == (7 if status else 6)
    assert len(records(tmp_path, "validation")) == 1
    assert "stopping after this step, or one more if a pass is" in capsys.readouterr().err


@pytest.mark.parametrize(("last", "status"), [(12, 143), (6, 0)])
def test_a_signal_amid_the_last_step_finds_all_done(last, status, run, tmp_path, monkeypatch):
    add = loop.Interval.add

    def interrupted(interval, step, results):
        if step == 6:
            signal.raise_signal(signal.SIGTERM)
        add(interval, step, results)

    monkeypatch.setattr(loop.Interval, "add", interrupted)
    assert run(tmp_path, f"--config.train.num_steps={last}") == status
    assert steps(tmp_path)[-1] == 6


def test_a_step_is_not_chosen_for_training(run, tmp_path, capsys):
    assert run(tmp_path, "--config.train.num_steps=1") == 0
    capsys.readouterr()
    assert run(tmp_path, "--config.checkpoint.step=1") == 2
    assert "checkpoint.step=1: training goes on from the newest" in errors(capsys)[-1]


def test_what_an_evaluation_takes_from_the_checkpoint_is_said(trained, run, capsys):
    assert (
        run(trained, "--mode=eval", "--config.model.width=0.5", "--config.data.mean=at_crop") == 0
    )
    (line,) = [line for line in errors(capsys) if line.startswith("of the checkpoint: ")]
    assert re.fullmatch(
        r"of the checkpoint: model.width=[\d.]+, not 0.5; data.mean='central', not 'at_crop'", line
    )
    assert run(trained, "--mode=eval") == 0
    assert "of the checkpoint" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--flagfile=/nonexistent", "flagfile"),
        ("--config.model.pool_windows=(1500,3,3)", "make windows and strides smaller"),
        ("--config.train.batch_size=100000000000000000000", "from 1 to 2**31 - 1"),
        ("--config.train.num_steps=100000000000000000000", "from 0 to 2**31 - 1"),
    ],
)
def test_extreme_values_are_told_in_a_line(flag, words, run, tmp_path, capsys):
    assert run(tmp_path, flag) == 2
    assert words in errors(capsys)[-1]
    assert not steps(tmp_path)


def test_a_platform_that_is_not_there_is_told_in_a_line(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "alexnet_jax.main", "--config=configs/quickstart.py",
         f"--workdir={tmp_path}"],
        env=os.environ | {"JAX_PLATFORMS": "nowhere"}, capture_output=True, text=True, cwd=ROOT,
        timeout=100,
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1].startswith("error: JAX_PLATFORMS=nowhere: JAX cannot")


def test_without_a_terminal_for_errors_a_run_goes_on(config_file, tmp_path):
    flags = [f"--config={config_file}", f"--workdir={tmp_path}", "--config.train.num_steps=2"]
    command = shlex.join([sys.executable, "-m", "alexnet_jax.main", *flags])
    assert subprocess.run(["sh", "-c", f"{command} 2>&-"], timeout=100).returncode == 0
    assert records(tmp_path, "validation")


def test_the_plateau_leaves_other_schedules_alone(run, tmp_path):
    schedule = ("--config.optim.schedule=cosine", *HOPELESS)
    assert run(tmp_path, "--config.train.num_steps=20", *schedule) == 0
    for record in records(tmp_path, "train"):
        turn = (record["step"] - 1) / 20  # the rate is that of the steps done before
        rate = 0.005 * (1 + np.cos(np.pi * turn))
        assert record["learning_rate"] == pytest.approx(rate, rel=1e-4)  # float32 near -1


def test_other_classes_are_refused(trained, run, images, tmp_path, capsys):
    for split in ("train", "val"):
        for old, new in zip(CLASSES, ("ant", "bee", "owl"), strict=True):
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / new).symlink_to(images / split / old)
    source = f"--config.data.source=folder:{tmp_path}"
    for allowed in ([], ["--allow_config_change"]):
        assert run(trained, source, *allowed) == 2
        error = capsys.readouterr().err
        assert f"class 0 is 'ant', in the run in {trained} 'cat'; choose another --workdir" in error
    assert run(trained, source, "--mode=eval") == 2
    error = capsys.readouterr().err
    assert "other classes" in error
    assert f"set data.source to the data the net was trained for, folder:{images}" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=nowhere.py"], ["nowhere.py"]),
        (["--config.model.widht=1"], ["'model.widht'", "nearest is model.width"]),
        (["--config.modle.width=1"], ["'modle.width'", "nearest is model.width"]),
        (["--config.sed=1"], ["'sed'", "nearest is seed"]),
        (["-config.model.prest=half"], ["'model.prest'", "nearest is model.preset"]),
        (["--config.optim.lr=1"], ["'optim.lr'", "nearest is optim.learning_rate"]),
        (["--config.train.bs", "3"], ["'train.bs'", "nearest is train.batch_size"]),
        (["--config.train.lr=1"], ["nearest is optim.learning_rate"]),
        (["--config.train.learning_rates=1"], ["nearest is optim.learning_rate"]),
        (["--config.model.learning_rte=1"], ["nearest is optim.learning_rate"]),
        (["--config.train.momentum_=1"], ["nearest is optim.momentum"]),
        (["--config.data.batch=1"], ["nearest is train.batch_size"]),
        (["--config.model.channels=(96,255,384,384,256)"], ["channels: 255 maps", "2 towers"]),
        (["--config.model.features=(4095,4096)"], ["features: 4095 maps", "2 towers"]),
        (["--process_id=one"], ["--process_id='one': must be a whole number"]),
        (["--config.model.num_epochs=3"], ["nearest is train.num_epochs"]),
        (["--config.train.batch_size.x=3"], ["nearest is train.batch_size"]),
        (["--config.eval=1"], ["config.eval is no field but a section", "eval.num_crops"]),
        (["--config.train.batch_size=many"], ["train.batch_size", "many"]),
        (["--config.seed=1.5"], ["seed", "1.5"]),
        (["--config.optim.momentum=2"], ["optim.momentum=2.0", "below 1"]),
        (["--mode=trian"], ["--mode=trian", "train, eval"]),
        (["--wrkdir=x"], ["wrkdir"]),
        (["stray"], ["stray"]),
        (["--output=x.npz"], ["--output is for --mode=eval and features", "--mode=train"]),
        (["--figure=x.png", "--mode=eval"], ["--figure is for --mode=predict", "--mode=eval"]),
        (["--allow_config_change", "--mode=eval"], ["--allow_config_change is for --mode=train"]),
        (["--config.train.batch_size=6", "--config.mesh.data=4"], ["train.batch_size=6", "4"]),
        (["--config.mesh.data=3", "--config.mesh.model=2"], ["JAX_NUM_CPU_DEVICES=6", "4 (cpu)"]),
        (["--config.model.preset=caffenet", "--config.mesh.model=2"], ["--config.mesh.model=1"]),
        (["--config.model.preset=half", "--config.mesh.model=2"], ["--config.mesh.model=1"]),
        (["--config.model.input_size=20", "--config.mesh.data=1"], ["input_size=20", "36"]),
        (["--config.model.num_classes=4"], ["num_classes=4", "3 classes"]),
        (["--config.train.max_parameters=1000"], ["train.max_parameters=1,000"]),
        (["--config.data.source=folder:/does/not/exist"], ["/does/not/exist", "train/CLASS/*"]),
        (["--config.data.source=tfds:imagenet2012"], ["ILSVRC2012_img_val.tar", "quickstart.py"]),
        (["--config.data.source=folder"], ["data.source='folder'", "folder:PATH"]),
        (["--mode=eval"], ["holds no checkpoint"]),
        (["--mode=eval", "--workdir=a,,b"], ["--workdir=a,,b: a name is missing"]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else None,
)
def test_a_mistake_ends_with_one_clear_line_and_status_2(arguments, words, run, tmp_path, capsys):
    tfds_dir = f"--config.data.tfds_dir={tmp_path / 'tfds'}"
    assert run(tmp_path / "workdir", tfds_dir, *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def command_line(capsys, *arguments: str) -> str:
    """The one line on stderr with which a command ends in status 2."""
    assert command.main(["main", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("data.mirror=maybe", "data.mirror='maybe': must be True or False"),
        ("train.num_steps=many", "train.num_steps='many': must be a whole number"),
        ("train.num_epochs=many", "train.num_epochs='many': must be a finite number"),
        ("model.channels=(1,2", "model.channels='(1,2': must be a list"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_field(flag, words, config_file, capsys):
    said = command_line(capsys, f"--config={config_file}", "--mode=inspect", f"--config.{flag}")
    assert words in said
    assert f"set --config.{flag.partition('=')[0]}=..." in said


def test_a_config_file_that_is_not_there_is_looked_for_where(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = command_line(capsys, "--config=configs/quickstart.py", "--mode=inspect")
    assert f"--config=configs/quickstart.py: no such file or directory in {tmp_path}" in said
    said = command_line(capsys, f"--config={tmp_path}", "--mode=inspect")
    assert f"--config={tmp_path}: is a directory" in said


@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_help_names_every_flag(asked, capsys):
    assert command.main(["main", asked]) == 0
    found = capsys.readouterr().out
    for flag in ("config", "workdir", "mode", "output", "layer", "figure", "json", "coordinator",
                 "num_processes", "process_id", "allow_config_change"):  # fmt: skip
        assert re.search(rf"^ +--(\[no\])?{flag}:", found, re.MULTILINE), flag


def test_a_lack_of_memory_is_told_in_a_line(capsys):
    def work() -> int:
        raise MemoryError("Unable to allocate 9 GiB")

    assert shared.status(work) == 1
    assert capsys.readouterr().err == (
        "error: there is not enough memory (Unable to allocate 9 GiB)\n"
    )


def test_a_lack_of_device_memory_is_told_with_the_way_out_and_no_other_failure_is_taken_for_it(
    capsys,
):
    def fails(words: str) -> int:
        raise jax.errors.JaxRuntimeError(words)

    full = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"
    assert shared.status(lambda: fails(full)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the devices have not enough memory ({full}); more ")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        shared.status(lambda: fails("INTERNAL: a bug"))


def test_a_config_file_that_gives_no_config_is_a_mistake(config_file, tmp_path, capsys):
    workdir = f"--workdir={tmp_path / 'workdir'}"
    assert "nope.py" in command_line(capsys, "--config=configs/nope.py", workdir)
    begun = "from alexnet_jax.config import blank\ndef get_config():\n  c = blank()\n  "
    broken = {
        "def": "line 1: SyntaxError: invalid syntax",
        "x = 1\n1 / 0": "line 2: ZeroDivisionError: division by zero",
        "import os\ndef get_config():\n  os.environ['NOT_SET']": "line 3: KeyError: NOT_SET",
        "import os\ndef get_config():\n  os.getenvv()": "line 3: AttributeError: module 'os'",
        f"{begun}c.train.batch_size = 'many'": "line 4: TypeError: Could not override",
        f"{begun}c.seed + 'x'": "line 4: TypeError: unsupported operand",
    }
    for text, words in broken.items():
        path = tmp_path / "broken.py"
        path.write_text(text)
        assert f"{path}, {words}" in command_line(capsys, f"--config={path}", workdir)
    for text, kind in {
        "c": "NoneType",
        "return c.to_dict()": "dict",
        "from alexnet_jax.config import resolve\n  return resolve(c)": "Config",
        "del c.data\n  return c": "ConfigDict",
    }.items():
        path.write_text(f"{begun}c.unlock()\n  {text}")
        wrong = command_line(capsys, f"--config={path}", workdir)
        assert f"returns no whole config but {kind}; begin it with blank()" in wrong
    path.write_text(f"{begun}import ml_collections\n  return ml_collections.FrozenConfigDict(c)")
    wrong = command_line(capsys, f"--config={path}", workdir)
    assert "returns a FrozenConfigDict; return what blank() gives" in wrong
    wrong = command_line(capsys, f"--config={config_file}:small", workdir)
    assert "no get_config(), or none that takes what follows a colon" in wrong
    path.write_text(f"{begun}c.batch_size = 3")
    wrong = command_line(capsys, f"--config={path}", workdir)
    assert "config field 'batch_size' does not exist; nearest is train.batch_size" in wrong
    assert "--config is missing" in command_line(capsys, workdir)
    assert "--workdir is missing" in command_line(capsys, f"--config={config_file}", "--workdir=")
    assert not (tmp_path / "workdir").exists()


def flipped(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "another content": flipped,
    "bytes, had": lambda path: os.truncate(path, path.stat().st_size // 2),
    "is missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(words, run, tmp_path, capsys):
    """At a rate of nothing the errors stay, so that the first epoch's, step 6, is kept as best."""
    flags = ["--config.train.num_steps=7", "--config.optim.learning_rate=1e-9"]
    assert run(tmp_path, *flags) == 0
    assert steps(tmp_path) == [6, 7]  # of equal errors the earlier is the best
    undisturbed, lines = final_state(tmp_path, 7), records(tmp_path, "train")
    largest = max((tmp_path / "checkpoints" / "7").rglob("d/*"), key=lambda p: p.stat().st_size)
    DAMAGE[words](largest)
    capsys.readouterr()
    assert run(tmp_path, "--mode=eval") == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["step"] == 6
    (warning,) = said.err.strip().splitlines()
    assert "checkpoints/7 IS DAMAGED" in warning
    assert words in warning
    assert run(tmp_path, "--mode=eval", "--config.checkpoint.step=7") == 2
    assert "checkpoints/7 is damaged" in capsys.readouterr().err
    assert run(tmp_path, *flags) == 0
    said = capsys.readouterr()
    assert "IS DAMAGED" in said.err
    assert "going on from step 6" in said.out
    assert steps(tmp_path) == [6, 7]
    assert_equal(final_state(tmp_path, 7), undisturbed)
    again = records(tmp_path, "train")
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]


def test_a_checkpoint_that_was_not_sealed_counts_if_it_can_be_read(run, tmp_path, capsys):
    """As when a run is killed between the two; and does not where it cannot."""
    assert run(tmp_path, "--config.train.num_steps=7", "--config.optim.learning_rate=1e-9") == 0
    folder = tmp_path / "checkpoints" / "7"
    (folder / "sha256.json").unlink()
    assert run(tmp_path, "--mode=eval") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 7
    shutil.rmtree(folder / "params")
    assert run(tmp_path, "--mode=eval") == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["step"] == 6
    assert "was not sealed" in said.err


def test_where_every_checkpoint_is_damaged_nothing_begins_anew(run, tmp_path, capsys):
    assert run(tmp_path, "--config.train.num_steps=2") == 0
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "params")
    capsys.readouterr()
    for mode in ("train", "eval"):
        assert run(tmp_path, f"--mode={mode}") == 2
        warning, error = capsys.readouterr().err.strip().splitlines()
        assert "checkpoints/2 IS DAMAGED" in warning
        assert "all checkpoints of" in error
    assert steps(tmp_path) == [2]


def test_garbage_in_the_workdir_does_no_harm(run, tmp_path):
    assert run(tmp_path, "--config.train.num_steps=2") == 0
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n3\n{"a": 1}\n[]\n')
    assert run(tmp_path, "--config.train.num_steps=3") == 0
    assert [record["step"] for record in records(tmp_path, "train")] == [1, 2, 3]


def test_images_that_came_or_went_are_noticed_before_going_on(run, images, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(images, data)
    source = f"--config.data.source=folder:{data}"
    assert run(tmp_path / "run", source, "--config.train.num_steps=2") == 0
    (data / "train" / "cat" / "00.jpg").unlink()
    assert run(tmp_path / "run", source) == 2
    assert "has 47 training images, and had 48" in capsys.readouterr().err
    assert run(tmp_path / "run", source, "--allow_config_change") == 0


def test_a_workdir_that_cannot_be_written_is_a_mistake(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(tmp_path / "file" / "workdir") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "cannot be written" in line


def test_a_step_that_was_never_saved_is_a_mistake(trained, run, capsys):
    assert run(trained, "--mode=eval", "--config.checkpoint.step=5") == 2
    assert "checkpoint.step=5" in capsys.readouterr().err


def test_the_calendar_ends_an_epoch_at_the_first_step_past_it():
    calendar = Calendar(num_examples=10, batch_size=4, num_steps=9)
    # Steps 3 (12 images), 5 (20), 8 (32); and 9, the last.
    assert [step for step in range(1, 10) if calendar.epoch_ends(step, 1)] == [3, 5, 8, 9]
    assert [step for step in range(1, 10) if calendar.epoch_ends(step, 2)] == [5, 9]
    assert [step for step in range(1, 10) if calendar.is_due(step, 4)] == [4, 8, 9]
    assert [step for step in range(1, 10) if calendar.is_due(step, 0)] == [9]


def test_the_error_of_the_newest_pass_is_saved_only_where_a_pass_was_made(run, tmp_path):
    assert run(tmp_path, "--config.checkpoint.every_steps=7", "--config.train.num_steps=8") == 0
    with Saver(tmp_path / "checkpoints") as checkpoints:
        kept = {c.step: c.metrics for c in checkpoints.checkpointer.checkpoints}
    passes = {record["step"]: record["top1_error"] for record in records(tmp_path, "validation")}
    assert set(passes) == {6, 8}
    best = min(passes, key=lambda step: (passes[step], step))
    assert kept == {7: None} | {step: {"top1_error": passes[step]} for step in {best, 8}}


def test_nothing_is_compiled_once_every_kind_of_work_was_done(run, tmp_path, monkeypatch):
    """Steps, validation and saves of three epochs; what the second and third compile: nothing."""
    compiled, after = [], {}

    def listen(event: str, seconds: float, **about: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about)

    recorded = Report.record

    def record(self: Report, split: str, step: int, *rest: object) -> None:
        after[split, step] = len(compiled)
        recorded(self, split, step, *rest)

    monkeypatch.setattr(Report, "record", record)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        settings = ("--config.train.num_steps=18", "--config.checkpoint.every_steps=2")
        assert run(tmp_path, *settings) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert after["train", 1] > 0  # it does listen
    assert after["validation", 6] > after["train", 6]
    assert after["validation", 18] == after["train", 7]
