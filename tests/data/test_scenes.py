"""The embedded scenes: their stated factors are what can be measured in the pixels."""

import colorsys
import hashlib
import pickle

import numpy as np
import pytest

from cassle_jax.data import Scenes
from cassle_jax.data import scenes as scenes_module
from cassle_jax.data.drawing import SHAPES
from cassle_jax.data.scenes import FACTORS, TEXTURES

PINNED = [
    2.4789956468491265,
    1.0,
    0.3527130725770487,
    0.6669153698825934,
    0.2018530546542873,
    1.1323599673776468,
    1.0,
]


IMAGES = "b7425629e94631d22c71dee3ee200306cb5fb0db79453e6c9ae2ba529b48e1ab"


def alone(monkeypatch) -> None:
    """Draws objects on black, without blobs, in full light."""
    monkeypatch.setattr(
        scenes_module, "_background", lambda _, size: np.zeros((size, size, 3), np.float32)
    )
    monkeypatch.setattr(scenes_module, "_BLOBS", 0)


def measured_hues(image: np.ndarray) -> np.ndarray:
    bright = image.reshape(-1, 3)[image.max(-1).ravel() > 60] / 255
    return np.array([colorsys.rgb_to_hsv(*pixel)[0] for pixel in bright]) * 2 * np.pi


def test_a_scene_is_a_function_of_seed_split_and_index():
    few, many = Scenes(5, seed=3, size=32), Scenes(50, seed=3, size=32)
    for i in range(5):
        np.testing.assert_array_equal(few[i].image, many[i].image)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(many))[31].image, many[31].image)
    assert (
        len(
            {
                Scenes(5, seed, 32, split)[0].image.tobytes()
                for seed in (0, 1)
                for split in ("train", "test")
            }
        )
        == 4
    )


def test_splits_share_no_scene():
    train, test = (Scenes(2000, split=split).factors for split in ("train", "test"))
    assert not np.intersect1d(train["hue"], test["hue"]).size


def test_first_scene_is_pinned():
    """The stream does not change under our users: these are the first scene's factors."""
    factors = Scenes(1).factors
    np.testing.assert_allclose([factors[name][0] for name in FACTORS], PINNED, rtol=1e-12)


def test_first_images_are_pinned():
    """Nor do the images: runs continue, and are repeated, on the same ones."""
    digest = hashlib.sha256()
    for split in ("train", "test"):
        scenes = Scenes(20, seed=0, size=48, split=split)
        for i in range(20):
            digest.update(scenes[i].image.tobytes())
    assert digest.hexdigest() == IMAGES


def test_factors_are_independent_and_uniform():
    count = 20_000
    factors = Scenes(count).factors
    assert set(factors) == set(FACTORS)
    kinds = {"shape": len(SHAPES), "texture": len(TEXTURES)}
    for name, factor in FACTORS.items():
        values, kind = factors[name], factor.kind
        assert values.shape == (count,)
        if kind == "class":
            share = np.bincount(values, minlength=kinds[name]) / count
            np.testing.assert_allclose(share, 1 / kinds[name], atol=0.01)
        else:
            low, high = values.min(), values.max()
            if kind == "angle":
                assert low >= 0
                assert high < 2 * np.pi
                assert high - low > 6.27
            quartiles = (np.quantile(values, [0.25, 0.5, 0.75]) - low) / (high - low)
            np.testing.assert_allclose(quartiles, [0.25, 0.5, 0.75], atol=0.015)
    correlation = np.corrcoef([factors[name] for name in FACTORS])
    assert np.abs(correlation - np.eye(len(FACTORS))).max() < 0.03


def test_label_is_the_shape():
    scenes = Scenes(30, size=16)
    assert scenes.class_names == tuple(SHAPES)
    assert [scenes[i].label for i in range(30)] == scenes.factors["shape"].tolist()


def test_objects_pixels_have_the_stated_hue(monkeypatch):
    alone(monkeypatch)
    scenes = Scenes(60, size=64)
    for i, hue in enumerate(scenes.factors["hue"]):
        difference = np.angle(np.exp(1j * (measured_hues(scenes[i].image) - hue)))
        assert np.abs(np.median(difference)) < 0.03
        assert np.abs(difference).max() < 0.12


def test_object_lies_where_and_is_as_large_as_stated(monkeypatch):
    """Every shape reaches its radius, and none reaches beyond it by much."""
    alone(monkeypatch)
    scenes = Scenes(120, size=128)
    factors = scenes.factors
    for i in range(120):
        rows, columns = np.nonzero(scenes[i].image.max(-1) > 40)
        x, y = (columns + 0.5) / 128 - factors["x"][i], (rows + 0.5) / 128 - factors["y"][i]
        reach = np.hypot(x, y).max() / factors["size"][i]
        assert 0.85 < reach < 1.2


def test_turning_an_object_by_its_orientation_undoes_it(monkeypatch):
    """The pixels, read along the stated orientation, match the upright drawing of the shape."""
    alone(monkeypatch)
    scenes = Scenes(60, size=128)
    factors = scenes.factors
    grid = np.linspace(-0.8, 0.8, 41)
    right, up = np.meshgrid(grid, -grid)
    for i in range(60):
        angle, radius = factors["orientation"][i], factors["size"][i]
        x = factors["x"][i] + radius * (np.cos(angle) * right - np.sin(angle) * up)
        y = factors["y"][i] - radius * (np.sin(angle) * right + np.cos(angle) * up)
        filled = scenes[i].image.max(-1)[(y * 128).astype(int), (x * 128).astype(int)] > 25
        shape = list(SHAPES.values())[factors["shape"][i]]
        upright = shape(right.astype(np.float32), up.astype(np.float32)) < 0
        assert (filled == upright).mean() > 0.93


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_has_a_symmetry_of_rotation(shape):
    grid = np.linspace(-1.1, 1.1, 81, dtype=np.float32)
    x, y = np.meshgrid(grid, grid)
    upright = SHAPES[shape](x, y) < 0
    for part in range(1, 12):
        angle = 2 * np.pi * part / 12
        turned = SHAPES[shape](
            (np.cos(angle) * x + np.sin(angle) * y).astype(np.float32),
            (np.cos(angle) * y - np.sin(angle) * x).astype(np.float32),
        )
        overlap = (upright & (turned < 0)).sum() / (upright | (turned < 0)).sum()
        assert overlap < 0.92


def test_edges_are_antialiased(monkeypatch):
    alone(monkeypatch)
    monkeypatch.setattr(scenes_module, "TEXTURES", {"plain": TEXTURES["plain"]} | TEXTURES)
    scenes = Scenes(200, size=64)
    plain = np.flatnonzero(scenes.factors["texture"] == 0)[:10]
    for i in plain:
        values = np.unique(scenes[int(i)].image.max(-1))
        assert len(values) > 10


@pytest.mark.exhaustive
def test_mean_colour_does_not_give_the_hue_away():
    """A linear map of the mean pixel explains little of the object's hue."""
    scenes = Scenes(900, size=32)
    means = np.array([scenes[i].image.mean((0, 1)) for i in range(900)])
    features = np.c_[means, np.ones(900)]
    hue = scenes.factors["hue"]
    target = np.c_[np.cos(hue), np.sin(hue)]
    fitted = features @ np.linalg.lstsq(features[:600], target[:600], rcond=None)[0]
    explained = 1 - ((target - fitted)[600:] ** 2).sum() / (target[600:] ** 2).sum()
    assert explained < 0.3
