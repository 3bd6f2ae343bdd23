"""What an encoder sees in evaluation: Pillow's centre crop, and views under one augmentation."""

import dataclasses
import io
from typing import ClassVar

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from cassle_jax.augment import DESCRIPTORS, describe
from cassle_jax.augment.spec import CHANCES
from cassle_jax.data import Record
from cassle_jax.data.datasets import EvaluationData
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.store import FeatureStore, uncropped_side
from cassle_jax.evaluation.views import (
    AUGMENTATIONS,
    alone,
    draw_for_each,
    every_augmentation,
    nothing,
    view_under,
)
from cassle_jax.methods import Networks
from tests.evaluation.analysed import SPEC, devices
from tests.evaluation.taught import colour_subject

SIZE = 32
SHAPES = [(48, 64), (480, 640), (300, 900), (900, 300), (80, 400), (60, 600), (20, 31), (700, 70)]


class Pixels(nn.Module):
    """Its features are the view's values, so that they can be looked at."""

    feature_width: ClassVar[int] = SIZE * SIZE * 3

    @nn.compact
    def __call__(self, images, train):
        return images.reshape(len(images), -1)


class Pictures:
    """Waves, noise and edges of many sizes, as files."""

    class_names = ("one", "other")
    name = "pictures"

    def __init__(self, kind):
        self.files = [file_of(picture(*shape), kind) for shape in SHAPES]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return Record(self.files[index], index % 2, f"picture {index}")


def picture(height, width):
    rows, columns = np.mgrid[:height, :width][..., None]
    noise = np.random.default_rng(height).normal(0, 40, (height, width, 3))
    waves = 127 + 90 * np.sin(rows / 5 + np.arange(3)) * np.cos(columns / 7)
    waves[(rows > 2 * columns)[..., 0]] -= 120
    return np.clip(waves + noise, 0, 255).astype(np.uint8)


def file_of(pixels, kind):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def resized(file, short_side):
    """Torchvision's Resize, bicubic."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    sides = tuple(short_side * side // min(image.size) for side in image.size)
    return np.asarray(image.resize(sides, Image.Resampling.BICUBIC))


def five_crops(pixels):
    height, width = pixels.shape[:2]
    top, left = round((height - SIZE) / 2), round((width - SIZE) / 2)
    centre = pixels[top:, left:][:SIZE, :SIZE]
    return [
        pixels[:SIZE, :SIZE], pixels[:SIZE, -SIZE:],
        pixels[-SIZE:, :SIZE], pixels[-SIZE:, -SIZE:], centre,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def benches():
    """The features of an encoder that returns its input, for the same pictures in two formats."""
    spec = dataclasses.replace(SPEC, size=SIZE)
    networks = Networks({"encoder": Pixels})
    subject = dataclasses.replace(colour_subject(), networks=networks, spec=spec)
    store = FeatureStore(subject, devices(1), batch=8)

    def bench(kind):
        parts = [Pictures(kind)] * 3
        data = EvaluationData("pictures", *parts, 2, "accuracy", "classification", ten_crops=True)
        return Bench(subject, data, store)

    return {kind: bench(kind) for kind in ("PNG", "JPEG")}


def assert_shown(features, expected):
    shown = 255 * features.reshape(-1, SIZE, SIZE, 3)
    for view, pixels in zip(shown, expected, strict=True):
        assert np.abs(view - pixels).mean() < 0.05
        gradients = [np.abs(np.diff(each.astype(float), axis=1)).mean() for each in (view, pixels)]
        assert gradients[0] == pytest.approx(gradients[1], rel=0.005)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_of_any_size_and_aspect_are_shown_as_pillow_has_them(benches, kind):
    files = Pictures(kind).files
    assert_shown(benches[kind].test.features, [five_crops(resized(f, SIZE))[4] for f in files])


@pytest.mark.exhaustive
def test_ten_crops_and_their_centres_are_pillows(benches):
    files = Pictures("PNG").files
    side = uncropped_side(SIZE)
    train, _, test = benches["PNG"].cropped()
    pictures = [resized(file, side) for file in files]
    ten = [crop for each in pictures for crop in five_crops(each) + five_crops(each[:, ::-1])]
    assert_shown(train.features, ten)
    assert_shown(test.features, [five_crops(each)[4] for each in pictures])


@pytest.fixture(scope="module")
def seen_under():
    """Eight square pictures and their descriptors under chosen augmentations: one program."""
    spec = every_augmentation(dataclasses.replace(SPEC, **dict.fromkeys(CHANCES, 0.5)))
    batch = {
        "image": np.stack([picture(SIZE + each, 64)[:SIZE, :SIZE] for each in range(8)]),
        "size": np.full((8, 2), SIZE, np.int32),
        "index": np.arange(8, dtype=np.int32),
    }

    @jax.jit
    def under(chosen):
        view = view_under(chosen, draw_for_each(jax.random.key(0), batch, spec), batch, spec)
        return view.image, jax.vmap(lambda each: describe(each, spec))(view)

    return lambda chosen: jax.tree.map(np.asarray, under(chosen))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_by_itself_changes_the_view_and_its_own_descriptors(seen_under, name):
    """Also fails where an augmentation is described, and `apply` leaves it out."""
    plain, as_plain = seen_under(nothing())
    views, omega = seen_under(alone(name))
    changed = (views != plain).any((1, 2, 3))
    assert changed.any()
    described = {each: (omega[each] != as_plain[each]).any(1) for each in DESCRIPTORS}
    own = [each for each, entry in DESCRIPTORS.items() if entry.setting == name]
    assert own and all(described[each].any() for each in own)
    assert not any(described[each].any() for each in set(DESCRIPTORS) - set(own))
    assert not changed[~described[own[0]]].any()
