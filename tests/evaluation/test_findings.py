import json

import jaxtyping
import numpy as np
import pytest

from cassle_jax.evaluation.findings import Chart, Gallery, Score, from_json, to_json


def there_and_back(finding):
    (found,) = from_json(json.loads(json.dumps(to_json([finding]), allow_nan=False)))
    return found


@pytest.mark.parametrize(
    "score",
    [
        Score("linear", "cifar10", "accuracy", 0.1 + 0.2),
        Score("few-shot", "cub200", "5-way", 0.5, 0.004, None),
        Score("spectrum", "stl10", "alignment", float("-inf"), float("inf"), False),
    ],
)
def test_scores_come_back_as_they_were(score):
    assert there_and_back(score) == score


def test_what_is_not_a_number_comes_back_as_such():
    score = there_and_back(Score("k-NN", "cifar10", "accuracy", float("nan"), float("nan")))
    assert np.isnan([score.value, score.interval]).all()


def test_numbers_of_numpy_are_numbers():
    chart = Chart("a", "b", "c", "x", "y", {"s": [(np.int64(2), np.float32(0.5))]}, log_x=True)
    score = Score("a", "b", "c", np.float32(0.25), np.float64(0.5))
    assert there_and_back(score) == Score("a", "b", "c", 0.25, 0.5)
    assert there_and_back(chart).series == {"s": ((2, 0.5),)}
    assert there_and_back(chart).log_x and not there_and_back(chart).log_y


def test_bars_and_lines_are_distinguished_after_reading():
    bars = Chart("a", "b", "c", "x", "y", {"s": [("stem", 1.0), ("nan", float("nan"))]})
    lines = Chart("a", "b", "c", "x", "y", {"s": [(1, 1.0)]})
    assert there_and_back(bars).is_bars and not there_and_back(lines).is_bars
    (first, second) = there_and_back(bars).series["s"]
    assert first == ("stem", 1.0) and second[0] == "nan" and np.isnan(second[1])


def test_pictures_keep_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    gallery = there_and_back(Gallery("a", "b", "c", [[(pixels, "query"), (255 - pixels, "ü")]]))
    ((first, second),) = gallery.rows
    np.testing.assert_array_equal(first[0], pixels)
    np.testing.assert_array_equal(second[0], 255 - pixels)
    assert (first[1], second[1]) == ("query", "ü")


SCORE = {"kind": "score", "task": "knn", "dataset": "a", "metric": "accuracy", "value": 0.5}
SCORE |= {"interval": None, "higher_is_better": True}
CHART = {"kind": "chart", "task": "knn", "dataset": "a", "title": "t", "x_label": "x"}
CHART |= {"y_label": "y", "series": {"s": [[1, 2.0]]}, "log_x": False, "log_y": False}
FAILURE = {"kind": "failure", "task": "knn", "dataset": "a", "reason": "why"}


@pytest.mark.parametrize("wrong", [None, 3, -1.5, [], {}, [3], {"a": 3}])
@pytest.mark.parametrize("whole", [SCORE, CHART, FAILURE], ids=lambda each: each["kind"])
def test_what_is_read_of_another_type_is_damaged(monkeypatch, whole, wrong):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside tests
    assert len(from_json([whole])) == 1
    for name in whole.keys() - {"kind", "value", "interval"}:
        if (name, wrong) not in (("higher_is_better", None), ("series", {})):
            with pytest.raises((AttributeError, TypeError, ValueError)):
                from_json([whole | {name: wrong}])
    if "series" in whole and not isinstance(wrong, int | float):
        with pytest.raises(ValueError, match="is in no chart"):
            from_json([whole | {"series": {"s": [[wrong, 2.0]]}}])


@pytest.mark.parametrize("png", ["", "AAAA", "no base64", 3, None])
def test_a_picture_that_is_none_is_damaged(monkeypatch, png):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside tests
    gallery = {"kind": "gallery", "task": "neighbours", "dataset": "a", "title": "t"}
    with pytest.raises((TypeError, ValueError)):
        from_json([gallery | {"rows": [[[png, "query"]]]}])
