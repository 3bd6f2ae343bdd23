"""Batch normalisation with PyTorch's running statistics, synchronised over devices."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cassle_jax.models.sums import channel_sums


class BatchNorm(nn.Module):
    """Normalises each channel (the last axis) by its mean and variance over all other axes.

    In training the statistics are the batch's, over every device of `axis_name`. The running
    averages (collection `batch_stats`: `mean`, `var`) then take a step of 1 − momentum towards
    them, with the unbiased variance. In evaluation the running averages are used. Parameters
    (`scale`, `bias`) are float32, and statistics are computed in float32 or wider.

    Attributes:
        use_scale: learn a scale per channel.
        use_bias: learn a shift per channel.
        scale_init: initial values of the scale.
        momentum: share of the old running average that is kept, in [0, 1].
        epsilon: added to the variance.
        axis_name: mapped axis over which the statistics are synchronised; None: this device's only.
        dtype: dtype of the result.

    References:
        Ioffe and Szegedy, Batch Normalization, 2015, algorithms 1 and 2.
    """

    use_scale: bool = True
    use_bias: bool = True
    scale_init: Initializer = nn.initializers.ones
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch channels"], train: bool
    ) -> Float[Array, "*batch channels"]:
        """Normalises `x`.

        Args:
            x: activations, any floating dtype.
            train: use and record the batch's statistics instead of the running averages.

        Raises:
            ValueError: in training, if there is only one value per channel.
        """
        channels = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))

        mean, var = running_mean.value, running_var.value
        if train and not self.is_initializing():
            mean, var = _moments(x, mean, self.axis_name)
            count = _count(x, self.axis_name)
            running_mean.value = self._step(running_mean.value, mean)
            running_var.value = self._step(running_var.value, var * (count / (count - 1)))

        factor = jax.lax.rsqrt(var + self.epsilon)
        if self.use_scale:
            factor *= self.param("scale", self.scale_init, channels, jnp.float32)
        bias = jnp.zeros(channels, jnp.float32)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        scaled = _scaled(x, *(jnp.asarray(v, x.dtype) for v in (mean, factor, bias)))
        return scaled.astype(self.dtype)

    def _step(self, average: Float[Array, " c"], value: Float[Array, " c"]):
        return self.momentum * average + (1 - self.momentum) * value


@jax.custom_vjp
def _scaled(
    x: Float[Array, "*batch c"],
    mean: Float[Array, " c"],
    factor: Float[Array, " c"],
    bias: Float[Array, " c"],
) -> Float[Array, "*batch c"]:
    """`(x − mean) · factor + bias`, with two sums over `x` in its gradient instead of three.

    A caller's own `jax.shard_map` around it needs `check_vma=False`: the gradients are local to a
    device until they are averaged.
    """
    return (x - mean) * factor + bias


def _scaled_forward(x, mean, factor, bias):
    return _scaled(x, mean, factor, bias), (x, mean, factor)


def _scaled_backward(kept, gradient):
    x, mean, factor = kept
    of_bias = channel_sums(gradient)
    of_factor = channel_sums(gradient * (x - mean))
    return gradient * factor, -factor * of_bias, of_factor, of_bias


_scaled.defvjp(_scaled_forward, _scaled_backward)


def _moments(
    x: Float[Array, "*batch c"], running_mean: Float[Array, " c"], axis_name: str | None
) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Mean and biased variance per channel in one pass over `x`, and one exchange.

    E[x²] − E[x]² cancels badly where the mean is large. So sums are taken around a shift near
    it: within a device a value from the batch's middle, away from edges and their padding; between
    devices the running mean, which all know.
    """
    shift = jax.lax.stop_gradient(x[tuple(size // 2 for size in x.shape[:-1])])
    values = math.prod(x.shape[:-1])
    mean, squares = (channel_sums(v) / values for v in (x - shift, jnp.square(x - shift)))
    mean, var = mean + shift, squares - jnp.square(mean)
    if axis_name is not None:
        shift = jax.lax.stop_gradient(running_mean)
        mean -= shift
        mean, squares = jax.lax.pmean(jnp.stack([mean, var + jnp.square(mean)]), axis_name)
        mean, var = mean + shift, squares - jnp.square(mean)
    return mean, jnp.maximum(var, 0)


def _count(x: Float[Array, "*batch c"], axis_name: str | None) -> int:
    """Values per channel over all devices; raises a ValueError where no variance exists."""
    devices = 1 if axis_name is None else jax.lax.psum(1, axis_name)
    count = math.prod(x.shape[:-1]) * devices
    if count < 2:
        raise ValueError(
            f"BatchNorm in training needs at least 2 values per channel over all devices; "
            f"the input's shape is {x.shape} on {devices} device(s)"
        )
    return count
