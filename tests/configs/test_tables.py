"""Every table there is can be run: its rows are whole runs, and its tasks work at toy size."""

import dataclasses

import jax
import pytest

from cassle_jax.config import flat_settings
from cassle_jax.models import ENCODERS
from cassle_jax.parallel import device_mesh
from cassle_jax.report.files import JSON, read_report
from cassle_jax.sweep import worker
from cassle_jax.sweep.table import TABLES, find_table, planned, runs_of_table
from cassle_jax.sweep.worker import EXPORTED, RESULT, Job, pretrain_and_evaluate
from cassle_jax.tables import evaluation_of
from cassle_jax.training.run import build_run
from tests.everyday import everyday
from tests.tiny import TinyEncoder

NAMES = sorted(path.stem for path in TABLES.glob("*.py"))
TINY = (
    "encoder.name=tiny",
    "encoder.width=24",
    "encoder.small_images=False",
    "conditioning.depth=2",
    "steps=2",
)
# As `cropped_only`: views that compile in half the time, where no task changes anything else.
CROPPED = ("augment.jitter=0.0", "augment.grayscale=0.0", "augment.blur=0.0")
OF_AUGMENTATIONS = {"invariance", "matching"}
# The tasks of tables that suit scenes.
FOR_SCENES = {"few_shot", "invariance", "knn", "linear", "matching", "spectrum"}


def tasks_by_table():
    """Per table, the tasks that no table with fewer tasks has."""
    own, seen = {}, set()
    for name in sorted(NAMES, key=lambda name: len(find_table(name).tasks)):
        tasks = set(find_table(name).tasks) & FOR_SCENES
        own[name] = tuple(sorted(tasks - seen))
        seen |= tasks
    return own


OWN_TASKS = tasks_by_table()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_a_run(name):
    mesh, table = device_mesh(), find_table(name)
    for run in runs_of_table(table, seeds=(0,)):
        build_run(planned(run, 100_000).config, mesh, 100_000)
    for run in runs_of_table(table, seeds=(0,), toy=True):
        build_run(planned(run, 64).config, mesh, 64)
        assert flat_settings(run.config)["data.source"] == "scenes"


@pytest.mark.parametrize("name", everyday([name for name in NAMES if OWN_TASKS[name]], "few_shot"))
def test_a_row_of_it_runs_at_toy_size(name, tmp_path, monkeypatch):
    tasks = OWN_TASKS[name]
    exports = []
    monkeypatch.setitem(ENCODERS, "tiny", TinyEncoder)
    monkeypatch.setattr(worker, "export_command", lambda **settings: exports.append(settings))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # the process is not its own
    table = dataclasses.replace(find_table(name), tasks=tasks)
    overrides = (*TINY, "compilation_cache=")
    if not OF_AUGMENTATIONS & set(tasks):
        overrides += CROPPED
    run = planned(
        runs_of_table(table, seeds=(0,), rows=("CASSLE",), toy=True, overrides=overrides)[-1], 64
    )
    evaluation = evaluation_of(table, toy=True, options=("batch=32",))  # 256 would be padding
    job = Job(run.subject, run.arguments, tmp_path, evaluation, False, table.export)
    pretrain_and_evaluate(job)
    (findings,) = read_report(tmp_path / RESULT / JSON)[0][run.subject]
    assert set(tasks) <= {finding.task for finding in findings}
    wanted = {"run": str(tmp_path), "to": str(tmp_path / EXPORTED), "formats": table.export}
    assert exports == ([wanted] if table.export else [])
