"""Draws, applies and describes augmentations on the accelerator.

Three pure functions of ONE image, batched by ``jax.vmap``: ``draw`` makes every random choice,
``apply`` carries them out, ``describe`` returns descriptors; ``augment`` draws and applies.
"""

from cassle_jax.augment.apply import View, apply, augment, denormalize
from cassle_jax.augment.describe import (
    CASSLE_DESCRIPTORS,
    LEAK_FREE_DESCRIPTORS,
    check_descriptors,
    concatenate,
    describe,
    descriptor_width,
    difference,
    identity_descriptor,
    identity_difference,
)
from cassle_jax.augment.descriptors import DESCRIPTORS, PALETTE, Descriptor
from cassle_jax.augment.draw import ViewParams, draw
from cassle_jax.augment.resample import center_view
from cassle_jax.augment.spec import (
    CHANCES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    RARE,
    STL10_MEAN,
    STL10_STD,
    SWITCHES,
    AugmentSpec,
)

__all__ = [
    "CASSLE_DESCRIPTORS",
    "CHANCES",
    "DESCRIPTORS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "LEAK_FREE_DESCRIPTORS",
    "PALETTE",
    "RARE",
    "STL10_MEAN",
    "STL10_STD",
    "SWITCHES",
    "AugmentSpec",
    "Descriptor",
    "View",
    "ViewParams",
    "apply",
    "augment",
    "center_view",
    "check_descriptors",
    "concatenate",
    "denormalize",
    "describe",
    "descriptor_width",
    "difference",
    "draw",
    "identity_descriptor",
    "identity_difference",
]
