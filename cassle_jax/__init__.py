"""CASSLE for JAX: self-supervised pretraining whose projector knows how each view was augmented."""

import sys

from cassle_jax.extras import explain_failed_starts

if "runpy" in sys.modules:  # python -m cassle_jax.…
    explain_failed_starts()  # also those of the imports below

from cassle_jax.cpu_fusions import switch_off_ynnpack

__version__ = "0.1.0"

switch_off_ynnpack()
