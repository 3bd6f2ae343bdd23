"""Contrastive objectives and pair statistics on embeddings, each for one device of a mapped axis.

Every function takes this device's share of a batch and, where it contrasts against the whole
batch, gathers the rest over `axis_name` (`None`: this device holds the whole batch). Losses are the
mean over the local samples, so the mean over devices is the mean over the global batch.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def normalize(embeddings: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Scales each embedding to unit length; a zero vector stays zero."""
    squared_length = jnp.sum(jnp.square(embeddings), axis=-1, keepdims=True)
    return embeddings * jax.lax.rsqrt(jnp.maximum(squared_length, 1e-24))


def gather(local: Float[Array, "B D"], axis_name: str | None) -> Float[Array, "N D"]:
    """The rows of all devices in device order; differentiable."""
    return local if axis_name is None else jax.lax.all_gather(local, axis_name, tiled=True)


def batch_offset(local_size: int, axis_name: str | None) -> int | Array:
    """Position of this device's first sample in the global batch."""
    return 0 if axis_name is None else jax.lax.axis_index(axis_name) * local_size


def _similarities(first: Float[Array, "B D"], second: Float[Array, "N D"]) -> Float[Array, "B N"]:
    # Accelerators would otherwise round the factors to bfloat16 or TF32.
    return jnp.matmul(first, second.T, precision=jax.lax.Precision.HIGHEST)


def nt_xent(
    first: Float[Array, "B D"],
    second: Float[Array, "B D"],
    *,
    temperature: float,
    axis_name: str | None,
) -> Float[Array, ""]:
    """The normalised temperature-scaled cross entropy of SimCLR.

    Each of the 2B local embeddings must find the other view of its image among all other
    embeddings of both views, here and on every device of `axis_name`.

    Args:
      first: embeddings of the first views, any length.
      second: embeddings of the second views, row by row of the same images.
      temperature: positive.
      axis_name: the devices whose samples serve as negatives; `None` for this one's only.

    References:
      Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020,
      eq. 1.
    """
    first, second = normalize(first), normalize(second)
    all_first, all_second = gather(first, axis_name), gather(second, axis_name)
    size = first.shape[0]
    position = batch_offset(size, axis_name) + jnp.arange(size)
    itself = jax.nn.one_hot(position, all_first.shape[0], dtype=bool)

    def one_direction(anchor, same_view, other_view):
        positives = _similarities(anchor, other_view) / temperature
        negatives = jnp.where(itself, -jnp.inf, _similarities(anchor, same_view) / temperature)
        logits = jnp.concatenate([positives, negatives], axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, position).mean()

    return 0.5 * (
        one_direction(first, all_first, all_second) + one_direction(second, all_second, all_first)
    )


def queue_info_nce(
    queries: Float[Array, "B D"],
    keys: Float[Array, "B D"],
    queue: Float[Array, "K D"],
    *,
    temperature: float,
) -> Float[Array, ""]:
    """InfoNCE of MoCo: each query against its key and all K embeddings of the queue.

    Args:
      queries: online embeddings, any length.
      keys: momentum embeddings of the other views, any length.
      queue: negatives of unit length.
      temperature: positive.

    References:
      He et al., Momentum Contrast for Unsupervised Visual Representation Learning, 2020, eq. 1.
    """
    queries, keys = normalize(queries), normalize(keys)
    positives = jnp.sum(queries * keys, axis=-1, keepdims=True)
    logits = jnp.concatenate([positives, _similarities(queries, queue)], axis=1) / temperature
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.zeros(len(logits), jnp.int32)
    ).mean()


def pair_similarities(
    first: Float[Array, "B D"], second: Float[Array, "B D"], axis_name: str | None
) -> dict[str, Float[Array, ""]]:
    """Mean cosine similarity of positive pairs and of all other pairs in the global batch.

    Returns:
      `positive_similarity` and `negative_similarity`, each in [-1, 1]; a collapsed network has both
      at 1. With one sample there is no negative pair and the second is 0.
    """
    first, second = normalize(first), normalize(second)
    positives = jnp.sum(first * second)
    sums = jnp.concatenate([first.sum(0), second.sum(0), positives[None]])
    count = first.shape[0]
    if axis_name is not None:
        sums = jax.lax.psum(sums, axis_name)
        count = count * jax.lax.psum(1, axis_name)
    sum_first, sum_second = jnp.split(sums[:-1], 2)
    positives = sums[-1]
    return {
        "positive_similarity": positives / count,
        "negative_similarity": (jnp.sum(sum_first * sum_second) - positives)
        / max(count * (count - 1), 1),
    }
