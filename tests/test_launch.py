"""What launch/ starts, and with which words: programs in the place of Python, srun and gcloud tell.

tests/faults/slurm.sh runs launch/slurm.sbatch under Slurm itself.
"""

import json
import os
import pathlib
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import yaml

from alexnet_jax import main as command

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
RUN = "python -m alexnet_jax.main"
FLAGS = ("--config=configs/quickstart.py", "--workdir=a run")

# In the place of `python`: writes what it was given to a file for each rank, waits for a signal if
# TOLD is set, and ends with the status that STATUS holds for its rank.
FAKE_PYTHON = f"""#!{sys.executable} -SE
import json, os, signal, sys, time
if sys.argv[1] == "-c":
    exec(sys.argv[2])
    sys.exit()
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: got.append(number))
rank = [value.partition("=")[2] for value in sys.argv if value.startswith("--process_id=")][0]
if os.environ.get("HALTED") == rank:
    os.kill(os.getpid(), signal.SIGSTOP)
print("out", rank, flush=True)
print("err", rank, file=sys.stderr, flush=True)
patience = time.monotonic() + 20 * ("TOLD" in os.environ)
while not got and time.monotonic() < patience:
    time.sleep(0.01)
time.sleep(0.3 * bool(got))  # a second signal would come now
names = ("CUDA_VISIBLE_DEVICES", "JAX_NUM_CPU_DEVICES", "JAX_COORDINATOR_BIND_ADDRESS")
told = dict(argv=sys.argv[1:], signals=got, env={{name: os.environ.get(name) for name in names}})
open(os.environ["RANKS"] + "/" + rank, "w").write(json.dumps(told))
sys.exit(128 + got[0] if got else json.loads(os.environ.get("STATUS", "{{}}")).get(rank, 0))
"""
# In the place of any command: writes its arguments down.
RECORDER = r"""#!/bin/bash
{ printf '%s\x1f' "${0##*/}" "$@"; printf '\x1e'; } >>"$CALLS"
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """(name, text) -> that program, the first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))

    def put(name: str, text: str = RECORDER) -> None:
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    return put


@pytest.fixture
def calls(tmp_path):
    """() -> the recorded calls, each a list of words."""
    found = tmp_path / "calls"
    return lambda: [call.split("\x1f")[:-1] for call in found.read_text().split("\x1e")[:-1]]


@pytest.fixture
def ranks(tmp_path, place, monkeypatch):
    """() -> what each rank that launch/local.sh started was given, in order."""
    place("python", FAKE_PYTHON)
    place("nvidia-smi", "#!/bin/sh\necho NVIDIA-SMI has failed, for there is no driver; exit 9")
    (tmp_path / "ranks").mkdir()
    monkeypatch.setenv("RANKS", str(tmp_path / "ranks"))
    for name in ("PYTHON", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return lambda: [json.loads(p.read_text()) for p in sorted((tmp_path / "ranks").iterdir())]


def bash(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)


def jobset() -> dict:
    _, found = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return found["spec"]["replicatedJobs"][0]["template"]["spec"] | {"jobset": found}


def test_scripts_are_read_by_bash():
    scripts = [*LAUNCH.glob("*.s*"), *ROOT.glob("tests/faults/*.sh")]
    assert {"local.sh", "slurm.sbatch", "tpu_pod.sh", "slurm.sh"} <= {s.name for s in scripts}
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)


def test_every_file_runs_the_same_command_once():
    for path in LAUNCH.iterdir():
        code = re.sub(r"(^|\s)#.*", "", path.read_text(), flags=re.MULTILINE)
        words = " ".join(re.sub(r'[][",$]', " ", code).split())
        assert words.count(RUN) == 1, path.name


def test_local_starts_each_rank_on_loopback(ranks):
    done = bash("local.sh", "3", *FLAGS)
    assert (done.returncode, done.stdout) == (0, "out 0\n")
    assert sorted(done.stderr.splitlines()) == ["[1] err 1", "[2] err 2", "err 0"]
    addresses = set()
    for rank, told in enumerate(ranks()):
        options, rest = command.parse(["main", *told["argv"][2:]])
        assert told["argv"][:2] == RUN.split()[1:]
        assert (options.num_processes, options.process_id, rest) == (3, rank, [])
        assert options.workdir == "a run"
        assert told["env"]["JAX_NUM_CPU_DEVICES"] == "1"
        assert told["env"]["JAX_COORDINATOR_BIND_ADDRESS"] == options.coordinator
        addresses.add(options.coordinator)
    assert re.fullmatch(r"127\.0\.0\.1:\d+", addresses.pop())
    assert not addresses


