"""Finds the images most similar to a query: an exact search under cosine similarity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from cassle_jax.checks import check_finite
from cassle_jax.data import Source, decode
from cassle_jax.evaluation.agreement import unit_length
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.findings import Finding, Gallery, Pixels
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.settings import Settings

GALLERY_QUERIES, GALLERY_NEIGHBOURS = 8, 6
THUMBNAIL = 96  # pixels

Parts = Sequence[Float[Array | np.ndarray, "_ _"]]
"""Features in several arrays, one after the other."""

_QUERY_ROWS = 8192
_SEARCH_ROWS = 1024
# Blocks are whole tiles of a matrix product. What is left of a tile may be summed in another order,
# which would make equal rows differ by their rounding.
_TILE_ROWS = 64
# Distance below which rows of unit length count as one.
_COLLAPSED = 1e-6


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
        names: Sequence[str] = (),
    ) -> list[Finding]:
        """A gallery: each line shows a query, then its neighbours with their similarity.

        Args:
          dataset: Name of the dataset.
          query_picture: Fetches the picture of a query by its place among the queries.
          picture: Fetches the picture of a searched row by its place.
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
        return [Gallery(PROTOCOL.name, dataset, PROTOCOL.title, tuple(lines))]


def nearest(
    queries: Float[Array | np.ndarray, "queries features"],
    rows: Float[Array | np.ndarray, "rows features"] | Parts,
    k: int,
    *,
    own_rows: Int[np.ndarray, " queries"] | None = None,
) -> Neighbours:
    """The ``k`` rows with the largest cosine to each query.

    The search is exact and in float32, block by block of both sides. It compares distances between
    rows of unit length, which order rows as their cosines do, and differ where all cosines round
    to 1. A row of zeros has similarity 0 to everything. Among equally similar rows the earlier one
    is the nearer.

    Memory in addition to the features, whatever their number: three blocks of at most 8192 rows,
    and 8192 × 1024 similarities; with 2048 features 0.1 GB.

    Args:
      queries: Features, any scale.
      rows: Features to search, any scale; several parts count as one after the other.
      k: Number of neighbours to find.
      own_rows: The place of each query among the rows, which the search leaves out; −1 for a query
        that is not among them. `nearest(features[images], features, k, own_rows=images)` finds
        neighbours of images within their own set.

    Returns:
      Rows and similarities, the nearest first.

    Raises:
      ValueError: If ``k`` is out of range, there are no queries, the widths differ, a feature is
        not finite, there is another number of own rows than of queries, or an own row is not among
        the rows.
    """
    queries, *parts = (
        np.asarray(jax.device_get(side), np.float32) for side in (queries, *parts_of(rows))
    )
    own_rows = np.full(len(queries), -1) if own_rows is None else own_rows
    _check_search(queries, parts, k, own_rows)
    own_rows = own_rows.astype(np.int32)
    size = min(_QUERY_ROWS, len(queries))
    centre = _centre(_block(next(filter(len, parts)), 0, _TILE_ROWS))
    found = [
        _search(_block(queries, first, size), _block(own_rows, first, size), parts, centre, k)
        for first in range(0, len(queries), size)
    ]
    places, closeness = (np.concatenate(side)[: len(queries)] for side in zip(*found, strict=True))
    return Neighbours(places, 1 + closeness / 2)


def _check_search(
    queries: np.ndarray, parts: Sequence[np.ndarray], k: int, own_rows: np.ndarray
) -> None:
    """Raises the errors of `nearest`."""
    count = sum(map(len, parts))
    available = count - int(own_rows.max(initial=-1) >= 0)
    if not 1 <= k <= available:
        raise ValueError(f"k={k} is not from 1 to the number of rows to search, {available}")
    if len(queries) == 0:
        raise ValueError("queries has no rows")
    if own_rows.shape != (len(queries),):
        raise ValueError(f"own_rows has shape {own_rows.shape} for {len(queries)} queries")
    for part in parts:
        if part.shape[1:] != queries.shape[1:]:
            raise ValueError(
                f"queries of shape {queries.shape} and rows of shape {part.shape} differ in width"
            )
    check_finite("queries", queries)
    for part in parts:
        check_finite("rows", part)
    if own_rows.min() < -1 or own_rows.max() >= count:
        raise ValueError(
            f"own_rows are from {own_rows.min()} to {own_rows.max()}; there are {count} rows "
            f"from 0, and -1 stands for none"
        )


def parts_of(rows: Float[Array | np.ndarray, "rows features"] | Parts) -> Parts:
    """The arrays of rows that are given in one, or in several."""
    return rows if isinstance(rows, Sequence) else [rows]


