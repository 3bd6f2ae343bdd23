#!/usr/bin/env bash
# Tests launch/slurm.sbatch on a real SLURM: slurmctld, slurmd and munge from Debian, on the loopback, in a temporary folder.
# The time limit's signal stops a run of two tasks, which continues; a job of higher priority preempts it, and it
# continues again. It must end with the same bits as an undisturbed run.
# Usage: bash launch/test_slurm.sh [--keep] [--sweep]      installs SLURM with apt-get where it is missing and this user may;
#   --keep   leaves the folder of logs and runs;
#   --sweep  tests python -m cassle_jax.sweep, too: of two runs one is preempted, one killed from outside; the same sweep then ends.
# Exit codes: 0 passed, 1 failed, 77 skipped, as SLURM cannot be installed here.

# shellcheck source=launch/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

keep='' sweep=''
for word; do
  case "$word" in
    --keep) keep=yes ;;
    --sweep) sweep=yes ;;
    *) stop "$word is unknown; use --keep or --sweep" ;;
  esac
done
steps=200
PATH="$PATH:/usr/sbin:/sbin"
export JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=''
# This script may itself run in a SLURM job, whose settings must not reach the test.
unset "${!SLURM_@}" "${!SBATCH_@}"

skip() {
  say "skipped: $*"
  exit 77
}

install_slurm() {
  local as_root=() name missing=''
  for name in slurmctld slurmd sbatch munged; do
    command -v "$name" >/dev/null || missing=yes
  done
  [ -n "$missing" ] || return 0
  command -v apt-get >/dev/null || skip "SLURM is not installed, and there is no apt-get to install it with"
  if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo -n)
    sudo -n true 2>/dev/null || skip "SLURM is not installed, and this user may not: sudo apt-get install slurmctld slurmd slurm-client munge"
  fi
  say "installing SLURM"
  {
    "${as_root[@]}" timeout 120 apt-get update -qq &&
      "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y -qq slurmctld slurmd slurm-client munge
  } >/dev/null || skip "apt-get could not install SLURM; its message is above"
}

free_ports() {
  "$python" -c '
import socket, sys
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(s.getsockname()[1] for s in sockets))' "$1"
}

# await WHAT SECONDS COMMAND: waits until the command succeeds, at most this number of seconds, for what WHAT names.
await() {
  local what="$1" seconds="$2" end
  shift 2
  end=$((SECONDS + seconds))
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || fail "waited $seconds s for $what"
    sleep 0.5
  done
}

