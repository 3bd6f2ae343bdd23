#!/usr/bin/env bash
# Installs CASSLE's requirements and runs the table `transfer` within a time budget: plain, AugSelf, CASSLE, leak-free and
# leak-free + plain branch, each for three methods and several seeds.
# Usage: bash launch/transfer.sh [options of python -m cassle_jax.transfer]

# shellcheck source=launch/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

say "running: python -m cassle_jax.transfer $*"
# PYTHONPATH and -P instead of cd, so that relative paths among the options keep the caller's meaning.
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -P -m cassle_jax.transfer "$@"
