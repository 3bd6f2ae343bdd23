"""Finds the images most similar to a query: an exact search under cosine similarity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from cassle_jax.data import Source, decode
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.findings import Finding, Gallery, Pixels
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.settings import Settings

GALLERY_QUERIES, GALLERY_NEIGHBOURS = 8, 6
THUMBNAIL = 96  # pixels

_QUERY_ROWS = 1024
_SEARCH_ROWS = 8192


@dataclass(frozen=True)
class Neighbours:
    """The rows most similar to each query, the nearest first.

    Attributes:
      rows: Places of the neighbours among the searched rows.
      similarities: Cosine between the neighbours and the query.
    """

    rows: Int32[np.ndarray, "queries k"]
    similarities: Float32[np.ndarray, "queries k"]

    def findings(
        self,
        dataset: str,
        query_picture: Callable[[int], Pixels],
        picture: Callable[[int], Pixels],
        *,
        title: str = "Nearest images",
        names: Sequence[str] = (),
    ) -> list[Finding]:
        """A gallery: each line shows a query, then its neighbours with their similarity.

        Args:
          dataset: Name of the dataset.
          query_picture: Fetches the picture of a query by its place among the queries.
          picture: Fetches the picture of a searched row by its place.
          title: Title of the gallery.
          names: Captions of the queries; "query" by default.

        Returns:
          The gallery alone.

        Raises:
          ValueError: If the number of names differs from the number of queries.
        """
        if names and len(names) != len(self.rows):
            raise ValueError(f"names has {len(names)} captions for {len(self.rows)} queries")
        lines = []
        for query, (rows, similarities) in enumerate(
            zip(self.rows, self.similarities, strict=True)
        ):
            found = [
                (picture(int(row)), f"{similarity:.2f}")
                for row, similarity in zip(rows, similarities, strict=True)
            ]
            caption = names[query] if names else "query"
            lines.append(((query_picture(query), caption), *found))
        return [Gallery(PROTOCOL.name, dataset, title, tuple(lines))]


def nearest(
    queries: Float[Array | np.ndarray, "queries features"],
    rows: Float[Array | np.ndarray, "rows features"],
    k: int,
    *,
    own_rows: Int[np.ndarray, " queries"] | None = None,
) -> Neighbours:
    """The ``k`` rows with the largest cosine to each query.

    The search is exact and in float32, block by block of both sides. A row of zeros has similarity
    0 to everything. Among equally similar rows the earlier one is the nearer.

    The device holds the rows and one block of 1024 × 8192 similarities: for 75 000 × 2048 features
    0.7 GB.

    Args:
      queries: Features, any scale.
      rows: Features to search, any scale.
      k: Number of neighbours to find.
      own_rows: The place of each query among the rows, where it is left out; −1 for a query that is
        not among them. So the neighbours of images within their own set are
        `nearest(features[images], features, k, own_rows=images)`.

    Returns:
      Rows and similarities, the nearest first.

    Raises:
      ValueError: If ``k`` is out of range, there are no queries, a feature is not finite, or an own
        row is not among the rows.
    """
    queries, rows = (np.asarray(jax.device_get(side), np.float32) for side in (queries, rows))
    available = len(rows) if own_rows is None else len(rows) - 1
    own_rows = np.full(len(queries), -1) if own_rows is None else own_rows
    _check_search(queries, rows, k, available, own_rows)

    # A block must hold k rows, so that top_k can find k.
    block_rows = max(k, min(_SEARCH_ROWS, len(rows)))
    blocks = jnp.asarray(_blocks(rows, block_rows))
    is_row = jnp.asarray(_blocks(np.ones(len(rows), bool), block_rows))
    query_rows = min(_QUERY_ROWS, len(queries))
    parts = zip(
        _blocks(queries, query_rows), _blocks(own_rows.astype(np.int32), query_rows), strict=True
    )
    found = [jax.device_get(_search(*part, blocks, is_row, k=k)) for part in parts]
    places, similarities = (
        np.concatenate(side)[: len(queries)] for side in zip(*found, strict=True)
    )
    return Neighbours(places, similarities)


def _check_search(
    queries: np.ndarray, rows: np.ndarray, k: int, available: int, own_rows: np.ndarray
) -> None:
    """Raises the errors of `nearest`."""
    if not 1 <= k <= available:
        raise ValueError(f"k={k} must lie between 1 and the {available} rows there are to find")
    if len(queries) == 0:
        raise ValueError("queries has no rows")
    for name, side in (("queries", queries), ("rows", rows)):
        if not np.isfinite(side).all():
            raise ValueError(f"{name} holds values that are not finite")
    if own_rows.min() < -1 or own_rows.max() >= len(rows):
        raise ValueError(
            f"own_rows are from {own_rows.min()} to {own_rows.max()}; there are {len(rows)} rows "
            f"from 0, and -1 stands for none"
        )


def _blocks(rows: np.ndarray, block_rows: int) -> np.ndarray:
    """Cuts rows into blocks of equal length, the last one filled up with zeros."""
    missing = -len(rows) % block_rows
    padded = np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
    return padded.reshape(-1, block_rows, *rows.shape[1:])


@partial(jax.jit, static_argnames="k")
def _search(
    queries: Float[Array | np.ndarray, "queries features"],
    own_rows: Int[Array | np.ndarray, " queries"],
    blocks: Float[Array, "blocks rows features"],
    is_row: Bool[Array, "blocks rows"],
    *,
    k: int,
) -> tuple[Int32[Array, "queries k"], Float32[Array, "queries k"]]:
    """The nearest rows to each query, found block by block, and their similarities."""
    queries = _normalise(jnp.asarray(queries))

    def merge(nearest, block):
        rows, is_row, first = block
        similarity = jnp.matmul(queries, _normalise(rows).T, precision=jax.lax.Precision.HIGHEST)
        places = first + jnp.arange(len(rows))
        allowed = is_row & (places != jnp.asarray(own_rows)[:, None])
        found, kept = jax.lax.top_k(jnp.where(allowed, similarity, -jnp.inf), k)
        # Earlier finds come first: top_k then keeps the earlier of equal ones.
        similarity = jnp.concatenate([nearest[1], found], axis=1)
        places = jnp.concatenate([nearest[0], places[kept]], axis=1)
        similarity, kept = jax.lax.top_k(similarity, k)
        return (jnp.take_along_axis(places, kept, axis=1), similarity), None

    nothing = (
        jnp.zeros((len(queries), k), jnp.int32),
        jnp.full((len(queries), k), -jnp.inf, jnp.float32),
    )
    firsts = jnp.arange(len(blocks)) * blocks.shape[1]
    found, _ = jax.lax.scan(merge, nothing, (blocks, is_row, firsts))
    return found


def _normalise(rows: Float[Array, "rows features"]) -> Float[Array, "rows features"]:
    norm = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norm == 0, 1, norm)


def _run(bench: Bench, _: Settings) -> list[Finding]:
    part, source = bench.test, bench.data.test
    last = len(part.features) - 1
    chosen = np.unique(np.linspace(0, last, GALLERY_QUERIES).round().astype(int))
    found = nearest(
        part.features[chosen], part.features, min(GALLERY_NEIGHBOURS, last), own_rows=chosen
    )

    def picture(row: int) -> Pixels:
        return decode(source[int(part.places[row])].image, THUMBNAIL)

    return found.findings(
        bench.data.name,
        lambda query: picture(int(chosen[query])),
        picture,
        names=[_name(source, int(part.labels[row])) for row in chosen],
    )


def _name(source: Source, label: int) -> str:
    return source.class_names[label] if source.class_names and label >= 0 else "query"


PROTOCOL = Protocol("neighbours", title="Nearest images", run=_run)
