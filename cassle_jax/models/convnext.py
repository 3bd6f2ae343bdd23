"""ConvNeXt, with timm's layout and names."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from cassle_jax.checks import ConfigError, check_at_least
from cassle_jax.models.stages import WithStages

KERNEL = 7
MLP_RATIO = 4
LEAST_SIZE = 32  # pixels; the last stage has one place for them
LAYER_SCALE = 1e-6

layer_norm = partial(nn.LayerNorm, epsilon=1e-6)
normal = nn.initializers.normal(0.02)  # the published one is truncated, at 100 standard deviations


class Block(nn.Module):
    """A depthwise 7×7 convolution and a feed-forward network, with a scaled shortcut.

    There is no stochastic depth.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float32[Array, "batch height width channels"]
    ) -> Float32[Array, "batch height width channels"]:
        """Maps `x`; the sums stay in float32, as under PyTorch's mixed precision."""
        channels = x.shape[-1]
        linear = partial(nn.Dense, dtype=self.dtype, kernel_init=normal)
        y = nn.Conv(
            channels,
            (KERNEL, KERNEL),
            padding=KERNEL // 2,
            feature_group_count=channels,
            dtype=self.dtype,
            kernel_init=normal,
            name="conv_dw",
        )(x)
        y = layer_norm(dtype=self.dtype, name="norm")(y)
        y = linear(MLP_RATIO * channels, name="mlp_fc1")(y)
        y = linear(channels, name="mlp_fc2")(jax.nn.gelu(y, approximate=False))
        scale = nn.initializers.constant(LAYER_SCALE)
        return x + self.param("gamma", scale, (channels,), jnp.float32) * y


class ConvNeXt(nn.Module):
    """A ConvNeXt up to the LayerNorm of its pooled features.

    The module sows the outputs that evaluation reads in the collection `intermediates`, at no cost
    unless the caller makes it mutable: `stem`, `layer1` … `layer4` (feature maps) and `features`.

    Attributes:
        depths: number of blocks per stage; there are four stages.
        width: channels of the stem and the first stage; every stage has twice those before it.
        dtype: dtype the convolutions and matrix products compute in; parameters, LayerNorm's
            statistics and the sums along the blocks are float32.
        remat: recompute each block's activations in the backward pass instead of storing them.

    References:
        Liu et al., A ConvNet for the 2020s, 2022, section 2 and appendix A.
    """

    depths: tuple[int, int, int, int]
    width: int = 96
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self):
        check_at_least("encoder.width", self.width, 1)
        if len(self.depths) != 4 or min(self.depths) < 1:
            raise ConfigError(f"depths={self.depths} are not four numbers of blocks, 1 or more")
        super().__post_init__()

    @property
    def feature_width(self) -> int:
        """Width of the features."""
        return self.stage_widths[-1]

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Width of the pooled features per stage."""
        return tuple(self.width * 2**stage for stage in range(len(self.depths)))

    def check_image_size(self, size: int, setting: str = "augment.size") -> None:
        """Refuses images whose sides (`size` pixels, by `setting`) are too small.

        Raises:
            ConfigError: the message names the least size.
        """
        if size < LEAST_SIZE:
            raise ConfigError(
                f"{setting}={size} is too small for a ConvNeXt; use at least {LEAST_SIZE}"
            )

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        train: bool,
        stages: tuple[int, ...] = (),
    ) -> Float32[Array, "batch {self.feature_width}"] | WithStages:
        """Features of normalised images with any number of channels.

        Args:
            images: one view of the batch, with sides of at least 32 pixels.
            train: has no effect; every encoder takes it.
            stages: stages, from 1, whose outputs' means over all places are returned as well.

        Raises:
            ConfigError: for smaller images.
        """
        del train
        self.check_image_size(min(images.shape[1:3]))
        norm = partial(layer_norm, dtype=jnp.float32)
        block = nn.remat(Block) if self.remat else Block
        x = norm(name="stem_1")(self._shrink(images, self.width, 4, "stem_0"))
        self.sow("intermediates", "stem", x)
        earlier = {}
        for stage, depth in enumerate(self.depths):
            if stage > 0:
                name = f"stages_{stage}_downsample"
                x = norm(name=f"{name}_0")(x)
                x = self._shrink(x, self.width * 2**stage, 2, f"{name}_1").astype(jnp.float32)
            for index in range(depth):
                x = block(self.dtype, name=f"stages_{stage}_blocks_{index}")(x)
            self.sow("intermediates", f"layer{stage + 1}", x)
            if stage + 1 in stages:
                earlier[stage + 1] = x.mean(axis=(1, 2))
        features = norm(name="head_norm")(x.mean(axis=(1, 2)))
        self.sow("intermediates", "features", features)
        return (features, earlier) if stages else features

    def _shrink(self, x, channels, factor, name):
        """A convolution of patches that do not overlap."""
        return nn.Conv(
            channels,
            (factor, factor),
            strides=factor,
            padding="VALID",
            dtype=self.dtype,
            kernel_init=normal,
            name=name,
        )(x)
