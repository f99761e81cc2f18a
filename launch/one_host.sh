#!/usr/bin/env bash
# One host: 1 to 8 GPUs, the chips of a single-host TPU, or a laptop. One process drives them all.
#
#   bash launch/one_host.sh --config=configs/qwen3_0_6b_gsm8k.py --workdir=runs/gsm8k
#
# Flags go to experiments.train; --dry_run prints the commands instead. The same command, again,
# continues the run: so does this script by itself, RETRIES times, after a failure that is not of
# the configuration. What the run says is added to WORKDIR.log, beside the workdir; of a bucket, to
# a file of its last name here.
# Variables: PYTHON (python), RETRIES (3), RETRY_S (30), CACHE (compiled programs), LOG (WORKDIR.log).
set -euo pipefail

quoted() { # a command line that can be pasted
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  echo "${line:1}"
}

dry_run=false workdir="" flags=()
for flag in "$@"; do
  case $flag in
    --dry_run) dry_run=true ;;
    *) flags+=("$flag") ;;
  esac
  case $flag in --workdir=*) workdir=${flag#--workdir=} ;; esac
done
if [[ -z $workdir || " ${flags[*]}" != *" --config="* ]]; then
  echo "usage: bash launch/one_host.sh [--dry_run] --config=FILE --workdir=FOLDER [--config.…]" >&2
  exit 2
fi

# jax takes three quarters of a GPU's memory unless told otherwise; compiled programs are kept.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export JAX_COMPILATION_CACHE_DIR=${CACHE:-$HOME/.cache/luspo_jax/xla}
command=("${PYTHON:-python}" -m experiments.train "${flags[@]}")

if $dry_run; then
  echo "export XLA_PYTHON_CLIENT_MEM_FRACTION=$XLA_PYTHON_CLIENT_MEM_FRACTION"
  echo "export JAX_COMPILATION_CACHE_DIR=$(quoted "$JAX_COMPILATION_CACHE_DIR")"
  quoted "${command[@]}"
  exit 0
fi

log=${workdir%/}.log
if [[ $workdir == *://* ]]; then log=$(basename "$log"); else mkdir -p "$(dirname "$workdir")"; fi
log=${LOG:-$log} stopped=false child=""
trap 'stopped=true; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT
for ((attempt = 0; ; attempt++)); do
  status=0
  "${command[@]}" > >(tee -a "$log") 2>&1 &
  child=$!
  wait "$child" || status=$?
  if $stopped; then # the first wait ended with the signal, the process may still be ending
    wait "$child" 2>/dev/null || true
    echo "stopped; the same command continues the run" | tee -a "$log" >&2
    exit 143
  fi
  # 0 done; 2 a flag or configuration that no retry mends; 130 interrupted by hand.
  case $status in 0 | 2 | 130) exit "$status" ;; esac
  ((attempt < ${RETRIES:-3})) || exit "$status"
  echo "exit status $status: continuing in ${RETRY_S:-30} s" | tee -a "$log" >&2
  sleep "${RETRY_S:-30}"
  if $stopped; then exit 143; fi
done
