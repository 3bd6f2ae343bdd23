"""CASSLE for JAX: self-supervised pretraining whose projector knows how each view was augmented."""

__version__ = "0.1.0"
