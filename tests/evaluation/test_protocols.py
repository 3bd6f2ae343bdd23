import ast
import dataclasses
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

from cassle_jax import evaluation
from cassle_jax.data import Scenes
from cassle_jax.data.datasets import EvaluationData
from cassle_jax.data.splits import Part
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.findings import Score
from cassle_jax.evaluation.protocol import Protocol
from cassle_jax.evaluation.protocols import PROTOCOLS, checked_settings
from cassle_jax.evaluation.settings import Analysis
from cassle_jax.evaluation.store import FeatureStore
from cassle_jax.evaluation.subject import Subject
from cassle_jax.methods import Networks
from cassle_jax.methods.build import Conditioning
from tests.evaluation.analysed import (
    COLOR_DIFF,
    JITTERED,
    PIXELS,
    PLAIN,
    SPEC,
    Colour,
    colour_networks,
    devices,
)
from tests.evaluation.taught import Plain, colours

SETTINGS = Analysis(analysed=12)


@pytest.fixture
def bench():
    """A bench of an encoder without a projector."""
    networks = Networks({"encoder": Colour})
    variables = {"params": {}, "batch_stats": {}}
    subject = Subject("bare", networks, variables, SPEC, PLAIN, (JITTERED, JITTERED))
    parts = (Scenes(16, seed=seed, size=PIXELS) for seed in (1, 2, 0))
    data = EvaluationData("scenes", *parts, 2, "accuracy", "classification")
    store = FeatureStore(subject, devices(1), batch=8)
    return Bench(subject, data, store)


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("invariance", {f"difference under {name}, features" for name in
                        ("crop", "flip", "jitter", "grayscale", "blur")}),
        ("matching", {f"{metric}, {of}" for metric in ("InfoNCE", "accuracy")
                      for of in ("features", "chance")}),
    ],
)  # fmt: skip
def test_an_encoder_alone_is_analysed_and_the_log_says_so(bench, caplog, task, metrics):
    assert PROTOCOLS[task].suits(bench.data, requested=False)
    with caplog.at_level("INFO", logger="cassle_jax"):
        findings = PROTOCOLS[task].run(bench, SETTINGS)
    assert re.search(f"{task} of bare: .* alone, as it has no projector", caplog.text)
    assert {each.metric for each in findings if isinstance(each, Score)} == metrics


def test_a_leak_is_measured_of_omega_and_of_nothing_else(bench, caplog):
    with caplog.at_level("INFO", logger="cassle_jax"):
        assert PROTOCOLS["leak"].run(bench, SETTINGS) == []
    assert "leak of bare: left out" in caplog.text
    given = dataclasses.replace(bench.subject, conditioning=Conditioning(descriptors=("color",)))
    value, chance, _ = PROTOCOLS["leak"].run(dataclasses.replace(bench, subject=given), SETTINGS)
    assert (value.metric, chance.metric) == ("NT-Xent, ω alone", "NT-Xent, chance")
    assert chance.value == pytest.approx(np.log(5))  # half of 12 images hold two batches of 3
    assert not PROTOCOLS["leak"].suits(bench.data, requested=False)


def test_matching_says_where_omega_enters_with_the_image(bench, caplog):
    conditioning = dataclasses.replace(COLOR_DIFF, injection="image")
    networks, variables = colour_networks(conditioning)
    given = dataclasses.replace(
        bench.subject, networks=networks, variables=variables, conditioning=conditioning
    )
    with caplog.at_level("INFO", logger="cassle_jax"):
        PROTOCOLS["matching"].run(dataclasses.replace(bench, subject=given), SETTINGS)
    assert "matching of bare: not by ω alone, as its encoder takes ω" in caplog.text


def test_analysed_images_are_in_an_order_that_is_always_the_same(bench):
    def labels():
        rows = [batch["label"][batch["mask"]] for batch in bench.analysed(12)]
        return np.concatenate(rows)

    first = labels()
    assert len(first) == 12
    np.testing.assert_array_equal(first, labels())
    in_order = [bench.data.test[place].label for place in range(12)]
    assert first.tolist() != in_order


def test_test_images_that_are_also_learnt_from_are_warned_of(bench, caplog):
    """With the nearest neighbour of a test image being itself, any encoder scores 100 %."""
    assert bench.fitted and not caplog.records
    some = Part(bench.data.test, np.arange(5), "some")
    assert dataclasses.replace(bench, data=dataclasses.replace(bench.data, train=some)).fitted
    (said,) = caplog.messages
    assert said.startswith("bare on scenes: 5 of 16 test images have exactly the features of an")


