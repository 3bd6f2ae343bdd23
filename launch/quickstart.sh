#!/usr/bin/env bash
# Installs what CASSLE needs and runs the quickstart: plain and CASSLE pretraining on drawn motifs, side by side.
# Usage: bash launch/quickstart.sh [options of python -m cassle_jax.quickstart]

# shellcheck source=launch/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

say "running: python -m cassle_jax.quickstart $*"
# PYTHONPATH and -P instead of cd: relative paths among the options keep meaning what the caller meant.
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -P -m cassle_jax.quickstart "$@"
