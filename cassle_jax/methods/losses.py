"""Objectives and pair statistics on embeddings, each for one device of a mapped axis.

Every function takes this device's share of a batch and, where it contrasts against the whole
batch, gathers the rest over `axis_name` (`None`: this device holds the whole batch). Losses are the
mean over the local samples, so the mean over devices is the mean over the global batch. Embeddings
are widened to float32 where their dtype is narrower. Pairs of unequal shapes are refused.

A caller's own `jax.shard_map` around them needs `check_vma=False`, as around `BatchNorm`: gradients
are local to a device until the caller averages them. Otherwise JAX has summed them already.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float


def widened(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The values in float32; as they are where they are float64."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _paired(
    first: Float[Array, "B D"], second: Float[Array, "B D"]
) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """Both embeddings, widened; raises ValueError unless they can be of the same images."""
    if first.shape != second.shape:
        raise ValueError(
            f"embeddings of shapes {first.shape} and {second.shape} are not of the same images, "
            "row by row; give one row per image and equal widths"
        )
    return widened(first), widened(second)


def normalize(embeddings: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Scales each embedding to unit length; a zero vector stays zero."""
    embeddings = widened(embeddings)
    squared_length = jnp.sum(jnp.square(embeddings), axis=-1, keepdims=True)
    return embeddings * jax.lax.rsqrt(jnp.maximum(squared_length, 1e-24))


def gather(local: Float[Array, "B D"], axis_name: str | None) -> Float[Array, "N D"]:
    """The rows of all devices in device order; differentiable."""
    return local if axis_name is None else jax.lax.all_gather(local, axis_name, tiled=True)


def batch_offset(local_size: int, axis_name: str | None) -> int | Array:
    """Position of this device's first sample in the global batch."""
    return 0 if axis_name is None else jax.lax.axis_index(axis_name) * local_size


def mean_over_devices(value: Float[Array, "*shape"], axis_name: str | None) -> Array:
    """The mean over the devices of their values, the global batch's mean; differentiable."""
    return value if axis_name is None else jax.lax.pmean(value, axis_name)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def agreed_mean(value: Float[Array, "*shape"], axis_name: str | None) -> Array:
    """`mean_over_devices` of a value from which all devices then compute the same loss.

    Their gradients are equal and need no averaging. This halves the communication, which matters
    for a matrix of all units by all units.
    """
    return mean_over_devices(value, axis_name)


def _agreed_mean_forward(value, axis_name):
    return mean_over_devices(value, axis_name), None


def _agreed_mean_backward(axis_name, _, gradient):
    del axis_name
    return (gradient,)


agreed_mean.defvjp(_agreed_mean_forward, _agreed_mean_backward)


def similarities(first: Float[Array, "B D"], second: Float[Array, "N D"]) -> Float[Array, "B N"]:
    """The scalar product of every row of one with every row of the other, in full precision."""
    # Accelerators would otherwise round the factors to bfloat16 or TF32.
    return jnp.matmul(first, second.T, precision=jax.lax.Precision.HIGHEST)


