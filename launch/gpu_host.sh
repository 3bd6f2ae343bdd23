#!/usr/bin/env bash
# Pretrains on all GPUs of this host, and restarts the run after it saved and ended, lost storage, or crashed.
# Usage: bash launch/gpu_host.sh [--processes=N] [--restarts=N] [--dry-run] --config=… --workdir=… [--config.…=…]
#   --processes  1 for all GPUs (the default, and JAX's recommendation), or N with an equal share each
#   --restarts   largest number of restarts (default 5); after that, the same command continues by hand
#   --dry-run    prints the commands without running them
# SIGTERM and Ctrl-C save and end the run. The environment may set CUDA_VISIBLE_DEVICES, or JAX_PLATFORMS=cpu.

# shellcheck source=launch/run.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/run.sh"

count=1 restarts=5 arguments=()
for word; do
  case "$word" in
    --dry-run) dry_run=yes ;;
    --processes=*) count="${word#*=}" ;;
    --restarts=*) restarts="${word#*=}" ;;
    --processes | --restarts) refuse "$word needs a value: $word=N" ;;
    *) arguments+=("$word") ;;
  esac
done
[[ "$count" =~ ^[1-9][0-9]*$ ]] || refuse "--processes=$count is not a number of processes; use 1 or more"
[[ "$restarts" =~ ^(0|[1-9][0-9]*)$ ]] || refuse "--restarts=$restarts is not a number; use 0 or more"
check_run "${arguments[@]}"

# Sets gpus to the numbers, or names, of the GPUs that this script may use.
find_gpus() {
  gpus=()
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    IFS=, read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
  elif [ "$accelerator" = cuda ]; then
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null)
  fi
}

# Prints the GPUs of a process, joined by commas.
share_of() {
  local each=$((${#gpus[@]} / count)) joined
  joined="$(printf ',%s' "${gpus[@]:$(($1 * each)):each}")"
  printf '%s' "${joined#,}"
}

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# Starts, or prints, the processes of the run.
start_processes() {
  local index port=PORT settings command=("$python" -P -m cassle_jax.pretrain "${arguments[@]}")
  processes=()
  [ -n "$dry_run" ] || port="$(free_port)"
  for ((index = 0; index < count; index++)); do
    settings=()
    if [ "$count" -gt 1 ]; then
      settings=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$index")
      [ "${#gpus[@]}" -eq 0 ] || settings+=("CUDA_VISIBLE_DEVICES=$(share_of "$index")")
    fi
    if [ -n "$dry_run" ]; then
      typed "${settings[@]}" "${command[@]}"
    else
      env "${settings[@]}" "${command[@]}" &
      processes+=("$!")
    fi
  done
}

accelerator=cuda
case "${JAX_PLATFORMS:-}" in cpu*) accelerator='' ;; esac
find_gpus
if [ "${#gpus[@]}" -gt 0 ] && [ $((${#gpus[@]} % count)) -ne 0 ]; then
  refuse "--processes=$count does not divide the ${#gpus[@]} GPUs of this host (${gpus[*]}) into equal shares"
fi
prepare "$accelerator"
if [ -n "$dry_run" ]; then
  start_processes
  echo "# started again after exit code $saved (saved), $outage (storage or a process lost) or a crash," \
    "$restarts times at most; not after 0, $wrong_setting (wrong setting), $diverged (diverged)" \
    "and $disk_full (disk full)"
  exit
fi
say "running: python -m cassle_jax.pretrain ${arguments[*]}"
supervise "$restarts"
