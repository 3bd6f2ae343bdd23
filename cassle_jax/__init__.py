"""CASSLE for JAX: self-supervised pretraining whose projector knows how each view was augmented."""

import sys

from cassle_jax.cpu_fusions import switch_off_ynnpack
from cassle_jax.extras import explain_missing_packages

__version__ = "0.1.0"

if "runpy" in sys.modules:  # python -m cassle_jax.…
    explain_missing_packages()
switch_off_ynnpack()
