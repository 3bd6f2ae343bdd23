"""The documented example of a protocol: one file and its line in the table, run by the command."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from cassle_jax.data.requested import open_evaluated
from cassle_jax.evaluation.bench import Bench
from cassle_jax.evaluation.store import FeatureStore
from cassle_jax.parallel import device_mesh
from cassle_jax.subjects import open_subject
from tests.changes import apply_change
from tests.test_evaluate import workdir_of
from tests.tiny import on_one_device

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_a_protocol.md").read_text()
IMAGES = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The package with the changes, and the run that the page's command evaluates."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "cassle_jax", folder / "cassle_jax")
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    (folder / "cassle_jax" / "evaluation" / "nearest_mean.py").write_text(code)
    change = re.search(r"```diff\n(.*?)```", PAGE, re.DOTALL)[1]
    apply_change(change, folder)
    (folder / "runs").mkdir()
    # What the command's process knows.
    workdir_of(folder / "runs" / "cassle", name="resnet18", width=2, small_images=True)
    return folder


def evaluated(folder, *further):
    """The page's command with further flags, in a process that has the changed package."""
    command = re.search(r"```sh\npython (.*?)\n```", PAGE, re.DOTALL)[1].split()
    names = {flag.split("=")[0] for flag in further}  # Each flag is given once.
    command = [word for word in command if word.split("=")[0] not in names]
    return subprocess.run(
        [sys.executable, *command, f"--limit={IMAGES}", "--batch=32", "--cache=", *further],
        cwd=folder,
        env=on_one_device({**os.environ, "PYTHONPATH": str(folder)}),
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.mark.exhaustive
def test_the_command_runs_it_and_its_name_is_in_the_csv(folder):
    ran = evaluated(folder, "--shrinkage=0")
    assert ran.returncode == 0, ran.stderr
    report = folder / "runs" / "evaluation"
    with (report / "report.csv").open() as file:
        ((task, metric, found),) = (
            (row["task"], row["metric"], float(row["value"])) for row in csv.DictReader(file)
        )
    assert (task, metric) == ("nearest_mean", "accuracy")
    page = (report / "report.html").read_text()
    assert "Nearest class mean" in page and "shrinkage 0.0" in page

    subject, mesh = open_subject(folder / "runs" / "cassle"), device_mesh(jax.devices()[:1])
    store = FeatureStore(subject, mesh, batch=32, limit=IMAGES)
    bench = Bench(subject, open_evaluated("scenes", ""), store)
    train, test = bench.train, bench.test
    classes = np.unique(train.labels)
    means = np.stack([train.features[train.labels == each].mean(axis=0) for each in classes])
    distances = np.linalg.norm(test.features[:, None] - means, axis=-1)
    assert found == pytest.approx(np.mean(classes[distances.argmin(axis=1)] == test.labels))


@pytest.mark.exhaustive
def test_its_flag_is_checked_before_anything_is_opened(folder):
    ran = evaluated(folder, "--shrinkage=-1", "--run=nowhere")
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1] == "error: shrinkage=-1.0 must be at least 0"
