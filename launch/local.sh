#!/usr/bin/env bash
# One job of N processes on this machine, which communicate over loopback.
#
#   launch/local.sh N --config=configs/NAME.py --workdir=DIR [more flags]
#
# Each process takes one GPU, or on a machine without GPUs one CPU device (JAX_NUM_CPU_DEVICES sets
# another number). Rank 0 prints as if it were alone; the others' stderr is prefixed with their rank.
# Ctrl-C and SIGTERM reach each process once: all save at the same step, and the same command
# continues from there; a second signal ends them at once. The exit status is the program's.
# PYTHON names another interpreter than `python`.
set -uo pipefail

[[ -e /dev/fd/1 ]] || exec >/dev/null # a closed one would be given to a pipe, and nobody see its end
[[ -e /dev/fd/2 ]] || exec 2>/dev/null

mistake() { echo "error: $*" >&2 && exit 2; }

size=${1-}
[[ $size =~ ^[1-9][0-9]*$ ]] || mistake "'$size' is no count of processes; launch/local.sh N FLAGS"
shift

gpus=()
if [[ ${JAX_PLATFORMS-} != cpu ]]; then
  found=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null) || found=
  found=${found//$'\n'/,}
  IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-$found}"
  ((${#gpus[@]} == 0 || ${#gpus[@]} >= size)) ||
    mistake "$size processes and ${#gpus[@]} GPUs: start fewer, or on the CPU by JAX_PLATFORMS=cpu"
fi
export JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-1}

python=${PYTHON:-python}
free_port='import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'
address=127.0.0.1:$("$python" -c "$free_port") || mistake "PYTHON=$python does not run"
export JAX_COORDINATOR_BIND_ADDRESS=$address # otherwise rank 0 listens on all networks

start() { # start RANK FLAGS...: does not return
  if ((${#gpus[@]})); then export CUDA_VISIBLE_DEVICES=${gpus[$1]}; fi
  exec "$python" -m alexnet_jax.main \
    --coordinator="$address" --num_processes="$size" --process_id="$1" "${@:2}" </dev/null
}

prefix() { # prefix RANK: stdin to stderr, until it ends, whatever the signals
  trap '' INT TERM HUP
  exec sed -u "s/^/[$1] /" >&2
}

ranks=() prefixes=()
end_leftovers() { for rank in "${ranks[@]}"; do kill -KILL -- "-$rank"; done 2>/dev/null; }
trap end_leftovers EXIT
set -m # each rank in a process group of its own, so that Ctrl-C reaches this script alone
start 0 "$@" &
ranks+=($!)
for ((rank = 1; rank < size; rank++)); do
  exec {log}> >(prefix "$rank")
  prefixes+=($!)
  start "$rank" "$@" >/dev/null 2>&"$log" &
  ranks+=($!)
  exec {log}>&-
done
set +m # with it, `wait` would not sleep while a rank is stopped
trap 'kill -INT "${ranks[@]}" 2>/dev/null' INT
trap 'kill -TERM "${ranks[@]}" 2>/dev/null' TERM HUP

# Unlike the others, a stopped rank cannot end by itself.
alive() { for rank in "${ranks[@]}"; do kill -0 "$rank" 2>&- && echo; done | wc -l; }
since=$SECONDS
while left=$(alive || true) && ((left)); do
  ((left < size)) || since=$SECONDS
  if ((SECONDS - since >= 30)); then
    echo "error: a rank ended 30 s ago, and others still wait for it: they are killed" >&2
    end_leftovers
    since=$SECONDS
  fi
  sleep 0.2
done

status=0
for rank in "${ranks[@]}"; do
  wait "$rank"
  ended=$?
  case $status:$ended in *:0) ;; 0:* | 1:2 | 1:130 | 1:143 | 137:130 | 137:143) status=$ended ;; esac
done
end_leftovers
wait "${prefixes[@]}"
exit "$status"
