"""Two views of every image, the same on any number of devices, with ω in alphabetical order."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.augment import AugmentSpec, difference, draw
from cassle_jax.methods import AugSelf
from cassle_jax.methods.build import Conditioning
from cassle_jax.methods.views import augmented_views, training_views
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, device_mesh, parallel

BATCH, CANVAS = 8, 16
SPEC = AugmentSpec(size=8, jitter_order="batch", jitter=1.0, solarize=0.5, rotation=0.5)
# Neither in alphabetical order, so that a test sees who sorts.
DESCRIPTORS = ("crop", "blur", "solarize", "color", "flip")
PREDICTED = ("rotation", "crop", "flip")
AUGSELF = (AugSelf(dict.fromkeys(PREDICTED, 0.5)),)


def make_views(key, images, sizes, axis_name, spec=SPEC):
    specs = (spec, spec)
    pair = augmented_views(key, images, sizes, specs, axis_name)
    return pair, training_views(pair, specs, Conditioning(DESCRIPTORS), AUGSELF)


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (BATCH, CANVAS, CANVAS, 3), np.uint8)
    images[5] = images[4]
    sizes = draw.integers(10, CANVAS + 1, (BATCH, 2), np.int32)
    sizes[5] = sizes[4]
    return jnp.asarray(images), jnp.asarray(sizes)


@pytest.fixture(scope="module")
def on_devices(batch):
    """`on_devices(count)(key, images, sizes)`: pair and training views of the whole batch."""

    def make(count):
        views = parallel(
            partial(make_views, axis_name=AXIS),
            device_mesh(jax.devices()[:count]),
            inputs=(REPLICATED, SHARDED, SHARDED),
            outputs=SHARDED,
        )
        # Few optimisations: the tests compile for seconds and run for milliseconds.
        quickly = {"xla_backend_optimization_level": 0}
        return views.lower(jax.random.key(0), *batch).compile(compiler_options=quickly)

    compiled = {count: make(count) for count in (1, 4)}
    return compiled.__getitem__


@pytest.fixture(scope="module")
def drawn(on_devices, batch):
    return on_devices(1)(jax.random.key(3), *batch)


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_four_devices_make_what_one_makes(on_devices, batch, drawn):
    on_four = on_devices(4)(jax.random.key(3), *batch)
    for found, expected in zip(arrays(on_four), arrays(drawn), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_two_views_of_an_image_differ(drawn):
    (first, second), views = drawn
    assert views.views[0].images.shape == (BATCH, 8, 8, 3)
    for a, b in zip(views.views[0].images, views.views[1].images, strict=True):
        assert np.abs(a - b).max() > 0.1
    assert not np.isclose(first.params.crop, second.params.crop).all(axis=1).any()


def test_equal_images_at_different_places_get_draws_of_their_own(drawn):
    for view in drawn[0]:
        assert len(np.unique(view.params.brightness)) == BATCH
        assert np.abs(view.image[4] - view.image[5]).max() > 0.1


def test_draws_depend_on_key_and_place_not_on_the_pixels(on_devices, batch, drawn):
    images, sizes = batch
    (first, _), _ = on_devices(1)(jax.random.key(3), images[::-1], sizes)
    for found, expected in zip(arrays(first.params), arrays(drawn[0][0].params), strict=True):
        np.testing.assert_array_equal(found, expected)
    (other, _), _ = on_devices(1)(jax.random.key(4), images, sizes)
    assert not np.isclose(other.params.brightness, drawn[0][0].params.brightness).any()


@pytest.mark.exhaustive
def test_a_part_of_the_batch_gets_the_views_it_has_in_the_whole(batch, drawn):
    part = slice(1, None, 3)
    make = partial(augmented_views, specs=(SPEC, SPEC), positions=jnp.arange(BATCH)[part])
    options = {"xla_backend_optimization_level": 0}
    found = jax.jit(make, compiler_options=options)(jax.random.key(3), *(x[part] for x in batch))
    expected = jax.tree.map(lambda x: x[part], drawn[0])
    for one, other in zip(arrays(found), arrays(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_batch_and_view_shares_its_order_of_jitter_on_all_devices(on_devices, batch):
    pairs = [on_devices(4)(jax.random.key(seed), *batch)[0] for seed in range(4)]
    orders = [[np.unique(view.params.jitter_order, axis=0) for view in pair] for pair in pairs]
    assert all(len(order) == 1 for pair in orders for order in pair)
    assert len({order.tobytes() for pair in orders for order in pair}) > 1
    assert any(first.tobytes() != second.tobytes() for first, second in orders)


def test_omega_is_alphabetical_whatever_order_was_requested(drawn):
    pair, views = drawn
    for view, made in zip(pair, views.views, strict=True):
        np.testing.assert_array_equal(made.images, view.image)
        params = jax.device_get(view.params)
        assert made.descriptor.shape == (BATCH, 1 + 4 + 4 + 1 + 1)
        blur, color, crop, flip, solarize = np.split(made.descriptor, [1, 5, 9, 10], axis=1)
        np.testing.assert_allclose(blur[:, 0], np.where(params.blur, params.sigma, 0))
        np.testing.assert_allclose(color[:, 0], (params.brightness - 1) / 0.8, atol=1e-6)
        np.testing.assert_allclose(crop[:, 2:], params.crop[:, 2:])
        np.testing.assert_array_equal(flip[:, 0], params.flip)
        threshold = np.where(params.solarize, params.solarize_threshold, 1)
        np.testing.assert_allclose(solarize[:, 0], threshold)


def test_targets_are_the_predicted_differences_of_both_orders(drawn):
    (first, second), views = drawn
    for targets, (one, other) in zip(
        views.targets["augself"], ((first, second), (second, first)), strict=True
    ):
        assert targets.keys() == set(PREDICTED)
        np.testing.assert_allclose(
            targets["crop"][:, 2:], (one.params.crop - other.params.crop)[:, 2:], atol=1e-6
        )
        np.testing.assert_array_equal(targets["flip"][:, 0], one.params.flip == other.params.flip)
        turns = np.asarray(one.params.turns - other.params.turns) % 4
        np.testing.assert_array_equal(targets["rotation"], np.eye(4)[turns])


def test_relative_omega_is_how_a_view_differs_from_the_other(drawn):
    first, second = drawn[0]
    conditioning = Conditioning(("crop", "grayscale", "blur"), relative=True)
    specs = (SPEC, SPEC, SPEC)
    # Compiled whole: a hundred small programs otherwise.
    related = jax.jit(lambda *drawn: training_views(drawn, specs, conditioning))
    differences = jax.jit(jax.vmap(lambda a, b: difference(a, b, SPEC)))
    for made, (one, other) in zip(
        related(first, second, second).views,
        ((first, second), (second, first), (second, first)),
        strict=True,
    ):
        expected = differences(one, other)
        blur, crop, grayscale = np.split(made.descriptor, [1, 5], axis=1)
        np.testing.assert_array_equal(blur, expected["blur"])
        np.testing.assert_array_equal(crop, expected["crop"])
        gray_one, gray_other = (np.asarray(v.params.grayscale, np.float32) for v in (one, other))
        np.testing.assert_array_equal(grayscale[:, 0], gray_one - gray_other)


@pytest.mark.exhaustive
def test_each_view_has_an_augmentation_of_its_own(batch):
    first, second = AugmentSpec(size=8, jitter=0.0).asymmetric_pair()
    small = AugmentSpec(size=4, jitter=0.0, blur=0.0, kernel_size=3)
    views = jax.eval_shape(
        lambda key: augmented_views(key, *batch, (first, second, small)), jax.random.key(0)
    )
    assert [view.image.shape[1] for view in views] == [8, 8, 4]
    keys = jax.random.split(jax.random.key(0), 400)
    drawn = [
        jax.vmap(lambda key, spec=spec: draw(key, jnp.array([16, 16]), spec))(keys)
        for spec in (first, second)
    ]
    assert drawn[0].blur.all() and not drawn[0].solarize.any()
    np.testing.assert_allclose(drawn[1].blur.mean(), 0.1, atol=0.05)
    np.testing.assert_allclose(drawn[1].solarize.mean(), 0.2, atol=0.07)
    np.testing.assert_allclose(drawn[1].solarize_threshold, 0.5)


def test_without_descriptors_omega_is_empty(drawn):
    views = training_views(drawn[0], (SPEC, SPEC), Conditioning(()))
    assert [view.descriptor.shape for view in views.views] == [(BATCH, 0)] * 2
    assert views.targets == {}


@pytest.mark.exhaustive
@pytest.mark.parametrize("devices", [1, 4])
def test_paired_images_share_crop_and_colours_and_nothing_else(batch, devices):
    images, _ = batch
    sizes = jnp.full((BATCH, 2), CANVAS)
    spec = dataclasses.replace(SPEC, jitter_order="image", flip=0.5, blur=0.5)

    def params(key, images, sizes, paired):
        views = augmented_views(key, images, sizes, (spec, spec), AXIS, paired=paired)
        return [view.params for view in views]

    found, alone = (
        parallel(
            partial(params, paired=paired),
            device_mesh(jax.devices()[:devices]),
            inputs=(REPLICATED, SHARDED, SHARDED),
            outputs=SHARDED,
        )(jax.random.key(0), images, sizes)
        for paired in (True, False)
    )
    shared = "crop", "jitter_order", "brightness", "contrast", "saturation", "hue"
    for view, unpaired in zip(found, alone, strict=True):
        for name in (*shared, "jitter", "grayscale"):
            values = np.asarray(getattr(view, name))
            np.testing.assert_array_equal(values[::2], values[1::2])
            np.testing.assert_array_equal(values[::2], getattr(unpaired, name)[::2])
        assert len(np.unique(view.hue)) == BATCH // 2
        for name in ("flip", "sigma", "blur", "turns", "solarize"):
            np.testing.assert_array_equal(getattr(view, name), getattr(unpaired, name))
        assert len(np.unique(view.sigma)) == BATCH
    assert not np.isclose(found[0].hue, found[1].hue).any()
