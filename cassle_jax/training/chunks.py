"""Walks a batch in chunks, so that only one chunk's activations are in memory at a time."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from cassle_jax.methods.base import PyTree


def in_chunks(
    function: Callable[[PyTree], tuple[PyTree, PyTree]], rows: PyTree, chunks: int
) -> tuple[PyTree, PyTree]:
    """Applies `function` to all rows, one chunk of them at a time.

    Differentiated, this is gradient caching. The forward pass keeps only the results of a chunk. A
    function of all results, such as a loss that contrasts each row with every other, then has one
    gradient per result. The backward pass recomputes each chunk and adds up its share of the
    gradient: the same gradient as in one pass, for twice the forward computation.

    With n chunks, chunk k has the rows k, k + n, k + 2n, …. Where devices share a batch, the rows
    that all devices together have in a chunk then do not depend on the number of devices.

    Args:
      function: maps rows to their results, which have the same leading axis, and to statistics,
        which get no gradient.
      rows: arrays with a leading axis of equal length.
      chunks: number of chunks; divides the number of rows. With 1, this is `function` itself.

    Returns:
      The results of all rows, in their order, and the mean of the chunks' statistics.

    References:
      Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021,
      section 3.
    """
    if chunks == 1:
        return function(rows)

    def rows_of(index, x):
        split = x.reshape(len(x) // chunks, chunks, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(split, index, axis=1, keepdims=False)

    # Two loops share no expressions, so XLA has nothing to merge.
    @partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(index):
        results, statistics = function(jax.tree.map(partial(rows_of, index), rows))
        return results, jax.lax.stop_gradient(statistics)

    def joined(x):  # also where the width is 0, as the plain method's ω has
        return x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    results, statistics = jax.lax.map(one_chunk, jnp.arange(chunks))
    return (
        jax.tree.map(joined, results),
        jax.tree.map(lambda x: x.mean(0), statistics),
    )
