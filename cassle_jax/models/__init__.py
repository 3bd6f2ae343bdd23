"""Encoders, multilayer perceptrons and the conditioned projector, as Flax Linen modules."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from cassle_jax.models.batch_norm import BatchNorm
from cassle_jax.models.conditioning import (
    INJECTIONS,
    TREATMENTS,
    ConditionedProjector,
    ImageConditioner,
    check_conditioning,
)
from cassle_jax.models.mlp import MLP
from cassle_jax.models.resnet import ResNet

ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(ResNet, depth=18),
    "resnet34": partial(ResNet, depth=34),
    "resnet50": partial(ResNet, depth=50),
}


def make_encoder(
    name: str,
    *,
    width: int = 64,
    small_images: bool = False,
    dtype: DTypeLike = jnp.float32,
    axis_name: str | None = None,
    remat: bool = False,
) -> nn.Module:
    """The encoder called `name`, a key of `ENCODERS`; the settings are those of `ResNet`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in ENCODERS:
        raise ValueError(f"encoder={name!r} is unknown; use one of {sorted(ENCODERS)}")
    return ENCODERS[name](
        width=width, small_images=small_images, dtype=dtype, axis_name=axis_name, remat=remat
    )


__all__ = [
    "ENCODERS",
    "INJECTIONS",
    "MLP",
    "TREATMENTS",
    "BatchNorm",
    "ConditionedProjector",
    "ImageConditioner",
    "ResNet",
    "check_conditioning",
    "make_encoder",
]
