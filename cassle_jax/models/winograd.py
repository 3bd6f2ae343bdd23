"""Convolves with 3×3 kernels; on CPUs by Winograd's algorithm, with fewer multiplications."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Maps = Float[Array, "batch height width channels"]
Convolved = Float[Array, "batch height width features"]
Kernel = Float[Array, "3 3 channels features"]
Grid = list[list[Array]]

# Bytes of transformed maps at a time: more would leave the cache before the products read them.
_AT_ONCE = 2**23

_stored = lax.optimization_barrier


def convolve_3x3(
    x: Maps, kernel: Kernel, convolution: Callable[[Maps, Kernel], Convolved]
) -> Convolved:
    """Convolves with stride 1 and a padding of 1.

    On CPUs, the values and the gradient of `x` come from F(2×2, 3×3) of Lavin and Gray
    (arXiv 1509.09308): 16 matrix products give 2×2 pixels each, with 4 multiplications per pixel
    and channel instead of 9. Elsewhere they are those of `convolution`, and so is the kernel's
    gradient everywhere. Forward-mode differentiation, as in `jax.jvp`, is not supported.

    Args:
        x: the maps, float32: with fewer bits, the algorithm's differences would lose some.
        kernel: the kernel.
        convolution: returns the same convolution by XLA.
    """
    return _convolve(x, kernel, convolution)


def _values(x, kernel, convolution):
    return lax.platform_dependent(x, kernel, cpu=_by_tiles, default=convolution)


_convolve = jax.custom_vjp(_values, nondiff_argnums=(2,))


def _forward(x, kernel, convolution):
    return _values(x, kernel, convolution), (x, kernel)


def _backward(convolution, kept, gradient):
    x, kernel = kept

    def by_xla(gradient, kernel):
        return jax.vjp(lambda x: convolution(x, kernel), x)[1](gradient)[0]

    def by_tiles(gradient, kernel):
        return _by_tiles(gradient, kernel[::-1, ::-1].swapaxes(2, 3))

    of_map = lax.platform_dependent(gradient, kernel, cpu=by_tiles, default=by_xla)
    of_kernel = jax.vjp(lambda kernel: convolution(x, kernel), kernel)[1](gradient)[0]
    return of_map, of_kernel


_convolve.defvjp(_forward, _backward)


def _by_tiles(x: Maps, kernel: Kernel) -> Convolved:
    kernels = _along_both(lambda a, b, c: (a, (a + b + c) / 2, (a - b + c) / 2, c), kernel)
    images = max(1, _AT_ONCE // (4 * x[0].size * x.dtype.itemsize))
    return lax.map(partial(_image_by_tiles, kernels=kernels), x, batch_size=images)


def _image_by_tiles(
    x: Float[Array, "height width channels"], kernels: Grid
) -> Float[Array, "height width features"]:
    """The convolution of one image, from the 4×4 transformed elements of the kernel.

    Tiles of 4×4 pixels overlap by 2. The barriers store what several of the following sums or
    products read; XLA would compute it anew for each.
    """
    height, width, _ = x.shape
    down, across = -(-height // 2), -(-width // 2)  # tiles
    around = ((1, 1 + height % 2), (1, 1 + width % 2), (0, 0))
    padded = _stored(jnp.pad(x, around))
    pixels = [
        [padded[i : i + 2 * down - 1 : 2, j : j + 2 * across - 1 : 2] for j in range(4)]
        for i in range(4)
    ]
    maps = _along_both(lambda a, b, c, d: (a - c, b + c, c - b, b - d), pixels)
    products = [
        [_stored(_stored(m) @ k) for m, k in zip(*rows, strict=True)]
        for rows in zip(maps, kernels, strict=True)
    ]
    result = _along_both(lambda a, b, c, d: (a + b + c, b - c - d), products)
    whole = jnp.stack([jnp.stack(row, 2) for row in result], 1)
    return whole.reshape(2 * down, 2 * across, -1)[:height, :width]


def _along_both(transform: Callable[..., tuple[Array, ...]], grid: Grid | Kernel) -> Grid:
    """Transforms the columns of a grid, then its rows."""
    columns = [transform(*column) for column in zip(*grid, strict=True)]
    return [list(transform(*row)) for row in zip(*columns, strict=True)]
