import dataclasses
import functools

import jax
import numpy as np
import pytest

from cassle_jax.evaluation.agreement import both_ways
from cassle_jax.evaluation.findings import Score, from_json, to_json
from cassle_jax.evaluation.matching import (
    ANOTHER,
    CHANCE,
    FEATURES,
    MEAN,
    NONE,
    RIGHT,
    WRONG,
    ViewMatcher,
    donors,
)
from cassle_jax.evaluation.projection import (
    another_image,
    projector_takes_omega,
    with_wrong_omega,
)
from cassle_jax.evaluation.views import protocol_key
from cassle_jax.methods.build import Conditioning
from tests.evaluation.analysed import (
    COLOR_DIFF,
    JITTERED,
    PLAIN,
    batches_of,
    colour_networks,
    devices,
    info_nce,
    pictures,
    similarity_of_different,
)

IMAGES = pictures(14)


@functools.cache
def matcher(conditioning, count=1):
    networks, variables = colour_networks(conditioning)
    match = ViewMatcher(networks, conditioning, (JITTERED, JITTERED), devices(count))
    return match, variables


def match(conditioning=COLOR_DIFF, *, size=16, count=1, images=IMAGES, **others):
    measure, variables = matcher(conditioning, count)
    return measure(variables, lambda: batches_of(images, size, **others))


@pytest.fixture(scope="module")
def measured():
    return match()


def test_a_projector_that_undoes_the_jitter_matches_with_the_right_descriptor_alone(measured):
    colours = IMAGES.mean((1, 2))
    right, wrong, none = (measured.agreements[name] for name in (RIGHT, WRONG, NONE))
    assert right.same == pytest.approx(1, abs=1e-5)
    assert right.different == pytest.approx(similarity_of_different(colours, colours), rel=1e-4)
    assert right.info_nce == pytest.approx(info_nce(colours, colours), rel=1e-4)
    assert right.accuracy == 1
    assert right.info_nce < none.info_nce < wrong.info_nce
    assert right.accuracy > max(none.accuracy, wrong.accuracy)
    assert measured.images == len(IMAGES)


def deaf_to(rows):
    """What matching finds where the projector's weights of some of its inputs are 0."""
    measure, variables = matcher(COLOR_DIFF)

    def silence(kernel):
        silenced = np.array(kernel)
        silenced[rows] = 0
        return silenced

    return measure(jax.tree.map(silence, variables), lambda: batches_of(IMAGES, 16)).agreements


@pytest.mark.exhaustive
def test_a_projector_that_hears_the_descriptor_alone_matches_alike_whatever_the_features(measured):
    found = deaf_to(slice(0, 3))
    right = dataclasses.astuple(found[RIGHT])
    assert right != dataclasses.astuple(measured.agreements[RIGHT])
    for name in (MEAN, ANOTHER):
        assert dataclasses.astuple(found[name]) == pytest.approx(right, rel=1e-5), name


def test_a_projector_that_is_deaf_to_the_descriptor_matches_mean_features_by_chance():
    found = deaf_to(slice(3, 6))
    assert found[MEAN].info_nce == pytest.approx(np.log(len(IMAGES)), rel=1e-5)
    assert found[MEAN].difference == pytest.approx(0, abs=1e-5)
    assert found[RIGHT].info_nce < found[MEAN].info_nce < found[ANOTHER].info_nce
    assert found[RIGHT].accuracy > max(1 / len(IMAGES), found[ANOTHER].accuracy)


def test_a_projector_without_a_descriptor_takes_no_omega(measured):
    plain = match(PLAIN)
    assert list(plain.agreements) == [FEATURES, NONE]
    assert plain.agreements[FEATURES] == measured.agreements[FEATURES]
    # Added to the features, a neutral color_diff of 0 is no descriptor at all.
    assert dataclasses.astuple(plain.agreements[NONE]) == pytest.approx(
        dataclasses.astuple(measured.agreements[NONE]), rel=1e-5
    )


