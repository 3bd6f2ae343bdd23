# Finds or makes the Python environment, installs requirements.txt into it, and sets two names: repository and python. Commands
# started from here allocate large pages.
# Sourced by the scripts beside it. An active virtual or conda environment is used; otherwise it is .venv in the repository.
# shellcheck shell=bash

set -euo pipefail

say() { printf '%s\n' "[cassle_jax] $*"; }
stop() {
  printf '%s\n' "[cassle_jax] $*" >&2
  exit 1
}

repository="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
# The oldest Python that runs CASSLE, and the newest one its requirements have wheels for.
oldest=311
newest=314

# Prints a version such as 312; fails where the command is absent or only a shim with nothing behind it.
version_of() { "$1" -c 'import sys; print("%d%02d" % sys.version_info[:2])' 2>/dev/null; }

dotted() { printf '%s.%s' "${1:0:1}" "$((10#${1:1}))"; }

can_make_environments() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

suits() { [ "$1" -ge "$oldest" ] && [ "$1" -le "$newest" ]; }

# Prints the newest suitable interpreter that can make a virtual environment, or stops and says what is missing.
find_python() {
  local candidate version best='' best_version=0 bare_version=0 seen=''
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    version="$(version_of "$candidate")" || continue
    seen+="${seen:+, }$candidate is $(dotted "$version")"
    suits "$version" || continue
    if ! can_make_environments "$candidate"; then
      [ "$version" -le "$bare_version" ] || bare_version="$version"
    elif [ "$version" -gt "$best_version" ]; then
      best="$candidate" best_version="$version"
    fi
  done
  if [ -z "$best" ] && [ "$bare_version" -gt 0 ]; then
    stop "Python $(dotted "$bare_version") cannot make virtual environments yet; run: sudo apt-get install -y python$(dotted "$bare_version")-venv"
  fi
  if [ -z "$best" ]; then
    stop "needs Python $(dotted "$oldest") to $(dotted "$newest"), found ${seen:-none};" \
      "on Debian 12 or Ubuntu 24.04 run: sudo apt-get install -y python3 python3-venv"
  fi
  command -v "$best"
}

# Sets environment and python, making .venv where no environment is active.
find_environment() {
  local version maker
  for environment in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
    if [ -z "$environment" ] || [ ! -x "$environment/bin/python" ]; then
      continue
    fi
    python="$environment/bin/python"
    version="$(version_of "$python")" || stop "the active environment $environment has a Python that does not start"
    suits "$version" ||
      stop "the active environment $environment has Python $(dotted "$version"); deactivate it, or activate one with Python $(dotted "$oldest") to $(dotted "$newest")"
    say "using the active environment $environment (Python $(dotted "$version"))"
    return
  done
  environment="$repository/.venv"
  python="$environment/bin/python"
  if version="$(version_of "$python")" && suits "$version"; then
    say "using $environment (Python $(dotted "$version"))"
    return
  fi
  maker="$(find_python)"
  say "making a virtual environment in $environment with $maker (Python $(dotted "$(version_of "$maker")"))"
  "$maker" -m venv --clear "$environment" || stop "could not make $environment with $maker -m venv"
}

# Installs requirements.txt unless exactly this text was installed here before.
install_requirements() {
  local stamp="$environment/.cassle_jax_requirements"
  if cmp -s "$repository/requirements.txt" "$stamp"; then
    return
  fi
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null ||
    stop "$environment has no pip; run: $python -m ensurepip"
  say "installing requirements.txt into $environment (1.2 GB on disk; half a minute to some minutes)"
  "$python" -m pip install --quiet --disable-pip-version-check --no-input -r "$repository/requirements.txt" ||
    stop "pip could not install requirements.txt into $environment; its message is above"
  cp "$repository/requirements.txt" "$stamp"
}

# glibc asks the kernel for large pages, which saves a CPU's training step the faults of small ones: up to a tenth of its time.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

# Two scripts started at once take turns, so that neither uses a half-finished installation of the other.
exec 9<"$repository/requirements.txt"
if command -v flock >/dev/null && ! flock --nonblock 9; then
  say "waiting for another script to finish installing"
  flock 9
fi
find_environment
install_requirements
exec 9<&-
