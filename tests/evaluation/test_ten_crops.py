"""Linear evaluation of datasets that ask for ten crops: which rows it fits to and is tested on."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from cassle_jax.data import DataError, Record
from cassle_jax.data.datasets import EvaluationData
from cassle_jax.evaluation import memory, resampled
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.linear import PROTOCOL
from cassle_jax.evaluation.settings import Seeded, Settings
from cassle_jax.evaluation.store import FeatureStore, uncropped_side
from tests.evaluation.analysed import PIXELS, devices
from tests.evaluation.taught import colour_subject

SIZES = {"train": 12, "val": 4, "test": 7}


class Noise:
    """Noisy images of two classes, one brighter; as files, so that they are decoded."""

    class_names = ("dark", "bright")

    def __init__(self, name, count, seed):
        self.name = name
        draw = np.random.default_rng(seed)
        light = 90 * (np.arange(count) % 2)[:, None, None, None]
        self.pixels = (light + draw.integers(0, 160, (count, 24, 30, 3))).astype(np.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        file = io.BytesIO()
        Image.fromarray(self.pixels[index]).save(file, "PNG")
        return Record(file.getvalue(), index % 2, f"{self.name} {index}")


@pytest.fixture
def bench(tmp_path):
    """A bench of a subject whose features are an image's mean colour, in [0, 1]."""
    parts = [Noise(name, count, seed) for seed, (name, count) in enumerate(SIZES.items())]
    data = EvaluationData("noise", *parts, 2, "accuracy", "classification", ten_crops=True)
    subject, mesh = colour_subject(), devices(2)
    store = FeatureStore(subject, mesh, batch=8, folder=tmp_path)
    return Bench(subject, data, store)


def resized(pixels):
    """Short side 9 pixels, as 256 is to 224 for views of 8."""
    height, width = 9, 9 * 30 // 24
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def mean_colours(pixels, places):
    return [pixels[top : top + PIXELS, left : left + PIXELS].mean((0, 1)) / 255
            for top, left in places]  # fmt: skip


@pytest.mark.exhaustive
def test_what_is_fitted_are_ten_crops_and_what_is_tested_is_the_centre(bench):
    assert uncropped_side(PIXELS) == 9
    assert uncropped_side(224) == 256
    train, val, test = bench.cropped()
    for part, source in ((train, bench.data.train), (val, bench.data.val)):
        assert part.features.shape == (10 * len(source), 3)
        assert part.labels.tolist() == np.repeat(np.arange(len(source)) % 2, 10).tolist()
        for row, pixels in enumerate(source.pixels):
            picture = resized(pixels)
            # 9 × 11 pixels: the margins are 1 and 3, half of which is 0 and 2, rounded to even.
            places = [(0, 0), (0, 3), (1, 0), (1, 3), (0, 2)]
            expected = mean_colours(picture, places) + mean_colours(picture[:, ::-1], places)
            found = part.features[10 * row : 10 * row + 10]
            np.testing.assert_allclose(found, expected, atol=0.002)
    assert test.labels.tolist() == [index % 2 for index in range(7)]
    expected = [mean_colours(resized(each), [(0, 2)])[0] for each in bench.data.test.pixels]
    np.testing.assert_allclose(test.features, expected, atol=0.002)


@pytest.mark.exhaustive
def test_a_limit_counts_images_and_each_has_its_ten_crops(bench):
    store = FeatureStore(bench.subject, bench.store.mesh, batch=8, limit=5)
    limited = Bench(bench.subject, bench.data, store)
    for few, whole in zip(limited.cropped()[:2], bench.cropped()[:2], strict=True):
        images = whole.features.reshape(-1, 10, 3)
        found = few.features.reshape(-1, 10, 3)
        assert len(found) == min(5, len(images))
        whose = [np.flatnonzero((images == each).all(axis=(1, 2))) for each in found]
        assert len(np.unique(np.concatenate(whose))) == len(found)
    assert limited.train.labels.tolist() == limited.cropped()[0].labels[::10].tolist()
    assert len(limited.cropped()[2].features) == 5


def test_the_crops_of_a_damaged_image_are_one_damaged_image(bench, caplog):
    class Torn(Noise):
        def __getitem__(self, index):
            record = super().__getitem__(index)
            return record._replace(image=record.image[:60]) if index == 3 else record

    torn = dataclasses.replace(bench.data, train=Torn("torn", 12, 0))
    with caplog.at_level("WARNING", logger="cassle_jax"):
        train, *_ = dataclasses.replace(bench, data=torn).cropped()
    assert train.labels.tolist() == np.repeat([0, 1, 0, *[0, 1] * 4], 10).tolist()
    (said,) = [line for line in caplog.messages if "damaged" in line]
    assert said.startswith("damaged image: torn 3 (")


def test_features_of_crops_and_of_whole_images_are_kept_apart(bench, tmp_path):
    whole = [bench.train, bench.val, bench.test]
    cropped = bench.cropped()
    assert len(list(tmp_path.rglob("*.npz"))) == 6
    again = Bench(bench.subject, bench.data, bench.store)
    for kept, made in zip([again.train, again.val, again.test], whole, strict=True):
        np.testing.assert_array_equal(kept.features, made.features)
    for kept, made in zip(again.cropped(), cropped, strict=True):
        np.testing.assert_array_equal(kept.features, made.features)


def test_random_splits_take_whole_images_and_no_more_memory(bench, monkeypatch):
    # Ten crops need (12 + 4) × 10 × (2 × 4 × 3 + 8 × (2 × 4 + 6 × 2)) = 29 440 bytes.
    monkeypatch.setattr(memory, "host_bytes", lambda: 20_000)
    resampled.PROTOCOL.run(bench, Seeded())
    with pytest.raises(DataError, match=r"160 × 3 features of noise need .*; limit=6 would fit"):
        PROTOCOL.run(bench, Settings())


def test_only_datasets_with_ten_crops_are_cropped(bench):
    findings = PROTOCOL.run(bench, Settings())
    assert findings[0].value == 1
    plain = dataclasses.replace(bench, data=dataclasses.replace(bench.data, ten_crops=False))
    assert [len(part.features) for part in plain.cropped()] == [12, 4, 7]
