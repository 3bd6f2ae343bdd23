"""Turns stored images into batches of uint8 canvases: sources, decoding, and the Grain pipeline."""

from cassle_jax.data.damaged import DamagedLog, TooManyDamaged
from cassle_jax.data.decode import DamagedImage, decode
from cassle_jax.data.errors import DataError
from cassle_jax.data.factors import COLOUR, CONTENT, FORM, Drawn, Factor
from cassle_jax.data.folder import check_outside
from cassle_jax.data.motifs import Motifs
from cassle_jax.data.opening import Feed, open_feed, open_source
from cassle_jax.data.pipeline import (
    BatchIterator,
    evaluation_batches,
    steps_per_epoch,
    training_batches,
)
from cassle_jax.data.scenes import Scenes
from cassle_jax.data.sources import Record, Source, names_of

__all__ = [
    "COLOUR",
    "CONTENT",
    "FORM",
    "BatchIterator",
    "DamagedImage",
    "DamagedLog",
    "DataError",
    "Drawn",
    "Factor",
    "Feed",
    "Motifs",
    "Record",
    "Scenes",
    "Source",
    "TooManyDamaged",
    "check_outside",
    "decode",
    "evaluation_batches",
    "names_of",
    "open_feed",
    "open_source",
    "steps_per_epoch",
    "training_batches",
]