@pytest.mark.parametrize(
    ("of_ranks", "expected"),
    [
        ({"1": 2, "2": 1}, 2),
        ({"0": 1, "2": 2}, 2),
        ({"0": 143, "1": 1}, 143),
        ({"0": 137, "1": 143}, 143),
        ({"1": 137}, 137),
    ],
)
def test_local_ends_with_the_status_that_says_most(ranks, monkeypatch, of_ranks, expected):
    monkeypatch.setenv("STATUS", json.dumps(of_ranks))
    assert bash("local.sh", "3", *FLAGS).returncode == expected
    assert len(ranks()) == 3


def test_local_ends_also_where_nobody_hears_it(ranks):
    closed = f"exec bash {LAUNCH / 'local.sh'} 2 {shlex.join(FLAGS)} >&- 2>&-"
    assert subprocess.run(["bash", "-c", closed], timeout=60).returncode == 0
    assert len(ranks()) == 2


def test_local_gives_each_rank_a_gpu_or_says_that_there_are_too_few(ranks, place, monkeypatch):
    place("nvidia-smi", "#!/bin/sh\nprintf '0\\n1\\n2\\n'")
    assert bash("local.sh", "2", *FLAGS).returncode == 0
    assert [told["env"]["CUDA_VISIBLE_DEVICES"] for told in ranks()] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert bash("local.sh", "2", *FLAGS).returncode == 0
    assert [told["env"]["CUDA_VISIBLE_DEVICES"] for told in ranks()] == ["2", "0"]
    refused = bash("local.sh", "3", *FLAGS)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "3 processes and 2 GPUs" in refused.stderr
    assert bash("local.sh", "two", *FLAGS).returncode == 2


def test_local_hands_a_ctrl_c_at_the_terminal_to_each_rank_once(ranks, monkeypatch):
    monkeypatch.setenv("TOLD", "yes")
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background is deaf to it
        os.execv("/bin/bash", ["bash", str(LAUNCH / "local.sh"), "3", *FLAGS])
    shown = b""
    while shown.count(b"err") < 3:
        shown += os.read(terminal, 1000)
    time.sleep(0.2)  # the traps are set once all ranks run
    os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    os.close(terminal)
    assert [told["signals"] for told in ranks()] == [[signal.SIGINT]] * 3


def test_local_hands_sigterm_to_each_rank_once(ranks, monkeypatch):
    monkeypatch.setenv("TOLD", "yes")
    line = ["bash", LAUNCH / "local.sh", "2", *FLAGS]
    with subprocess.Popen(line, stderr=subprocess.PIPE) as script:
        for _ in range(2):
            script.stderr.readline()
        time.sleep(0.2)
        script.terminate()
        script.stderr.read()
    assert script.returncode == 143
    assert [told["signals"] for told in ranks()] == [[signal.SIGTERM]] * 2


def test_local_ends_a_rank_that_outlives_the_others(ranks, tmp_path, monkeypatch):
    text = (LAUNCH / "local.sh").read_text()
    assert text.count(">= 30") == 1
    (tmp_path / "local.sh").write_text(text.replace(">= 30", ">= 1"))
    monkeypatch.setenv("HALTED", "1")
    begun = time.monotonic()
    ended = bash(str(tmp_path / "local.sh"), "3", *FLAGS)
    assert ended.returncode == 128 + signal.SIGKILL
    assert ended.stderr.count("others still wait for it: they are killed") == 1
    assert time.monotonic() - begun < 15
    assert len(ranks()) == 2


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (2, False), (143, True)])
def test_slurm_queues_a_job_again_only_where_it_was_stopped(
    place, calls, monkeypatch, status, requeued
):
    place("srun", f"{RECORDER}exit {status}")
    place("scontrol")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert bash("slurm.sbatch", *FLAGS).returncode == status
    srun, *others = calls()
    assert srun[0] == "srun"
    assert srun[-5:] == [*RUN.split(), *FLAGS]
    assert others == [["scontrol", "requeue", "17"]] * requeued


