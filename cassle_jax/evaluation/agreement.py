"""Compares two sets of embeddings row by row: cosine similarity, InfoNCE, retrieval accuracy."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from cassle_jax.methods.losses import batch_offset, normalize
from cassle_jax.solvers.logistic import widest_floats

TEMPERATURE = 0.2

_ROWS_AT_ONCE = 1024


def unit_length(rows: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Rows of length 1, whatever their scale; rows of zeros as they are.

    On CPUs, rows of subnormal numbers count as rows of zeros, in encoders too.
    """
    # A power of two rounds nothing, and keeps squares from becoming 0 or infinite.
    _, exponent = jnp.frexp(jnp.max(jnp.abs(rows), axis=-1, keepdims=True))
    return normalize(jnp.ldexp(rows, -exponent))


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Agreement between the embeddings of two views of the same images.

    Attributes:
      same: mean cosine similarity between the two embeddings of an image, in [−1, 1].
      different: mean cosine similarity between the first embedding of an image and the second
        embedding of another image, over all pairs of different images.
      info_nce: mean of −log softmax(similarities / temperature) at the image's own embedding, over
        all candidates; chance is log(candidates).
      accuracy: share of images whose own embedding is the most similar candidate, in [0, 1].
    """

    same: float
    different: float
    info_nce: float
    accuracy: float

    @property
    def difference(self) -> float:
        """The similarity of an image to itself minus its similarity to another image."""
        return self.same - self.different


@struct.dataclass
class BatchRows:
    """The candidates of the global batch, and the places of this device's rows among them.

    Attributes:
      real: which candidates hold an image.
      position: the indices of this device's rows among the candidates.
    """

    real: Bool[Array, " N"]
    position: Int[Array, " B"]

    @property
    def counted(self) -> Bool[Array, " B"]:
        """This device's rows that hold an image."""
        return self.real[self.position]


def batch_rows(mask: Bool[Array, " B"], axis_name: str | None) -> BatchRows:
    """Locates this device's rows among the candidates of the global batch.

    Args:
      mask: which rows of this device hold an image.
      axis_name: the devices that share the batch; `None` for a single one.
    """
    position = batch_offset(len(mask), axis_name) + jnp.arange(len(mask))
    real = mask if axis_name is None else jax.lax.all_gather(mask, axis_name, tiled=True)
    return BatchRows(real, position)


@struct.dataclass
class AgreementSums:
    """Sums over images, from which `agreement` takes means.

    Attributes:
      same: sum of the cosine similarities between an image's two embeddings.
      queries: sum of the first embeddings, scaled to unit length.
      keys: sum of the second embeddings, scaled to unit length.
      info_nce: sum over the images that have more than one candidate.
      matched: number of those images whose own embedding is the most similar candidate.
    """

    same: Float[Array | np.ndarray, ""]
    queries: Float[Array | np.ndarray, " D"]
    keys: Float[Array | np.ndarray, " D"]
    info_nce: Float[Array | np.ndarray, ""]
    matched: Float[Array | np.ndarray, ""]


@struct.dataclass
class Counts:
    """Numbers of compared images.

    Attributes:
      images: all images.
      ranked: the images that have more than one candidate.
      candidates: the candidates of the ranked images, summed over these images.
    """

    images: Float[Array | np.ndarray, ""]
    ranked: Float[Array | np.ndarray, ""]
    candidates: Float[Array | np.ndarray, ""]


def agreement_sums(
    rows: BatchRows,
    queries: Float[Array, "B D"],
    keys: Float[Array, "N D"],
    temperature: float | Float[Array, ""],
) -> AgreementSums:
    """The sums over this device's images.

    Args:
      rows: this device's rows and all candidates.
      queries: this device's first embeddings, of any length.
      keys: the second embeddings of all candidates, scaled to unit length.
      temperature: the temperature of InfoNCE, above 0.
    """

    def compare(row):
        query, own = row
        # Accelerators would otherwise round the factors to bfloat16 or TF32.
        similarities = jnp.matmul(keys, query, precision=jax.lax.Precision.HIGHEST)
        logits = jnp.where(rows.real, similarities / temperature, -jnp.inf)
        info_nce = optax.softmax_cross_entropy_with_integer_labels(logits, own)
        return similarities[own], info_nce, jnp.argmax(logits) == own

    queries = unit_length(queries)
    same, info_nce, matched = jax.lax.map(
        compare, (queries, rows.position), batch_size=_ROWS_AT_ONCE
    )

    def total(values):
        counted = rows.counted.reshape(-1, *[1] * (values.ndim - 1))
        return jnp.sum(jnp.where(counted, values, 0.0), axis=0)

    ranked = rows.real.sum() > 1
    return AgreementSums(
        same=total(same),
        queries=total(queries),
        keys=total(keys[rows.position]),
        info_nce=ranked * total(info_nce),
        matched=ranked * total(matched),
    )


def counts(rows: BatchRows) -> Counts:
    """The numbers of this device's images."""
    images = rows.counted.sum(dtype=jnp.float32)
    candidates = rows.real.sum(dtype=jnp.float32)
    ranked = jnp.where(candidates > 1, images, 0)
    return Counts(images, ranked, ranked * candidates)


def agreement(sums: AgreementSums, counts: Counts, name: str) -> Agreement:
    """The means over the images.

    Args:
      sums: summed over all devices and batches.
      counts: summed over all devices and batches.
      name: name of the embeddings, for the error message.

    Raises:
      ValueError: a mean is not finite.
    """
    sums, counts = jax.tree.map(partial(np.asarray, dtype=np.float64), (sums, counts))
    # Sum over all pairs minus sum over the pairs of the same image.
    different = np.vdot(sums.queries, sums.keys) - sums.same
    found = Agreement(
        same=float(sums.same / counts.images),
        different=float(different / (counts.images * (counts.images - 1))),
        info_nce=float(sums.info_nce / counts.ranked),
        accuracy=float(sums.matched / counts.ranked),
    )
    if not np.isfinite(dataclasses.astuple(found)).all():
        raise ValueError(f"the embeddings compared as {name!r} hold values that are not finite")
    return found


def both_ways(embeddings: Float[np.ndarray, "N 2 D"], temperature: float, name: str) -> Agreement:
    """The mean of two comparisons: first views as queries, then second views as queries.

    Similarities are in float64 (on TPUs in float32): where all embeddings point nearly the same
    way, float32 rounds each of them to 1.

    Args:
      embeddings: embeddings of the two views of every image.
      temperature: the temperature of InfoNCE, above 0.
      name: name of the embeddings, for the error message.

    Raises:
      ValueError: an embedding is not finite.
    """
    with widest_floats():
        first, second = (jnp.asarray(each, float) for each in np.moveaxis(embeddings, 1, 0))
        ways = [
            dataclasses.astuple(agreement(*_among_all(queries, keys, temperature), name))
            for queries, keys in ((first, second), (second, first))
        ]
    return Agreement(*(float(each) for each in np.mean(ways, axis=0)))


@jax.jit
def _among_all(
    queries: Float[Array, "N D"], keys: Float[Array, "N D"], temperature: float | Float[Array, ""]
) -> tuple[AgreementSums, Counts]:
    rows = batch_rows(jnp.ones(len(keys), bool), None)
    return agreement_sums(rows, queries, unit_length(keys), temperature), counts(rows)
