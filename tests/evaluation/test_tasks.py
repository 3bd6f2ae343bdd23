import numpy as np
import pytest

from cassle_jax.data import Scenes
from cassle_jax.data.datasets import EvaluationData
from cassle_jax.evaluation.findings import Score
from cassle_jax.evaluation.store import FeatureStore
from cassle_jax.evaluation.subject import Subject
from cassle_jax.evaluation.tasks import TASKS, Bench, Settings
from cassle_jax.methods import Networks
from tests.evaluation.analysed import JITTERED, PIXELS, PLAIN, SPEC, Colour, devices


@pytest.fixture
def bench():
    """Of an encoder without a projector."""
    networks = Networks({"encoder": Colour})
    variables = {"params": {}, "batch_stats": {}}
    subject = Subject("bare", networks, variables, SPEC, PLAIN, (JITTERED, JITTERED))
    scenes = Scenes(16, size=PIXELS)
    data = EvaluationData("scenes", scenes, scenes, scenes, 2, "accuracy", "classification")
    store = FeatureStore(subject, devices(1), batch=8)
    return Bench(subject, data, store, devices(1), Settings(analysed=12))


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("invariance", {f"difference under {name}, features" for name in
                        ("crop", "flip", "jitter", "grayscale", "blur")}),
        ("matching", {f"{metric}, {of}" for metric in ("InfoNCE", "accuracy")
                      for of in ("features", "chance")}),
    ],
)  # fmt: skip
def test_an_encoder_without_a_projector_is_analysed_and_told_so(bench, caplog, task, metrics):
    assert TASKS[task].suits(bench.data, asked_for=False)
    with caplog.at_level("INFO", logger="cassle_jax"):
        findings = TASKS[task].run(bench)
    assert f"{task} of bare: no projector" in caplog.text
    assert {each.metric for each in findings if isinstance(each, Score)} == metrics


def test_analysed_images_are_in_an_order_that_is_always_the_same(bench):
    def labels():
        rows = [batch["label"][batch["mask"]] for batch in bench.analysed()]
        return np.concatenate(rows)

    first = labels()
    assert len(first) == 12
    np.testing.assert_array_equal(first, labels())
    in_order = [bench.data.test[place].label for place in range(12)]
    assert first.tolist() != in_order
