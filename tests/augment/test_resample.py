"""Crops, flips and evaluation views against Pillow, from canvases whose padding is garbage."""

import dataclasses
import functools

import jax
import numpy as np
import PIL.Image
import pytest

from cassle_jax.augment import AugmentSpec, apply, augment, center_view
from cassle_jax.augment.resample import crop_and_resize
from tests.platforms import compute_as_accelerators, programs

CANVAS = 80
# Geometry only, values kept in [0, 1].
GEOMETRY = AugmentSpec(24, jitter=0, grayscale=0, blur=0, mean=(0, 0, 0), std=(1, 1, 1))
SHAPES = [(80, 80), (61, 47), (24, 24), (7, 80), (80, 5), (33, 24), (3, 2), (1, 1)]


def _picture(height, width, seed=0):
    """Smooth structure, noise and hard edges."""
    rows, columns = np.mgrid[:height, :width][..., None]
    random = np.random.default_rng(seed)
    waves = 127 + 90 * np.sin(rows / 5 + np.arange(3)) * np.cos(columns / 7)
    noisy = waves + random.normal(0, 40, (height, width, 3))
    noisy[rows[..., 0] > columns[..., 0] * 2] -= 120
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _on_canvas(picture, padding=None):
    canvas = np.zeros((CANVAS, CANVAS, 3), np.uint8)
    if padding is not None:
        canvas[:] = np.random.default_rng(padding).integers(0, 256, canvas.shape)
    canvas[: picture.shape[0], : picture.shape[1]] = picture
    return canvas


def _pillow_resize(picture):
    """Bilinear to 24 x 24 in Pillow's float mode, which does not round to bytes."""
    channels = [PIL.Image.fromarray(picture[..., c].astype(np.float32)) for c in range(3)]
    return np.stack([np.asarray(c.resize((24, 24), PIL.Image.BILINEAR)) for c in channels], axis=-1)


def _assert_pillows(actual, expected):
    error = np.abs(255 * np.asarray(actual, np.float64) - np.asarray(expected))
    assert error.max() <= 1.05
    assert error.mean() <= 0.32


@functools.cache
def _compiled_apply(spec=GEOMETRY):
    return jax.jit(
        jax.vmap(lambda image, params, size: apply(image, params, spec, size), (None, 0, None))
    )


