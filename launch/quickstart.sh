#!/usr/bin/env bash
# Installs CASSLE's requirements and runs the quickstart: plain and CASSLE pretraining on drawn motifs, side by side.
# Usage: bash launch/quickstart.sh [options of python -m cassle_jax.quickstart]

# shellcheck source=launch/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

say "running: python -m cassle_jax.quickstart $*"
# PYTHONPATH and -P instead of cd, so that relative paths among the options keep the caller's meaning.
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -P -m cassle_jax.quickstart "$@"
