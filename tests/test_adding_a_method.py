"""The documented example of a method: short, right, and trained by the command like any other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cassle_jax.evaluate import evaluate_command
from cassle_jax.evaluation.projection import has_projector
from cassle_jax.export import export_command
from cassle_jax.methods import METHODS, Encoded, Moment, Progress, Step
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, device_mesh, parallel
from cassle_jax.report.files import read_report
from cassle_jax.subjects import open_subject
from cassle_jax.training.metrics import read_metrics
from tests.tiny import on_one_device

ROOT = Path(__file__).parents[1]
OVERRIDES = {
    "data.source": "scenes",
    "data.scenes": 64,
    "data.canvas": 16,
    "augment.size": 16,
    "encoder.width": 2,
    "conditioning.depth": 2,
    "conditioning.width": 8,
    # Views that are but cropped and flipped compile in half the time.
    **dict.fromkeys(["augment.jitter", "augment.grayscale", "augment.blur"], 0.0),
    "batch_size": 16,
    "steps": 8,
    "log.every_steps": 4,
    "probe.every_epochs": 0,
    "compilation_cache": "",
}


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    page = (ROOT / "docs" / "adding_a_method.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    path = tmp_path_factory.mktemp("example") / "align_uniform.py"
    path.write_text(code)
    return path


@pytest.fixture
def method(example):
    before = dict(METHODS)
    exec(compile(example.read_text(), example, "exec"), {"__name__": "align_uniform"})
    yield METHODS["align_uniform"](uniformity_weight=2.0)
    METHODS.clear()
    METHODS.update(before)


def test_it_is_under_sixty_lines(example):
    assert len(example.read_text().splitlines()) < 60


def test_its_loss_is_the_papers_on_any_number_of_devices(method):
    draw = np.random.default_rng(0)
    first, second = (jnp.asarray(draw.normal(size=(8, 5)), jnp.float32) for _ in range(2))

    def loss(first, second, axis_name):
        views = {0: Encoded(first, first), 1: Encoded(second, second)}
        terms, metrics = method.loss(Step(views, {}, {}, Progress(0, 0.0, 1.0), axis_name), None)
        logged = {**terms, **metrics}
        return logged if axis_name is None else jax.lax.pmean(logged, axis_name)

    one = loss(first, second, None)
    x, y = (
        np.asarray(rows) / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (first, second)
    )
    np.testing.assert_allclose(one["alignment"], np.mean(np.sum((x - y) ** 2, 1)), rtol=1e-5)

    def spread(rows):
        squared = np.sum((rows[:, None] - rows) ** 2, axis=-1)
        return np.log(np.mean(np.exp(-2 * squared[~np.eye(8, dtype=bool)])))

    np.testing.assert_allclose(one["uniformity"], spread(x) + spread(y), rtol=1e-5)
    np.testing.assert_allclose(one["norm"], np.linalg.norm(first, axis=1).mean(), rtol=1e-5)
    four = parallel(
        lambda *rows: loss(*rows, AXIS),
        device_mesh(jax.devices()[:4]),
        inputs=(SHARDED, SHARDED),
        outputs=REPLICATED,
    )(first, second)
    for term, value in one.items():
        np.testing.assert_allclose(four[term], value, rtol=1e-5)


@pytest.fixture(scope="module")
def workdir(example, tmp_path_factory):
    """What the command leaves; this process has never heard of the method."""
    workdir = tmp_path_factory.mktemp("align_uniform")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "cassle_jax.pretrain",
            f"--config={example}",
            f"--workdir={workdir}",
            *(f"--config.{name}={value}" for name, value in OVERRIDES.items()),
        ],
        cwd=ROOT,
        env=on_one_device(os.environ),
        check=True,
        timeout=600,
    )
    return workdir


@pytest.mark.exhaustive
def test_the_command_trains_it_with_cassle(workdir):
    metrics = read_metrics(workdir)
    losses, terms = metrics["loss"], (metrics["loss_alignment"], metrics["loss_uniformity"])
    assert len(losses) == 2
    assert [step for step, norm in metrics["method_norm"] if norm > 0] == [4, 8]
    for (step, loss), *parts in zip(losses, *terms, strict=True):
        assert step in (4, 8)
        np.testing.assert_allclose(loss, sum(value for _, value in parts), rtol=1e-5)


@pytest.mark.exhaustive
def test_it_is_exported_and_evaluated_where_nobody_registers_it(workdir, tmp_path):
    assert "align_uniform" not in METHODS
    subject = open_subject(workdir)
    assert has_projector(subject.variables)
    assert (
        subject.variables["params"]["projector"]["projector"]["linear_1"]["kernel"].shape[1] == 128
    )
    export_command(run=str(workdir), to=str(tmp_path / "exported"))
    exported = open_subject(tmp_path / "exported" / "cassle.safetensors")
    jax.tree.map(np.testing.assert_array_equal, exported.variables, subject.variables)
    assert exported.views == subject.views
    evaluate_command(
        runs=[f"mine={workdir}"],
        datasets=["scenes"],
        to=str(tmp_path / "report"),
        tasks=["knn"],
        limit=64,
        batch=32,
        cache="",
    )
    ((findings,),) = read_report(tmp_path / "report" / "report.json")[0].values()
    assert all(0 <= finding.value <= 1 for finding in findings)


def test_methods_written_with_the_former_names_still_work():
    step = Step({}, {}, None, Moment(step=3, epoch=1.5, epochs=2.0))
    assert step.moment is step.progress and float(step.moment.whole_epoch) == 1.0
