#!/usr/bin/env bash
# One job on all hosts of a Cloud TPU pod, from a machine where gcloud is logged in.
#
#   launch/tpu_pod.sh create    # the pod; it costs money until `delete`
#   launch/tpu_pod.sh install   # the last commit, JAX for TPUs and the shared disk, on every host
#   launch/tpu_pod.sh run --config=configs/NAME.py --workdir=/shared/NAME [more flags]
#   launch/tpu_pod.sh stop      # all hosts save at the same step and end; the same `run` continues
#   launch/tpu_pod.sh delete
#
# `run` prints the hosts' output and needs its terminal to stay open. After losing a host: `delete`,
# `create`, `install`, and the same `run`. Its gcloud calls are tested; it has not run on a pod.
set -euo pipefail

# To fill in. The share is a Filestore in the zone's network, for data and workdirs.
name=alexnet
zone=us-central1-a
accelerator_type=v5litepod-16
version=v2-alpha-tpuv5-lite
share=10.0.0.2:/share

pod() { gcloud compute tpus tpu-vm "$1" "${@:2}" --zone="$zone"; }
on() { pod ssh "$name" --worker="$1" --command="$2"; } # on WORKER|all COMMAND

case ${1-} in
  create) pod create "$name" --accelerator-type="$accelerator_type" --version="$version" ;;
  install)
    archive=$(mktemp -d)/alexnet_jax.tar.gz
    trap 'rm -r "${archive%/*}"' EXIT
    git -C "$(dirname "$0")/.." archive --output="$archive" HEAD
    pod scp "$archive" "$name:" --worker=all
    on all "set -e
      sudo apt-get -qq update && sudo apt-get -qq install --yes nfs-common
      sudo mkdir -p /shared
      mountpoint -q /shared || sudo mount $share /shared
      sudo chmod 777 /shared
      rm -rf alexnet_jax && mkdir alexnet_jax && tar -xzf alexnet_jax.tar.gz -C alexnet_jax
      cd alexnet_jax
      python3 -m pip install --quiet --user uv # the hosts' own Python may be older than 3.11
      python3 -m uv venv --quiet --python=3.12
      python3 -m uv pip install --quiet --constraint=constraints-3.12.txt --editable='.[tpu]'"
    ;;
  run)
    on all "cd alexnet_jax && source .venv/bin/activate &&
      exec python -m alexnet_jax.main --coordinator=auto $(printf '%q ' "${@:2}")"
    ;;
  stop) on 0 "pkill -TERM --full '[p]ython -m alexnet_jax.main'" ;;
  delete) pod delete "$name" ;;
  *) sed -n '2,/^set/s/^# \?//p' "$0" >&2 && exit 2 ;;
esac