@pytest.mark.parametrize(
    ("settings", "takes"),
    [
        ({}, True),
        ({"injection": "image"}, True),
        ({"treatment": "hypernetwork"}, True),
        ({"treatment": "none"}, False),
        ({"injection": "none"}, False),
        ({"into": "predictor"}, False),
        ({"descriptors": ()}, False),
    ],
)
def test_only_a_conditioned_projector_takes_a_descriptor(settings, takes):
    assert projector_takes_omega(Conditioning(**settings)) == takes


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", [(8, 1, 0), (8, 2, 0), (13, 1, 0), (24, 4, 3)])
def test_devices_batches_padding_and_damage_change_nothing(measured, how):
    size, count, holes = how
    assert_equal(match(size=size, count=count, holes=holes), measured)


def test_the_order_of_the_images_changes_nothing(measured):
    measure, variables = matcher(COLOR_DIFF)
    (batch,) = batches_of(IMAGES, 16)
    order = np.random.default_rng(0).permutation(16)
    shuffled = {name: rows[order] for name, rows in batch.items()}
    assert_equal(measure(variables, lambda: [shuffled]), measured)


def test_another_seed_draws_other_views(measured):
    measure, variables = matcher(COLOR_DIFF)
    other = measure(variables, lambda: batches_of(IMAGES, 16), 1)
    assert other.agreements[FEATURES].same != measured.agreements[FEATURES].same


def test_every_protocol_and_seed_has_a_key_of_its_own():
    protocols = ("matching", "invariance", "augmentation probes")
    keys = [
        tuple(np.asarray(jax.random.key_data(protocol_key(name, seed))).tolist())
        for name in protocols
        for seed in range(20)
    ]
    assert len(set(keys)) == len(keys)


def assert_equal(found, expected):
    assert found.images == expected.images
    assert list(found.agreements) == list(expected.agreements)
    for name, each in expected.agreements.items():
        assert dataclasses.astuple(found.agreements[name]) == pytest.approx(
            dataclasses.astuple(each), rel=1e-5
        ), name


def test_an_encoder_without_a_projector_is_matched_by_its_features(measured):
    measure, _ = matcher(COLOR_DIFF)
    bare = measure({"params": {}, "batch_stats": {}}, lambda: batches_of(IMAGES, 16))
    assert list(bare.agreements) == [FEATURES]
    # Two programs, which XLA rounds each in its own way.
    assert dataclasses.astuple(bare.agreements[FEATURES]) == pytest.approx(
        dataclasses.astuple(measured.agreements[FEATURES]), rel=1e-6
    )


@pytest.mark.parametrize("count", [2, 3, 50])
def test_another_is_never_oneself_and_everybody_is_anothers_once(count):
    index = np.arange(count) * 7
    another = another_image(jax.random.key(0), index)
    assert (another != np.arange(count)).all()
    assert sorted(another) == list(range(count))
    # The other image does not depend on the order.
    order = np.random.default_rng(1).permutation(count)
    shuffled = another_image(jax.random.key(0), index[order])
    assert dict(zip(index[order], index[order][shuffled], strict=True)) == dict(
        zip(index, index[another], strict=True)
    )
    if count > 3:
        assert (another != another_image(jax.random.key(1), index)).any()
        assert (another != np.roll(np.arange(count), 1)).any()


@pytest.mark.parametrize("count", [4, 5, 9, 50])
def test_no_two_views_have_the_features_of_the_same_image(count):
    index = np.arange(count) * 7
    givers = donors(jax.random.key(0), index)
    assert (givers != np.arange(count)[:, None]).all()
    assert not set(givers[:, 0]) & set(givers[:, 1])
    assert len(set(givers.ravel())) == count
    order = np.random.default_rng(1).permutation(count)
    shuffled = index[order][donors(jax.random.key(0), index[order])]
    np.testing.assert_array_equal(shuffled, index[givers][order])


