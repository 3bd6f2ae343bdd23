"""The former name of `python -m cassle_jax.sweep`; works from any folder."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
print("note: python launch/sweep.py is now python -m cassle_jax.sweep", file=sys.stderr)
runpy.run_module("cassle_jax.sweep", run_name="__main__", alter_sys=True)
