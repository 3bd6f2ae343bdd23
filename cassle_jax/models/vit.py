"""The Vision Transformer of MoCo-v3, with timm's layout and names, and DINOv2's options."""

import math
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from cassle_jax.checks import LONGEST, WIDEST, ConfigError, check_at_least
from cassle_jax.models.attention import attend
from cassle_jax.models.stages import WithStages

MLP_RATIO = 4
TEMPERATURE = 10_000.0
STAGES = 4

EPSILON, ROTARY_EPSILON = 1e-6, 1e-5  # LayerNorm's; the second is DINOv3's
LONGEST_PERIOD = 100.0
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
    frequencies = TEMPERATURE ** -(jnp.arange(width // 4, dtype=jnp.float32) / (width // 4))
    angles = jnp.arange(side)[:, None] * frequencies
    line = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    rows, columns = jnp.repeat(line, side, axis=0), jnp.tile(line, (side, 1))
    return jnp.concatenate([rows, columns], axis=1)


def resize_positions(
    positions: Float32[Array, "1 positions channels"],
    height: int,
    width: int,
    offset: float | None = None,
) -> Float32[Array, "1 {height*width+1} channels"]:
    """Resizes a square grid's positions, the class token's first, to a height×width grid.

    They are interpolated bicubically; the class token's position is unchanged.

    Args:
        positions: the positions.
        height: rows of the new grid.
        width: its columns.
        offset: `None` interpolates as timm, antialiased where the grid shrinks. A number, as 0.1 in
            DINOv2's first models, interpolates as PyTorch, without antialiasing, to a grid larger
            by it.

    Raises:
        ValueError: if the given positions are not those of a square grid.
    """
    patches = positions.shape[1] - 1
    side = max(math.isqrt(patches), 1)
    if side**2 != patches:
        raise ValueError(
            f"pos_embed has {patches} positions beside the class token's; "
            f"only square grids can be resized, such as {side}×{side}"
        )
    if (height, width) == (side, side):
        return positions
    grid = positions[:, 1:].reshape(1, side, side, -1)
    if offset is None:
        grid = jax.image.resize(grid, (1, height, width, grid.shape[-1]), "cubic")
    else:
        rows, columns = (_bicubic(side, size, offset) for size in (height, width))
        grid = jnp.einsum("yr,xc,brcd->byxd", rows, columns, grid, precision="highest")
    return jnp.concatenate([positions[:, :1], grid.reshape(1, height * width, -1)], axis=1)


def _bicubic(side: int, size: int, offset: float) -> Float32[np.ndarray, "size side"]:
    """Weights that interpolate a line of `side` values to `size` values, as PyTorch does.

    The cubic's parameter is −3/4. Beyond an end, its value is repeated.
    """
    places = (np.arange(size) + 0.5) * side / (size + offset) - 0.5
    near = np.floor(places).astype(int)[:, None] + np.arange(-1, 3)
    d = np.abs(places[:, None] - near)
    inner = (1.25 * d - 2.25) * d**2 + 1
    outer = ((-0.75 * d + 3.75) * d - 6) * d + 3
    weights = np.zeros((size, side), np.float32)
    rows = np.broadcast_to(np.arange(size)[:, None], near.shape)
    np.add.at(weights, (rows, near.clip(0, side - 1)), np.where(d <= 1, inner, outer))
    return weights


def rotary_periods(count: int) -> Float32[np.ndarray, " periods"]:
    """The periods of DINOv3's rotary positions: from 1 to below 100, in geometric progression."""
    return (LONGEST_PERIOD ** (np.arange(count) / count)).astype(np.float32)


def rotary_angles(
    height: int, width: int, periods: Float32[Array, " periods"]
) -> Float32[Array, "{height*width} half_head"]:
    """Angles by which DINOv3 rotates the queries and keys of height×width patches, row after row.

    The centres of the patches are in (−1, 1) along both axes. The first half of the angles is for
    the row, the second for the column.
    """
    rows, columns = (2 * (jnp.arange(n, dtype=jnp.float32) + 0.5) / n - 1 for n in (height, width))
    places = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    return (2 * jnp.pi * places / periods).reshape(len(places), -1)


def rotated(
    x: Float[Array, "batch tokens heads of_head"], angles: Float32[Array, "tokens half_head"]
) -> Float[Array, "batch tokens heads of_head"]:
    """Rotates each pair of entries n and n + of_head/2 by the token's n-th angle, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


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
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        angles: Float32[Array, "tokens half_head"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Lets every token attend to all tokens, queries and keys rotated by `angles`."""
        width = x.shape[-1]
        linear = partial(nn.Dense, dtype=self.dtype)
        qkv = linear(3 * width, kernel_init=qkv_uniform, name="qkv")(x)
        qkv = qkv.reshape(*x.shape[:2], 3, self.heads, width // self.heads)
        queries, keys, values = jnp.unstack(qkv, axis=2)
        if angles is not None:
            queries, keys = rotated(queries, angles), rotated(keys, angles)
        attended = attend(queries, keys, values, flash=self.flash)
        return linear(width, kernel_init=xavier_uniform, name="proj")(attended.reshape(x.shape))


def swiglu_width(width: int) -> int:
    """Width of each half of a gated feed-forward network on tokens of `width`."""
    return -(-int(MLP_RATIO * width * 2 / 3) // 8) * 8


class FeedForward(nn.Module):
    """Linear → GELU (exact) → Linear on each token, four times as wide in between.

    With `swiglu`, the first layer's two halves are a and b, and SiLU(a)·b enters the last one. Each
    is 8/3 times as wide as a token, rounded up to a multiple of 8.
    """

    dtype: DTypeLike
    swiglu: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Maps each token separately."""
        width = x.shape[-1]
        linear = partial(nn.Dense, dtype=self.dtype, kernel_init=xavier_uniform)
        if self.swiglu:
            a, b = jnp.split(linear(2 * swiglu_width(width), name="fc1")(x), 2, axis=-1)
            return linear(width, name="fc2")(jax.nn.silu(a) * b)
        y = linear(MLP_RATIO * width, name="fc1")(x)
        return linear(width, name="fc2")(jax.nn.gelu(y, approximate=False))


class LayerScale(nn.Module):
    """Scales each channel by `gamma`, which starts at `initial`; does nothing where that is 0."""

    initial: float

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Scales each token."""
        if not self.initial:
            return x
        initial = nn.initializers.constant(self.initial)
        return x * self.param("gamma", initial, (x.shape[-1],), jnp.float32)


class Block(nn.Module):
    """Attention and a feed-forward network, each with a LayerNorm before and a shortcut around.

    Attributes:
        heads: number of attention heads.
        dtype: dtype the matrix products compute in.
        flash: see `attend`.
        layer_scale: initial value of the factors on what a block adds to the shortcut; 0 for none.
        swiglu: see `FeedForward`.
        epsilon: LayerNorm's.
    """

    heads: int
    dtype: DTypeLike
    flash: bool = True
    layer_scale: float = 0.0
    swiglu: bool = False
    epsilon: float = EPSILON

    @nn.compact
    def __call__(
        self,
        x: Float32[Array, "batch tokens width"],
        angles: Float32[Array, "tokens half_head"] | None = None,
    ) -> Float32[Array, "batch tokens width"]:
        """Maps `x`; the sums stay in float32, as under PyTorch's mixed precision.

        `angles` are those of `Attention`.
        """
        norm = partial(nn.LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
        scale = partial(LayerScale, self.layer_scale)
        attention = Attention(self.heads, self.dtype, self.flash, name="attn")
        x = x + scale(name="ls1")(attention(norm(name="norm1")(x), angles))
        feed_forward = FeedForward(self.dtype, self.swiglu, name="mlp")
        return x + scale(name="ls2")(feed_forward(norm(name="norm2")(x)))


class VisionTransformer(nn.Module):
    """A Vision Transformer as MoCo-v3 trains it; its feature is the class token.

    Patch embedding and positions are parameters, so that checkpoints hold them, but keep their
    initial values: they get no gradient, and the optimizer must leave them alone too, weight decay
    included. The module sows the outputs that evaluation reads in the collection `intermediates`,
    at no cost unless the caller makes it mutable: `stem` (the patches as they enter the blocks),
    `layer1` … `layer4` (the patches after each quarter of the blocks, rounded up), both as feature
    maps without the other tokens, and `features`.

    Attributes:
        width: width of the tokens and features, a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: number of attention heads; MoCo-v3 uses 12 at width 384 too.
        patch_size: side of a patch in pixels.
        dtype: dtype the matrix products compute in; parameters, LayerNorm's statistics, softmax
            and the sums along the blocks are float32.
        remat: recompute each block's activations in the backward pass instead of storing them.
        flash_attention: use cuDNN's flash attention where the devices have it, see `attend`.
        registers: number of further learnt tokens, without positions, as DINOv2 has them.
        layer_scale: initial value of the factors on what blocks add to the shortcut; 0 for none.
        swiglu: gated feed-forward networks, see `FeedForward`.
        position_offset: interpolation of the positions, see `resize_positions`.
        rotary: rotate queries and keys by the patches' places instead of adding positions, and give
            LayerNorm an ε of 1e-5, as DINOv3 does. `pos_embed` is then the rotations' periods.
        frozen_parameters: names, at the top level of the parameters, that are never trained.

    References:
        Chen, Xie and He, An Empirical Study of Training Self-Supervised Vision Transformers, 2021,
        section 4 and appendix. Dosovitskiy et al., An Image is Worth 16x16 Words, 2021. Oquab et
        al., DINOv2, 2023. Darcet et al., Vision Transformers Need Registers, 2024.
    """

    width: int
    depth: int
    heads: int
    patch_size: int = 16
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    flash_attention: bool = True
    registers: int = 0
    layer_scale: float = 0.0
    swiglu: bool = False
    position_offset: float | None = None
    rotary: bool = False

    frozen_parameters: ClassVar[tuple[str, ...]] = ("patch_embed", "pos_embed")

    def __post_init__(self):
        check_at_least("encoder.width", self.width, 1)
        check_at_least("encoder.depth", self.depth, 1, LONGEST)
        check_at_least("encoder.heads", self.heads, 1)
        check_at_least("encoder.patch_size", self.patch_size, 1)
        check_at_least("encoder.registers", self.registers, 0, WIDEST)
        check_at_least("encoder.layer_scale", self.layer_scale, 0)
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
        if self.rotary and self.width // self.heads % 4:
            fitting = [n for n in range(1, self.width + 1) if self.width % (4 * n) == 0]
            raise ConfigError(
                f"encoder.rotary=True needs heads of a multiple of 4 entries, and "
                f"encoder.heads={self.heads} makes some of {self.width // self.heads}; "
                f"use one of {fitting}"
            )
        super().__post_init__()

    @property
    def feature_width(self) -> int:
        """Width of the features."""
        return self.width

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Width of the class token after each block."""
        return (self.width,) * self.depth

    def check_image_size(self, size: int, setting: str = "augment.size") -> None:
        """Refuses images whose sides (`size` pixels, by `setting`) are not whole patches.

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
        self,
        images: Float[Array, "batch height width channels"],
        train: bool,
        stages: tuple[int, ...] = (),
    ) -> Float32[Array, "batch {self.feature_width}"] | WithStages:
        """Features of normalised images with any number of channels.

        Positions are those of the image size the parameters were initialised with, resized to the
        current grid.

        Args:
            images: one view of the batch, its sides multiples of the patch size.
            train: has no effect; every encoder takes it.
            stages: blocks, from 1, after which the class token is returned as well.

        Raises:
            ValueError: for sides that are not such multiples, or initial images that are oblong.
        """
        del train
        x, grid, angles = self._tokens(images)
        epsilon = ROTARY_EPSILON if self.rotary else EPSILON
        self.sow("intermediates", "stem", _feature_map(x, grid))

        block = partial(
            nn.remat(Block) if self.remat else Block,
            self.heads,
            self.dtype,
            self.flash_attention,
            self.layer_scale,
            self.swiglu,
            epsilon,
        )
        earlier = {}
        ends = [math.ceil(stage * self.depth / STAGES) for stage in range(STAGES + 1)]
        for stage in range(STAGES):
            for index in range(ends[stage], ends[stage + 1]):
                x = block(name=f"blocks_{index}")(x, angles)
                if index + 1 in stages:
                    earlier[index + 1] = x[:, 0]
            self.sow("intermediates", f"layer{stage + 1}", _feature_map(x, grid))

        features = nn.LayerNorm(epsilon=epsilon, name="norm")(x[:, 0])
        self.sow("intermediates", "features", features)
        return (features, earlier) if stages else features

    def _tokens(self, images):
        """Class token, registers and patches; the grid's height and width; angles, if `rotary`."""
        for size in images.shape[1:3]:
            self.check_image_size(size)
        patches = PatchEmbedding(self.width, self.patch_size, self.dtype, name="patch_embed")(
            images
        )
        batch, *grid, width = patches.shape
        patches = patches.reshape(batch, -1, width).astype(jnp.float32)
        tokens = jnp.concatenate([self._learnt("cls_token", 1, batch), patches], axis=1)
        angles = None
        if self.rotary:  # only patches have a place
            count = self.width // self.heads // 4
            initial = rotary_periods(count)
            periods = jax.lax.stop_gradient(self.param("pos_embed", lambda _: jnp.array(initial)))
            angles = rotary_angles(*grid, periods)
            angles = jnp.pad(angles, ((1 + self.registers, 0), (0, 0)))
        else:
            positions = jax.lax.stop_gradient(self._stored_positions(*grid))
            tokens += resize_positions(positions, *grid, self.position_offset)
        if self.registers:
            registers = self._learnt("reg_token", self.registers, batch)
            tokens = jnp.concatenate([tokens[:, :1], registers, tokens[:, 1:]], axis=1)
        return tokens, grid, angles

    def _learnt(self, name, count, batch):
        """Tokens that are parameters, the same for each image."""
        shape = (1, count, self.width)
        tokens = self.param(name, nn.initializers.normal(1e-6), shape, jnp.float32)
        return jnp.broadcast_to(tokens, (batch, *shape[1:]))

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
    return tokens[:, -math.prod(grid) :].reshape(len(tokens), *grid, -1)
