"""Draws, applies and describes augmentations on the accelerator.

Three pure functions of ONE image, batched by ``jax.vmap``: ``draw`` makes every random choice,
``apply`` carries them out, ``describe`` says what was done; ``augment`` is the first two in one.
"""

from cassle_jax.augment.apply import View, apply, augment, denormalize
from cassle_jax.augment.describe import (
    CASSLE_DESCRIPTORS,
    COMPONENTS,
    DESCRIPTOR_SIZES,
    FROM_IMAGE,
    LEAK_FREE_DESCRIPTORS,
    PALETTE,
    check_descriptors,
    concatenate,
    describe,
    descriptor_width,
    difference,
    identity_descriptor,
    identity_difference,
)
from cassle_jax.augment.draw import ViewParams, draw
from cassle_jax.augment.resample import center_view
from cassle_jax.augment.spec import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    STL10_MEAN,
    STL10_STD,
    AugmentSpec,
)

__all__ = [
    "CASSLE_DESCRIPTORS",
    "COMPONENTS",
    "DESCRIPTOR_SIZES",
    "FROM_IMAGE",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "LEAK_FREE_DESCRIPTORS",
    "PALETTE",
    "STL10_MEAN",
    "STL10_STD",
    "AugmentSpec",
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
