import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from cassle_jax.evaluation import neighbours
from cassle_jax.evaluation.findings import Gallery
from cassle_jax.evaluation.neighbours import nearest
from tests.evaluation.traced import peak_bytes


def points(rows: int, seed: int, width: int = 9) -> np.ndarray:
    generator = np.random.default_rng(seed)
    scale = generator.uniform(0.1, 20, size=(rows, 1))
    return (scale * generator.normal(size=(rows, width))).astype(np.float32)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(neighbours, "_SEARCH_ROWS", 64)
    monkeypatch.setattr(neighbours, "_QUERY_ROWS", 32)


@pytest.mark.parametrize(("k", "scale"), [(1, 1), (5, 1), (150, 1), (5, 1e-32), (5, 1e35)])
def test_the_search_is_scikit_learns(k, scale, small_blocks):
    queries, rows = points(70, seed=1), points(150, seed=2)
    found = nearest(scale * queries, scale * rows, k)
    witness = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(rows)
    distances, places = witness.kneighbors(queries)
    np.testing.assert_array_equal(found.rows, places)
    np.testing.assert_allclose(found.similarities, 1 - distances, atol=1e-6)


def test_rows_that_point_nearly_the_same_way_are_distinguished(small_blocks):
    centre = np.random.default_rng(0).uniform(1, 2, size=37)
    rows, queries = (centre + 1e-5 * points(n, seed=n, width=37) for n in (150, 70))
    rows, queries = (each.astype(np.float32) for each in (rows, queries))
    found = nearest(queries, rows, 5)
    exact = (rows.astype(np.float64), queries.astype(np.float64))
    rows, queries = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in exact)
    distances = ((queries[:, None] - rows) ** 2).sum(axis=2)
    reached = np.take_along_axis(distances, found.rows, axis=1)
    np.testing.assert_allclose(reached, np.sort(distances, axis=1)[:, :5], rtol=1e-2)
    np.testing.assert_allclose(found.similarities, 1 - reached / 2, atol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("k", [3, 149])
def test_a_query_does_not_find_itself(k, small_blocks):
    rows = points(150, seed=2)
    images = np.array([0, 63, 64, 149])
    found = nearest(rows[images], rows, k, own_rows=images)
    # scikit-learn finds the query first, at distance zero.
    witness = NearestNeighbors(n_neighbors=k + 1, metric="cosine", algorithm="brute").fit(rows)
    np.testing.assert_array_equal(found.rows, witness.kneighbors(rows[images])[1][:, 1:])

    copies = np.ones((4, 3), np.float32)
    assert nearest(copies[:1], copies, 3, own_rows=np.array([0])).rows.tolist() == [[1, 2, 3]]
    mixed = nearest(copies[:2], copies, 2, own_rows=np.array([-1, 1]))
    assert mixed.rows.tolist() == [[0, 1], [0, 2]]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("rows", "width"), [(100, 129), (100, 512), (1030, 37)])
def test_copies_of_an_image_are_found_in_their_order(rows, width):
    copies = np.tile(points(1, seed=3, width=width), (rows, 1))
    found = nearest(copies[:5], copies, 3)
    np.testing.assert_array_equal(found.rows, np.tile([0, 1, 2], (5, 1)))


@pytest.mark.parametrize("lengths", [(150,), (64, 86), (3, 147), (149, 1)])
def test_rows_in_several_parts_are_those_of_one(lengths, small_blocks):
    queries, rows = points(70, seed=1), points(150, seed=2)
    images = np.array([0, *range(64, 132), 149])
    parts = np.split(rows, np.cumsum(lengths)[:-1])
    whole = nearest(queries, rows, 7, own_rows=images)
    found = nearest(queries, parts, 7, own_rows=images)
    np.testing.assert_array_equal(found.rows, whole.rows)
    np.testing.assert_allclose(found.similarities, whole.similarities, atol=1e-6)


@pytest.mark.exhaustive
def test_memory_does_not_grow_with_the_rows_searched(small_blocks):
    rows = points(40_000, seed=2, width=32)
    nearest(rows[:100], rows[:100], 3)  # compiles
    assert peak_bytes(lambda: nearest(rows[:100], [rows, rows], 3)) < rows.nbytes / 10


def picture(shade: int) -> np.ndarray:
    return np.full((2, 3, 3), shade, np.uint8)


def test_a_gallery_shows_each_query_with_its_neighbours():
    rows = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    found = nearest(np.array([[1, 0.1], [0, 2]], np.float32), rows, 2)
    (gallery,) = found.findings("Food-101", lambda query: picture(100 + query), picture)
    assert isinstance(gallery, Gallery)
    shades = [[int(pixels[0, 0, 0]) for pixels, _ in line] for line in gallery.rows]
    assert shades == [[100, 0, 2], [101, 1, 2]]
    assert [caption for _, caption in gallery.rows[1]] == ["query", "1.00", "0.71"]
    (named,) = found.findings("Food-101", picture, picture, names=["soup", "salad"])
    assert [line[0][1] for line in named.rows] == ["soup", "salad"]
    with pytest.raises(ValueError, match="names has 1 captions for 2 queries"):
        found.findings("Food-101", picture, picture, names=["soup"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k=0 is not from 1 to the number of rows to search, 6"),
        (
            {"k": 6, "own_rows": np.arange(2)},
            "k=6 is not from 1 to the number of rows to search, 5",
        ),
        ({"queries": np.zeros((0, 9), np.float32)}, "queries has no rows"),
        ({"rows": np.full((6, 9), np.nan, np.float32)}, "rows holds values that are not finite"),
        ({"own_rows": np.array([0, 6])}, "own_rows are from 0 to 6; there are 6 rows"),
        ({"own_rows": np.array([0])}, r"own_rows has shape \(1,\) for 2 queries"),
        ({"queries": np.ones((2, 1))}, r"queries of shape \(2, 1\) and rows of shape \(6, 9\) dif"),
    ],
)
@pytest.mark.usefixtures("as_a_library")
def test_bad_arguments_are_named(change, message):
    arguments = {"queries": points(2, seed=1), "rows": points(6, seed=2), "k": 1}
    with pytest.raises(ValueError, match=message):
        nearest(**arguments | change)
