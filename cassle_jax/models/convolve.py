"""A convolution that stays fast where the map is smaller than its kernel."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def convolve(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "rows columns channels features"],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options,
) -> Float[Array, "batch height_out width_out features"]:
    """`lax.conv_general_dilated` of images, with the arguments of `flax.linen.Conv`.

    Where the result is smaller than the kernel, as in a ResNet's last stage of 64-pixel images, it
    is one matrix product over the patches. XLA's own convolution is up to a hundred times slower
    there on CPUs, forwards or backwards.

    Args:
        x: the maps.
        kernel: the kernel as in the parameters.
        window_strides: strides of the rows and of the columns.
        padding: zeros before and after the rows, and the columns.
        options: further options of `lax.conv_general_dilated`.
    """
    rows, columns, channels, features = kernel.shape
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    down, across = window_strides
    height = (padded.shape[1] - rows) // down + 1
    width = (padded.shape[2] - columns) // across + 1
    if height >= rows and width >= columns:
        return lax.conv_general_dilated(x, kernel, window_strides, padding, **options)
    patches = [
        padded[:, i : i + (height - 1) * down + 1 : down, j : j + (width - 1) * across + 1 : across]
        for i in range(rows)
        for j in range(columns)
    ]
    return jnp.dot(
        jnp.concatenate(patches, axis=-1),
        kernel.reshape(rows * columns * channels, features),
        precision=options.get("precision"),
    )
