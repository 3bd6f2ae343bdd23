"""What a run has left in its folder, for sweeps and tables alike."""

import json
import os

import pytest

from cassle_jax.checks import ConfigError
from cassle_jax.command import Stop
from cassle_jax.data import DataError, names_of, open_source
from cassle_jax.evaluation.findings import Score
from cassle_jax.parallel import device_mesh
from cassle_jax.report.files import JSON, write_report
from cassle_jax.sweep import records as records_module
from cassle_jax.sweep import sweep as sweep_module
from cassle_jax.sweep.jobs import OUTCOME, Local, write_outcome
from cassle_jax.sweep.records import RunRecord, check_finished
from cassle_jax.sweep.space import RunSpec
from cassle_jax.sweep.sweep import EvaluationOptions
from cassle_jax.training.saved_config import write_config
from cassle_jax.training.start_records import record_start
from tests.tiny import tiny_config


def ended(folder, code, line=""):
    folder.mkdir(exist_ok=True)
    write_outcome(folder, code, line)
    return RunRecord(folder)


@pytest.mark.parametrize(
    ("code", "state"), [(0, "finished"), (3, "diverged"), (1, "failed"), (69, "failed")]
)
def test_the_state_of_a_run_follows_its_exit_code(tmp_path, code, state):
    record = ended(tmp_path, code)
    assert (record.exit_code, record.state) == (code, state)


def test_a_folder_without_an_outcome_is_a_killed_run(tmp_path):
    missing, killed = RunRecord(tmp_path / "missing"), RunRecord(tmp_path)
    assert (missing.state, killed.state, killed.exit_code) == ("missing", "failed", None)
    assert killed.failure == f"{tmp_path.name}: the process was killed (see {tmp_path}/log.txt)"


def test_the_first_failure_is_reported(tmp_path):
    records = [
        ended(tmp_path / name, code, line)
        for name, code, line in (("a", 0, ""), ("b", 2, "error: steps=-1"), ("c", 1, "killed"))
    ]
    check_finished(records[:1])
    with pytest.raises(Stop, match=r"^2 of 3 runs failed; b: steps=-1 \(see ") as stopped:
        check_finished(records)
    assert stopped.value.code == 1


def test_a_run_with_other_settings_is_refused(tmp_path):
    config = tiny_config()
    write_config(config, tmp_path)
    RunRecord(tmp_path).check_same(config)
    config.steps += 1
    with pytest.raises(ConfigError, match=rf"holds a run with other .*steps={config.steps} was"):
        RunRecord(tmp_path).check_same(config)


def test_a_run_of_other_images_is_another_run_and_a_moved_folder_is_not(tmp_path):
    def config_of(folder, *files):
        config = tiny_config()
        config.data.source, config.data.path = "folder", str(tmp_path / folder)
        for file in files:
            path = tmp_path / folder / "train" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        return config

    config, record = config_of("mine", "a/1.png", "b/2.png"), RunRecord(tmp_path / "run")
    record.folder.mkdir()
    write_config(config, record.folder)
    source, mesh = open_source(config.data, "train"), device_mesh()
    record_start(record.folder, step=0, images=2, mesh=mesh, names=names_of(source))
    record.check_same(config_of("moved", "a/1.png", "b/2.png"))
    with pytest.raises(ConfigError, match=r"\(data\.path='.*other' has other images than '.*mine'"):
        record.check_same(config_of("other", "a/1.png", "b/3.png"))
    with pytest.raises(DataError, match=r"^data\.path='.*gone' is not a folder"):
        record.check_same(config_of("gone"))
    record.check_same(config)
    records_module._names_of.cache_clear()  # as in a later call
    with pytest.raises(ConfigError, match=r"\(its training images have changed since\)"):
        record.check_same(config_of("mine", "b/3.png"))
    records_module._names_of.cache_clear()
    (tmp_path / "mine").rename(tmp_path / "elsewhere")  # nothing to compare
    record.check_same(config)
    (record.folder / "starts.jsonl").unlink()  # as an older version
    record.check_same(config_of("other"))


@pytest.mark.parametrize("name", ["requested.json", "asked.json"])  # the latter by older versions
def test_an_evaluation_that_is_up_to_date_is_not_repeated(tmp_path, monkeypatch, name):
    def interrupted(*_):
        raise KeyboardInterrupt

    calls, run, folder = [], ended(tmp_path / "run", 0), tmp_path / "evaluation"
    os.utime(run.folder / OUTCOME, (0, 0))

    class Executor(Local):
        def __init__(self):
            pass

        def run(self, commands, on_end):
            calls.extend(commands)
            ended(commands[0].folder, 0)
            write_report(commands[0].folder, {"run": [[Score("knn", "scenes", "accuracy", 0.5)]]})

    def evaluate(*tasks):
        options = EvaluationOptions(("scenes",), tasks)
        spec = RunSpec("run", "a", {}, (), tiny_config())
        sweep_module._evaluate(options, {spec: run.folder}, folder, Executor())

    evaluate("knn")
    (folder / "requested.json").rename(folder / name)
    if name == "asked.json":
        (folder / name).write_text(json.dumps(calls[0].arguments))
    evaluate("knn")
    assert len(calls) == 1
    evaluate("linear")
    assert len(calls) == 2 and "--tasks=linear" in calls[1].arguments
    assert "--tasks=linear" in json.loads((folder / "requested.json").read_text())
    report = folder / JSON
    report.write_bytes(report.read_bytes()[:-20])
    evaluate("linear")
    assert len(calls) == 3
    os.utime(run.folder / OUTCOME, (-3600, -3600))  # it ended again, after the clock was set back
    evaluate("linear")
    evaluate("linear")
    assert len(calls) == 4
    monkeypatch.setattr(sweep_module, "write_surely", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate("knn")
    monkeypatch.undo()
    evaluate("linear")  # nothing says any more that the old report is whole
    assert len(calls) == 5
