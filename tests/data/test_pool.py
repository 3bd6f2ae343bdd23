"""Memory is used again, but never while somebody can still see it."""

import gc

import jax
import numpy as np

from cassle_jax.data.pool import BufferPool


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_comes_back_when_the_last_view_is_gone():
    pool = BufferPool((4, 5))
    first = pool.lend()
    first[:] = 7
    place, view = address(first), first[1:3, ::2]
    del first
    gc.collect()
    other = pool.lend()
    assert address(other) != place
    assert (view == 7).all()
    del view
    gc.collect()
    assert address(pool.lend()) == place


def test_an_array_that_jax_took_over_keeps_its_values():
    pool = BufferPool((64, 64, 3))
    taken = []
    for value in range(8):
        lent = pool.lend()
        lent[:] = value
        taken.append(jax.device_put(lent))
        del lent
        gc.collect()
    for value, array in enumerate(taken):
        np.testing.assert_array_equal(array, value)