fail() {
  say "FAILED: $*"
  squeue --long 2>/dev/null || true
  tail -n 15 "$folder"/*.out "$folder"/*.log 2>/dev/null || true
  exit 1
}

start_slurm() {
  local user controller_port node_port
  user="$(id -un)"
  read -r controller_port node_port <<<"$(free_ports 2)"
  mkdir -p "$folder/state" "$folder/spool"
  head -c 1024 /dev/urandom >"$folder/munge.key"
  chmod 600 "$folder/munge.key"
  cat >"$SLURM_CONF" <<CONF
ClusterName=cassle
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$controller_port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# How long a requeued job waits before it starts again.
AuthInfo=socket=$folder/munge.socket,cred_expire=15
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=500000,sched_interval=2,bf_interval=3
# Time from SIGTERM to SIGKILL, where SLURM itself ends a job: time to save.
KillWait=60
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# The name under which tasks find the first task.
NodeName=localhost NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$node_port CPUs=2
PartitionName=low Nodes=localhost PriorityTier=1 Default=YES MaxTime=60
PartitionName=high Nodes=localhost PriorityTier=2 PreemptMode=OFF MaxTime=60
CONF
  # In separate sessions: Ctrl-C must spare the daemons, so that they can end the jobs.
  setsid munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --num-threads=2 \
    --pid-file="$folder/munge.pid" --log-file="$folder/munge.log" --seed-file="$folder/munge.seed" 2>/dev/null &
  daemons+=("$!")
  await "munged" 20 test -S "$folder/munge.socket"
  setsid slurmctld -D -c &>/dev/null &
  daemons+=("$!")
  await "slurmctld" 60 scontrol ping
  setsid slurmd -D -N localhost &>/dev/null &
  daemons+=("$!")
  await "slurmd" 60 idle
  say "$(slurmctld -V) runs on the loopback"
}

idle() { [ "$(sinfo --noheader --format=%t | sort -u)" = idle ]; }

clean_up() {
  local daemon left=60
  # The daemons can end what they started only while they run.
  scancel --user="$(id -un)" --signal=KILL --full 2>/dev/null || true
  scancel --user="$(id -un)" 2>/dev/null || true
  while [ "$((left--))" -gt 0 ] && [ -n "$(squeue --noheader 2>/dev/null)" ]; do sleep 1; done
  for daemon in "${daemons[@]}"; do
    kill "$daemon" 2>/dev/null || true
    wait "$daemon" 2>/dev/null || true
  done
  if [ -n "$keep" ]; then say "logs and runs are in $folder"; else rm -rf "$folder"; fi
}

config=("--config=$repository/configs/quickstart.py:method=simclr" "--config.steps=$steps" --config.batch_size=8
  --config.encoder.width=4 --config.augment.size=16 --config.data.canvas=16 --config.data.scenes=512 --config.data.threads=1
  --config.probe.every_epochs=0 --config.log.every_steps=1 --config.checkpoint.every_steps=1000000)

# Submits a run of two tasks, and prints its job's number.
submit() {
  sbatch --parsable --job-name="$1" --ntasks=2 --time=30 --output="$folder/$1.out" --chdir="$repository" \
    "$repository/launch/slurm.sbatch" "${config[@]}" "--workdir=$folder/$1"
}

state_of() { scontrol show job "$1" --oneliner | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p'; }
minutes_run() {
  local hours minutes
  IFS=: read -r hours minutes _ < <(scontrol show job "$1" --oneliner | sed -n 's/.*RunTime=\([0-9:]*\).*/\1/p')
  echo $((10#$hours * 60 + 10#$minutes))
}
is_in() { [ "$(state_of "$1")" = "$2" ]; }
ended() { case "$(state_of "$1")" in COMPLETED | FAILED | CANCELLED | TIMEOUT | NODE_FAIL | OUT_OF_MEMORY) ;; *) false ;; esac; }
steps_done() { wc -l 2>/dev/null <"$folder/$1/metrics.jsonl" || echo 0; }
has_done() { [ "$(steps_done "$1")" -ge "$2" ]; }
saved_step() { find "$folder/$1/checkpoints" -maxdepth 1 -name '[0-9]*[0-9]' -printf '%f\n' | grep -x '[0-9]*' | sort -n | tail -n 1; }

# Fails unless the run has saved a step between two given ones, from which it is to continue.
check_saved() {
  local name="$1" above="$2" step
  step="$(saved_step "$name")"
  if [ -z "$step" ] || [ "$step" -le "$above" ] || [ "$step" -ge "$steps" ]; then
    fail "$name saved step '${step:-none}', not one between $above and $steps"
  fi
  say "$name: step $step of $steps is saved"
}

same_bits() {
  "$python" - "$@" <<'PYTHON'
import logging
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.WARNING)


def arrays(path):
    # Restored as NumPy arrays, which need none of the devices that saved them.
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    for key, leaf in jax.tree_util.tree_leaves_with_path(reader.restore(path, restore_args=as_numpy)):
        is_key = jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)
        yield jax.tree_util.keystr(key), np.asarray(jax.random.key_data(leaf) if is_key else leaf)


whole, interrupted = (dict(arrays(path)) for path in sys.argv[1:])
different = [name for name in whole if whole[name].tobytes() != interrupted[name].tobytes()]
if not whole or whole.keys() != interrupted.keys() or different:
    sys.exit(f"{len(different)} of {len(whole)} arrays differ, such as {different[:3]}")