@pytest.mark.parametrize("task", ["linear", "linear_resampled", "knn", "few_shot", "regression"])
def test_every_protocol_that_learns_from_features_warns_of_them(bench, monkeypatch, task):
    """The warning is made by `fitted`."""

    class Warned(Exception):
        pass

    def fitted(_):
        raise Warned

    monkeypatch.setattr(Bench, "fitted", property(fitted))
    with pytest.raises(Warned):
        PROTOCOLS[task].run(bench, PROTOCOLS[task].settings())


def test_what_serves_all_datasets_is_made_once_for_equal_arguments_alone(bench):
    made = []

    def make(spec, neutral, mesh):
        made.append((spec, neutral))
        return spec, mesh

    other = dataclasses.replace(SPEC, flip=1.0)
    first = bench.once(make, SPEC, np.zeros(2))
    of_another_dataset = dataclasses.replace(
        bench, data=dataclasses.replace(bench.data, name="other")
    )
    assert of_another_dataset.once(make, dataclasses.replace(SPEC), np.zeros(2)) is first
    assert first == (SPEC, bench.mesh)
    assert bench.once(make, other, np.zeros(2))[0] == other
    assert bench.once(make, SPEC, np.ones(2)) is not first
    assert bench.once(make, SPEC, np.zeros(3)) is not first
    assert len(made) == 4

    for given in (None, (np.zeros(2), "a"), (np.zeros(2), "b"), np.zeros(2, np.int32)):
        once, again = (bench.once(make, SPEC, given) for _ in range(2))
        assert once is again is not first
    assert len(made) == 8

    def make(mesh):  # of another file, by the same name
        return "another"

    assert bench.once(make) == "another"


def last_statement(module):
    last = ast.parse(Path(module.__file__).read_text()).body[-1]
    return ast.unparse(last).split("(")[0] if isinstance(last, ast.Assign) else ""


def test_a_file_of_a_protocol_ends_in_it_and_the_table_has_every_one():
    modules = [
        importlib.import_module(f"cassle_jax.evaluation.{each.name}")
        for each in pkgutil.iter_modules(evaluation.__path__)
    ]
    protocols = {id(m.PROTOCOL): m for m in modules if hasattr(m, "PROTOCOL")}
    assert {id(each) for each in PROTOCOLS.values()} == protocols.keys()
    assert all(name == each.name for name, each in PROTOCOLS.items())
    for module in protocols.values():
        assert last_statement(module) == "PROTOCOL = Protocol", module.__name__


def test_what_a_protocol_finds_bears_its_name(bench):
    _, of_protocols = checked_settings({})
    for name in ("knn", "neighbours", "factors", "spectrum", "equivariance"):
        findings = PROTOCOLS[name].run(bench, of_protocols[name])
        assert findings and {each.task for each in findings} == {name}
        assert {each.dataset for each in findings} == {"scenes"}


@pytest.mark.parametrize("names", [("knn", "scenes"), ("own", "motifs")])
def test_what_bears_the_name_of_another_is_refused(bench, names):
    own = Protocol("own", title="Own", run=lambda *_: [Score(*names, "accuracy", 0.5)])
    with pytest.raises(ValueError, match=f"of own on scenes has task='{names[0]}' .*{names[1]}"):
        own.measure(bench, SETTINGS)
    right = dataclasses.replace(own, run=lambda *_: [Score("own", "scenes", "accuracy", 0.5)])
    assert [each.value for each in right.measure(bench, SETTINGS)] == [0.5]


class Targets(Plain):
    """Two of the three numbers that make an image's colour are its targets."""

    @property
    def targets(self):
        return self._colours[:, :2].astype(np.float32)


@pytest.mark.parametrize(
    ("task", "kind", "metric", "read"),
    [
        ("linear_resampled", Plain, "accuracy", "accuracy"),
        ("regression", Targets, "r2", "R²"),
    ],
)
def test_what_the_features_are_made_of_is_read_from_them(bench, task, kind, metric, read):
    parts = (kind(*colours(24, 2, seed, spread=5)) for seed in range(3))
    of_task = "regression" if kind is Targets else "classification"
    data = EvaluationData("colours", *parts, 2 * (kind is Plain), metric, of_task)
    _, of_protocols = checked_settings({})
    findings = PROTOCOLS[task].run(dataclasses.replace(bench, data=data), of_protocols[task])
    first = findings[0]
    assert (first.task, first.dataset, first.metric) == (task, "colours", read)
    assert first.value == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "k-NN"}, r"name='k-NN' of a protocol is not one word"),
        ({"takes": ("images",)}, r"knn takes 'images'; use classification, "),
        ({"usual": ("often",)}, r"knn takes 'often'"),
    ],
)
def test_a_protocol_that_no_command_could_run_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PROTOCOLS["knn"], **wrong)
