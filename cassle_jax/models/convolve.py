"""A convolution that stays fast where the map is smaller than its kernel."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
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

    Where the result is smaller than the kernel, as in a ResNet's last stage of 64-pixel images,
    each of its places is one matrix product: the part of the map under the kernel, times the
    matching part of the kernel. This leaves out the padding, more than half of the work there.
    XLA's own convolution is up to a hundred times slower on CPUs. Forward-mode differentiation, as
    in `jax.jvp` and `jax.hessian`, is then not supported.

    Args:
        x: the maps.
        kernel: the kernel as in the parameters.
        window_strides: strides of the rows and of the columns.
        padding: numbers of zeros before and after the rows, and the columns; each below the
            kernel's size.
        options: further options of `lax.conv_general_dilated`.
    """
    sides = tuple(
        _Side(*sizes)
        for sizes in zip(x.shape[1:3], kernel.shape[:2], window_strides, padding, strict=True)
    )
    if all(side.places >= side.kernel for side in sides):
        return lax.conv_general_dilated(x, kernel, window_strides, padding, **options)
    return _by_places(x, kernel, sides, options.get("precision"))


class _Side(NamedTuple):
    """Rows or columns: their number in map and kernel, stride and padding."""

    size: int
    kernel: int
    stride: int
    padding: tuple[int, int]

    @property
    def places(self) -> int:
        """The number of the result's rows or columns."""
        return (self.size + sum(self.padding) - self.kernel) // self.stride + 1

    def covered(self) -> list[tuple[slice, slice]]:
        """Per place, the part of the map under the kernel, and the matching part of the kernel."""
        starts = [place * self.stride - self.padding[0] for place in range(self.places)]
        return [
            (slice(max(start, 0), start + self.kernel), slice(max(-start, 0), self.size - start))
            for start in starts
        ]

    def covering(self) -> list[tuple[slice, slice]]:
        """Per pixel, the places that cover it, and their parts of the kernel, from its end on."""
        found = []
        for pixel in range(self.padding[0], self.padding[0] + self.size):
            first = max(-((self.kernel - 1 - pixel) // self.stride), 0)
            last = min(pixel // self.stride, self.places - 1)
            begin, end = (self.kernel - 1 - pixel + place * self.stride for place in (first, last))
            found.append((slice(first, last + 1), slice(begin, end + 1, self.stride)))
        return found


def _products(x, kernel, rows, columns, precision):
    """A map whose places are products of a part of the map `x` with a part of the kernel."""
    places = [
        jnp.dot(
            x[:, of_map, of_map_columns].reshape(len(x), -1),
            kernel[of_kernel, of_kernel_columns].reshape(-1, kernel.shape[-1]),
            precision=precision,
        )
        for of_map, of_kernel in rows
        for of_map_columns, of_kernel_columns in columns
    ]
    return jnp.stack(places, axis=1).reshape(len(x), len(rows), len(columns), -1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _by_places(x, kernel, sides, precision):
    return _products(x, kernel, *(side.covered() for side in sides), precision)


def _forward(x, kernel, sides, precision):
    return _by_places(x, kernel, sides, precision), (x, kernel)


def _backward(sides, precision, kept, gradient):
    x, kernel = kept
    covered, covering = zip(*((side.covered(), side.covering()) for side in sides), strict=True)
    by_kernel = jax.vjp(lambda kernel: _products(x, kernel, *covered, precision), kernel)[1]
    # One product per pixel of the map: adding up what the places send back would take longer.
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    return _products(gradient, turned, *covering, precision), by_kernel(gradient)[0]


_by_places.defvjp(_forward, _backward)
