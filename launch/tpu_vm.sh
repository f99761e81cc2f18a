#!/usr/bin/env bash
# A TPU slice of one or several hosts (Cloud TPU VMs): the same command on every host.
#
#   export TPU=my-slice ZONE=us-east5-a
#   bash launch/tpu_vm.sh install
#   bash launch/tpu_vm.sh run --config=configs/qwen2_5_7b_dapo17k.py --workdir=gs://BUCKET/luspo_7b \
#       --config.train.microbatch_tokens=557056
#   bash launch/tpu_vm.sh log            what host 0 says
#   bash launch/tpu_vm.sh stop
#
# --dry_run after the verb prints the commands. `install` copies this checkout, makes an environment
# with Python 3.12 and mounts NFS, where one is named, as /mnt/runs: the workdir of several hosts is
# in a bucket, or on storage that all of them see (Filestore). `run`, again, continues; a process that fails is started again
# by itself, together with the others, RETRIES times. After a preemption make the slice anew, then
# `install` and `run` as before.
# Variables: TPU, ZONE, PROJECT (gcloud's own), NFS (none), RETRIES (3).
set -euo pipefail

quoted() { # a command line that can be pasted
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  echo "${line:1}"
}

usage="usage: TPU=NAME ZONE=ZONE bash launch/tpu_vm.sh install|run|log|stop [--dry_run] [flags of run]"
verb=${1:-} dry_run=false flags=()
for flag in "${@:2}"; do
  if [[ $flag == --dry_run ]]; then dry_run=true; else flags+=("$flag"); fi
done
if [[ -z ${TPU:-} || -z ${ZONE:-} ]]; then
  echo "$usage" >&2
  exit 2
fi
where=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})

call() { # prints or runs a command
  if $dry_run; then quoted "$@"; else "$@"; fi
}
on() { # WORKERS COMMAND: a command line on hosts of the slice
  call gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --worker="$1" --command="$2"
}

case $verb in
  install)
    call gcloud compute tpus tpu-vm scp --recurse . "$TPU:luspo_jax" "${where[@]}" --worker=all
    on all "curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --clear --python 3.12 ~/venv && ~/.local/bin/uv pip install --python ~/venv/bin/python -e './luspo_jax[tpu,gs]'"
    if [[ -n ${NFS:-} ]]; then
      on all "sudo apt-get install -y nfs-common && sudo mkdir -p /mnt/runs && (mountpoint -q /mnt/runs || sudo mount -t nfs $NFS /mnt/runs)"
    fi
    ;;
  run)
    if [[ " ${flags[*]}" != *" --config="* || " ${flags[*]}" != *" --workdir="* ]]; then
      echo "$usage: run needs --config=FILE and --workdir=gs://BUCKET/NAME or a folder that all hosts see" >&2
      exit 2
    fi
    train="~/venv/bin/python -m experiments.train --distributed=auto $(quoted "${flags[@]}")"
    # 2 is a flag or configuration that no restart mends. It goes on when the connection ends.
    loop="for i in \$(seq 0 ${RETRIES:-3}); do $train; s=\$?; case \$s in 0|2) exit \$s;; esac; sleep 30; done"
    loop=$(quoted "$loop")
    on all "cd ~/luspo_jax && export JAX_COMPILATION_CACHE_DIR=~/.cache/luspo_jax/xla && (setsid nohup bash -c $loop >>~/train.log 2>&1 </dev/null &)"
    ;;
  log) on 0 "tail -n 100 -f ~/train.log" ;;
  stop) on all "pkill -TERM -f '[e]xperiments.train' || true" ;;
  *)
    echo "$usage" >&2
    exit 2
    ;;
esac
