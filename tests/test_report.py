"""Where a record goes: a line of JSON, a TensorBoard event, words on the terminal."""

import json
import os
import pathlib
import pty
import subprocess
import sys
import time

from tensorboardX.proto.event_pb2 import Event

from alexnet_jax import command
from alexnet_jax.report import Report, evaluation_records, training_records

OF_TRAINING = {
    "loss": 1.5, "top1_error": 0.25, "top5_error": 0.125, "images_per_second": 1234.5,
    "learning_rate": 0.01,
}  # fmt: skip
VALUES = OF_TRAINING | {"num_examples": 7}

SCRIPT = """
import pathlib, sys
from alexnet_jax.report import Report
with Report(pathlib.Path(sys.argv[1]), first_step=0, num_steps=4) as report:
    for step in (1, 2, 3, 4):
        report.record("train", step, step / 2, {training})
    report.record("validation", 4, 2.0, {values})
    report.record("train", 4, 2.0, {values})
"""


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """(step, tag, value) of every scalar: records of length, checksum, data, checksum."""
    (path,) = (workdir / "tensorboard").iterdir()
    data, found = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return found


def test_a_record_is_a_line_of_json_and_events_and_a_plain_line(tmp_path, capsys):
    with Report(tmp_path, first_step=0, num_steps=10) as report:
        report.record("train", 5, 0.5, OF_TRAINING)
    assert lines(tmp_path) == [{"step": 5, "epoch": 0.5, "split": "train", **OF_TRAINING}]
    assert (5, "train/loss", 1.5) in events(tmp_path)
    assert (5, "train/top1_error", 0.25) in events(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert training_records(tmp_path) == lines(tmp_path)
    for word in ("step 5/10", "loss 1.5000", "top-1 error 25.00%", "1,234 images/s", "ETA"):
        assert word in line


def test_where_a_disk_is_full_the_file_is_named(tmp_path, capsys):
    def work():
        with Report(tmp_path, first_step=0, num_steps=10) as report:
            report.file = pathlib.Path("/dev/full").open("w")  # noqa: SIM115
            report.record("train", 5, 0.5, OF_TRAINING)

    assert command.status(work) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"No space left on device: '{tmp_path / 'metrics.jsonl'}'; make room" in line


def test_what_was_recorded_survives_a_kill(tmp_path):
    code = SCRIPT.format(training=OF_TRAINING, values=VALUES).replace(
        '    report.record("train", 4, 2.0',
        "    print('', flush=True); import time; time.sleep(60)\n#",
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip():
            pass
        time.sleep(3)
        process.kill()
    assert len(lines(tmp_path)) == 5
    assert {(step, tag) for step, tag, _ in events(tmp_path) if tag.endswith("/loss")} == {
        (1, "train/loss"), (2, "train/loss"), (3, "train/loss"), (4, "train/loss"),
        (4, "validation/loss"),
    }  # fmt: skip


def test_the_training_split_evaluated_has_a_curve_of_its_own(tmp_path):
    with Report(tmp_path, first_step=0, num_steps=10) as report:
        report.record("train", 5, 0.5, OF_TRAINING)
        report.record("train", 5, 0.5, VALUES | {"loss": 9.0})
    found = [(step, tag, value) for step, tag, value in events(tmp_path) if tag.endswith("/loss")]
    assert found == [(5, "train/loss", 1.5), (5, "evaluation/loss", 9.0)]
    assert [record["loss"] for record in evaluation_records(tmp_path)] == [9.0]


def test_records_later_than_the_start_are_taken_out(tmp_path):
    with Report(tmp_path, first_step=0, num_steps=10) as report:
        for step in (1, 2, 3):
            report.record("train", step, step / 2, VALUES)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "spl')  # a run killed while writing
    assert [record["step"] for record in evaluation_records(tmp_path)] == [1, 2, 3]
    with Report(tmp_path, first_step=2, num_steps=10) as report:
        report.record("train", 3, 1.5, VALUES)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_tensorflow_is_not_needed():
    code = "import sys; from alexnet_jax import report; print('tensorflow' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_a_terminal_gets_a_progress_bar_with_errors_and_speed(tmp_path):
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-c",
        SCRIPT.format(training=OF_TRAINING, values=VALUES),
        str(tmp_path),
    ]
    environment = os.environ | {"COLUMNS": "200", "LINES": "24"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    text = shown.decode()
    assert "4/4" in text
    assert "top-1 error 25.00%" in text
    assert "1,234 images/s" in text
    assert "validation  step 4/4" in text
    assert "train  step 4/4" in text  # the training split, evaluated
    assert len(lines(tmp_path)) == 6
