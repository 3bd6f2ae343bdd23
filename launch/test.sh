#!/usr/bin/env bash
# Installs CASSLE's requirements and runs its tests, two at a time; --all adds the repetitions marked exhaustive.
# Usage: bash launch/test.sh [--all] [options of pytest, such as tests/evaluation or -k knn]

# shellcheck source=launch/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

if [ "${1:-}" = --all ]; then shift; else set -- -m "not exhaustive" "$@"; fi
cd -- "$repository"
# Rewriting the tests and checking the package's types takes 15 s of each process, unless Python keeps what it has compiled.
unset PYTHONDONTWRITEBYTECODE
say "running: python -m pytest -n 2 --dist worksteal $*"
exec "$python" -m pytest -n 2 --dist worksteal "$@"
