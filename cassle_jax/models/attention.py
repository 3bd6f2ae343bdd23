"""Dot-product attention by the fastest kernel of the devices: cuDNN's flash attention, or XLA's."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_HALF = (jnp.bfloat16, jnp.float16)
_WIDEST_HEAD = 128  # channels that the kernel's backward pass takes on every GPU that has one


def attend(
    query: Float[Array, "batch tokens heads channels"],
    key: Float[Array, "batch tokens heads channels"],
    value: Float[Array, "batch tokens heads channels"],
    *,
    flash: bool = True,
) -> Float[Array, "batch tokens heads channels"]:
    """softmax(query·keyᵀ/√channels)·value per head; the softmax is computed in float32.

    Flash attention (Dao et al. 2022) never holds the tokens × tokens weights in memory. It is used
    on NVIDIA's GPUs from Ampere on, for bfloat16 and float16, and where a head has a multiple of 8
    channels, at most 128. Its results differ from XLA's by the rounding of the dtype.

    Args:
        query: the tokens' queries.
        key: their keys.
        value: their values; all three have the dtype of the result.
        flash: use flash attention where the devices have it.
    """
    channels = query.shape[-1]
    fits = query.dtype in _HALF and channels % 8 == 0 and channels <= _WIDEST_HEAD
    if not (flash and fits and have_flash_attention()):
        return jax.nn.dot_product_attention(query, key, value, implementation="xla")
    batch, tokens = query.shape[:2]
    # JAX refuses the gradient of an odd number of tokens, as with a class token: add one that is
    # masked.
    odd = ((0, 0), (0, tokens % 2), (0, 0), (0, 0))
    lengths = jnp.full(batch, tokens, jnp.int32) if tokens % 2 else None
    attended = jax.nn.dot_product_attention(
        *(jnp.pad(each, odd) for each in (query, key, value)),
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return attended[:, :tokens]


def have_flash_attention() -> bool:
    """Whether the devices are NVIDIA's GPUs of compute capability 8.0 or more."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version.lower():
        return False
    return float(device.compute_capability) >= 8.0
