"""The tables of methods and of auxiliary objectives."""

from cassle_jax.methods.augself import AugSelf
from cassle_jax.methods.auxiliary import Auxiliary, Canvases, Features, Head
from cassle_jax.methods.barlow_twins import BarlowTwins
from cassle_jax.methods.base import (
    Encoded,
    HeadShape,
    Method,
    Moment,
    Networks,
    Progress,
    Step,
    TrainingViews,
    ViewBatch,
)
from cassle_jax.methods.byol import BYOL
from cassle_jax.methods.equimod import EquiMod
from cassle_jax.methods.essl import ESSL
from cassle_jax.methods.moco_v2 import MoCoV2
from cassle_jax.methods.moco_v3 import MoCoV3
from cassle_jax.methods.sie import SIE
from cassle_jax.methods.simclr import SimCLR
from cassle_jax.methods.simsiam import SimSiam
from cassle_jax.methods.stl import STL
from cassle_jax.methods.swav import SwAV
from cassle_jax.methods.vicreg import VICReg

METHODS: dict[str, type[Method]] = {
    "barlow_twins": BarlowTwins,
    "byol": BYOL,
    "moco_v2": MoCoV2,
    "moco_v3": MoCoV3,
    "simclr": SimCLR,
    "simsiam": SimSiam,
    "swav": SwAV,
    "vicreg": VICReg,
}

AUXILIARIES: dict[str, type[Auxiliary]] = {
    each.name: each for each in (AugSelf, EquiMod, ESSL, SIE, STL)
}

__all__ = [
    "AUXILIARIES",
    "ESSL",
    "METHODS",
    "SIE",
    "STL",
    "AugSelf",
    "Auxiliary",
    "Canvases",
    "Encoded",
    "EquiMod",
    "Features",
    "Head",
    "HeadShape",
    "Method",
    "Moment",
    "Networks",
    "Progress",
    "Step",
    "TrainingViews",
    "ViewBatch",
]
