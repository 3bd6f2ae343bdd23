"""Operations, whole views, descriptors and differences against the published code's figures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.augment import (
    CASSLE_DESCRIPTORS,
    AugmentSpec,
    View,
    apply,
    concatenate,
    describe,
    difference,
)

# Everything may be applied; the views keep [0, 1], as the golden operations do.
# The figures were made with the nine taps that the published code has for everything but 224 px.
SPEC = AugmentSpec(64, solarize=0.5, rotation=0.5, mean=(0, 0, 0), std=(1, 1, 1), kernel_size=9)
TOLERANCE = 1e-5


@functools.cache
def _compiled(spec):
    return jax.jit(jax.vmap(lambda image, params: apply(image, params, spec)))


def _assert_close(actual, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance)


def _apply(golden, params, spec=SPEC):
    return _compiled(spec)(golden["images"], params)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_colour_operation(golden_operations, make_params, name):
    factor = golden_operations[f"{name}_factor"]
    view = _apply(golden_operations, make_params(6, jitter=True, **{name: factor}))
    _assert_close(view.image, golden_operations[name])


@pytest.mark.parametrize("index", range(4))
def test_jitter_in_each_published_order(golden_operations, make_params, index):
    params = _jitter(golden_operations, make_params, golden_operations["jitter_orders"][index])
    view = _apply(golden_operations, params)
    _assert_close(view.image, golden_operations[f"jitter_{index}"])
    _assert_close(view.color_diff, golden_operations[f"jitter_{index}_color_diff"])


def _jitter(golden, make_params, order):
    names = ("brightness", "contrast", "saturation", "hue")
    factors = {name: golden[f"{name}_factor"] for name in names}
    return make_params(6, jitter=True, jitter_order=order, **factors)


def test_grayscale(golden_operations, make_params):
    view = _apply(golden_operations, make_params(6, grayscale=True))
    _assert_close(view.image, np.broadcast_to(golden_operations["grayscale"], view.image.shape))


def test_flip(golden_operations, make_params):
    view = _apply(golden_operations, make_params(6, flip=True))
    _assert_close(view.image, golden_operations["flip"])


def test_solarize(golden_operations, make_params):
    threshold = golden_operations["solarize_threshold"]
    view = _apply(golden_operations, make_params(6, solarize=True, solarize_threshold=threshold))
    _assert_close(view.image, golden_operations["solarize"])


@pytest.mark.parametrize("taps", [9, 23])
def test_blur(golden_operations, make_params, taps):
    params = make_params(6, blur=True, sigma=golden_operations["blur_sigma"])
    view = _apply(golden_operations, params, dataclasses.replace(SPEC, kernel_size=taps))
    _assert_close(view.image, golden_operations[f"blur_k{taps}"])


@pytest.mark.parametrize("output", [32, 96])
def test_crops_are_pillows(golden_operations, make_params, output):
    boxes = golden_operations["crop_boxes_top_left_height_width"]
    image = golden_operations["crop_image"]
    fractions = boxes / np.tile(image.shape[:2], 2)
    params = make_params(len(boxes), crop=fractions)
    spec = AugmentSpec(output, jitter=0, blur=0, grayscale=0, mean=(0, 0, 0), std=(1, 1, 1))
    view = jax.jit(jax.vmap(lambda params: apply(image, params, spec)))(params)
    error = np.abs(255 * view.image - golden_operations[f"crop_bilinear_{output}"].astype(float))
    assert error.max() <= 1.05
    assert error.mean() <= 0.32


def _published_params(golden, make_params, view, **given):
    return make_params(
        18,
        flip=golden[f"flip_{view}"],
        jitter=golden[f"jitter_applied_{view}"],
        jitter_order=golden[f"jitter_order_{view}"],
        brightness=golden[f"brightness_factor_{view}"],
        contrast=golden[f"contrast_factor_{view}"],
        saturation=golden[f"saturation_factor_{view}"],
        hue=golden[f"hue_factor_{view}"],
        grayscale=golden[f"grayscale_{view}"],
        blur=golden[f"blur_applied_{view}"],
        sigma=golden[f"blur_sigma_{view}"],
        **given,
    )


@pytest.fixture(scope="module")
def published_views(golden_descriptors, make_params):
    """The published pair of views; their images are not cropped, but described as if they were."""
    compiled = _compiled(AugmentSpec(64, kernel_size=9))
    views = []
    for index in (1, 2):
        params = _published_params(golden_descriptors, make_params, index)
        view = compiled(golden_descriptors["images"], params)
        described = params.replace(crop=jnp.asarray(golden_descriptors[f"crop_{index}"]))
        views.append(view.replace(params=described))
    return views


@pytest.mark.parametrize("index", [1, 2])
def test_whole_views(golden_descriptors, published_views, index):
    view = published_views[index - 1]
    _assert_close(view.image, golden_descriptors[f"view_{index}"])
    _assert_close(view.color_diff, golden_descriptors[f"descriptor_{index}_color_diff"])


@pytest.mark.parametrize("index", [1, 2])
def test_descriptors(golden_descriptors, published_views, index):
    omega = jax.vmap(lambda view: describe(view, AugmentSpec(64)))(published_views[index - 1])
    names = ("blur", "color", "color_diff", "crop", "flip", "grayscale")
    for name in names:
        _assert_close(omega[name], golden_descriptors[f"descriptor_{index}_{name}"])
    expected = [golden_descriptors[f"descriptor_{index}_{name}"] for name in CASSLE_DESCRIPTORS]
    _assert_close(concatenate(omega, CASSLE_DESCRIPTORS), np.concatenate(expected, axis=1))


@pytest.mark.parametrize("index", [1, 2])
def test_differences(golden_descriptors, published_views, index):
    pair = published_views if index == 1 else published_views[::-1]
    differences = jax.vmap(lambda one, two: difference(one, two, AugmentSpec(64)))(*pair)
    for name in ("blur", "color", "color_diff", "crop", "flip"):
        _assert_close(differences[name], golden_descriptors[f"difference_{index}_{name}"])


def test_a_view_stated_by_figures_alone_can_be_described(golden_descriptors, make_params):
    params = _published_params(
        golden_descriptors, make_params, 1, crop=golden_descriptors["crop_1"]
    )
    view = View(
        image=jnp.asarray(golden_descriptors["view_1"]),
        params=params,
        color_diff=jnp.asarray(golden_descriptors["descriptor_1_color_diff"]),
    )
    omega = jax.vmap(lambda view: describe(view, AugmentSpec(64)))(view)
    _assert_close(omega["crop"], golden_descriptors["descriptor_1_crop"])
