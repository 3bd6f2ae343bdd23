"""What is drawn: its distributions over many draws, and torchvision's rule for the crop.

A uniform sample's empirical distribution stays within 2 / sqrt(n) of the true one (Kolmogorov and
Smirnov) except once in 1500 samples, a frequency within 4 / (2 sqrt(n)); the keys are fixed.
"""

import functools
import itertools
import math

import jax
import numpy as np
import pytest

from cassle_jax.augment import AugmentSpec, draw

DRAWS = 20_000
SPEC = AugmentSpec(32, solarize=0.3, rotation=0.6)


@functools.cache
def _draws(spec, height, width, count=DRAWS, seed=0, order_seed=None):
    order_key = None if order_seed is None else jax.random.key(order_seed)
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.device_get(_compiled(spec, order_key is not None)(keys, (height, width), order_key))


@functools.cache
def _compiled(spec, shared_order):
    del shared_order
    return jax.jit(
        lambda keys, size, order_key: jax.vmap(
            lambda key: draw(key, jax.numpy.array(size), spec, order_key)
        )(keys)
    )


@pytest.fixture(scope="module")
def draws():
    return _draws(SPEC, 1500, 2000)


def _assert_uniform(sample, low, high):
    assert sample.min() >= low - 1e-6
    assert sample.max() <= high + 1e-6
    position = (np.sort(sample) - low) / (high - low)
    distance = np.abs(position - (np.arange(len(sample)) + 0.5) / len(sample)).max()
    assert distance < 2 / math.sqrt(len(sample))


def _assert_frequency(events, probability):
    assert abs(np.mean(events) - probability) < 2 / math.sqrt(len(events))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.6, 1.4),
        ("hue", -0.1, 0.1),
        ("sigma", 0.1, 2.0),
        ("solarize_threshold", 0.0, 1.0),
    ],
)
def test_ranges_are_uniform(draws, name, low, high):
    _assert_uniform(getattr(draws, name), low, high)


@pytest.mark.parametrize("name", ["flip", "jitter", "grayscale", "blur", "solarize"])
def test_probabilities(draws, name):
    _assert_frequency(getattr(draws, name), getattr(SPEC, name))


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_never_and_always(probability):
    names = ("flip", "jitter", "grayscale", "blur", "solarize", "rotation")
    drawn = _draws(AugmentSpec(32, **dict.fromkeys(names, probability)), 40, 40)
    for name in names[:-1]:
        assert (getattr(drawn, name) == bool(probability)).all()
    assert drawn.turns.any() == bool(probability)


def test_quarter_turns_are_uniform_where_applied(draws):
    for turns in (1, 2, 3):
        _assert_frequency(draws.turns == turns, SPEC.rotation / 4)
    _assert_frequency(draws.turns == 0, 1 - SPEC.rotation * 3 / 4)


def test_order_per_image_is_uniform_over_all_24(draws):
    code = draws.jitter_order @ np.array([64, 16, 4, 1])
    for order in itertools.permutations(range(4)):
        expected = DRAWS / 24
        assert abs((code == np.dot(order, [64, 16, 4, 1])).sum() - expected) < 5 * expected**0.5


def test_order_per_batch_is_shared_and_changes_with_its_key():
    spec = AugmentSpec(32, jitter_order="batch")
    orders = set()
    for seed in range(12):
        order = _draws(spec, 40, 40, count=5, order_seed=seed).jitter_order
        assert (order == order[0]).all()
        orders.add(tuple(order[0].tolist()))
    assert len(orders) > 5


def test_order_per_batch_needs_its_key():
    spec = AugmentSpec(32, jitter_order="batch")
    with pytest.raises(ValueError, match=r"augment\.jitter_order='batch' needs the order_key"):
        draw(jax.random.key(0), np.array([40, 40]), spec)


def test_draws_are_independent_of_each_other(draws):
    names = ("flip", "jitter", "brightness", "contrast", "saturation", "hue", "grayscale", "blur")
    names += ("sigma", "solarize", "solarize_threshold", "turns")
    columns = [getattr(draws, name) for name in names] + list(draws.crop.T[:2])
    correlation = np.corrcoef(np.array(columns, np.float64))
    # Top and left correlate weakly, through the box's size.
    correlation[-1, -2] = correlation[-2, -1] = 0
    assert np.abs(correlation - np.eye(len(columns))).max() < 5 / math.sqrt(DRAWS)