def is_collapsed(rows: Parts) -> bool:
    """Whether float32 resolves no neighbours: all rows have one direction, or none has any."""
    first = None
    for part in rows:
        for start in range(0, len(part), _SEARCH_ROWS):
            block = np.array(part[start : start + _SEARCH_ROWS], np.float64)
            lengths = np.linalg.norm(block, axis=1, keepdims=True)
            block /= np.where(lengths > 0, lengths, 1)
            first = block[0] if first is None else first
            if np.linalg.norm(block - first, axis=1).max() >= _COLLAPSED:
                return False
    return True


def _block(rows: np.ndarray, first: int, size: int) -> np.ndarray:
    """Rows from `first` on, filled up with zeros to `size`."""
    block = rows[first : first + size]
    return np.pad(block, [(0, size - len(block))] + [(0, 0)] * (rows.ndim - 1))


class _Points(NamedTuple):
    """Rows of unit length, seen from a centre amid them.

    Attributes:
      offsets: the rows minus the centre.
      squared: the squared length of the offsets.
      is_zero: which rows have no direction.
    """

    offsets: Float[Array, "rows features"]
    squared: Float[Array, " rows"]
    is_zero: Bool[Array, " rows"]


@jax.jit
def _points(
    rows: Float[Array | np.ndarray, "rows features"], centre: Float[Array, " features"]
) -> _Points:
    offsets = unit_length(jnp.asarray(rows)) - centre
    return _Points(offsets, jnp.sum(offsets**2, axis=1), ~jnp.any(rows, axis=1))


@jax.jit
def _centre(rows: Float[Array | np.ndarray, "rows features"]) -> Float[Array, " features"]:
    """A point amid rows of unit length: distances from it round less than those from zero."""
    total = jnp.sum(unit_length(jnp.asarray(rows)), axis=0)
    return total / jnp.maximum(jnp.sum(jnp.any(rows, axis=1)), 1)


def _search(
    queries: Float32[np.ndarray, "queries features"],
    own_rows: Int32[np.ndarray, " queries"],
    parts: Sequence[Float32[np.ndarray, "_ features"]],
    centre: Float[Array, " features"],
    k: int,
) -> tuple[Int32[np.ndarray, "queries k"], Float32[np.ndarray, "queries k"]]:
    """The nearest rows to each query of one block, and their closeness, see `_merged`."""
    queries, own_rows = _points(queries, centre), jnp.asarray(own_rows)
    size = max(k, min(_SEARCH_ROWS, max(map(len, parts))))  # so that top_k can find k
    size += -size % _TILE_ROWS
    found = (
        jnp.zeros((len(own_rows), k), jnp.int32),
        jnp.full((len(own_rows), k), -jnp.inf, jnp.float32),
    )
    before = 0
    for part in parts:
        for first in range(0, len(part), size):
            earlier, place = found, before + first
            found = _merged(
                queries,
                own_rows,
                centre,
                earlier,
                _block(part, first, size),
                place,
                before + len(part),
                k=k,
            )
            jax.block_until_ready(earlier)  # the device is one block ahead, and holds no more
        before += len(part)
    return jax.device_get(found)


@partial(jax.jit, static_argnames="k")
def _merged(
    queries: _Points,
    own_rows: Int[Array, " queries"],
    centre: Float[Array, " features"],
    found: tuple[Int32[Array, "queries k"], Float32[Array, "queries k"]],
    block: Float[Array | np.ndarray, "rows features"],
    first: int | Int[Array, ""],
    end: int | Int[Array, ""],
    *,
    k: int,
) -> tuple[Int32[Array, "queries k"], Float32[Array, "queries k"]]:
    """The nearest of those found so far and of a block of rows at the places [first, end).

    Closeness is −‖query − row‖², which is 2 · (cosine − 1).
    """
    rows = _points(block, centre)
    product = jnp.matmul(queries.offsets, rows.offsets.T, precision=jax.lax.Precision.HIGHEST)
    squared = queries.squared[:, None] + rows.squared - 2 * product
    squared = jnp.where(queries.is_zero[:, None] | rows.is_zero, 2, squared)
    places = first + jnp.arange(len(block))
    allowed = (places < end) & (places != own_rows[:, None])
    nearer, kept = jax.lax.top_k(jnp.where(allowed, -squared, -jnp.inf), k)
    # Earlier finds come first: top_k then keeps the earlier of equal ones.
    closeness = jnp.concatenate([found[1], nearer], axis=1)
    places = jnp.concatenate([found[0], places[kept].astype(jnp.int32)], axis=1)
    closeness, kept = jax.lax.top_k(closeness, k)
    return jnp.take_along_axis(places, kept, axis=1), closeness


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
