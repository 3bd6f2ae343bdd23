"""Convolves with 3×3 kernels; on CPUs by Winograd's algorithm, with fewer multiplications."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Maps = Float[Array, "batch height width channels"]
Kernel = Float[Array, "3 3 channels channels"]
Grid = list[list[Array]]

# Bytes of transformed maps at a time: more would leave the cache before the products read them.
_AT_ONCE = 2**23

# As `stored`, in functions that only CPUs run.
_stored = lax.optimization_barrier


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve_3x3(x: Maps, kernel: Kernel, convolution: Callable[[Maps, Kernel], Maps]) -> Maps:
    """Convolves with stride 1, a padding of 1, and as many features as channels.

    On CPUs, F(2×2, 3×3) of Lavin and Gray (arXiv 1509.09308) gives the values and both gradients:
    16 matrix products make 2×2 pixels each, with 4 multiplications per pixel and channel instead of
    9. Elsewhere, `convolution` gives them. Forward-mode differentiation, as in `jax.jvp`, is not
    supported.

    Args:
        x: the maps, float32: the algorithm's differences would lose bits of narrower types.
        kernel: the kernel.
        convolution: computes the same by XLA, from maps and kernel.
    """
    return _values(x, kernel, convolution)


def _values(x, kernel, convolution):
    return lax.platform_dependent(x, kernel, cpu=_by_tiles, default=convolution)


def _forward(x, kernel, convolution):
    return _values(x, kernel, convolution), (x, kernel)


def _backward(convolution, kept, gradient):
    def by_xla(x, kernel, gradient):
        return jax.vjp(convolution, x, kernel)[1](gradient)

    return lax.platform_dependent(*kept, gradient, cpu=_gradients_by_tiles, default=by_xla)


convolve_3x3.defvjp(_forward, _backward)


# One dimension of the paper's transforms: Bᵀ, G, and Aᵀ; A and Gᵀ for the kernel's gradient.


def _of_map(a, b, c, d):
    return a - c, b + c, c - b, b - d


def _of_kernel(a, b, c):
    return a, (a + b + c) / 2, (a - b + c) / 2, c


def _to_result(a, b, c, d):
    return a + b + c, b - c - d


def _of_gradient(a, b):
    return a, a + b, a - b, -b


def _to_kernel(a, b, c, d):
    return a + (b + c) / 2, (b - c) / 2, (b + c) / 2 + d


def _by_tiles(x, kernel, side=0):
    """The convolution; `side` is that of the kernel's elements which meets the channels of `x`."""
    kernels = _along_both(_of_kernel, kernel)

    def convolved(x):
        products = [
            [_stored(jnp.tensordot(_stored(m), k, (3, side))) for m, k in zip(*row, strict=True)]
            for row in zip(_tiles(x), kernels, strict=True)
        ]
        pixels = [jnp.stack(row, 3) for row in _along_both(_to_result, products)]
        whole = jnp.stack(pixels, 2)
        images, down, _, across, _, channels = whole.shape
        return whole.reshape(images, 2 * down, 2 * across, channels)[:, : x.shape[1], : x.shape[2]]

    def replace(group, held):
        return lax.dynamic_update_index_in_dim(held, convolved(held[group]), group, 0)

    # XLA would allocate the result of lax.map long before it is computed.
    groups = _groups(x)
    result = lax.fori_loop(0, len(groups), replace, groups)
    return result.reshape(math.prod(result.shape[:2]), *x.shape[1:])[: len(x)]


def _gradients_by_tiles(x, kernel, gradient):
    return _by_tiles(gradient, kernel[::-1, ::-1], side=1), _kernels_gradient(x, gradient)


def _kernels_gradient(x, gradient):
    def add(total, group):
        x, gradient = group
        even = ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0))
        gradient = jnp.pad(gradient, even)
        pixels = [[gradient[:, i::2, j::2] for j in range(2)] for i in range(2)]
        products = [
            [_stored(_stored(_flat(m).T) @ _stored(_flat(g))) for m, g in zip(*row, strict=True)]
            for row in zip(_tiles(x), _along_both(_of_gradient, pixels), strict=True)
        ]
        elements = [jnp.stack(row) for row in _along_both(_to_kernel, products)]
        return total + jnp.stack(elements), None

    none = jnp.zeros((3, 3, x.shape[-1], x.shape[-1]), x.dtype)
    return lax.scan(add, none, (_groups(x), _groups(gradient)))[0]


def _groups(x: Maps) -> Float[Array, "groups images height width channels"]:
    """The images in equal groups whose transformed maps stay in the cache; zeros fill the last."""
    per_image = 4 * math.prod(x.shape[1:]) * x.dtype.itemsize
    groups = max(1, -(-len(x) // max(1, _AT_ONCE // per_image)))
    images = -(-len(x) // groups)
    filled = jnp.pad(x, ((0, groups * images - len(x)), (0, 0), (0, 0), (0, 0)))
    return filled.reshape(groups, images, *x.shape[1:])


def _tiles(x: Maps) -> Grid:
    """The 4×4 transformed pixels of all tiles, each [batch, tiles down, tiles across, channels].

    Tiles of 4×4 pixels overlap by 2.
    """
    _, height, width, _ = x.shape
    down, across = -(-height // 2), -(-width // 2)
    padded = _stored(jnp.pad(x, ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0))))
    pixels = [
        [padded[:, i : i + 2 * down - 1 : 2, j : j + 2 * across - 1 : 2] for j in range(4)]
        for i in range(4)
    ]
    return _along_both(_of_map, pixels)


def _along_both(transform: Callable[..., tuple[Array, ...]], grid: Grid | Kernel) -> Grid:
    """Transforms the columns of a grid, then its rows."""
    columns = [transform(*column) for column in zip(*grid, strict=True)]
    return [list(transform(*row)) for row in zip(*columns, strict=True)]


def _flat(maps: Maps) -> Float[Array, "places channels"]:
    return maps.reshape(-1, maps.shape[-1])
