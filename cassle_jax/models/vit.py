"""The Vision Transformer of MoCo-v3, with timm's layout and names."""

import math
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from cassle_jax.checks import ConfigError, check_at_least
from cassle_jax.models.attention import attend

MLP_RATIO = 4
TEMPERATURE = 10_000.0
STAGES = 4

layer_norm = partial(nn.LayerNorm, epsilon=1e-6)
xavier_uniform = nn.initializers.xavier_uniform()
# Queries, keys and values are three square matrices, each xavier-uniform: ±√(6/(2·width)).
qkv_uniform = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
# A patch is one long row, not a sliding window.
patch_uniform = nn.initializers.xavier_uniform(in_axis=(0, 1, 2))


def sin_cos_positions(side: int, width: int) -> Float32[Array, "patches {width}"]:
    """Fixed positions of a side×side grid of patches, row after row: [sin r, cos r, sin c, cos c].

    With the patch's row r and column c counted from 0, each part holds width/4 frequencies
    10000^(−4i/width). MoCo-v3 calls the first half w and the second h, but lays the grid out so
    that w counts rows: its published weights have the row first, as here.
    """
    frequencies = TEMPERATURE ** -(jnp.arange(width // 4) / (width // 4))
    angles = jnp.arange(side)[:, None] * frequencies
    line = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    rows, columns = jnp.repeat(line, side, axis=0), jnp.tile(line, (side, 1))
    return jnp.concatenate([rows, columns], axis=1)


def resize_positions(
    positions: Float32[Array, "1 positions channels"], height: int, width: int
) -> Float32[Array, "1 {height*width+1} channels"]:
    """Resizes a square grid's positions, the class token's first, to a height×width grid.

    They are interpolated bicubically, antialiased where the grid shrinks, as in timm; the class
    token's position is unchanged.

    Raises:
        ValueError: if the given positions are not those of a square grid.
    """
    patches = positions.shape[1] - 1
    side = math.isqrt(patches)
    if side**2 != patches:
        raise ValueError(
            f"pos_embed has {patches} positions beside the class token's; "
            f"only square grids can be resized, such as {side}×{side}"
        )
    if (height, width) == (side, side):
        return positions
    grid = positions[:, 1:].reshape(1, side, side, -1)
    grid = jax.image.resize(grid, (1, height, width, grid.shape[-1]), "cubic")
    return jnp.concatenate([positions[:, :1], grid.reshape(1, height * width, -1)], axis=1)


class PatchEmbedding(nn.Module):
    """A frozen linear map of each patch: its parameters get no gradient, the images do.

    It is a patch_size×patch_size convolution of that stride, written as a matrix product.
    """

    width: int
    patch_size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns {self.width}"]:
        """Embeds the patches of `images`, whose sides are multiples of the patch size."""
        size = self.patch_size
        batch, height, width, channels = images.shape
        shape = (size, size, channels, self.width)
        kernel = self.param("kernel", patch_uniform, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)
        kernel, bias = jax.lax.stop_gradient((kernel.astype(self.dtype), bias.astype(self.dtype)))

        shape = (batch, height // size, size, width // size, size, channels)
        patches = images.astype(self.dtype).reshape(shape)
        return jnp.einsum("brycxi,yxio->brco", patches, kernel) + bias


class Attention(nn.Module):
    """Multi-head self-attention; the softmax is computed in float32."""

    heads: int
    dtype: DTypeLike
    flash: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Lets every token attend to all tokens."""
        width = x.shape[-1]
        linear = partial(nn.Dense, dtype=self.dtype)
        qkv = linear(3 * width, kernel_init=qkv_uniform, name="qkv")(x)
        qkv = qkv.reshape(*x.shape[:2], 3, self.heads, width // self.heads)
        attended = attend(*jnp.unstack(qkv, axis=2), flash=self.flash)
        return linear(width, kernel_init=xavier_uniform, name="proj")(attended.reshape(x.shape))


class FeedForward(nn.Module):
    """Linear → GELU (exact) → Linear on each token, four times as wide in between."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Maps each token separately."""
        width = x.shape[-1]
        linear = partial(nn.Dense, dtype=self.dtype, kernel_init=xavier_uniform)
        y = linear(MLP_RATIO * width, name="fc1")(x)
        return linear(width, name="fc2")(jax.nn.gelu(y, approximate=False))


class Block(nn.Module):
    """Attention and a feed-forward network, each with a LayerNorm before and a shortcut around."""

    heads: int
    dtype: DTypeLike
    flash: bool = True

    @nn.compact
    def __call__(
        self, x: Float32[Array, "batch tokens width"]
    ) -> Float32[Array, "batch tokens width"]:
        """Maps `x`; the sums stay in float32, as under PyTorch's mixed precision."""
        norm = partial(layer_norm, dtype=self.dtype)
        attention = Attention(self.heads, self.dtype, self.flash, name="attn")
        x = x + attention(norm(name="norm1")(x))
        return x + FeedForward(self.dtype, name="mlp")(norm(name="norm2")(x))


class VisionTransformer(nn.Module):
    """A Vision Transformer as MoCo-v3 trains it; its feature is the class token.

    Patch embedding and positions are parameters, so that checkpoints hold them, but keep their
    initial values: they get no gradient, and the optimizer must leave them alone too, weight decay
    included. The module sows the outputs that evaluation reads in the collection `intermediates`,
    at no cost unless the caller makes it mutable: `stem` (the patches as they enter the blocks),
    `layer1` … `layer4` (the patches after each quarter of the blocks, rounded up), both as feature
    maps without the class token, and `features`.

    Attributes:
        width: width of the tokens and features, a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: number of attention heads; MoCo-v3 uses 12 at width 384 too.
        patch_size: side of a patch in pixels.
        dtype: dtype the matrix products compute in; parameters, LayerNorm's statistics, softmax
            and the sums along the blocks are float32.
        remat: recompute each block's activations in the backward pass instead of storing them.
        flash_attention: use cuDNN's flash attention where the devices have it, see `attend`.
        frozen_parameters: names, at the top level of the parameters, that are never trained.

    References:
        Chen, Xie and He, An Empirical Study of Training Self-Supervised Vision Transformers, 2021,
        section 4 and appendix. Dosovitskiy et al., An Image is Worth 16x16 Words, 2021.
    """

    width: int
    depth: int
    heads: int
    patch_size: int = 16
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    flash_attention: bool = True

    frozen_parameters: ClassVar[tuple[str, ...]] = ("patch_embed", "pos_embed")

    def __post_init__(self):
        check_at_least("encoder.width", self.width, 1)
        check_at_least("encoder.depth", self.depth, 1)
        check_at_least("encoder.heads", self.heads, 1)
        check_at_least("encoder.patch_size", self.patch_size, 1)
        if self.width % 4:
            raise ConfigError(
                f"encoder.width={self.width} is not a multiple of 4, as sin-cos positions need; "
                f"use {self.width + -self.width % 4}"
            )
        if self.width % self.heads:
            divisors = [n for n in range(1, self.width + 1) if self.width % n == 0]
            raise ConfigError(
                f"encoder.heads={self.heads} does not divide encoder.width={self.width}; "
                f"use one of {divisors}"
            )
        super().__post_init__()

    @property
    def feature_width(self) -> int:
        """Width of the features."""
        return self.width

    def check_image_size(self, size: int, setting: str = "augment.size") -> None:
        """Refuses images with sides (`size` pixels, by `setting`) of no whole number of patches.

        Raises:
            ConfigError: the message names the nearest sizes that work.
        """
        below = size - size % self.patch_size
        if below == size > 0:
            return
        use = f"{below} or {below + self.patch_size}" if below else f"{self.patch_size}"
        raise ConfigError(
            f"{setting}={size} is not a multiple of encoder.patch_size={self.patch_size}; use {use}"
        )

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool
    ) -> Float32[Array, "batch {self.feature_width}"]:
        """Features of normalised images with any number of channels.

        Positions are those of the image size the parameters were initialised with, resized to the
        current grid.

        Args:
            images: one view of the batch, its sides multiples of the patch size.
            train: has no effect; every encoder takes it.

        Raises:
            ValueError: for sides that are not such multiples, or initial images that are oblong.
        """
        del train
        x, grid = self._tokens(images)
        self.sow("intermediates", "stem", _feature_map(x, grid))

        block = nn.remat(Block) if self.remat else Block
        ends = [math.ceil(stage * self.depth / STAGES) for stage in range(STAGES + 1)]
        for stage in range(STAGES):
            for index in range(ends[stage], ends[stage + 1]):
                x = block(self.heads, self.dtype, self.flash_attention, name=f"blocks_{index}")(x)
            self.sow("intermediates", f"layer{stage + 1}", _feature_map(x, grid))

        features = layer_norm(name="norm")(x[:, 0])
        self.sow("intermediates", "features", features)
        return features

    def _tokens(self, images):
        """Class token and patches with their positions, and the grid's height and width."""
        for size in images.shape[1:3]:
            self.check_image_size(size)
        patches = PatchEmbedding(self.width, self.patch_size, self.dtype, name="patch_embed")(
            images
        )
        batch, *grid, width = patches.shape
        token = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, width), jnp.float32)
        tokens = jnp.concatenate(
            [
                jnp.broadcast_to(token, (batch, 1, width)),
                patches.reshape(batch, -1, width).astype(jnp.float32),
            ],
            axis=1,
        )
        positions = jax.lax.stop_gradient(self._stored_positions(*grid))
        return tokens + resize_positions(positions, *grid), grid

    def _stored_positions(self, height, width):
        # `param` would refuse positions of another grid than the images'.
        if self.has_variable("params", "pos_embed"):
            return self.get_variable("params", "pos_embed")
        if height != width:
            raise ValueError(
                f"the encoder's positions cannot start from images of {height}×{width} patches; "
                f"initialise with square images"
            )
        table = sin_cos_positions(height, self.width)
        return self.param("pos_embed", lambda _: jnp.pad(table, ((1, 0), (0, 0)))[None])


def _feature_map(tokens, grid):
    """The patches' tokens, arranged as in the image."""
    return tokens[:, 1:].reshape(len(tokens), *grid, -1)
