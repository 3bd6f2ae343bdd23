"""The table of methods and how one is put together with an encoder, a conditioning and AugSelf."""

from cassle_jax.methods.augself import AugSelf
from cassle_jax.methods.base import (
    Encoded,
    HeadShape,
    Method,
    Networks,
    TrainingViews,
    ViewBatch,
)
from cassle_jax.methods.moco_v2 import MoCoV2
from cassle_jax.methods.simclr import SimCLR

METHODS: dict[str, type[Method]] = {
    "moco_v2": MoCoV2,
    "simclr": SimCLR,
}

__all__ = [
    "METHODS",
    "AugSelf",
    "Encoded",
    "HeadShape",
    "Method",
    "Networks",
    "TrainingViews",
    "ViewBatch",
]
