#!/usr/bin/env bash
# Installs what CASSLE needs and runs the table `transfer`: plain, CASSLE, leak-free and AugSelf of three methods, with seeds, in a time budget.
# Usage: bash launch/transfer.sh [options of python -m cassle_jax.transfer]

# shellcheck source=launch/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

say "running: python -m cassle_jax.transfer $*"
# PYTHONPATH and -P instead of cd: relative paths among the options keep meaning what the caller meant.
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -P -m cassle_jax.transfer "$@"
