"""CASSLE for JAX: self-supervised pretraining whose projector knows how each view was augmented."""

from cassle_jax.cpu_fusions import switch_off_ynnpack

__version__ = "0.1.0"

switch_off_ynnpack()
