#!/usr/bin/env bash
# Installs what CASSLE needs and runs its tests, two at a time.
# Usage: bash launch/test.sh [options of pytest, such as tests/evaluation or -k knn]

# shellcheck source=launch/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

cd -- "$repository"
say "running: python -m pytest -n 2 --dist worksteal $*"
exec "$python" -m pytest -n 2 --dist worksteal "$@"
