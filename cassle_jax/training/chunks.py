"""Walks a batch in chunks, so that only one chunk's activations are in memory at a time."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from cassle_jax.methods.base import PyTree


def in_chunks(
    function: Callable[[PyTree], tuple[PyTree, PyTree]], rows: PyTree, chunks: int
) -> tuple[PyTree, PyTree]:
    """What `function` makes of all rows, a chunk of them at a time.

    Differentiated, this is gradient caching. Forwards, nothing of a chunk is kept but its results.
    What is made of the results of all chunks, such as a loss that contrasts each row with every
    other, then has one gradient for each of them. Backwards, each chunk is computed anew and its
    share of the gradient added up: that of one shot, for twice the forward computation.

    Of n chunks, chunk k has the rows k, k + n, k + 2n, …. Where devices share a batch, the rows
    that all of them have in a chunk are then the same however many devices there are.

    Args:
      function: makes of some rows their results, which have the same leading axis, and statistics,
        through which no gradient goes.
      rows: arrays with a leading axis of equal length.
      chunks: how many; divides the number of rows. With 1, this is `function` itself.

    Returns:
      The results of all rows, in their order, and the mean of the chunks' statistics.

    References:
      Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021,
      section 3.
    """
    if chunks == 1:
        return function(rows)

    def rows_of(index, x):
        split = x.reshape(-1, chunks, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(split, index, axis=1, keepdims=False)

    # Two loops share no expressions, so nothing has to keep XLA from merging them.
    @partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(index):
        results, statistics = function(jax.tree.map(partial(rows_of, index), rows))
        return results, jax.lax.stop_gradient(statistics)

    results, statistics = jax.lax.map(one_chunk, jnp.arange(chunks))
    return (
        jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), results),
        jax.tree.map(lambda x: x.mean(0), statistics),
    )
