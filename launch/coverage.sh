#!/usr/bin/env bash
# Runs the tests that launch/test.sh runs without --all, and lists the lines of cassle_jax/ that they leave out.
# A line counts if any process reaches it. Fails if a test fails, if tests/uncovered.txt does not excuse a line, or if it
# excuses a line that no longer exists.
# Usage: bash launch/coverage.sh [--of FOLDER_OF_CASSLE_JAX] [options of pytest, such as tests/evaluation]

# shellcheck source=launch/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

of=cassle_jax
if [ "${1:-}" = --of ]; then
  of="${2:?--of needs a folder, such as cassle_jax/report}"
  shift 2
fi
cd -- "$repository"
[ -d "$of" ] || stop "--of $of is not a folder; give one such as cassle_jax/report"
"$python" -c 'import coverage' 2>/dev/null || stop "needs coverage; run: $python -m pip install 'coverage>=7.10,<8'"
data="$(mktemp -d "${TMPDIR:-/tmp}/cassle_jax-coverage-XXXXXX")"
trap 'rm -rf "$data"' EXIT
export COVERAGE_FILE="$data/lines"

status=0
say "running: python -m coverage run -m pytest -n 2 --dist worksteal -m 'not exhaustive' $*"
"$python" -m coverage run -m pytest -n 2 --dist worksteal -m "not exhaustive" "$@" || status=$?
"$python" -m coverage combine --quiet
"$python" launch/uncovered.py "$of" || status=$?
exit "$status"