def nt_xent(
    first: Float[Array, "B D"],
    second: Float[Array, "B D"],
    *,
    temperature: float | Float[Array, ""],
    axis_name: str | None,
) -> Float[Array, ""]:
    """The normalised temperature-scaled cross entropy of SimCLR.

    Each of the 2B local embeddings must find the other view of its image among all other
    embeddings of both views, here and on every device of `axis_name`.

    Args:
      first: embeddings of the first views, any length.
      second: embeddings of the second views, of the same images row by row.
      temperature: positive.
      axis_name: the devices whose samples serve as negatives; `None` for this device's only.

    Returns:
      The mean over the 2B embeddings; log(2N − 1) for equal embeddings of N images.

    References:
      Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020,
      eq. 1.
    """
    first, second = map(normalize, _paired(first, second))
    all_first, all_second = gather(first, axis_name), gather(second, axis_name)
    size = first.shape[0]
    position = batch_offset(size, axis_name) + jnp.arange(size)
    itself = jax.nn.one_hot(position, all_first.shape[0], dtype=bool)

    def one_direction(anchor, same_view, other_view):
        positives = similarities(anchor, other_view) / temperature
        negatives = jnp.where(itself, -jnp.inf, similarities(anchor, same_view) / temperature)
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

    Returns:
      The mean over the B queries; log(K + 1) for equal embeddings.

    References:
      He et al., Momentum Contrast for Unsupervised Visual Representation Learning, 2020, eq. 1.
    """
    queries, keys = map(normalize, _paired(queries, keys))
    positives = jnp.sum(queries * keys, axis=-1, keepdims=True)
    logits = jnp.concatenate([positives, similarities(queries, queue)], axis=1) / temperature
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.zeros(len(logits), jnp.int32)
    ).mean()


def batch_info_nce(
    queries: Float[Array, "B D"],
    keys: Float[Array, "B D"],
    *,
    temperature: float,
    axis_name: str | None,
) -> Float[Array, ""]:
    """InfoNCE of MoCo-v3: each query finds its key among those of all images in the global batch.

    Args:
      queries: predictions of one view, any length.
      keys: momentum embeddings of the other view, of the same images row by row, any length.
      temperature: positive.
      axis_name: the devices that share the global batch; `None` for a single one.

    Returns:
      The mean over the B queries; log N for equal embeddings of N images.

    References:
      Chen, Xie and He, An Empirical Study of Training Self-Supervised Vision Transformers, 2021,
      eq. 1 and algorithm 1, without its factor 2τ.
    """
    queries, keys = map(normalize, _paired(queries, keys))
    keys = gather(keys, axis_name)
    position = batch_offset(len(queries), axis_name) + jnp.arange(len(queries))
    logits = similarities(queries, keys) / temperature
    return optax.softmax_cross_entropy_with_integer_labels(logits, position).mean()


def cosine(first: Float[Array, "B D"], second: Float[Array, "B D"]) -> Float[Array, ""]:
    """Mean cosine similarity of the rows of `first` with those of `second`, in [-1, 1]."""
    first, second = map(normalize, _paired(first, second))
    return jnp.sum(first * second, axis=-1).mean()


def cross_correlation(
    first: Float[Array, "B D"], second: Float[Array, "B D"], axis_name: str | None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The two terms of Barlow Twins, from c = zᵀz' / batch over the global batch.

    Args:
      first: embeddings of the first views, normalised over the batch by the projector.
      second: embeddings of the second views, of the same images row by row.
      axis_name: the devices that share the global batch; `None` for a single one.

    Returns:
      Σ (1 - c_ii)² and Σ c_ij² over i ≠ j, not weighted.

    References:
      Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, 2021, eq. 1.
    """
    first, second = _paired(first, second)
    c = jnp.matmul(first.T, second, precision=jax.lax.Precision.HIGHEST) / len(first)
    c = agreed_mean(c, axis_name)
    invariance = jnp.sum(jnp.square(1 - jnp.diagonal(c)))
    redundancy = jnp.sum(jnp.square(c), where=~jnp.eye(len(c), dtype=bool))
    return invariance, redundancy


def pair_similarities(
    first: Float[Array, "B D"], second: Float[Array, "B D"], axis_name: str | None
) -> dict[str, Float[Array, ""]]:
    """Mean cosine similarity of positive pairs and of all other pairs in the global batch.

    Returns:
      `positive_similarity` and `negative_similarity`, each in [-1, 1]; a collapsed network has both
      at 1. With one sample there is no negative pair and the second is 0.
    """
    first, second = map(normalize, _paired(first, second))
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
        / float(max(count * (count - 1), 1)),  # may exceed an int32
    }