def test_one_setting_leaves_the_other_draws_alone(draws):
    changed = _draws(AugmentSpec(32, solarize=0.9, flip=0.1, crop=False), 1500, 2000)
    for name in ("jitter", "brightness", "hue", "jitter_order", "grayscale", "blur", "sigma"):
        np.testing.assert_array_equal(getattr(changed, name), getattr(draws, name))
    np.testing.assert_array_equal(changed.crop, np.tile([0.0, 0, 1, 1], (DRAWS, 1)))


def test_boxes_are_whole_pixels_inside_the_image():
    height, width = 37, 53
    pixels = _draws(SPEC, height, width).crop * np.tile([height, width], 2)
    np.testing.assert_allclose(pixels, np.round(pixels), atol=1e-4)
    top, left, box_height, box_width = np.round(pixels).T
    assert min(top.min(), left.min()) == 0
    assert min(box_height.min(), box_width.min()) >= 1
    assert (top + box_height).max() == height
    assert (left + box_width).max() == width


def test_area_and_aspect_are_uniform():
    # Up to half the area every box of these aspects fits, so no draw is rejected.
    spec = AugmentSpec(32, crop_area=(0.1, 0.5))
    size = 2000
    _, _, height, width = size * _draws(spec, size, size).crop.T
    _assert_uniform(height * width / size**2, 0.1 - 1e-3, 0.5 + 1e-3)
    _assert_uniform(np.log(width / height), math.log(3 / 4) - 2e-3, math.log(4 / 3) + 2e-3)


def test_position_is_uniform_over_all_places():
    spec = AugmentSpec(32, crop_area=(0.25, 0.25), crop_aspect=(1, 1))
    top, left, height, width = np.round(8 * _draws(spec, 8, 8).crop.T)
    assert (height == 4).all()
    assert (width == 4).all()
    for start in (top, left):
        for place in range(5):
            _assert_frequency(start == place, 1 / 5)


def _torchvision_box(random, height, width, spec=SPEC):
    """The rule of RandomResizedCrop, one try after the other: top, left, height, width."""
    low, high = spec.crop_aspect
    for _ in range(10):
        area = height * width * random.uniform(*spec.crop_area)
        aspect = math.exp(random.uniform(math.log(low), math.log(high)))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = random.integers(0, height - box_height, endpoint=True)
            left = random.integers(0, width - box_width, endpoint=True)
            return top, left, box_height, box_width
    box_height, box_width = height, width
    if width / height < low:
        box_height = round(width / low)
    elif width / height > high:
        box_width = round(height * high)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


# The last three reject many draws: the fallback is drawn in a good part of the cases.
@pytest.mark.exhaustive
@pytest.mark.parametrize(("height", "width"), [(30, 40), (3, 2), (60, 240), (200, 50), (5, 20)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    random = np.random.default_rng(0)
    count = 10_000
    expected = np.array([_torchvision_box(random, height, width) for _ in range(count)])
    actual = np.round(_draws(SPEC, height, width).crop * np.tile([height, width], 2))
    for ours, theirs in zip(actual.T, expected.T, strict=True):
        values = np.union1d(ours, theirs)
        ours_below = np.searchsorted(np.sort(ours), values, side="right") / DRAWS
        theirs_below = np.searchsorted(np.sort(theirs), values, side="right") / count
        # Two samples of n and m: the distance's scale is sqrt(1/n + 1/m).
        assert np.abs(ours_below - theirs_below).max() < 2 * math.sqrt(1 / DRAWS + 1 / count)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1, 1, (0, 0, 1, 1)),
        (10_000, 1, (4999, 0, 1, 1)),
        (1, 10_000, (0, 4999, 1, 1)),
        (10_000, 30, (4980, 0, 40, 30)),
        (30, 10_000, (0, 4980, 30, 40)),
    ],
)
def test_extreme_shapes_fall_back_to_the_centre(height, width, expected):
    boxes = _draws(SPEC, height, width).crop * np.tile([height, width], 2)
    np.testing.assert_allclose(boxes, np.tile(expected, (DRAWS, 1)), atol=2e-3)


def test_a_box_that_never_fits_falls_back_to_the_whole_image():
    spec = AugmentSpec(32, crop_area=(1, 1), crop_aspect=(0.5, 2))
    boxes = _draws(spec, 100, 100).crop
    # All ten tries miss unless an aspect rounds to the square.
    np.testing.assert_array_equal(boxes, np.tile([0.0, 0, 1, 1], (DRAWS, 1)))
