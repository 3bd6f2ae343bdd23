import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, r2_score
from sklearn.preprocessing import StandardScaler

from cassle_jax.data.datasets import EvaluationData
from cassle_jax.evaluation import augmentation_probes
from cassle_jax.evaluation.augmentation_probes import augmentation_prober, read_augmentations
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.findings import Chart, from_json, to_json
from cassle_jax.evaluation.settings import Analysis
from cassle_jax.evaluation.store import FeatureStore
from cassle_jax.evaluation.subject import Subject
from tests.evaluation.analysed import (
    JITTERED,
    PLAIN,
    batches_of,
    colour_networks,
    devices,
    pictures,
)
from tests.evaluation.taught import Plain, colours

ROWS = 800
DRAWN = {
    "blur": 1,
    "color": 4,
    "color_diff": 3,
    "crop": 4,
    "flip": 1,
    "grayscale": 1,
    "rotation": 4,
    "solarize": 1,
}
CLASSES = ("flip", "grayscale", "rotation")


def descriptors():
    generator = np.random.default_rng(1)
    drawn = {name: generator.uniform(size=(ROWS, size)) for name, size in DRAWN.items()}
    drawn["flip"] = drawn["flip"] < 0.5
    drawn["grayscale"] = drawn["grayscale"] < 0.2
    drawn["rotation"] = np.eye(4)[generator.integers(4, size=ROWS)]
    return {name: values.astype(np.float32) for name, values in drawn.items()}


def noise(seed, width=24):
    return np.random.default_rng(seed).normal(size=(ROWS, width)).astype(np.float32)


def mixed(drawn):
    known = np.concatenate(list(drawn.values()), axis=1)
    return (known @ np.random.default_rng(2).normal(size=(known.shape[1], 24))).astype(np.float32)


@pytest.mark.exhaustive
def test_what_the_features_hold_is_read_and_noise_says_nothing():
    drawn = descriptors()
    held = read_augmentations(noise(3), mixed(drawn), drawn)
    absent = read_augmentations(noise(3), noise(4), drawn)
    assert len(held.readings) == 16 and held.images == ROWS
    for name, reading in held.readings.items():
        assert reading.metric == ("accuracy" if name in CLASSES else "R²")
        assert min(reading.from_pair, reading.from_augmented) > 0.98, name
        nothing = absent.readings[name]
        expected = nothing.constant if name in CLASSES else 0
        assert nothing.from_pair == pytest.approx(expected, abs=0.12), name
        assert nothing.from_augmented == pytest.approx(expected, abs=0.12), name
    assert 0.7 < absent.readings["grayscale"].constant < 0.9


def test_a_difference_is_read_off_the_pair_alone():
    drawn = descriptors()
    plain = noise(5)
    read = read_augmentations(plain, plain + 0.1 * mixed(drawn), drawn).readings
    assert read["crop row"].from_pair > 0.95
    assert read["crop row"].from_augmented < 0.3


def test_scores_are_those_of_scikit_learn():
    drawn = descriptors()
    chosen = {name: drawn[name] for name in ("blur", "flip")}
    features = mixed(drawn) + 3 * noise(6)
    read = read_augmentations(noise(5), features, chosen).readings
    held_out = np.arange(ROWS) % 4 == 3
    scaler = StandardScaler().fit(features[~held_out])
    train, test = scaler.transform(features[~held_out]), scaler.transform(features[held_out])
    blur, flip = drawn["blur"][:, 0], drawn["flip"][:, 0]
    r2 = [
        r2_score(
            blur[held_out], Ridge(alpha=penalty * 600).fit(train, blur[~held_out]).predict(test)
        )
        for penalty in np.logspace(-5, 2, 8)
    ]
    accuracy = [
        accuracy_score(
            flip[held_out],
            LogisticRegression(C=1 / (penalty * 600), tol=1e-3)
            .fit(train, flip[~held_out])
            .predict(test),
        )
        for penalty in (1.0, 1e-1, 1e-2, 1e-3)
    ]
    assert list(read) == ["blur sigma", "flip"]
    assert min(abs(read["blur sigma"].from_augmented - each) for each in r2) < 1e-4
    assert min(abs(read["flip"].from_augmented - each) for each in accuracy) < 1e-6
    assert 0.1 < read["blur sigma"].from_augmented < 0.9
    assert read["flip"].constant == pytest.approx(
        max(flip[held_out].mean(), 1 - flip[held_out].mean())
    )


