"""ResNets, wide ones included, with torchvision's depths, layout and names."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from cassle_jax.checks import check_at_least
from cassle_jax.models.batch_norm import BatchNorm
from cassle_jax.models.convolve import convolve
from cassle_jax.models.initializers import fan_in_uniform
from cassle_jax.models.pooling import max_pool
from cassle_jax.models.stages import WithStages


def convolution(features: int, size: int, stride: int = 1, **kwargs) -> nn.Conv:
    """A size×size convolution without bias, padded by size // 2 on every side."""
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=False,
        kernel_init=fan_in_uniform,
        conv_general_dilated=convolve,
        **kwargs,
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut: the block of ResNet-18 and ResNet-34."""

    width: int
    stride: int
    dtype: DTypeLike
    axis_name: str | None
    expansion = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch height_out width_out channels_out"]:
        """Maps `x`; `train` normalises by the batch's statistics, and records them."""
        conv = partial(convolution, dtype=self.dtype)
        norm = partial(BatchNorm, axis_name=self.axis_name, dtype=self.dtype)
        y = conv(self.width, 3, self.stride, name="conv1")(x)
        y = jax.nn.relu(norm(name="bn1")(y, train))
        y = conv(self.width, 3, name="conv2")(y)
        y = norm(scale_init=nn.initializers.zeros, name="bn2")(y, train)
        return jax.nn.relu(y + _shortcut(x, y, self.stride, conv, norm, train))


class Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride) and 1×1 convolutions with a shortcut: ResNet-50's block.

    The first two have `widening` times `width` channels, the last one four times `width`.
    """

    width: int
    stride: int
    dtype: DTypeLike
    axis_name: str | None
    widening: int = 1
    expansion = 4

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch height_out width_out channels_out"]:
        """Maps `x`; `train` normalises by the batch's statistics, and records them."""
        conv = partial(convolution, dtype=self.dtype)
        norm = partial(BatchNorm, axis_name=self.axis_name, dtype=self.dtype)
        inner = self.widening * self.width
        y = conv(inner, 1, name="conv1")(x)
        y = jax.nn.relu(norm(name="bn1")(y, train))
        y = conv(inner, 3, self.stride, name="conv2")(y)
        y = jax.nn.relu(norm(name="bn2")(y, train))
        y = conv(self.width * self.expansion, 1, name="conv3")(y)
        y = norm(scale_init=nn.initializers.zeros, name="bn3")(y, train)
        return jax.nn.relu(y + _shortcut(x, y, self.stride, conv, norm, train))


def _shortcut(x, y, stride, conv, norm, train):
    """`x` itself, or projected where its shape differs from that of the block's result `y`."""
    if stride == 1 and x.shape[-1] == y.shape[-1]:
        return x
    x = conv(y.shape[-1], 1, stride, name="downsample_0")(x)
    return norm(name="downsample_1")(x, train)


ARCHITECTURES = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """A residual network (v1.5: the stride is in the 3×3) up to its global average pooling.

    The module sows the outputs that evaluation reads in the collection `intermediates`, at no cost
    unless the caller makes it mutable: `stem`, `layer1` … `layer4` (feature maps) and `features`.

    Attributes:
        depth: 18, 34, 50, 101 or 152.
        width: channels of the stem and, where `widening` is 1, of the first stage's 3×3
            convolutions.
        small_images: a 3×3 stem with stride 1 and no max-pooling, for images of about 32 pixels.
        dtype: dtype the convolutions compute in; parameters are float32.
        axis_name: mapped axis over which BatchNorm statistics are synchronised.
        remat: recompute each block's activations in the backward pass instead of storing them.
        widening: factor on the channels of the bottlenecks' 3×3 convolutions, 2 in a wide ResNet;
            the features keep their width.

    References:
        He et al., Deep Residual Learning for Image Recognition, 2016, table 1. Zagoruyko and
        Komodakis, Wide Residual Networks, 2016.
    """

    depth: int
    width: int = 64
    small_images: bool = False
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None
    remat: bool = False
    widening: int = 1

    def __post_init__(self):
        check_at_least("encoder.width", self.width, 1)
        check_at_least("widening", self.widening, 1)
        if self.depth not in ARCHITECTURES:
            raise ValueError(
                f"depth={self.depth} is no known ResNet; use one of {[*ARCHITECTURES]}"
            )
        if self.widening != 1 and ARCHITECTURES[self.depth][0] is BasicBlock:
            raise ValueError(f"widening={self.widening} needs a depth of at least 50")
        super().__post_init__()

    @property
    def feature_width(self) -> int:
        """Width of the features."""
        return self.stage_widths[-1]

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Width of the pooled features per stage."""
        block, stages = ARCHITECTURES[self.depth]
        return tuple(self.width * 2**stage * block.expansion for stage in range(len(stages)))

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        train: bool,
        stages: tuple[int, ...] = (),
    ) -> Float32[Array, "batch {self.feature_width}"] | WithStages:
        """Features of normalised images with any number of channels.

        Args:
            images: one view of the batch.
            train: normalise by the batch's statistics, and record them.
            stages: stages, from 1, whose outputs' means over all places are returned as well.
        """
        x = self._stem(images, train)
        self.sow("intermediates", "stem", x)

        block, numbers = ARCHITECTURES[self.depth]
        if self.remat:
            block = nn.remat(block, static_argnums=(2,))
        if self.widening != 1:
            block = partial(block, widening=self.widening)
        earlier = {}
        for stage, blocks in enumerate(numbers):
            for index in range(blocks):
                x = block(
                    width=self.width * 2**stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f"layer{stage + 1}_{index}",
                )(x, train)
            self.sow("intermediates", f"layer{stage + 1}", x)
            if stage + 1 in stages:
                earlier[stage + 1] = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)

        features = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        self.sow("intermediates", "features", features)
        return (features, earlier) if stages else features

    def _stem(self, images, train):
        size, stride = (3, 1) if self.small_images else (7, 2)
        x = convolution(self.width, size, stride, dtype=self.dtype, name="conv1")(images)
        x = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name="bn1")(x, train)
        x = jax.nn.relu(x)
        if self.small_images:
            return x
        return max_pool(x)