def variance_invariance_covariance(
    first: Float[Array, "B D"], second: Float[Array, "B D"], axis_name: str | None
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """The three terms of VICReg, from statistics over the global batch.

    Args:
      first: embeddings of the first views.
      second: embeddings of the second views, of the same images row by row.
      axis_name: the devices that share the global batch; `None` for a single one.

    Returns:
      Variance: the shortfall of a unit's standard deviation √(var + 1e-4) from 1, the mean over
      units and, as in the authors' code, over the views. Invariance: the mean squared difference.
      Covariance: Σ c_ij² / D over i ≠ j, the sum over the views. None is weighted.

    References:
      Bardes, Ponce and LeCun, VICReg: Variance-Invariance-Covariance Regularization for
      Self-Supervised Learning, 2022, eqs. 1 to 5.
    """
    first, second = _paired(first, second)
    covariances = [_covariance(view, view, axis_name) for view in (first, second)]
    variance = _shortfall(jnp.stack([jnp.diagonal(c) for c in covariances]))
    invariance = jnp.square(first - second).mean()
    others = ~jnp.eye(first.shape[1], dtype=bool)
    covariance = sum(jnp.sum(jnp.square(c), where=others) for c in covariances) / first.shape[1]
    return variance, invariance, covariance


def variance_shortfall(embeddings: Float[Array, "B D"], axis_name: str | None) -> Float[Array, ""]:
    """VICReg's variance term of one view, not weighted; its statistics are the global batch's."""
    squares = jnp.square(_centred(embeddings, axis_name)).sum(0)
    return _shortfall(_unbiased(squares, len(embeddings), axis_name))


def cross_covariance(
    first: Float[Array, "B D"], second: Float[Array, "B E"], axis_name: str | None
) -> Float[Array, ""]:
    """Σ c_ij² over all pairs of a unit of one embedding and a unit of another."""
    return jnp.sum(jnp.square(_covariance(first, second, axis_name)))


def _shortfall(variances: Float[Array, "*views D"]) -> Float[Array, ""]:
    """The mean shortfall of standard deviations from 1."""
    return jax.nn.relu(1 - jnp.sqrt(variances + 1e-4)).mean()


def _covariance(
    first: Float[Array, "B D"], second: Float[Array, "B E"], axis_name: str | None
) -> Float[Array, "D E"]:
    """The unbiased covariance of the units of two embeddings over the global batch."""
    first, second = _centred(first, axis_name), _centred(second, axis_name)
    products = jnp.matmul(first.T, second, precision=jax.lax.Precision.HIGHEST)
    return _unbiased(products, len(first), axis_name)


def _centred(embeddings: Float[Array, "B D"], axis_name: str | None) -> Float[Array, "B D"]:
    """The embeddings minus their mean over the global batch."""
    embeddings = widened(embeddings)
    return embeddings - mean_over_devices(embeddings.mean(0), axis_name)


def _unbiased(sums: Float[Array, "*shape"], count: int, axis_name: str | None) -> Array:
    """Sums over the global batch divided by its size minus 1, from those over `count` samples."""
    devices = 1 if axis_name is None else jax.lax.psum(1, axis_name)
    return agreed_mean(sums, axis_name) * (devices / (count * devices - 1))


def sinkhorn_codes(
    scores: Float[Array, "B K"],
    queued: Float[Array, "Q K"] | None = None,
    use_queue: Bool[Array, ""] | bool = True,
    *,
    epsilon: float,
    iterations: int,
    axis_name: str | None,
) -> Float[Array, "B K"]:
    """Soft assignments of samples to prototypes that use all prototypes equally (SwAV).

    Each iteration of Sinkhorn-Knopp divides exp(scores / ε) by its sums over all samples, of every
    device, and then each sample by its sum. It works with logarithms, so that a small ε is safe.

    Args:
      scores: similarities of the samples to K prototypes; no gradient goes through them.
      queued: scores of earlier samples that share the prototypes, the same on every device.
      use_queue: whether the queued scores take part.
      epsilon: ε, positive; the smaller, the harder the assignments.
      iterations: number of iterations, at least 1.
      axis_name: the devices that share the global batch; `None` for a single one.

    Returns:
      Codes of the samples; each sums to 1.

    References:
      Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments,
      2020, eqs. 3 to 5; Cuturi, Sinkhorn Distances, 2013.
    """
    logsumexp = jax.nn.logsumexp

    def iterate(_, logits):
        own, queued = logits
        total = logsumexp(gather(logsumexp(own, 0, keepdims=True), axis_name), 0)
        if queued is not None:
            total = jnp.where(use_queue, jnp.logaddexp(total, logsumexp(queued, 0)), total)
        return jax.tree.map(lambda rows: jax.nn.log_softmax(rows - total), (own, queued))

    scores, queued = jax.lax.stop_gradient(jax.tree.map(widened, (scores, queued)))
    logits = jax.tree.map(lambda rows: rows / epsilon, (scores, queued))
    own, _ = jax.lax.fori_loop(0, iterations, iterate, logits)
    return jnp.exp(own)
