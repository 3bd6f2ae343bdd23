#!/usr/bin/env bash
# Pretrains on a Cloud TPU, one host or a pod, from here through gcloud.
# Usage: bash launch/tpu_pod.sh VERB --name=NAME --zone=ZONE [options] [--config=… --workdir=… …]
#   create   requests the TPU as a queued resource, or reuses the one of that name, and waits for it
#   install  copies this repository to all workers and installs its requirements there
#   run      starts the run on all workers, in the background; restarts it after it saved and ended, or crashed
#   log      follows the first worker's log; Ctrl-C leaves the run alone
#   stop     ends the run, which saves; the same run command continues it
#   delete   deletes the TPU
#   all      create, install, run, log; also works after a spot TPU was taken away
# Options: --type=v5litepod-16 (accelerator type), --version=… (runtime; by default the one for the type), --spot,
#   --project=… (by default gcloud's), --restarts=5, --dry-run (prints what it would do).
# The workdir must be on a folder that all workers see, such as a mounted bucket or NFS.

# shellcheck source=launch/run.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/run.sh"

verb="${1:-}"
[ "$#" -eq 0 ] || shift
name='' zone='' type='' version='' project='' spot='' restarts=5 arguments=()
for word; do
  case "$word" in
    --name=*) name="${word#*=}" ;;
    --zone=*) zone="${word#*=}" ;;
    --type=*) type="${word#*=}" ;;
    --version=*) version="${word#*=}" ;;
    --project=*) project="${word#*=}" ;;
    --restarts=*) restarts="${word#*=}" ;;
    --spot) spot=yes ;;
    --dry-run) dry_run=yes ;;
    --name | --zone | --type | --version | --project | --restarts) refuse "$word needs a value: $word=…" ;;
    *) arguments+=("$word") ;;
  esac
done
[[ "$restarts" =~ ^(0|[1-9][0-9]*)$ ]] || refuse "--restarts=$restarts is not a number; use 0 or more"

tpu() { # GROUP VERB …
  perform gcloud compute tpus "$1" "$2" "$name" "--zone=$zone" ${project:+"--project=$project"} "${@:3}"
}
on_workers() { tpu tpu-vm ssh "--worker=$1" "--command=$2"; }

# Prints the state of the TPU's request, in capitals; nothing where there is none.
state() { tpu queued-resources describe '--format=value(state.state)' 2>/dev/null || true; }

request() {
  tpu queued-resources create "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version" ${spot:+--spot}
}

remove() { tpu queued-resources delete --force --quiet; }

runtime_of() {
  case "$1" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) refuse "--type=$1 has no known runtime; give one with --version=… (gcloud compute tpus tpu-vm versions list)" ;;
  esac
}

create() {
  local now
  [ -n "$type" ] || refuse "--type is missing; give an accelerator type, such as --type=v5litepod-16"
  if [ -z "$version" ]; then version="$(runtime_of "$type")"; fi
  if [ -n "$dry_run" ]; then
    state
    echo '# where there is none; one that failed or was taken away is deleted first'
    request
    echo '# repeats the first command every 30 s until the state is ACTIVE'
    return
  fi
  now="$(state)"
  case "$now" in
    FAILED | SUSPENDED | SUSPENDING) remove && request ;;
    '') request ;;
    *) echo "$name is there ($now)" ;;
  esac
  while now="$(state)" && [ "$now" != ACTIVE ]; do
    case "$now" in
      FAILED | SUSPENDED) refuse "$name is $now; gcloud compute tpus queued-resources describe $name --zone=$zone says why" ;;
    esac
    echo "waiting for $name (${now:-unknown})"
    sleep 30
  done
}

install() {
  local archive="${TMPDIR:-/tmp}/cassle_jax-$$.tar.gz"
  [ -n "$dry_run" ] || trap 'rm -f "$archive"' RETURN
  perform tar --exclude=__pycache__ -C "$launch/.." -czf "$archive" cassle_jax configs launch pyproject.toml requirements.txt
  perform gcloud compute tpus tpu-vm scp "$archive" "$name:cassle_jax.tar.gz" --worker=all "--zone=$zone" \
    ${project:+"--project=$project"}
  on_workers all 'mkdir -p cassle_jax && tar -xzf cassle_jax.tar.gz -C cassle_jax && bash cassle_jax/launch/tpu_pod.sh worker'
}

start() {
  check_run "${arguments[@]}"
  on_workers all "cd cassle_jax
if [ -s run.pid ] && kill -0 \"\$(cat run.pid)\" 2>/dev/null; then echo 'a run is under way; stop it first' >&2; exit 1; fi
nohup setsid bash launch/tpu_pod.sh worker --restarts=$restarts $(typed "${arguments[@]}") >>run.log 2>&1 </dev/null &
echo \$! >run.pid"
}

end() {
  # shellcheck disable=SC2016 # expanded on the workers
  on_workers all 'cd cassle_jax
kill "$(cat run.pid)" || exit 0
while kill -0 "$(cat run.pid)" 2>/dev/null; do sleep 1; done
tail -n 2 run.log'
}

follow() { on_workers 0 'tail -n 100 -F cassle_jax/run.log'; }

# The part that runs on a worker: makes it ready and, given a run, runs it.
on_this_worker() {
  if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then # most images of TPU VMs are older
    [ -x "$launch/../.venv/bin/python" ] || {
      python3 -m pip install --user --quiet uv
      python3 -m uv venv --quiet --seed --python=3.12 "$launch/../.venv"
    }
  fi
  prepare tpu
  [ "${#arguments[@]}" -gt 0 ] || return 0
  start_processes() {
    "$python" -P -m cassle_jax.pretrain "${arguments[@]}" &
    processes=("$!")
  }
  supervise "$restarts"
}

case "$verb" in
  worker)
    on_this_worker
    exit
    ;;
  create | install | run | log | stop | delete | all) ;;
  *) refuse "'$verb' is not a verb; use create, install, run, log, stop, delete or all" ;;
esac
[ -n "$name" ] || refuse "--name is missing; give the TPU one"
[ -n "$zone" ] || refuse "--zone is missing; give the TPU's, such as --zone=us-west4-a"
if [ "$verb" != run ] && [ "$verb" != all ] && [ "${#arguments[@]}" -gt 0 ]; then
  refuse "${arguments[0]} is not an option of $verb"
fi
[ -n "$dry_run" ] || command -v gcloud >/dev/null || refuse "gcloud is not installed; see cloud.google.com/sdk/docs/install"
case "$verb" in
  create) create ;;
  install) install ;;
  run) start ;;
  log) follow ;;
  stop) end ;;
  delete) remove ;;
  all)
    check_run "${arguments[@]}"
    create
    install
    start
    follow
    ;;
esac
