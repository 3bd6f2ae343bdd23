"""The operations against plain references: every jitter order, solarize, rotation, not applied."""

import colorsys
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import scipy.ndimage

from cassle_jax.augment import AugmentSpec, apply, augment, denormalize, draw
from tests.platforms import compute_as_accelerators, programs

PLAIN = AugmentSpec(
    16, solarize=0.5, rotation=0.5, jitter_order="image", mean=(0, 0, 0), std=(1, 1, 1)
)
ORDERS = np.array(list(itertools.permutations(range(4))))


@functools.cache
def _compiled(spec=PLAIN):
    return jax.jit(jax.vmap(lambda image, params: apply(image, params, spec), in_axes=(None, 0)))


@pytest.fixture(scope="module")
def image():
    """All grey levels, saturated colours, black and white: where HSV has its corners."""
    random = np.random.default_rng(0)
    image = random.random((16, 16, 3)).astype(np.float32)
    image[0] = np.linspace(0, 1, 16)[:, None]
    image[1] = np.array(list(itertools.product((0, 1), repeat=3)) * 2)
    image[2] = np.array(list(itertools.product((0.25, 0.5), repeat=3)) * 2)
    return image


def _reference_jitter(image, order, brightness, contrast, saturation, hue):
    def in_hsv(change):
        def one(pixel):
            return colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel)))

        return np.apply_along_axis(one, 2, image)

    image = image.astype(np.float64)
    for operation in order:
        if operation == 0:
            image = np.clip(image * brightness, 0, 1)
        elif operation == 1:
            grey = (image @ [0.2989, 0.587, 0.114]).mean()
            image = np.clip(contrast * image + (1 - contrast) * grey, 0, 1)
        elif operation == 2:
            image = in_hsv(lambda h, s, v: (h, min(s * saturation, 1), v))
        else:
            image = in_hsv(lambda h, s, v: ((h + hue) % 1, s, v))
    return image


@pytest.mark.parametrize(
    "factors",
    [(1.3, 0.7, 1.4, 0.07), (0.8, 1.4, 1.3, -0.1), (1.9, 1.8, 1.8, 0.45), (0, 0, 0, -0.5)],
    ids=str,
)
def test_jitter_in_all_24_orders(image, make_params, factors):
    names = ("brightness", "contrast", "saturation", "hue")
    params = make_params(
        24, jitter=True, jitter_order=ORDERS, **dict(zip(names, factors, strict=True))
    )
    view = _compiled()(image, params)
    expected = np.stack([_reference_jitter(image, order, *factors) for order in ORDERS])
    np.testing.assert_allclose(view.image, expected, rtol=0, atol=1e-5)
    color_diff = image.mean(axis=(0, 1)) - expected.mean(axis=(1, 2))
    np.testing.assert_allclose(view.color_diff, color_diff, rtol=0, atol=1e-5)


def test_not_applied_leaves_every_bit(image, make_params):
    params = make_params(
        1, brightness=1.4, contrast=0.6, saturation=1.4, hue=0.1, sigma=2, jitter_order=[3, 1, 0, 2]
    )
    view = _compiled()(image, params)
    np.testing.assert_array_equal(view.image[0], image)
    np.testing.assert_array_equal(view.color_diff[0], np.zeros(3))


def test_jitter_with_neutral_values_changes_nothing(image, make_params):
    view = _compiled()(image, make_params(1, jitter=True))
    np.testing.assert_allclose(view.image[0], image, rtol=0, atol=1e-6)


def test_only_cpus_store_what_the_jitter_reads_often():
    draw_and_apply = jax.jit(lambda key, image: augment(key, image, AugmentSpec(8, blur=0)).image)
    program = programs(draw_and_apply.trace(jax.random.key(0), np.zeros((8, 8, 3), np.uint8)))
    assert [each for each, text in program.items() if "optimization_barrier" in text] == ["cpu"]


def test_solarize_is_pillows(make_params):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    levels = np.array([0, 1, 100, 128, 255])
    # Half a level below, so that no pixel lies within rounding of the threshold.
    thresholds = (levels - 0.5) / 255
    params = make_params(len(levels), solarize=True, solarize_threshold=thresholds)
    expected = [PIL.ImageOps.solarize(PIL.Image.fromarray(image), level) for level in levels]
    actual = 255 * _compiled()(image, params).image
    np.testing.assert_allclose(actual, np.stack(expected), rtol=0, atol=1e-3)


def test_rotation_is_counter_clockwise(image, make_params):
    rotated = _compiled()(image, make_params(4, turns=np.arange(4))).image
    for turns in range(4):
        np.testing.assert_array_equal(rotated[turns], np.rot90(image, turns))


def test_rotation_comes_after_the_flip(image, make_params):
    view = _compiled()(image, make_params(1, flip=True, turns=1))
    np.testing.assert_array_equal(view.image[0], np.rot90(image[:, ::-1]))


def test_solarize_comes_between_jitter_and_grayscale(image, make_params):
    params = make_params(
        1, jitter=True, brightness=1.4, solarize=True, solarize_threshold=0.6, grayscale=True
    )
    bright = np.clip(image * 1.4, 0, 1)
    expected = np.where(bright < 0.6, bright, 1 - bright) @ [0.299, 0.587, 0.114]
    actual = _compiled()(image, params).image[0]
    np.testing.assert_allclose(actual, np.tile(expected[..., None], 3), rtol=0, atol=1e-5)