@pytest.fixture(scope="module")
def jittered():
    return probed()


def probed(count=1, size=32, images=64, holes=0, spec=JITTERED, seed=0):
    networks, variables = colour_networks()
    prober = augmentation_prober(networks, spec, PLAIN.neutral, devices(count))
    return prober(variables, batches_of(pictures(images), size, holes), seed)


def test_mean_colours_reveal_the_jitter_by_comparison(jittered):
    # What is never drawn differently (here all but the jitter) is not among the readings.
    assert [name.split()[0] for name in jittered.readings] == ["color"] * 4 + ["color_diff"] * 3
    for channel in ("red", "green", "blue"):
        reading = jittered.readings[f"color_diff {channel}"]
        assert reading.from_pair > 0.999 > 0.9 > reading.from_augmented


def test_the_protocol_reads_the_analysed_images_of_the_test_part(jittered, monkeypatch):
    calls = []

    def prober(networks, spec, neutral, mesh):
        calls.append((networks, spec))

        def read(variables, batches, seed):
            images = [batch["image"][batch["mask"]] for batch in batches]
            calls.append((len(np.concatenate(images)), seed))
            return jittered

        return read

    monkeypatch.setattr(augmentation_probes, "augmentation_prober", prober)
    networks, variables = colour_networks()
    subject = Subject("colours", networks, variables, JITTERED, PLAIN, (JITTERED, JITTERED))
    test, none = (Plain(*colours(count, 2)) for count in (40, 2))
    data = EvaluationData("colours", none, none, test, 2, "accuracy", "classification")
    bench = Bench(subject, data, FeatureStore(subject, devices(1), batch=8))
    findings = augmentation_probes.PROTOCOL.run(bench, Analysis(analysed=20, seed=3))
    assert findings == jittered.findings("colours")
    assert calls == [(networks, JITTERED), (20, 3)]


@pytest.mark.exhaustive
def test_devices_and_batches_change_nothing(jittered):
    found = probed(count=4, size=16, holes=5)
    assert found.images == jittered.images == 64
    assert found.readings.keys() == jittered.readings.keys()
    for name, expected in jittered.readings.items():
        read = (found.readings[name].from_pair, found.readings[name].from_augmented)
        assert read == pytest.approx((expected.from_pair, expected.from_augmented), abs=1e-3)


def test_findings_name_metric_and_source():
    drawn = descriptors()
    findings = read_augmentations(noise(3), mixed(drawn), drawn).findings("scenes")
    assert from_json(to_json(findings)) == findings
    charts = {each.y_label: each for each in findings if isinstance(each, Chart)}
    assert list(charts) == ["R²", "accuracy"]
    assert list(charts["R²"].series) == ["plain and augmented", "augmented"]
    assert list(charts["accuracy"].series) == [
        "plain and augmented",
        "augmented",
        "constant answer",
    ]
    assert [name for name, _ in charts["accuracy"].series["augmented"]] == list(CLASSES)
    assert len(findings) == 2 + 2 * 16


def test_what_cannot_be_probed_is_refused():
    drawn = descriptors()
    few = {name: values[:12] for name, values in drawn.items()}
    with pytest.raises(ValueError, match="12 images are too few to probe; use at least 13"):
        read_augmentations(noise(3)[:12], noise(4)[:12], few)
    same = {name: np.zeros_like(values) for name, values in drawn.items()}
    with pytest.raises(ValueError, match="nothing to predict"):
        read_augmentations(noise(3), noise(4), same)
    with pytest.raises(ValueError, match="not finite"):
        read_augmentations(noise(3), noise(4) * np.nan, drawn)
    networks, variables = colour_networks()
    prober = augmentation_prober(networks, dataclasses.replace(JITTERED), PLAIN.neutral, devices(1))
    with pytest.raises(ValueError, match="there are no batches"):
        prober(variables, [])
