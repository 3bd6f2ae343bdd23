import functools

import numpy as np
import pytest

from cassle_jax.augment import AugmentSpec
from cassle_jax.evaluation.findings import Chart, Score, from_json, to_json
from cassle_jax.evaluation.leak import leak_of, pictures_of
from cassle_jax.methods.build import Conditioning
from tests.evaluation.analysed import PIXELS, batches_of, devices, pictures

SPEC = AugmentSpec(PIXELS, jitter=1)
IMAGES = pictures(256)
BATCH, STEPS = 16, 150


@functools.cache
def leak(*descriptors, images=256, grey=False):
    shown = IMAGES[:images]
    if grey:
        shown = np.full_like(shown, 128)
    conditioning = Conditioning(descriptors=descriptors)
    return leak_of(conditioning, (SPEC, SPEC), shown, batch=BATCH, steps=STEPS)


@pytest.mark.exhaustive
def test_what_was_drawn_does_not_give_the_image_away():
    found = leak("color", "crop")
    assert found.chance == pytest.approx(np.log(2 * BATCH - 1))
    assert found.nt_xent == pytest.approx(found.chance, abs=0.02)
    assert found.interval < 0.02


@pytest.mark.exhaustive
def test_how_the_mean_colour_changed_gives_it_away():
    found = leak("color", "color_diff")
    assert found.nt_xent + found.interval < found.chance - 0.3


@pytest.mark.exhaustive
def test_images_that_are_all_the_same_cannot_be_given_away():
    found = leak("color", "color_diff", grey=True)
    assert found.nt_xent == pytest.approx(found.chance, abs=0.02)


@pytest.mark.exhaustive
def test_the_sizes_of_images_are_given_away_by_what_crops_fit_them():
    shape = np.random.default_rng(0).uniform(-1.5, 1.5, 256)
    sizes = np.stack([200 * np.exp(-shape), 200 * np.exp(shape)], axis=1).astype(np.int32)
    found = leak_of(
        Conditioning(descriptors=("crop",)), (SPEC, SPEC), IMAGES, sizes, batch=BATCH, steps=STEPS
    )
    assert found.nt_xent + found.interval < found.chance - 0.3


def test_the_batch_shrinks_where_images_are_few_and_chance_with_it():
    found = leak("color", images=24)
    assert (found.batch, found.train_images, found.test_images) == (6, 12, 12)
    assert found.chance == pytest.approx(np.log(11))
    assert np.isfinite([found.nt_xent, found.interval]).all()


def test_findings_survive_json_and_hold_what_chance_gets():
    found = leak("color", "color_diff")
    findings = found.findings("scenes")
    assert from_json(to_json(findings)) == findings
    value, chance = (each for each in findings if isinstance(each, Score))
    assert (value.value, value.interval) == (found.nt_xent, found.interval)
    assert chance.value == found.chance
    (chart,) = (each for each in findings if isinstance(each, Chart))
    assert "among 32 views at temperature 0.2" in chart.title


def test_pictures_are_whole_and_the_same_however_they_are_read():
    canvases = np.zeros((5, 24, 24, 3), np.uint8)
    canvases[:, :12, :20] = np.arange(10, 60, 10)[:, None, None, None]
    batches = [{**each, "size": np.tile(np.int32([12, 20]), (8, 1))}
               for each in batches_of(canvases, 8)]  # fmt: skip
    found, sizes = pictures_of(batches, devices(1))
    # Nothing of the black canvas around them, and nothing is cut off.
    np.testing.assert_allclose(found, np.broadcast_to(canvases[:, :1, :1] / 255, found.shape),
                               atol=1e-6)  # fmt: skip
    np.testing.assert_array_equal(sizes, [[12, 20]] * 5)
    backwards = [{name: rows[::-1] for name, rows in each.items()} for each in batches]
    np.testing.assert_array_equal(pictures_of(backwards, devices(4))[0], found)


def test_what_cannot_be_measured_is_refused():
    plain, cassle = Conditioning(descriptors=()), Conditioning()
    with pytest.raises(ValueError, match="no descriptors"):
        leak_of(plain, (SPEC, SPEC), IMAGES)
    with pytest.raises(ValueError, match="7 images are too few; use at least 8"):
        leak_of(cassle, (SPEC, SPEC), IMAGES[:7])
    for setting in ({"steps": 0}, {"batch": 1}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            leak_of(cassle, (SPEC, SPEC), IMAGES, **setting)


@pytest.mark.usefixtures("as_a_library")
def test_sizes_of_fewer_images_are_refused():
    """The last size was that of all further images."""
    with pytest.raises(ValueError, match=r"sizes of shape \(9, 2\) are not a height and width per"):
        leak_of(Conditioning(), (SPEC, SPEC), IMAGES, np.ones((9, 2), np.int32))
