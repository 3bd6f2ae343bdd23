"""Encoders, multilayer perceptrons and the conditioned projector, as Flax Linen modules."""

from collections.abc import Callable, Mapping
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from cassle_jax.checks import LARGEST_SIDE, WIDEST, ConfigError, check_at_least, check_one_of
from cassle_jax.models.batch_norm import BatchNorm
from cassle_jax.models.bilinear import Bilinear
from cassle_jax.models.conditioning import (
    INJECTIONS,
    TREATMENTS,
    ConditionedProjector,
    ImageConditioner,
    check_conditioning,
)
from cassle_jax.models.convnext import ConvNeXt
from cassle_jax.models.mlp import MLP
from cassle_jax.models.resnet import ResNet
from cassle_jax.models.stages import earlier_stage, features_by_stage, width_at
from cassle_jax.models.vit import VisionTransformer

ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(ResNet, depth=18),
    "resnet34": partial(ResNet, depth=34),
    "resnet50": partial(ResNet, depth=50),
    "resnet101": partial(ResNet, depth=101),
    "resnet152": partial(ResNet, depth=152),
    "wide_resnet50_2": partial(ResNet, depth=50, widening=2),
    "wide_resnet101_2": partial(ResNet, depth=101, widening=2),
    "convnext_tiny": partial(ConvNeXt, depths=(3, 3, 9, 3)),
    "convnext_small": partial(ConvNeXt, depths=(3, 3, 27, 3)),
    "convnext_base": partial(ConvNeXt, depths=(3, 3, 27, 3), width=128),
    "vit_tiny": partial(VisionTransformer, width=192, depth=12, heads=3),
    "vit_small": partial(VisionTransformer, width=384, depth=12, heads=12),
    "vit_base": partial(VisionTransformer, width=768, depth=12, heads=12),
    "vit_large": partial(VisionTransformer, width=1024, depth=24, heads=16),
    "vit_huge": partial(VisionTransformer, width=1280, depth=32, heads=16),
    "vit_giant": partial(VisionTransformer, width=1536, depth=40, heads=24),
}


def make_encoder(
    name: str,
    *,
    width: int = 0,
    small_images: bool = False,
    patch_size: int = 16,
    heads: int = 0,
    registers: int = 0,
    layer_scale: float = 0.0,
    swiglu: bool = False,
    rotary: bool = False,
    dtype: DTypeLike = jnp.float32,
    axis_name: str | None = None,
    remat: bool = False,
    flash_attention: bool = True,
) -> nn.Module:
    """Makes the encoder called `name`, a key of `ENCODERS`.

    Args:
        name: name of the architecture.
        width: width of a convolutional network's stem or of a Vision Transformer; 0 for the
            architecture's own.
        small_images: gives a ResNet a stem for images of about 32 pixels.
        patch_size: side of a Vision Transformer's patch, in pixels.
        heads: attention heads of a Vision Transformer; 0 for the architecture's own.
        registers: further learnt tokens of a Vision Transformer.
        layer_scale: initial layer scale of a Vision Transformer; 0 for none.
        swiglu: gives a Vision Transformer gated feed-forward networks.
        rotary: gives a Vision Transformer rotary positions.
        dtype: dtype the layers compute in.
        axis_name: mapped axis over which a ResNet's BatchNorm is synchronised.
        remat: recompute activations in the backward pass instead of storing them.
        flash_attention: let a Vision Transformer use cuDNN's where the devices have it.

    Raises:
        ConfigError: for an unknown name, or a setting that the architecture lacks.
    """
    check_one_of("encoder.name", name, ENCODERS)
    check_at_least("encoder.width", width, 0, WIDEST)
    check_at_least("encoder.patch_size", patch_size, 1, LARGEST_SIDE)
    check_at_least("encoder.heads", heads, 0, WIDEST)
    of_vit = {"heads": heads, "registers": registers, "layer_scale": layer_scale}
    of_vit |= {"swiglu": swiglu, "rotary": rotary}
    of_vit = {setting: value for setting, value in of_vit.items() if value}
    _check_has(name, of_vit, small_images)
    settings = {"dtype": dtype, "remat": remat} | ({"width": width} if width else {})
    if name.startswith("vit"):
        settings |= {"patch_size": patch_size, "flash_attention": flash_attention, **of_vit}
    elif not name.startswith("convnext"):
        settings |= {"small_images": small_images, "axis_name": axis_name}
    return ENCODERS[name](**settings)


def _check_has(name: str, of_vit: Mapping[str, int | float], small_images: bool) -> None:
    """Refuses settings that the architecture lacks."""
    vit = name.startswith("vit")
    if of_vit and not vit:
        setting, value = next(iter(of_vit.items()))
        raise ConfigError(
            f"encoder.{setting}={value} does not go with encoder.name={name!r}; "
            f"use a ViT, or {type(value)()}"
        )
    if small_images and (vit or name.startswith("convnext")):
        instead = "encoder.patch_size=4" if vit else "a ResNet"
        raise ConfigError(
            f"encoder.small_images=True does not go with encoder.name={name!r}; "
            f"use {instead} for small images"
        )


def check_image_size(encoder: nn.Module, size: int, setting: str) -> None:
    """Refuses images whose sides (`size` pixels, by `setting`) an encoder does not take.

    Raises:
        ConfigError: the message names sizes that work.
    """
    if hasattr(encoder, "check_image_size"):
        encoder.check_image_size(size, setting)


__all__ = [
    "ENCODERS",
    "INJECTIONS",
    "MLP",
    "TREATMENTS",
    "BatchNorm",
    "Bilinear",
    "ConditionedProjector",
    "ConvNeXt",
    "ImageConditioner",
    "ResNet",
    "VisionTransformer",
    "check_conditioning",
    "check_image_size",
    "earlier_stage",
    "features_by_stage",
    "make_encoder",
    "width_at",
]
