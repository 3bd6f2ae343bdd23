# The parts that gpu_host.sh, slurm.sbatch and tpu_pod.sh share: their options, the accelerator's JAX, and restarts.
# Sourced by them. With dry_run set, commands are printed, not run.
# shellcheck shell=bash

set -euo pipefail

launch="$(dirname -- "${BASH_SOURCE[0]}")"
dry_run=''
python=python
first_pause="${CASSLE_RESTART_SECONDS:-10}"
# Exit codes of python -m cassle_jax.pretrain, see docs/storage.md.
# shellcheck disable=SC2034 # the scripts that source this read them
finished=0 wrong_setting=2 diverged=3 outage=69 disk_full=74 saved=75

refuse() {
  printf '%s\n' "error: $*" >&2
  exit "$wrong_setting"
}

# Prints a command as it would be typed.
typed() {
  local word separator=''
  for word; do
    [[ "$word" =~ ^[]A-Za-z0-9_./:=,@%+[-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
  printf '\n'
}

# Runs a command, or prints it.
perform() {
  if [ -n "$dry_run" ]; then typed "$@"; else "$@"; fi
}

# The value of an option, given as --name=value or as two words; fails where the option is missing.
option() {
  local name="$1" value='' given=1
  shift
  while [ "$#" -gt 0 ]; do
    case "$1" in
      "--$name="*) value="${1#*=}" given=0 ;;
      "--$name") value="${2:-}" given=0 ;;
    esac
    shift
  done
  printf '%s' "$value"
  return "$given"
}

# Sets kept to the arguments without an option, which may be --name=value or two words.
drop() {
  local name="$1"
  shift
  kept=()
  while [ "$#" -gt 0 ]; do
    case "$1" in
      "--$name="*) ;;
      "--$name") [ "$#" -eq 1 ] || shift ;;
      *) kept+=("$1") ;;
    esac
    shift
  done
}

# Refuses arguments without --config or --workdir, which python -m cassle_jax.pretrain needs, and a pause that is no number.
check_run() {
  local name value
  [[ "$first_pause" =~ ^[0-9]+([.][0-9]+)?$ ]] ||
    refuse "CASSLE_RESTART_SECONDS='$first_pause' is not a number of seconds; use 10"
  for name in config workdir; do
    value="$(option "$name" "$@")" || value=''
    [ -n "$value" ] ||
      refuse "--$name is missing; give --config=configs/….py --workdir=…, as to python -m cassle_jax.pretrain"
  done
}

# Makes the environment ready, with the JAX that an accelerator needs: cuda, tpu, or an empty word for none.
prepare() {
  local extra="$1"
  if [ -n "$dry_run" ]; then
    echo '. launch/environment.sh'
    typed export "PYTHONPATH=$(CDPATH='' cd -- "$launch/.." && pwd -P)"
  else
    # shellcheck source=launch/environment.sh
    . "$launch/environment.sh"
    export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
  fi
  if [ "$extra" = cuda ]; then
    extra="$(cuda_extra)"
  fi
  [ -z "$extra" ] || install_jax_with "$extra"
}

# The CUDA that JAX installs must suit the driver: 13 needs 580, 12 needs 525.
cuda_extra() {
  local driver
  driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)" || driver=''
  driver="${driver%%.*}"
  if ! [[ "$driver" =~ ^[0-9]+$ ]]; then
    [ -n "$dry_run" ] || refuse "nvidia-smi finds no GPU here; JAX_PLATFORMS=cpu runs without one"
    driver=580
  fi
  [ "$driver" -ge 525 ] || refuse "the NVIDIA driver $driver is older than 525, which JAX needs at least; update it"
  if [ "$driver" -ge 580 ]; then echo cuda13; else echo cuda12; fi
}

# Adds the accelerator's packages to the installed JAX, whose version stays.
install_jax_with() {
  local extra="$1" package version='VERSION'
  case "$extra" in
    tpu) package=libtpu ;;
    *) package="jax-$extra-plugin" ;;
  esac
  if [ -z "$dry_run" ]; then
    version="$(version_installed jax)"
    # A host that other jobs share takes turns, as in environment.sh.
    exec 9<"$repository/requirements.txt"
    ! command -v flock >/dev/null || flock 9
    if version_installed "$package" >/dev/null 2>&1; then
      exec 9<&-
      return
    fi
  fi
  perform "$python" -m pip install --quiet --disable-pip-version-check --no-input "jax[$extra]==$version" ||
    stop "pip could not install jax[$extra]==$version; its message is above"
  [ -n "$dry_run" ] || exec 9<&-
}

version_installed() { "$python" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1"; }

# Calls start_processes, which sets the array processes, until the run is finished or cannot go on.
# Restarts a run that saved and ended, lost storage or another process, or crashed, up to the given number of times, but
# not one that SIGTERM or Ctrl-C ended through this script. Waits before all restarts but those of a run that saved, ten
# seconds at first (CASSLE_RESTART_SECONDS), then twice as long each time, up to five minutes.
supervise() {
  local left="$1" code pause="$first_pause"
  processes=() stopping=''
  trap 'stopping=yes interrupted=yes; kill -TERM "${processes[@]}" 2>/dev/null || true' TERM INT
  while true; do
    start_processes
    wait_for_processes && code=0 || code=$?
    case "$code" in
      "$finished" | "$wrong_setting" | "$diverged" | "$disk_full") return "$code" ;;
    esac
    [ -z "$stopping" ] || return "$code"
    if [ "$left" -eq 0 ]; then
      say "ended with $code, as often as --restarts allows; the same command continues"
      return "$code"
    fi
    left=$((left - 1))
    if [ "$code" -eq "$saved" ]; then
      say "ended with $code; starting again (then $left more times at most)"
      continue
    fi
    sleep "$pause" &
    processes=("$!") # which a signal ends
    say "ended with $code; starting again in $pause s (then $left more times at most)"
    [ -n "$stopping" ] || wait "${processes[0]}" || true
    [ -z "$stopping" ] || return "$code"
    pause="$(LC_ALL=C awk -v seconds="$pause" 'BEGIN { print seconds < 150 ? 2 * seconds : 300 }')" # which may be a fraction
  done
}

# Returns the exit code of a process that neither finished nor saved, or else of one that saved, or else 0.
wait_for_processes() {
  local process code all=0
  for process in "${processes[@]}"; do
    interrupted=yes
    while [ -n "$interrupted" ]; do # a signal ends wait, not the process
      interrupted=''
      wait "$process" && code=0 || code=$?
    done
    if [ "$code" -ne "$finished" ] && { [ "$all" -eq "$finished" ] || [ "$all" -eq "$saved" ]; }; then
      all="$code"
    fi
  done
  return "$all"
}
