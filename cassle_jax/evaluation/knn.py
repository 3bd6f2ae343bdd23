"""Classifies features by their nearest neighbours under cosine similarity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_TEST_ROWS = 1024
_TRAIN_ROWS = 8192


def knn_accuracy(
    train_features: Float[Array | np.ndarray, "train features"],
    train_labels: Int[Array | np.ndarray, " train"],
    test_features: Float[Array | np.ndarray, "test features"],
    test_labels: Int[Array | np.ndarray, " test"],
    k: int = 1,
) -> float:
    """Share of test rows whose label the ``k`` most similar training rows vote for.

    The search is exact and in float32. Similarity is the cosine; a row of zeros has similarity 0
    to everything. Among equally similar training rows the earlier one is the nearer. Every
    neighbour has one vote; among labels with equally many votes, the one with the nearest
    neighbour wins. The CASSLE paper uses ``k = 1``.

    Memory beside the features: one block of 1024 × 8192 similarities.

    Args:
      train_features: Features of the rows to search, any scale.
      train_labels: Their labels, any integers.
      test_features: Features of the rows to classify.
      test_labels: Their labels.
      k: Number of neighbours, from 1 to the number of training rows.

    Returns:
      Accuracy in [0, 1].

    Raises:
      ValueError: If ``k`` is out of range, there are no test rows, or a feature is not finite.
    """
    train_features = np.asarray(train_features, np.float32)
    test_features = np.asarray(test_features, np.float32)
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k={k} must lie between 1 and the {len(train_features)} training rows")
    if len(test_features) == 0:
        raise ValueError("test_features has no rows")
    for name, features in (("train_features", train_features), ("test_features", test_features)):
        if not np.isfinite(features).all():
            raise ValueError(f"{name} holds values that are not finite")

    classes, labels = np.unique(np.asarray(train_labels), return_inverse=True)
    # The first block must hold k rows.
    block_rows = max(k, min(_TRAIN_ROWS, len(train_features)))
    blocks = (
        _blocks(train_features, block_rows),
        _blocks(labels.astype(np.int32), block_rows),
        _blocks(np.ones(len(labels), bool), block_rows),
    )
    test_blocks = _blocks(test_features, min(_TEST_ROWS, len(test_features)))
    votes = [np.asarray(_vote(test, *blocks, k=k)) for test in test_blocks]
    predicted = classes[np.concatenate(votes)[: len(test_features)]]
    return float(np.mean(predicted == np.asarray(test_labels)))


def _blocks(rows: np.ndarray, block_rows: int) -> Array:
    """Cuts rows into blocks of equal length, the last one filled up with zeros."""
    missing = -len(rows) % block_rows
    padded = np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
    return jnp.asarray(padded.reshape(-1, block_rows, *rows.shape[1:]))


@functools.partial(jax.jit, static_argnames="k")
def _vote(
    test: Float[Array, "test features"],
    train_blocks: Float[Array, "blocks rows features"],
    label_blocks: Int[Array, "blocks rows"],
    is_row_blocks: Bool[Array, "blocks rows"],
    *,
    k: int,
) -> Int[Array, " test"]:
    """The label each test row's k nearest training rows vote for."""
    test = _normalise(test)

    def merge(nearest, block):
        train, labels, is_row = block
        similarity = jnp.matmul(test, _normalise(train).T, precision=jax.lax.Precision.HIGHEST)
        found, rows = jax.lax.top_k(jnp.where(is_row, similarity, -jnp.inf), k)
        # What was found before stands first: top_k then keeps the earlier of equals.
        similarity = jnp.concatenate([nearest[0], found], axis=1)
        labels = jnp.concatenate([nearest[1], labels[rows]], axis=1)
        similarity, kept = jax.lax.top_k(similarity, k)
        return (similarity, jnp.take_along_axis(labels, kept, axis=1)), None

    nothing = (jnp.full((len(test), k), -jnp.inf), jnp.zeros((len(test), k), jnp.int32))
    (_, labels), _ = jax.lax.scan(merge, nothing, (train_blocks, label_blocks, is_row_blocks))
    votes = jnp.sum(labels[:, :, None] == labels[:, None, :], axis=2)
    winner = jnp.argmax(votes, axis=1)
    return jnp.take_along_axis(labels, winner[:, None], axis=1)[:, 0]


def _normalise(rows: Float[Array, "rows features"]) -> Float[Array, "rows features"]:
    norm = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norm == 0, 1, norm)
