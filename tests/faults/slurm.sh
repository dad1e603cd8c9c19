#!/usr/bin/env bash
# Slurm itself on one machine: a job of two tasks is preempted, waits, goes on, and has to end with
# the very numbers of a run that nobody disturbed.
#
#   PYTHON=.venv/bin/python tests/faults/slurm.sh [FOLDER]
#
# As root on Debian or Ubuntu; one and a half to four minutes on two cores. Runs launch/slurm.sbatch on the
# CPU, the daemons on loopback. All that is written lies in FOLDER, a new one in /tmp by default;
# what was started is ended, by its id.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath --no-symlinks "${PYTHON:-$(type -P python)}")
folder=$(realpath "${1:-$(mktemp --directory --suffix=.slurm)}")
mkdir -p "$folder"/{state,spool,runs}

type -P slurmctld slurmd munged >/dev/null ||
  { apt-get -qq update && apt-get -qq install --yes slurm-wlm munge >"$folder/apt.log"; }

chmod 711 "$folder" # munge wants its socket reachable, and its key secret
(umask 377 && head --bytes=128 /dev/urandom >"$folder/munge.key")
cat >"$folder/slurm.conf" <<CONF
ClusterName=faults
SlurmctldHost=$(hostname --short)(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthInfo=socket=$folder/munge.socket,cred_expire=5 # a requeued job waits as long
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=localhost CPUs=2
PartitionName=low Nodes=localhost Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=localhost PriorityTier=2 PreemptMode=OFF
CONF
export SLURM_CONF=$folder/slurm.conf

daemons=()
end() {
  scancel --user=root || true
  for ((second = 0; second < 60; second++)); do
    if [[ -z $(squeue --noheader) ]]; then break; fi
    sleep 1
  done
  kill "${daemons[@]}" && wait
}
trap end EXIT
daemon() { "$@" >"$folder/$1.log" 2>&1 & daemons+=($!); }
daemon munged --foreground --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" \
  --pid-file="$folder/munged.pid" --log-file="$folder/munge.log" --seed-file="$folder/munge.seed"
daemon slurmctld -D -i
daemon slurmd -D -N localhost

within() { # within SECONDS COMMAND...: wait until it succeeds
  for ((second = 0; second < $1; second++)); do
    if "${@:2}" >/dev/null 2>&1; then return; fi
    sleep 1
  done
  echo "not within $1 s: ${*:2}; see $folder" >&2 && exit 1
}
idle() { [[ $(sinfo --noheader --format=%T) == *idle* ]]; }
is() { [[ $(scontrol show job "$1") == *"$2"* ]]; } # is JOB FIELD=VALUE
reached() { grep --quiet "^{\"step\": $2," "$folder/runs/$1/metrics.jsonl"; } # reached RUN STEP
train() { # train RUN: its job's id
  PATH=$(dirname "$python"):$PATH JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1 sbatch --parsable \
    --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 --output="$folder/runs/$1.log" \
    launch/slurm.sbatch --config=configs/quickstart.py --workdir="$folder/runs/$1" \
    --config.train.num_epochs=2 --config.train.log_every_steps=1
}

within 30 idle
quiet=$(train quiet)
within 300 is "$quiet" JobState=COMPLETED

preempted=$(train preempted)
within 120 reached preempted 20
urgent=$(sbatch --parsable --partition=high --ntasks=2 --output=/dev/null --wrap='sleep 5')
within 60 is "$urgent" JobState=COMPLETED
within 300 is "$preempted" JobState=COMPLETED
is "$preempted" Restarts=1 || { echo "it was not preempted; see $folder" >&2 && exit 1; }

"$python" - "$folder/runs" <<'PYTHON'
import json, pathlib, sys
import jax, numpy as np
from alexnet_jax.checkpoint import Checkpoints

def read(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = [(line["split"], line["step"], line["loss"]) for line in lines]
    checkpoints = Checkpoints(workdir / "checkpoints")
    return losses, checkpoints.read_params(checkpoints.steps()[-1])

(quiet, weights), (preempted, others) = (read(pathlib.Path(sys.argv[1], run))
                                         for run in ("quiet", "preempted"))
assert preempted == quiet, "the losses differ"
jax.tree.map(np.testing.assert_array_equal, others, weights)
print(f"preempted, requeued, gone on: {len(quiet)} losses and every weight are the same")
PYTHON