@functools.cache
def _compiled_center(size, short_side):
    spec = dataclasses.replace(GEOMETRY, size=size)
    return jax.jit(lambda image, size: center_view(image, size, spec, short_side))


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_crops_and_flips_are_pillows(make_params, height, width):
    picture = _picture(height, width)
    boxes = [(0, 0, height, width), (height // 3, width // 2, height // 2, width // 2)]
    boxes += [(height - 1, 0, 1, width), (0, width - 1, height, 1)]
    boxes = np.array([(top, left, max(h, 1), max(w, 1)) for top, left, h, w in boxes])
    fractions = boxes / np.tile([height, width], 2)
    flips = np.arange(2 * len(boxes)) % 2 == 1
    params = make_params(len(flips), crop=np.repeat(fractions, 2, axis=0), flip=flips)
    size = np.array([height, width], np.int32)
    views = _compiled_apply()(_on_canvas(picture, padding=1), params, size).image
    for view, (top, left, h, w), flip in zip(views, np.repeat(boxes, 2, 0), flips, strict=True):
        expected = _pillow_resize(picture[top : top + h, left : left + w])
        np.testing.assert_allclose(255 * view, expected[:, ::-1] if flip else expected, atol=1e-3)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_wide_and_tall_canvases(make_params, shape):
    picture = _picture(*shape)
    view = jax.jit(lambda: apply(picture, _first(make_params(1)), GEOMETRY))().image
    np.testing.assert_allclose(255 * view, _pillow_resize(picture), atol=1e-3)


@pytest.mark.parametrize("output", [1, 5, 24, 100])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_cpus_and_accelerators_crop_alike(monkeypatch, shape, output):
    random = np.random.default_rng(5)
    canvas, many = random.integers(0, 256, (*shape, 3)).astype(np.uint8), 12
    lengths = random.uniform(0, 1, (many, 2))
    boxes = np.hstack([random.uniform(0, 1 - lengths), lengths]).astype(np.float32)
    sizes = random.integers(1, shape, (many, 2), endpoint=True).astype(np.int32)
    arguments = (boxes, random.random(many) < 0.5, sizes)

    def crop(box, flip, size):
        return crop_and_resize(canvas, box, flip, output, size)

    on_cpus = jax.jit(jax.vmap(crop))(*arguments)
    compute_as_accelerators(monkeypatch)
    on_accelerators = jax.jit(jax.vmap(lambda *each: crop(*each)))(*arguments)
    np.testing.assert_allclose(on_cpus, on_accelerators, atol=1e-5)


def test_only_cpus_gather_rows_and_sum_shifts():
    image = jax.ShapeDtypeStruct((64, 64, 3), np.uint8)
    traced = jax.jit(lambda key, image: augment(key, image, AugmentSpec(16)).image).trace(
        jax.random.key(0), image
    )
    products = {
        each: text.count("stablehlo.dot_general") for each, text in programs(traced).items()
    }
    assert products == {"cpu": 1, "cuda": 4, "tpu": 4}


def _first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)


def test_float_canvases_are_bytes_over_255(make_params):
    picture = _picture(CANVAS, CANVAS)
    params, size = make_params(1, crop=[0.1, 0.2, 0.5, 0.5]), np.array([CANVAS, CANVAS], np.int32)
    as_bytes = _compiled_apply()(picture, params, size).image
    as_floats = _compiled_apply()(picture / np.float32(255), params, size).image
    np.testing.assert_allclose(as_floats, as_bytes, atol=1e-6)


@pytest.mark.exhaustive
def test_padding_never_reaches_a_view():
    spec = AugmentSpec(16, kernel_size=3)
    compiled = jax.jit(
        jax.vmap(lambda key, image, size: augment(key, image, spec, size), (0, None, 0))
    )
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    sizes = np.array(SHAPES, np.int32)
    for index, (height, width) in enumerate(SHAPES):
        picture = _picture(height, width)
        plain, garbage = (
            _first(jax.tree.map(lambda leaf, i=index: leaf[i:], compiled(keys, canvas, sizes)))
            for canvas in (_on_canvas(picture), _on_canvas(picture, padding=7))
        )
        jax.tree.map(np.testing.assert_array_equal, plain, garbage)


def _pillow_center(picture, size, short_side):
    """Torchvision's Resize(short_side, bicubic), CenterCrop(size)."""
    height, width = picture.shape[:2]
    short = min(height, width)
    resized = (short_side * width // short, short_side * height // short)
    image = PIL.Image.fromarray(picture).resize(resized, PIL.Image.BICUBIC)
    left, top = (round((length - size) / 2) for length in resized)
    return image.crop((left, top, left + size, top + size))


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("short_side", [None, 31])
def test_evaluation_views_are_pillows(height, width, short_side):
    picture = _picture(height, width)
    size = np.array([height, width], np.int32)
    compiled = _compiled_center(24, short_side)
    view = compiled(_on_canvas(picture, padding=3), size)
    _assert_pillows(view, _pillow_center(picture, 24, short_side or 24))
    np.testing.assert_array_equal(view, compiled(_on_canvas(picture), size))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int64])
def test_a_size_of_any_integers_gives_the_same_evaluation_view(dtype):
    picture, size = _on_canvas(_picture(40, 50)), np.array([40, 50])
    view = center_view(picture, size.astype(dtype), GEOMETRY, short_side=1000)
    _assert_pillows(view, _pillow_center(_picture(40, 50), 24, 1000))


def test_evaluation_view_of_a_fitting_picture_is_the_picture():
    picture = _picture(CANVAS, CANVAS)
    spec = AugmentSpec(CANVAS)
    view = jax.jit(lambda: center_view(picture, None, spec))()
    expected = (picture / 255 - np.array(spec.mean)) / np.array(spec.std)
    np.testing.assert_allclose(view, expected, atol=1e-5)


def test_short_side_below_the_view_is_refused():
    with pytest.raises(ValueError, match=r"short_side=20 is smaller than augment\.size=24"):
        center_view(_picture(40, 40), None, GEOMETRY, short_side=20)
