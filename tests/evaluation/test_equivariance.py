import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from sklearn.linear_model import Ridge

from cassle_jax.evaluation.equivariance import (
    CHANCE,
    RIGHT,
    WRONG,
    Views,
    change_of,
    equivariance,
    pairs_of,
    retrieval,
)
from cassle_jax.evaluation.findings import Chart, Score
from cassle_jax.solvers.quadratic import fit_quadratic

KINDS = {"place": "value", "hue": "angle", "pose": "rotation"}
OBJECT_VIEWS = 8


def turned(angles):
    """The rotation about the fixed axes x, then y, then z, as a matrix; by the textbook."""
    (a, b, c), (sa, sb, sc) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, a, -sa], [0, sa, a]])
    about_y = np.array([[b, 0, sb], [0, 1, 0], [-sb, 0, b]])
    about_z = np.array([[c, -sc, 0], [sc, c, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def views(objects, seed, features_of):
    draw = np.random.default_rng(seed)
    count = objects * OBJECT_VIEWS
    factors = {
        "place": draw.uniform(0.3, 0.7, count),
        "hue": draw.uniform(0, 2 * np.pi, count),
        "pose": draw.uniform(-np.pi / 2, np.pi / 2, (count, 3)),
    }
    content = np.repeat(draw.normal(size=(objects, 3)), OBJECT_VIEWS, axis=0)
    features = features_of(factors, content, draw).astype(np.float32)
    return Views(features, np.repeat(np.arange(objects), OBJECT_VIEWS), factors)


def known(factors, content, _):
    """All factors as they are; a rotation as its quaternion."""
    hue, pose = factors["hue"], Rotation.from_euler("xyz", factors["pose"]).as_quat()
    columns = factors["place"], np.sin(hue), np.cos(hue)
    return np.concatenate([np.stack(columns, axis=1), pose, content], axis=1)


def noise(factors, content, draw):
    return draw.normal(size=(len(content), 6))


def measured(features_of, seed=0, sizes=(60, 12, 30)):
    parts = (views(size, place, features_of) for place, size in enumerate(sizes))
    return equivariance(*parts, KINDS, seed=seed)


def test_features_that_hold_the_factors_are_read_and_followed():
    result = measured(known)
    assert result.read.keys() == KINDS.keys()
    assert min(result.read.values()) > 0.999
    np.testing.assert_allclose(result.found[RIGHT], 1)
    assert result.found[WRONG].mean(axis=0)[0] < 0.6


def test_noise_is_read_and_found_by_chance():
    result = measured(noise)
    assert max(np.abs(list(result.read.values()))) < 0.05
    by_rank = 1 / np.arange(1, OBJECT_VIEWS + 1)
    chance = [by_rank.mean(), 1 / OBJECT_VIEWS, 5 / OBJECT_VIEWS]
    np.testing.assert_allclose(result.found[CHANCE].mean(axis=0), chance)
    scores = {
        each.metric: each
        for each in result.findings("drawn", dict.fromkeys(KINDS, "all"))
        if isinstance(each, Score)
    }
    for metric, value in zip(("MRR", "H@1", "H@5"), chance, strict=True):
        found = scores[f"{metric}, {RIGHT}"]
        assert abs(found.value - value) < found.interval < 0.1
        assert scores[f"{metric}, {CHANCE}"].value == pytest.approx(value)


def test_features_that_are_all_alike_find_by_chance():
    result = measured(lambda factors, content, draw: np.ones((len(content), 4)))
    np.testing.assert_allclose(result.found[RIGHT], result.found[CHANCE])
    assert result.read["place"] == pytest.approx(0, abs=0.05)


def test_an_invariant_encoder_follows_no_change():
    def invariant(factors, content, draw):
        return content + 1e-3 * draw.normal(size=content.shape)

    result = measured(invariant)
    assert max(result.read.values()) < 0.05
    # The prediction stays at the first view, which is never the right one.
    assert (result.found[RIGHT].mean(axis=0) < result.found[CHANCE].mean(axis=0) + 0.01).all()


def test_the_findings_are_by_factor_and_by_group():
    groups = {"place": "form", "hue": "colour", "pose": "form"}
    result = dataclasses.replace(
        measured(noise, sizes=(4, 2, 2)), read={"place": 0.5, "hue": 0.2, "pose": 0.1}
    )
    findings = result.findings("drawn", groups)
    read = {
        each.metric.removesuffix(": R² of the change"): each.value
        for each in findings
        if isinstance(each, Score) and each.metric.endswith("R² of the change")
    }
    assert read == pytest.approx(
        {"mean, form": 0.3, "mean, colour": 0.2, "place": 0.5, "hue": 0.2, "pose": 0.1}
    )
    charts = [each for each in findings if isinstance(each, Chart)]
    assert [list(each.series) for each in charts] == [["features"], [RIGHT, WRONG, CHANCE]]
    assert all(each.is_bars for each in charts)


def test_the_same_seed_gives_the_same_result():
    first, same, other = (measured(noise, seed, sizes=(6, 3, 3)) for seed in (1, 1, 2))
    assert first.read == same.read != other.read
    np.testing.assert_array_equal(first.found[RIGHT], same.found[RIGHT])


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_features_and_factors_are_computed_with_exactly_whatever_their_type(kind):
    def rounded(part):
        features = np.round(1000 * part.features + 3000)  # float16 has these numbers, not their sum
        return dataclasses.replace(part, features=features.astype(np.float16).astype(np.float64))

    parts = [rounded(views(size, place, known)) for place, size in enumerate((60, 12, 30))]
    exact = equivariance(*parts, KINDS)
    given = [dataclasses.replace(part, features=part.features.astype(kind)) for part in parts]
    found = equivariance(*given, KINDS)
    assert found.read == pytest.approx(exact.read, rel=1e-12)
    assert all((found.found[name] == exact.found[name]).all() for name in exact.found)


@pytest.mark.parametrize("kind", [np.uint8, np.float16])
def test_a_change_has_the_precision_and_the_sign_that_its_factors_type_lacks(kind):
    first, second = np.array([200, 3], kind), np.array([100, 4], kind)
    assert change_of("value", first, second).ravel().tolist() == [-100, 1]
    expected = np.stack([np.sin([-100.0, 1.0]), np.cos([-100.0, 1.0])], axis=1)
    np.testing.assert_array_equal(change_of("angle", first, second), expected)


def test_ranks_are_those_counted_by_hand():
    # Two views are better and two as good as the right one: its rank is 3, 4 or 5.
    third_to_fifth = [(1 / 3 + 1 / 4 + 1 / 5) / 3, 0, 1]
    first, sixth = [1, 1, 1], [1 / 6, 0, 0]
    # One is better and five as good: rank 2 to 7, up to the fifth in four of six.
    second_to_seventh = [sum(1 / rank for rank in range(2, 8)) / 6, 0, 4 / 6]
    found = retrieval(np.array([2, 0, 5, 1]), np.array([3, 1, 1, 6]))
    np.testing.assert_allclose(found, [third_to_fifth, first, sixth, second_to_seventh])


def test_every_view_is_paired_with_another_one_of_its_object():
    objects = np.array([3, 0, 3, 7, 0, 3, 3])  # one view alone of object 7
    pairs = pairs_of(objects, seed=0)
    assert sorted(pairs[:, 0].tolist()) == [0, 1, 2, 4, 5, 6]
    assert (objects[pairs[:, 0]] == objects[pairs[:, 1]]).all()
    assert (pairs[:, 0] != pairs[:, 1]).all()
    partners = {int(pairs_of(objects, seed)[2, 1]) for seed in range(20)}
    assert partners == {2, 5, 6}
    with pytest.raises(ValueError, match="none of the 3 images shows the same object"):
        pairs_of(np.arange(3), seed=0)


@pytest.mark.usefixtures("as_a_library")
def test_views_have_as_many_objects_and_factors_as_features():
    features, objects = np.zeros((4, 2)), np.array([0, 0, 1, 1])
    with pytest.raises(ValueError, match="objects has 3 rows, and features 4"):
        Views(features, objects[:3], {"place": np.zeros(4)})
    with pytest.raises(ValueError, match="place has 5 rows, and features 4"):
        Views(features, objects, {"place": np.zeros(5)})


def test_changes_are_those_of_the_textbook():
    draw = np.random.default_rng(0)
    first, second = draw.uniform(-np.pi / 2, np.pi / 2, (2, 5, 3))
    for one, other, (x, y, z, w) in zip(
        first, second, change_of("rotation", first, second), strict=True
    ):
        matrix = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
            ]
        )
        np.testing.assert_allclose(turned(one) @ matrix, turned(other), atol=1e-12)
    past_the_seam = change_of("angle", np.array([6.2]), np.array([0.1]))
    by = 0.1 - 6.2 + 2 * np.pi
    np.testing.assert_allclose(past_the_seam, [[np.sin(by), np.cos(by)]])
    np.testing.assert_allclose(change_of("value", np.array([0.5]), np.array([0.2])), [[-0.3]])
    with pytest.raises(ValueError, match="kind 'class' has no change"):
        change_of("class", first, second)


def test_the_fit_is_a_ridge_regression_on_all_products():
    draw = np.random.default_rng(0)
    parts = [[draw.normal(size=(rows, 2)), draw.normal(size=(rows, 1))] for rows in (40, 15, 7)]
    targets = [
        {"product": blocks[0][:, :1] * blocks[1] + 0.3 * draw.normal(size=(len(blocks[1]), 1)) + 5}
        for blocks in parts
    ]
    penalty = 0.01
    predict = fit_quadratic((parts[0], targets[0]), (parts[1], targets[1]), [penalty])

    columns = [np.concatenate(blocks, axis=1) for blocks in parts]
    scaled = [
        (each - columns[0].mean(0)) / columns[0].std(0) / np.sqrt([2, 2, 1]) for each in columns
    ]
    root = np.sqrt(2)

    def expanded(rows):
        a, b, c = rows.T
        products = a * a, b * b, c * c, root * a * b, root * a * c, root * b * c
        return np.stack([np.ones_like(a), root * a, root * b, root * c, *products], axis=1)

    both = expanded(np.concatenate(scaled[:2]))
    wanted = np.concatenate([each["product"] for each in targets[:2]])
    witness = Ridge(alpha=penalty * len(both), fit_intercept=False).fit(
        both, wanted - wanted.mean()
    )
    expected = witness.predict(expanded(scaled[2])).reshape(-1, 1) + wanted.mean()
    np.testing.assert_allclose(predict(parts[2])["product"], expected, rtol=1e-6)


def test_each_target_takes_its_own_penalty():
    draw = np.random.default_rng(0)
    inputs = [[draw.normal(size=(rows, 4))] for rows in (30, 30, 200)]
    clear = [blocks[0][:, :1] for blocks in inputs]
    noisy = [draw.normal(size=(len(each), 1)) for each in clear]
    train, val = ((inputs[i], {"clear": clear[i], "noisy": noisy[i]}) for i in (0, 1))
    found = fit_quadratic(train, val)(inputs[2])
    assert list(found) == ["clear", "noisy"]
    np.testing.assert_allclose(found["clear"], clear[2], atol=0.05)
    assert np.abs(found["noisy"] - noisy[0].mean()).max() < 1  # hardly more than a constant
