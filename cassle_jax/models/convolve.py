"""A convolution that is fast on CPUs too, even where the map is smaller than its kernel."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cassle_jax.models.winograd import convolve_3x3
from cassle_jax.stored import stored

_WIDE = 32  # the fewest channels with which Winograd's algorithm is faster


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
    XLA's own convolution is up to a hundred times slower on CPUs. Where wide float32 maps meet a
    3×3 kernel with stride 1, `convolve_3x3` saves CPUs multiplications. In both cases, forward-mode
    differentiation, as in `jax.jvp`, is not supported.

    Args:
        x: the maps.
        kernel: the kernel as in the parameters.
        window_strides: strides of the rows and of the columns.
        padding: numbers of zeros before and after the rows, and the columns; each below the
            kernel's size.
        options: further options of `lax.conv_general_dilated`, without dilation or groups.
    """
    sides = tuple(
        _Side(*sizes)
        for sizes in zip(x.shape[1:3], kernel.shape[:2], window_strides, padding, strict=True)
    )
    if any(side.places < side.kernel for side in sides):
        return _by_places(x, kernel, sides, options.get("precision"))
    convolution = partial(
        lax.conv_general_dilated, window_strides=window_strides, padding=padding, **options
    )
    *_, channels, features = kernel.shape
    is_wide = channels == features >= _WIDE and x.dtype == jnp.float32
    if is_wide and all(side.suits_winograd for side in sides):
        convolution = partial(convolve_3x3, convolution=convolution)
    # Otherwise, CPUs compute the maps and the result's gradient again while they transpose them for
    # the kernel's gradient.
    return stored(convolution(stored(x), kernel))


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

    @property
    def suits_winograd(self) -> bool:
        """Whether `convolve_3x3` convolves this side."""
        return (self.kernel, self.stride, self.padding) == (3, 1, (1, 1))

    def covered(self) -> list[tuple[slice, slice]]:
        """Per place, the part of the map under the kernel, and the matching part of the kernel."""
        starts = [place * self.stride - self.padding[0] for place in range(self.places)]
        return [
            (slice(max(start, 0), start + self.kernel), slice(max(-start, 0), self.size - start))
            for start in starts
        ]

    def reached(self) -> list[tuple[int, slice, tuple[int, int, int]]]:
        """For each row of the kernel that ever lies on the map: its index, the places, the padding.

        It lies on the map at these places. The padding, as in `lax.pad`, brings their values to the
        pixels under the row: zeros before, after and between them.
        """
        found = []
        for row in range(self.kernel):
            offset = row - self.padding[0]
            first = max(-(offset // self.stride), 0)
            last = min((self.size - 1 - offset) // self.stride, self.places - 1)
            if first <= last:
                before, end = (place * self.stride + offset for place in (first, last))
                inside = (before, self.size - 1 - end, self.stride - 1)
                found.append((row, slice(first, last + 1), inside))
        return found


def _products(x, kernel, sides, precision):
    """Per place, the part of the map under the kernel times the matching part of the kernel."""
    rows, columns = (side.covered() for side in sides)
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


_by_places = jax.custom_vjp(_products, nondiff_argnums=(2, 3))


def _forward(x, kernel, sides, precision):
    return _products(x, kernel, sides, precision), (x, kernel)


def _backward(sides, precision, kept, gradient):
    x, kernel = kept
    by_kernel = jax.vjp(lambda kernel: _products(x, kernel, sides, precision), kernel)[1]
    return _sent_back(kernel, gradient, sides, precision).astype(x.dtype), by_kernel(gradient)[0]


def _sent_back(kernel, gradient, sides, precision):
    """The gradient of the map: a sum over the kernel's elements, with one matrix product each.

    A product reads its element of the kernel transposed, without a copy. One product per pixel
    would need a transposed copy of the whole kernel. Sums are in float32 or wider.
    """
    wide = jnp.promote_types(gradient.dtype, jnp.float32)
    rows, columns = (side.reached() for side in sides)

    def part(row, column):
        (y, places, inside), (x, across, inside_across) = row, column
        sent, element = gradient[:, places, across], kernel[y, x]
        product = jnp.einsum(
            "nrsf,cf->nrsc", sent, element, precision=precision, preferred_element_type=wide
        )
        around = ((0, 0, 0), inside, inside_across, (0, 0, 0))
        return lax.pad(product, jnp.zeros((), wide), around)

    return sum(part(row, column) for row in rows for column in columns)


_by_places.defvjp(_forward, _backward)