def test_three_images_have_no_donors_and_those_that_see_the_descriptor_nothing_of_omega_alone():
    assert list(match(images=IMAGES[:3]).agreements) == [FEATURES, RIGHT, WRONG, NONE, MEAN]
    with_image = dataclasses.replace(COLOR_DIFF, injection="image")
    assert list(match(with_image).agreements) == [FEATURES, RIGHT, WRONG, NONE]


def test_images_get_the_omega_of_another_one():
    def describe(batch):
        return batch["index"].astype(float)[:, None]

    batches = with_wrong_omega(
        describe, lambda: batches_of(IMAGES, 4, holes=3), jax.random.key(2), devices(1)
    )
    index, wrong = (
        np.concatenate(each)
        for each in zip(*((batch["index"], batch["wrong"][:, 0]) for batch in batches), strict=True)
    )
    images = np.arange(len(IMAGES))
    expected = another_image(jax.random.key(2), images)
    np.testing.assert_array_equal(index[index >= 0], images)
    np.testing.assert_array_equal(wrong[index >= 0], expected)
    assert (wrong[index < 0] == 0).all()


def test_findings_survive_json_and_say_which_way_is_up(measured):
    findings = measured.findings("scenes")
    assert from_json(to_json(findings)) == findings
    scores = {each.metric: each for each in findings if isinstance(each, Score)}
    assert scores[f"accuracy, {RIGHT}"].value == 1
    assert scores[f"accuracy, {RIGHT}"].higher_is_better
    assert scores[f"InfoNCE, {NONE}"].higher_is_better is False
    assert scores[f"InfoNCE, {CHANCE}"].value == pytest.approx(np.log(14))
    assert scores[f"accuracy, {CHANCE}"].value == pytest.approx(1 / 14)
    assert scores[f"InfoNCE, {MEAN}"].value == measured.agreements[MEAN].info_nce
    for name in (WRONG, MEAN, ANOTHER, CHANCE):
        assert scores[f"InfoNCE, {name}"].higher_is_better is None
    charts = [each for each in findings if not isinstance(each, Score)]
    assert all(chart.is_bars and "among 14 images" in chart.title for chart in charts)
    names = [FEATURES, RIGHT, WRONG, NONE, MEAN, ANOTHER, CHANCE]
    assert all([name for name, _ in chart.series[metric]] == names
               for chart, metric in zip(charts, ("InfoNCE", "accuracy"), strict=True))  # fmt: skip


@pytest.mark.parametrize("scale", [1e-32, 1e32])
def test_the_scale_of_embeddings_changes_nothing(scale):
    pairs = np.random.default_rng(0).normal(size=(9, 2, 5)).astype(np.float32)
    unit = pairs / np.linalg.norm(pairs, axis=2, keepdims=True)
    found = both_ways((scale * pairs).astype(np.float32), 0.2, "pairs")
    assert found.same == pytest.approx(np.sum(unit[:, 0] * unit[:, 1], axis=1).mean(), abs=1e-6)
    expected = dataclasses.astuple(both_ways(pairs, 0.2, "pairs"))
    assert dataclasses.astuple(found) == pytest.approx(expected, abs=1e-5)


def test_what_cannot_be_compared_is_refused():
    for conditioning in (PLAIN, COLOR_DIFF):
        with pytest.raises(ValueError, match="1 images are too few to compare; use at least 2"):
            match(conditioning, images=IMAGES[:1])
    with pytest.raises(ValueError, match="there are no batches"):
        match(PLAIN, images=IMAGES[:0])
    measure, variables = matcher(PLAIN)
    broken = jax.tree.map(lambda array: array + np.nan, variables)
    with pytest.raises(ValueError, match=r"'no ω' hold values that are not finite"):
        measure(broken, lambda: batches_of(IMAGES, 16))


def test_embeddings_that_point_nearly_the_same_way_are_distinguished():
    draw = np.random.default_rng(0)
    images = draw.normal(size=(50, 1, 24)) + 0.1 * draw.normal(size=(50, 2, 24))
    pairs = (1 + 1e-4 * images).astype(np.float32)
    assert both_ways(pairs, 0.2, "pairs").accuracy == 1