def test_slurm_gives_a_job_time_to_save_and_keeps_its_log():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    asked = {line.split()[1] for line in lines if line.startswith("#SBATCH")}
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} <= asked
    last = max(place for place, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last])  # sbatch reads no further


def test_kubernetes_workers_are_counted_the_same_everywhere_and_meet_at_the_first():
    job = jobset()
    container = job["template"]["spec"]["containers"][0]
    name = job["jobset"]["metadata"]["name"]
    workers = job["jobset"]["spec"]["replicatedJobs"][0]["name"]
    arguments = [a.replace("$(JOB_COMPLETION_INDEX)", "1") for a in container["args"]]
    options, rest = command.parse(["main", *arguments])
    assert (options.process_id, rest) == (1, [])
    assert options.num_processes == job["completions"] == job["parallelism"]
    assert job["completionMode"] == "Indexed"
    assert options.coordinator.split(":")[0] == f"{name}-{workers}-0-0.{name}"
    assert (ROOT / "configs/alexnet.py").samefile(ROOT / arguments[3].partition("=")[2])


def test_kubernetes_restarts_all_workers_but_not_after_a_mistake():
    job = jobset()
    pod = job["template"]["spec"]
    policy = job["jobset"]["spec"]["failurePolicy"]
    assert job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    assert policy["maxRestarts"] > 0
    (rule,), (of_job,) = policy["rules"], job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert (of_job["action"], of_job["onExitCodes"]["values"]) == ("FailJob", [2])
    assert of_job["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert pod["terminationGracePeriodSeconds"] >= 60


def test_kubernetes_keeps_workdir_data_and_cache_on_the_claimed_volume():
    claim, _ = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = jobset()["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for flag in ("--workdir=", "--config.data.source=records:", "--config.data.cache_dir="):
        (value,) = [a.removeprefix(flag) for a in container["args"] if a.startswith(flag)]
        assert value.startswith(f"{mounts['shared']}/")


def test_a_tpu_pod_is_made_filled_used_and_given_back(place, calls):
    place("gcloud")
    place("git")
    for action in ("create", "install", "stop", "delete"):
        assert bash("tpu_pod.sh", action).returncode == 0
    assert bash("tpu_pod.sh", "run", *FLAGS).returncode == 0
    (archive,) = [call for call in calls() if call[0] == "git"]
    assert archive[-1] == "HEAD"
    found = [call for call in calls() if call[0] == "gcloud"]
    assert [call[4] for call in found] == ["create", "scp", "ssh", "ssh", "delete", "ssh"]
    for call in found:
        assert call[1:4] == ["compute", "tpus", "tpu-vm"]
        assert any(word.startswith("--zone=") for word in call)
        for word in call:
            if word.startswith("--command="):
                subprocess.run(["bash", "-nc", word.removeprefix("--command=")], check=True)
    _, copied, installed, stopped, _, run = found
    assert "--worker=all" in copied
    assert "--worker=all" in installed
    assert "--worker=0" in stopped  # one rank that is told is enough
    assert "--worker=all" in run
    (line,) = [word.removeprefix("--command=") for word in run if word.startswith("--command=")]
    words = shlex.split(line.partition(f"exec {RUN} ")[2])
    options, rest = command.parse(["main", *words])
    assert (options.coordinator, options.workdir, rest) == ("auto", "a run", [])


def test_tpu_pod_without_a_known_action_explains_itself(place):
    place("gcloud", "#!/bin/sh\nexit 1")
    done = bash("tpu_pod.sh")
    assert done.returncode == 2
    assert "launch/tpu_pod.sh install" in done.stderr


def test_the_image_takes_files_that_are_there_and_runs_as_nobody_special():
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line[:1].isalpha()]
    sources = [source for word, rest in steps if word == "COPY" for source in rest.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
    (install,) = [rest for word, rest in steps if word == "RUN" and "pip install" in rest]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.search(r"\.\[(\w+)\]", install)[1] in extras["optional-dependencies"]
    assert re.search(r"--constraint (\S+)", install)[1] in sources
    version = re.search(r"python:(3\.\d+)", steps[0][1])[1]
    assert f"constraints-{version}.txt" in sources
    user, entrypoint = steps[-3], steps[-1]
    assert user[0] == "USER"
    assert user[1] != "root"
    assert json.loads(entrypoint[1]) == RUN.split()
