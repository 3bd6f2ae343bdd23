"""Selects stages of an encoder: their pooled features, and the widths of these."""

from collections.abc import Sequence

from flax import linen as nn
from jaxtyping import Array, Float, Float32

from cassle_jax.checks import ConfigError

WithStages = tuple[Float32[Array, "batch _"], dict[int, Float32[Array, "batch _"]]]
"""An encoder's features, and those of the requested earlier stages."""


def features_by_stage(
    encoder: nn.Module,
    images: Float[Array, "batch height width channels"],
    train: bool,
    stages: Sequence[int],
) -> dict[int, Float[Array, "batch _"]]:
    """The features by stage, from one pass through the encoder; 0 for the encoder's own.

    Args:
        encoder: the encoder, bound; it takes the stages as a third argument if it has any.
        images: one view of the batch.
        train: whether the encoder is in training mode.
        stages: the earlier stages, counted from 1; a ViT's are its blocks.

    Raises:
        ValueError: features are not one row per image, such as maps that were not pooled.
    """
    if stages:
        features, earlier = encoder(images, train, tuple(stages))
        found = {0: features, **earlier}
    else:
        found = {0: encoder(images, train)}
    for features in found.values():
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(
                f"the encoder returns features of shape {features.shape} for {len(images)} images; "
                f"return [{len(images)}, features], as by a mean over all places"
            )
    return found


def earlier_stage(encoder: nn.Module, stage: int, setting: str) -> int:
    """The stage that a setting names; 0 for the last one, whose features are the encoder's own.

    Raises:
        ConfigError: the encoder has no such stage; the message names the setting.
    """
    if stage == 0:
        return 0
    last = len(getattr(encoder, "stage_widths", ())) or 1
    if stage not in range(1, last + 1):
        if last == 1:
            raise ConfigError(f"{setting}={stage}: this encoder has no earlier stages; use 0")
        raise ConfigError(
            f"{setting}={stage} is not a stage of this encoder; use 1 to {last}, or 0 for the "
            "last one"
        )
    return stage % last


def width_at(encoder: nn.Module, stage: int) -> int:
    """Width of the features of an earlier stage, or of the encoder's own for 0."""
    return encoder.stage_widths[stage - 1] if stage else encoder.feature_width
