"""The multilayer perceptron of projectors, predictors and heads."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cassle_jax.checks import check_at_least
from cassle_jax.models.batch_norm import BatchNorm
from cassle_jax.models.initializers import bias_uniform, fan_in_uniform


class MLP(nn.Module):
    """(Linear without bias → BatchNorm → ReLU) × (depth − 1), then Linear.

    Attributes:
        hidden: width of the hidden layers.
        out: width of the result.
        depth: number of Linear layers, at least 1.
        layer_norm: LayerNorm in place of BatchNorm between the layers.
        last_bn: end in a BatchNorm.
        last_bn_affine: give that last BatchNorm a scale and a shift.
        last_bias: give the last Linear a bias, where no BatchNorm follows it.
        axis_name: mapped axis over which BatchNorm statistics are synchronised.
        dtype: dtype the layers compute in; parameters are float32.
    """

    hidden: int
    out: int
    depth: int
    last_bn: bool = False
    last_bn_affine: bool = True
    last_bias: bool = True
    layer_norm: bool = False
    axis_name: str | None = None
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"depth={self.depth} leaves an MLP without layers; use 1 or more")
        if self.depth > 1:
            check_at_least("hidden", self.hidden, 1)
        check_at_least("out", self.out, 1)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch inputs"], train: bool
    ) -> Float[Array, "batch {self.out}"]:
        """Maps `x` to float32; `train` normalises by the batch's statistics, and records them."""
        last = self.depth - 1
        for layer in range(last):
            x = self._linear(x, self.hidden, layer, use_bias=False)
            x = jax.nn.relu(self._norm(x, layer, train))
        # The last layer's sums and bias stay float32, so that nothing is rounded before a loss.
        wide = jnp.promote_types(self.dtype, jnp.float32)
        x = self._linear(
            x,
            self.out,
            last,
            use_bias=self.last_bias and not self.last_bn,
            dtype=wide,
            dot_general=partial(_dot_of_narrow_factors, self.dtype, wide),
        )
        if self.last_bn:
            affine = self.last_bn_affine
            norm = BatchNorm(
                affine, affine, axis_name=self.axis_name, dtype=wide, name=f"bn_{last}"
            )
            x = norm(x, train)
        return x

    def _norm(self, x: Float[Array, "batch width"], layer: int, train: bool):
        if self.layer_norm:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=f"ln_{layer}")(x)
        return BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=f"bn_{layer}")(x, train)

    def _linear(
        self, x: Float[Array, "batch inputs"], width: int, layer: int, use_bias: bool, **kwargs
    ):
        return nn.Dense(
            width,
            use_bias=use_bias,
            **{"dtype": self.dtype, **kwargs},
            kernel_init=fan_in_uniform,
            bias_init=bias_uniform(x.shape[-1]),
            name=f"linear_{layer}",
        )(x)


def _dot_of_narrow_factors(dtype: DTypeLike, wide: DTypeLike, left, right, *args, **kwargs):
    kwargs["preferred_element_type"] = wide
    return jax.lax.dot_general(left.astype(dtype), right.astype(dtype), *args, **kwargs)
