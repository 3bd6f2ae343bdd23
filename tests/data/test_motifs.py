"""The motifs: each factor is what can be measured in the pixels, and nothing else is drawn."""

import colorsys
import pickle

import numpy as np
import pytest
from scipy import ndimage

from cassle_jax.data import CONTENT, Motifs
from cassle_jax.data.drawing import SHAPES
from cassle_jax.data.motifs import FACTORS, PATTERNS, TEXTURES

CLEAR = {
    "light": 1.0,
    "contrast": 1.0,
    "saturation": 0.6,
    "hue": 1.0,
    "x": 0.45,
    "y": 0.55,
    "size": 0.13,
    "blur": 0.0,
    "shape": 0,
    "texture": 0,
    "pattern": 0,
    "count": 3,
}


def draw(pixels: int = 96, **factors) -> np.ndarray:
    return Motifs.draw(CLEAR | factors, np.zeros(0), pixels)


def bodies(image: np.ndarray, hue: float = CLEAR["hue"]) -> np.ndarray:
    """Which pixels have the bodies' hue rather than the ground's."""
    return np.abs(np.angle(np.exp(1j * (hues(image) - hue)))) < np.pi / 2


def hues(image: np.ndarray) -> np.ndarray:
    pixels = image.reshape(-1, 3) / 255
    return (
        2 * np.pi * np.array([colorsys.rgb_to_hsv(*p)[0] for p in pixels]).reshape(image.shape[:2])
    )


def middles(name: str, count: int = 4) -> np.ndarray:
    low, high = FACTORS[name].values
    return low + (high - low) * (np.arange(count) + 0.5) / count


def test_a_motif_is_a_function_of_seed_split_and_index():
    few, many = Motifs(5, seed=3, size=32), Motifs(50, seed=3, size=32)
    for i in range(5):
        np.testing.assert_array_equal(few[i].image, many[i].image)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(many))[31].image, many[31].image)
    assert many[7].label == many.labels[7] == many.factors["shape"][7]
    streams = {
        Motifs(1, seed, 32, split)[0].image.tobytes()
        for seed in (0, 1)
        for split in ("train", "test")
    }
    assert len(streams) == 4


def test_images_of_the_same_factors_are_the_same():
    """No number beside the factors is drawn: images differ in them alone."""
    motifs = Motifs(20, size=32)
    assert len(FACTORS) == motifs.DRAWS
    for i in range(20):
        factors = {name: values[i].item() for name, values in motifs.factors.items()}
        np.testing.assert_array_equal(Motifs.draw(factors, np.zeros(0), 32), motifs[i].image)


def test_factors_are_independent_and_uniform():
    count = 20_000
    factors = Motifs(count).factors
    assert list(factors) == list(FACTORS)
    for name, factor in FACTORS.items():
        values = factors[name]
        if factor.kind == "class":
            share = np.bincount(values, minlength=len(factor.values)) / count
            np.testing.assert_allclose(share, 1 / len(factor.values), atol=0.01)
        else:
            low, high = factor.values
            assert low <= values.min() < values.max() < high
            quartiles = (np.quantile(values, [0.25, 0.5, 0.75]) - low) / (high - low)
            np.testing.assert_allclose(quartiles, [0.25, 0.5, 0.75], atol=0.015)
    correlation = np.corrcoef([factors[name] for name in FACTORS])
    assert np.abs(correlation - np.eye(len(FACTORS))).max() < 0.03


def test_brightness_is_in_proportion_to_the_light():
    lights = middles("light")
    means = np.array([draw(light=light).mean() for light in lights])
    np.testing.assert_allclose(means / lights, means[0] / lights[0], rtol=0.01)


def test_contrast_spreads_the_lightness():
    spread = [draw(contrast=contrast).max(-1).std() for contrast in middles("contrast")]
    np.testing.assert_allclose(spread / middles("contrast"), spread[0] / 0.475, rtol=0.03)


def test_pixels_have_the_stated_saturation_and_hue():
    for saturation in middles("saturation"):
        image = draw(saturation=saturation, pattern=3).astype(float)
        measured = 1 - image.min(-1) / image.max(-1)
        assert abs(np.median(measured) - saturation) < 0.02
    for hue in (0.3, 2.0, 3.7, 5.5):
        image = draw(hue=hue)
        inside = bodies(image, hue)
        assert 0.02 < inside.mean() < 0.5
        for pixels, stated in ((inside, hue), (~inside, hue + np.pi)):
            difference = np.angle(np.exp(1j * (hues(image)[pixels] - stated)))
            assert abs(np.median(difference)) < 0.05


def test_bodies_lie_where_and_are_as_large_as_stated():
    def box(**factors):
        rows, columns = np.nonzero(bodies(draw(192, shape=5, **factors)))
        return (rows.min() + rows.max() + 1) / 384, (columns.min() + columns.max() + 1) / 384, rows

    for x, y in ((0.4, 0.6), (0.6, 0.45)):
        middle_y, middle_x, _ = box(x=x, y=y, size=0.1)
        assert abs(middle_x - x) < 0.02 and abs(middle_y - y) < 0.02
    areas = [bodies(draw(192, size=size)).sum() / size**2 for size in middles("size")]
    np.testing.assert_allclose(areas, areas[0], rtol=0.05)


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", range(4))
def test_there_are_as_many_bodies_as_stated(count):
    for shape in range(len(SHAPES)):
        _, parts = ndimage.label(bodies(draw(192, shape=shape, count=count)), np.ones((3, 3)))
        assert parts == count + 1


def test_blur_takes_the_fine_detail():
    def detail(**factors):
        return np.abs(ndimage.laplace(draw(48, **factors).mean(-1))).mean()

    for pattern in range(len(PATTERNS)):
        details = [detail(blur=blur, pattern=pattern) for blur in middles("blur")]
        assert (np.diff(details) < 0).all()
    assert abs(draw(blur=0.03).mean() - draw(blur=0.0).mean()) < 1


def test_a_flip_changes_no_factor_but_x():
    for i in range(40):
        factors = {name: values[i].item() for name, values in Motifs(40).factors.items()}
        image, mirrored = (draw(48, **factors | {"x": x}) for x in (factors["x"], 1 - factors["x"]))
        assert np.abs(image[:, ::-1].astype(int) - mirrored).max() <= 1


@pytest.mark.parametrize("name", FACTORS)
def test_every_factor_is_seen(name):
    """Each factor alone changes an image, at the size that the quickstart draws."""
    factor = FACTORS[name]
    values = range(len(factor.values)) if factor.kind == "class" else middles(name, 3)
    images = [draw(48, **{name: value}).astype(int) for value in values]
    for first in range(len(images)):
        for second in range(first):
            assert np.abs(images[first] - images[second]).max() > 8


def test_what_augmentations_do_not_change_distinguishes_images():
    """Or a plain method would have nothing to go by: few of a batch share all those classes."""
    kinds = [len(factor.values) for factor in FACTORS.values() if factor.group == CONTENT]
    assert len(kinds) >= 4 and np.prod(kinds) > 128


def test_textures_show_on_the_bodies_alone():
    ground = ~ndimage.binary_dilation(bodies(draw(96)), iterations=2)
    for texture in range(len(TEXTURES)):
        np.testing.assert_array_equal(draw(96, texture=texture)[ground], draw(96)[ground])