print(f"all {len(whole)} arrays ({sum(a.nbytes for a in whole.values())} bytes) are the same to the bit")
PYTHON
}

install_slurm
folder="$(mktemp -d)" daemons=()
# From here on SLURM's commands know only this cluster, whatever happens before it runs.
export SLURM_CONF="$folder/slurm.conf"
trap clean_up EXIT
trap 'exit 1' INT TERM
start_slurm

whole="$(submit whole)"
say "job $whole: two tasks, left alone"
await "job $whole" 900 ended "$whole"
is_in "$whole" COMPLETED || fail "job $whole is $(state_of "$whole")"

job="$(submit interrupted)"
say "job $job: the same, to be interrupted"
await "job $job to train" 900 has_done interrupted 10
scontrol update "JobId=$job" "TimeLimit=$(($(minutes_run "$job") + 2))"
say "job $job: less than two minutes are now left to its time limit, so that SLURM signals it"
await "job $job to be requeued" 300 grep -q 'ended with 75' "$folder/interrupted.out"
check_saved interrupted 0
first="$(saved_step interrupted)"
await "job $job to wait" 120 is_in "$job" PENDING
scontrol update "JobId=$job" TimeLimit=30

await "job $job to continue" 900 has_done interrupted $((first + 10))
urgent="$(sbatch --parsable --job-name=urgent --partition=high --ntasks=2 --output="$folder/urgent.out" --wrap='sleep 3')"
say "job $urgent of higher priority preempts it"
await "job $urgent" 600 ended "$urgent"
is_in "$urgent" COMPLETED || fail "job $urgent is $(state_of "$urgent")"
check_saved interrupted "$first"

await "job $job" 900 ended "$job"
is_in "$job" COMPLETED || fail "job $job is $(state_of "$job")"
starts="$(scontrol show job "$job" --oneliner | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p')"
[ "$starts" -eq 2 ] || fail "job $job was restarted $starts times, not 2"
grep -h 'continuing' "$folder/interrupted.out" || fail "job $job did not continue"
same_bits "$folder/whole/checkpoints/$steps/state" "$folder/interrupted/checkpoints/$steps/state" || fail "the runs differ"
say "passed: stopped at the time limit, preempted, requeued twice, and the same bits as the run left alone"

[ -n "$sweep" ] || exit 0
# Long enough that a preempted run does not end in the time SLURM leaves it to save.
command=(env "PYTHONPATH=$repository" "$python" -P -m cassle_jax.sweep "${config[@]}" --config.steps=1500 --where=slurm
  --grid='seed=0,1' "--to=$folder/sweep" --slurm=time=30)
say "a sweep of two runs: ${command[*]}"
"${command[@]}" &>"$folder/sweep.out" &
sweeping="$!"
for seed in 0 1; do await "run seed=$seed to train" 900 has_done "sweep/runs/seed=$seed" 10; done
urgent="$(sbatch --parsable --job-name=urgent --partition=high --ntasks=1 --output="$folder/urgent.out" --wrap='sleep 3')"
say "job $urgent of higher priority preempts one of them"
await "job $urgent" 600 ended "$urgent"
preempted="$(squeue --array --noheader --states=PENDING --format=%i)"
running="$(squeue --array --noheader --states=RUNNING --format=%i)"
if [ -z "$preempted" ] || [ -z "$running" ]; then fail "of the sweep, pending is '$preempted', running is '$running'"; fi
say "job $running is killed from outside"
scancel --signal=KILL --full "$running"
wait "$sweeping" && fail "the sweep did not report the run that was killed"
tail -n 1 "$folder/sweep.out"
grep -q '1 of 2 runs failed' "$folder/sweep.out" || fail "the sweep ended otherwise"
"${command[@]}" &>>"$folder/sweep.out" || fail "the same sweep again failed"
[ "$(grep -c '"state": "finished"' "$folder/sweep/runs.jsonl")" -eq 2 ] || fail "the sweep did not finish its runs"
say "passed: a sweep went on after a preemption, and ran again what was killed"
