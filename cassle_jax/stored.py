"""Makes XLA store an array on CPUs, where it would compute it several times."""

from typing import TypeVar

from jax import lax

Arrays = TypeVar("Arrays")


def stored(x: Arrays) -> Arrays:
    """The same array, or tree of arrays; CPUs store it, and its gradient.

    XLA fuses an array's computation into each of its readers. On CPUs, a reader that transposes,
    shifts or sums the array then computes elements several times, and without vectors.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)