def test_solarize_comes_last_where_the_papers_have_it_so(image, make_params):
    settings = {"grayscale": True, "blur": True, "sigma": 1.0}
    before = _compiled()(image, make_params(1, **settings)).image[0]
    assert (before > 0.45).any() and (before < 0.45).any()
    last = dataclasses.replace(PLAIN, solarize_after="blur")
    params = make_params(1, **settings, solarize=True, solarize_threshold=0.45)
    actual = _compiled(last)(image, params).image[0]
    np.testing.assert_allclose(actual, np.where(before < 0.45, before, 1 - before), atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "accelerator"])
@pytest.mark.parametrize("kernel_size", [1, 3, 31])
def test_blur_is_scipys(monkeypatch, make_params, image, kernel_size, platform):
    if platform == "accelerator":
        compute_as_accelerators(monkeypatch)
    sigmas = np.array([0.1, 0.7, 2.0], np.float32)
    spec = dataclasses.replace(PLAIN, kernel_size=kernel_size)
    params = make_params(3, blur=True, sigma=sigmas)
    views = jax.vmap(lambda params: apply(image, params, spec))(params).image
    offsets = np.arange(kernel_size) - kernel_size // 2
    for view, sigma in zip(views, sigmas, strict=True):
        kernel = np.exp(-0.5 * (offsets / np.float64(sigma)) ** 2)
        expected = image.astype(np.float64)
        for axis in (0, 1):
            expected = scipy.ndimage.correlate1d(
                expected, kernel / kernel.sum(), axis, mode="mirror"
            )
        np.testing.assert_allclose(view, expected, atol=1e-6)


def test_blur_keeps_the_mean_of_a_constant_and_the_borders_reflect(make_params):
    image = np.zeros((16, 16, 3), np.float32)
    image[1] = 1
    view = _compiled()(image, make_params(1, blur=True, sigma=1.0)).image[0]
    # Row 0 sees row 1 from both sides: three taps at a distance of -1, 0 and 1.
    near, centre = np.exp(-0.5), 1.0
    expected = np.array([2 * near, centre, near]) / (centre + 2 * near)
    np.testing.assert_allclose(view[:3, 5, 0], expected, atol=1e-6)
    assert not view[3:].any()


def test_a_step_of_probability_zero_is_left_out(image, make_params):
    spec = AugmentSpec(16, jitter=0, grayscale=0, blur=0, mean=(0, 0, 0), std=(1, 1, 1))
    params = make_params(
        1, jitter=True, brightness=0.5, grayscale=True, blur=True, solarize=True, turns=1
    )
    np.testing.assert_array_equal(_compiled(spec)(image, params).image[0], image)


@pytest.mark.exhaustive
def test_vmap_is_a_loop():
    spec = AugmentSpec(16, solarize=0.5, rotation=0.5, jitter_order="batch")
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (6, 24, 20, 3), dtype=np.uint8)
    sizes = np.array([[24, 20], [10, 20], [24, 7], [1, 1], [13, 13], [2, 19]], np.int32)
    keys, order_key = jax.random.split(jax.random.key(1), 6), jax.random.key(2)

    def one(key, image, size):
        return augment(key, image, spec, size, order_key)

    single = jax.jit(one)
    looped = [single(*arguments) for arguments in zip(keys, images, sizes, strict=True)]
    looped = jax.tree.map(lambda *leaves: np.stack(leaves), *looped)
    mapped = jax.jit(jax.vmap(one))(keys, images, sizes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), mapped, looped)


def test_augment_is_draw_then_apply():
    spec, key = AugmentSpec(8, kernel_size=3), jax.random.key(3)
    image = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)

    @jax.jit
    def both_ways(key):
        size = np.array([20, 24])
        return augment(key, image, spec), apply(image, draw(key, size, spec), spec)

    both, apart = both_ways(key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), both, apart)


def test_denormalize_undoes_normalisation(image, make_params):
    spec = AugmentSpec(16)
    view = _compiled(spec)(image, make_params(2))
    pictures = denormalize(view.image, spec)
    np.testing.assert_allclose(pictures, np.stack([image, image]), rtol=0, atol=1e-6)
    assert denormalize(10 * jnp.ones((1, 1, 3)), spec).max() == 1


@pytest.mark.exhaustive
def test_colours_are_right_within_a_compiled_loop():
    """A compiler that rounds a channel differently at two places must not change its hue."""
    spec = AugmentSpec(32, crop=False, flip=0, jitter=1, blur=0, grayscale=0)
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    keys = jax.random.split(jax.random.key(0), len(images))

    def views(strength):
        def one(key, image):
            params = draw(key, jnp.array([32, 32]), spec)
            stronger = params.replace(
                brightness=jnp.maximum(0, 1 + strength * (params.brightness - 1)),
                contrast=jnp.maximum(0, 1 + strength * (params.contrast - 1)),
                saturation=jnp.maximum(0, 1 + strength * (params.saturation - 1)),
                hue=jnp.clip(strength * params.hue, -0.5, 0.5),
            )
            return apply(image, stronger, spec).image

        return jax.vmap(one)(keys, jnp.asarray(images))

    strengths = jnp.arange(1, 17) / 8
    looped = jax.jit(lambda strengths: jax.lax.map(views, strengths))(strengths)
    one_by_one = jax.jit(views)
    for found, strength in zip(looped, strengths, strict=True):
        np.testing.assert_allclose(found, one_by_one(strength), atol=1e-4)
