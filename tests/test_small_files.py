"""Small files that are damaged, or out of reach for now, cost no results and no traceback."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from etils import epath
from safetensors.numpy import save_file

from cassle_jax import evaluate, faults, quickstart
from cassle_jax.checks import ConfigError, UserError
from cassle_jax.command import EXIT_OUTAGE, EXIT_WRONG_SETTING, code_of
from cassle_jax.config_files import find_config, find_file
from cassle_jax.data import DamagedLog
from cassle_jax.data.sources import read_class_list
from cassle_jax.evaluation.findings import Score
from cassle_jax.export import export_command
from cassle_jax.interop.weights import load_weights
from cassle_jax.lock import await_turn, folder_held
from cassle_jax.prepare.shards import written_shard
from cassle_jax.report.files import JSON, read_report, write_report
from cassle_jax.report.growing_report import GrowingReport
from cassle_jax.storage import (
    GrowingFile,
    check_writable,
    kept_json,
    make_shared,
    open_shared,
    read_whole,
    share,
    write_whole,
)
from cassle_jax.subjects import open_subject
from cassle_jax.sweep import experiment, worker
from cassle_jax.sweep.budget import measured_in, read_plan
from cassle_jax.sweep.evaluation import Evaluation, evaluation_of
from cassle_jax.sweep.jobs import JOB_LOCK, OUTCOME, outcome_of, write_outcome
from cassle_jax.sweep.records import FINISHED, MISSING, RunRecord, workdir_of
from cassle_jax.sweep.space import SweepRequest, runs_of
from cassle_jax.sweep.sweep import _RunLines, sweep
from cassle_jax.sweep.table import Row, Table, runs_of_table
from cassle_jax.sweep.worker import RESULT
from cassle_jax.training.findings import pretraining_findings
from cassle_jax.training.metrics import JsonLines, append_line, read_metrics
from cassle_jax.training.saved_config import changes, holds_run, read_config, write_config
from cassle_jax.training.start_records import last_start_record
from cassle_jax.training.workdir import written
from tests.interop.states import encoder_state
from tests.tiny import tiny_config

CONFIG = str(Path(__file__).parents[1] / "configs" / "quickstart.py")
DAMAGED = ("", "[]", "null", "3", '"text"', '{"exit', "{}", "\0\0\0", "[" * 100_000)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Faults are given half a second, not minutes."""
    monkeypatch.setenv(faults.SECONDS, "0.5")
    monkeypatch.setattr(faults, "_FIRST_PAUSE", 0.02)


def failing(monkeypatch, owner, name, code, times):
    """Lets the first calls of a function fail, and returns those that failed."""
    function, failed = getattr(owner, name), []

    def fail(*arguments, **settings):
        if len(failed) < times:
            failed.append(arguments)
            raise OSError(code, os.strerror(code))
        return function(*arguments, **settings)

    monkeypatch.setattr(owner, name, fail)
    return failed


# --- damaged


OF_OTHER_TYPES = (
    '{"exit_code": "x", "last_line": ""}',
    '{"exit_code": null, "last_line": ""}',
    '{"minutes": "x", "steps": 3, "seconds": {}, "overhead": 1.0}',
    '{"minutes": 3.0, "steps": [], "seconds": {}, "overhead": 1.0}',
    '{"minutes": 3.0, "steps": 0, "seconds": {}, "overhead": 1.0}',
    '{"minutes": 3.0, "steps": 3, "seconds": {"a": "x"}, "overhead": 1.0}',
    '{"minutes": 3.0, "steps": 3, "seconds": {"a": NaN}, "overhead": 1.0}',
    '{"minutes": Infinity, "steps": 3, "seconds": {}, "overhead": 1.0}',
    f'{{"minutes": 3.0, "steps": {10**400}, "seconds": {{}}, "overhead": 1.0}}',
)


@pytest.mark.parametrize("content", [*DAMAGED, *OF_OTHER_TYPES])
def test_a_damaged_outcome_or_plan_counts_as_missing(tmp_path, content):
    for name in (OUTCOME, "plan.json"):
        (tmp_path / name).write_text(content)
    assert RunRecord(tmp_path).exit_code is None
    assert read_plan(tmp_path, 0.0) is None
    assert RunRecord(tmp_path / "none").state == MISSING


@pytest.mark.parametrize(
    "outcome",
    [
        *OF_OTHER_TYPES[:2],
        '{"exit_code": 0, "last_line": ""}',
        '{"exit_code": 0, "last_line": "", "seconds": "x"}',
        '{"exit_code": 0, "last_line": "", "seconds": NaN}',
        f'{{"exit_code": 0, "last_line": "", "seconds": {10**400}}}',
        '{"exit_code": 0, "last_line": "", "seconds": 0}',
    ],
)
def test_a_measurement_whose_files_are_damaged_is_none(tmp_path, outcome):
    line = '{"step": 40, "images_per_second": 12.5}'
    (tmp_path / "metrics.jsonl").write_text(line)
    (tmp_path / OUTCOME).write_text(outcome)
    assert measured_in(tmp_path) is None
    (tmp_path / OUTCOME).write_text('{"exit_code": 0, "last_line": "", "seconds": 3}')
    assert measured_in(tmp_path) == (12.5, 3.0)
    for damaged in ("", line.replace("12.5", "0.0"), line.replace("12.5", '"x"')):
        (tmp_path / "metrics.jsonl").write_text(damaged)
        assert measured_in(tmp_path) is None


@pytest.mark.parametrize("wrong", [None, "x", 3, -1.5, [], [3], {"a": 3}, True])
def test_a_fact_of_a_start_that_has_another_type_counts_as_not_recorded(tmp_path, caplog, wrong):
    whole = {"images": 64, "names": "f0", "devices": "1 × cpu", "versions": {"jax": "0.10"}}
    for name, value in whole.items():
        start = {"step": 0, **whole, name: wrong, "heads": {}}
        (tmp_path / "starts.jsonl").write_text(json.dumps(start))
        kept = {"step": 0, **whole, "heads": {}}
        if type(wrong) is not type(value) or wrong == {"a": 3}:
            del kept[name]
        caplog.clear()
        found = last_start_record(tmp_path, 5)
        said = f"damaged facts of the start at step 0 count as not recorded: {name}"
        assert (said in caplog.text) == (name not in kept and wrong is not None)
        assert found == kept | ({name: wrong} if name in kept else {})


@pytest.mark.parametrize("unreadable", ["3", "[3]", '[["a"]]', '[["a", 3]]'])
def test_a_shard_whose_note_has_other_types_counts_as_missing(tmp_path, unreadable):
    shard = tmp_path / "mine-train.array_record-00000-of-00001"
    shard.touch()
    note = tmp_path / f".{shard.name}.written.json"
    rest = '"records": 1, "size": 2, "content": "of images", "file_size": 0'
    note.write_text(f'{{{rest}, "unreadable": {unreadable}}}')
    assert written_shard(shard) is None
    note.write_text(f'{{{rest}, "unreadable": [["a", "torn"]]}}')
    assert written_shard(shard) == (1, 2, [("a", "torn")], "of images", 0)


@pytest.mark.parametrize("content", [each for each in DAMAGED if each != "{}"])
def test_damaged_settings_or_results_are_named_in_one_line(tmp_path, content):
    for name, read in (("config.json", read_config), (JSON, lambda path: read_report(path / JSON))):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match="is damaged") as raised:
            read(tmp_path)
        assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)


def test_settings_of_no_configuration_are_named_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"data.name": "cifar10"}')
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/config.json is damaged: .* dots"):
        read_config(tmp_path)


def test_damaged_lines_of_metrics_are_left_out(tmp_path):
    path, whole = tmp_path / "metrics.jsonl", '{"step": 1, "loss": 2.0}\n'
    wrong = '{"step": 1, "loss": "x", "a": {}, "b": null}\n{"step": "x", "loss": 1.0}\n'
    path.write_text("\n".join([*DAMAGED, wrong, whole]))
    assert read_metrics(tmp_path) == {"loss": [(1, 2.0)]}
    JsonLines(epath.Path(path), 1).close()  # as a run that continues
    assert read_metrics(tmp_path) == {"loss": [(1, 2.0)]}


def test_whole_numbers_that_no_float_holds_end_no_page(tmp_path):
    huge = 10**400
    lines = [{"step": huge, "loss": 1.0}, {"step": 1, "loss": huge}, {"step": 2, "loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    findings = pretraining_findings(tiny_config(), tmp_path)
    assert write_report(tmp_path, {"a": [findings]}, provenance={}).exists()
    ((step, first), last) = read_metrics(tmp_path)["loss"]
    assert (step, first, last) == (1, float("inf"), (2, 3.0))


@pytest.mark.parametrize(
    ("source", "dataset"), [("tfds", "cifar10"), ("folder", "flowers"), ("scenes", "scenes")]
)
def test_metrics_bear_the_name_of_the_images_that_were_read(tmp_path, source, dataset):
    config = tiny_config()
    config.data.update({"source": source, "name": "cifar10", "path": "/data/flowers/"})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}')
    (loss,) = pretraining_findings(config, tmp_path)
    assert (loss.dataset, loss.value) == (dataset, 2.0)


def test_a_sweep_shows_a_finished_run_whose_metrics_are_gone(tmp_path):
    (run,) = runs_of(SweepRequest(CONFIG, grid="seed=0"))
    workdir = workdir_of(tmp_path, run.name)
    workdir.mkdir(parents=True)
    write_config(run.config, workdir)
    write_outcome(workdir, 0, "")
    lines = _RunLines(tmp_path, [run])
    lines._write()
    (line,) = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert (line["state"], line["result"]) == (FINISHED, {"steps": 0})


def test_damaged_lines_of_a_sweep_are_left_out(tmp_path):
    runs = runs_of(SweepRequest(CONFIG, grid="seed=0"))
    earlier = '{"run": "another"}'
    (tmp_path / "runs.jsonl").write_text(f'{earlier}\n[]\n{{"x": 1}}\n{{"run": "half')
    _RunLines(tmp_path, runs)._write()
    lines = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert [each["run"] for each in lines] == ["another", runs[0].name]


def finished(folder, table):
    """The only run of a table, as if it had finished and been evaluated."""
    (run,) = runs_of_table(table)
    workdir = workdir_of(folder, run.name)
    workdir.mkdir(parents=True)
    write_config(run.config, workdir)
    write_outcome(workdir, 0, "", seconds=3.0)
    write_report(workdir / RESULT, {run.subject: [[Score("knn", "scenes", "accuracy", 0.5)]]})
    return run, workdir / RESULT / JSON


def test_a_tables_page_reads_every_evaluation_once(tmp_path, monkeypatch):
    row = Row("a", f"{CONFIG}:method=simclr", ("steps=1",))
    table = Table("A", "?", (row,), seeds=(0,), datasets=("scenes",), tasks=("knn",))
    _, report = finished(tmp_path, table)
    results = experiment._Results(tmp_path, table, evaluation_of(table))
    read, os_open = [], os.open
    monkeypatch.setattr(os, "open", lambda *to: (read.append(str(to[0])), os_open(*to))[1])
    assert "0.500" in results.write_page().read_text()
    assert read.count(str(report)) == 1


def test_a_run_whose_evaluation_is_damaged_is_done_again(tmp_path):
    row = Row("a", f"{CONFIG}:method=simclr", ("steps=1",))
    table = Table("A", "?", (row,), seeds=(0,), datasets=("scenes",), tasks=("knn",))
    run, report = finished(tmp_path, table)
    results = experiment._Results(tmp_path, table, evaluation_of(table))
    assert not results.lacks(run)
    assert results.write_page().exists()
    for content in (report.read_text()[:200], *DAMAGED):
        report.write_text(content)
        assert results.lacks(run)
        assert results.write_page() is None  # as for a run that has not finished
    report.unlink()
    assert results.lacks(run)


def a_socket(path):
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)  # a whole path may be too long


@pytest.mark.parametrize("kind", [os.mkfifo, a_socket])
@pytest.mark.parametrize(
    "read",
    [
        lambda pipe: read_config(pipe.parent),
        lambda pipe: read_metrics(pipe.parent),
        lambda pipe: kept_json(pipe),
        lambda pipe: read_report(pipe),
        lambda pipe: load_weights(pipe),
        lambda pipe: read_class_list(str(pipe)),
        lambda pipe: find_file("table", str(pipe)),
        lambda pipe: find_config(f"{pipe}:method=simclr"),
    ],
)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, read, kind):
    for name in ("config.json", "metrics.jsonl"):
        kind(tmp_path / name)
    with pytest.raises(OSError, match="a pipe or a device"):
        open_shared(tmp_path / "metrics.jsonl", os.O_WRONLY)
    with pytest.raises((OSError, UserError), match="a pipe or a device") as raised:
        read(tmp_path / "config.json")
    assert code_of(raised.value) == EXIT_WRONG_SETTING


@pytest.mark.parametrize("name", ["log.txt", "job.lock", "metrics.jsonl"])
def test_users_who_may_write_to_the_folder_may_write_to_its_files(tmp_path, name):
    tmp_path.chmod(0o775)
    previous = os.umask(0o022)
    try:
        if name == "metrics.jsonl":
            GrowingFile(epath.Path(tmp_path / name)).append(b"{}\n")
        else:
            os.close(open_shared(tmp_path / name, os.O_WRONLY))
    finally:
        os.umask(previous)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o664


def test_a_file_is_waited_for_whose_server_or_reader_has_a_lease_on_it(tmp_path):
    (file := tmp_path / "config.json").write_text("{}")
    leased = os.open(file, os.O_RDWR)
    requested = threading.Event()
    previous = signal.signal(signal.SIGIO, lambda *_: requested.set())

    def give_up():
        requested.wait(60)
        time.sleep(0.2)
        os.close(leased)

    giving = threading.Thread(target=give_up)
    try:
        try:
            fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            pytest.skip(f"no leases here: {error}")
        giving.start()
        assert read_whole(file) == b"{}"
        assert requested.is_set()
    finally:
        requested.set()
        signal.signal(signal.SIGIO, previous)
    giving.join()


# --- out of reach for now, and for good


def test_what_evaluations_and_exports_read_is_waited_for(tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    save_file(encoder_state("resnet18"), file)
    torch = tmp_path / "weights.pth"
    torch.write_bytes(b"")
    failed = failing(monkeypatch, os, "open", errno.EIO, 1)
    with pytest.raises(ValueError, match="damaged or no PyTorch file"):
        load_weights(torch)
    assert len(failed) == 1
    for name, read in (
        ("config.json", read_config),
        ("metrics.jsonl", read_metrics),
        (OUTCOME, outcome_of),
    ):
        (tmp_path / name).write_text('{"step": 1, "loss": 2.0, "exit_code": 0, "last_line": ""}')
        failed = failing(monkeypatch, os, "open", errno.ESTALE, 1)
        assert read(tmp_path)
        assert len(failed) == 1


def test_an_export_waits_for_room(tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    save_file(encoder_state("resnet18"), file)
    failed = failing(monkeypatch, type(epath.Path(tmp_path)), "write_bytes", errno.ENOSPC, 3)
    export_command(weights=str(file), to=str(tmp_path / "out"), formats=["cassle"])
    assert len(failed) == 3
    assert {each.name for each in (tmp_path / "out").iterdir()} == {
        "cassle.safetensors",
        "model_card.json",
        "model_card.md",
    }


def test_the_page_of_an_evaluation_waits_for_room(tmp_path, monkeypatch):
    report = GrowingReport(tmp_path, "", {"a": {}})
    report.begin("a")
    report.add([Score("knn", "scenes", "accuracy", 0.5)])
    (tmp_path / JSON).unlink()
    failed = failing(monkeypatch, GrowingReport, "write", errno.ENOSPC, 2)
    assert evaluate._written(report, complete=True).exists() and (tmp_path / JSON).exists()
    assert len(failed) == 2
    failing(monkeypatch, GrowingReport, "write", errno.ENOSPC, 10**6)
    said = rf"^to={tmp_path}: No space left on device, for 0\.5 s; the same command"
    with pytest.raises(faults.Outage, match=said) as ended:
        evaluate._written(report, complete=True)
    assert code_of(ended.value) == EXIT_OUTAGE


def test_a_full_disk_is_named_by_sweeps_and_tables(tmp_path, monkeypatch):
    failed = failing(monkeypatch, type(epath.Path(tmp_path)), "write_bytes", errno.ENOSPC, 2)
    write_outcome(tmp_path, 0, "")
    assert len(failed) == 2 and RunRecord(tmp_path).exit_code == 0
    failing(monkeypatch, type(epath.Path(tmp_path)), "write_bytes", errno.ENOSPC, 10**6)
    with pytest.raises(faults.Outage, match=r"outcome\.json: No space left on device, for 0\.5 s"):
        write_outcome(tmp_path, 0, "")


def test_a_folder_that_takes_no_files_is_named_by_sweeps_and_tables(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    table = Table("A", "?", (Row("a", f"{CONFIG}:method=simclr"),))
    for run in (
        lambda: sweep(SweepRequest(CONFIG, grid="seed=0"), file),
        lambda: experiment.run_table(table, file),
    ):
        with pytest.raises(ConfigError, match=r"to=.*file is not a folder: .*is a file") as refused:
            run()
        assert code_of(refused.value) == EXIT_WRONG_SETTING


def out_of_reach(monkeypatch, times, *names):
    """Lets the first looks at the files of these names fail with ESTALE."""
    look, failed = os.stat, []

    def stat(path, *arguments, **settings):
        known = isinstance(path, (str, os.PathLike)) and Path(path).name in names
        if known and len(failed) < times:
            failed.append(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return look(path, *arguments, **settings)

    monkeypatch.setattr(os, "stat", stat)
    return failed


def test_records_out_of_reach_are_not_taken_for_missing_and_begun_anew(tmp_path, monkeypatch):
    """A path's own `exists` says that they are missing."""
    workdir = epath.Path(tmp_path)
    lines = b'{"step": 1, "loss": 2.0}\n'
    for name in ("metrics.jsonl", "starts.jsonl", "damaged-00000.txt"):
        (tmp_path / name).write_bytes(lines)
    failed = [out_of_reach(monkeypatch, 1, "metrics.jsonl")]
    written(workdir, lambda: JsonLines(workdir / "metrics.jsonl", 1)).close()
    failed.append(out_of_reach(monkeypatch, 1, "starts.jsonl"))
    append_line(workdir / "starts.jsonl", {"step": 3})
    failed.append(out_of_reach(monkeypatch, 1, "damaged-00000.txt"))
    log = written(workdir, lambda: DamagedLog(9, 1.0, tmp_path))
    log.add("b", "why")
    assert list(map(len, failed)) == [1, 1, 1]
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines
    assert (tmp_path / "starts.jsonl").read_bytes() == lines + b'{"step": 3}\n'
    assert (tmp_path / "damaged-00000.txt").read_bytes() == lines + b"b\twhy\n"


def test_a_run_out_of_reach_is_not_taken_for_missing(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    config = runs_of(SweepRequest(CONFIG, grid="seed=0"))[0].config
    write_config(config, tmp_path)
    for name in (tmp_path.name, "config.json"):
        with monkeypatch.context() as patch:
            failed = out_of_reach(patch, 2, name)
            with pytest.raises(ConfigError, match="none of them can be read"):
                open_subject(tmp_path)
            assert failed
    out_of_reach(monkeypatch, 1, "config.json")
    with pytest.raises(OSError, match="Stale"):
        holds_run(epath.Path(tmp_path))
    assert holds_run(epath.Path(tmp_path))


def test_settings_of_a_newer_version_are_said_to_be_unknown():
    config = runs_of(SweepRequest(CONFIG, grid="seed=0"))[0].config
    newer = config.copy_and_resolve_references()
    with newer.unlocked():
        newer.encoder.shiny = "yes"
    assert changes(newer, config) == {
        "encoder.shiny": "encoder.shiny, which is unknown here, was 'yes'"
    }


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: make_shared(folder),
        lambda folder: check_writable("to", folder),
        lambda folder: write_report(folder, {"a": [[Score("knn", "x", "accuracy", 0.5)]]}),
        lambda folder: GrowingFile(epath.Path(folder / "lines")).append(b"1"),
    ],
)
def test_no_folder_takes_the_place_of_a_file_system_that_is_gone(tmp_path, monkeypatch, write):
    mounts = {"/", str(tmp_path / "mount")}
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) in mounts)
    folder = tmp_path / "mount" / "deep" / "er"
    write(folder)
    shutil.rmtree(tmp_path / "mount" / "deep")
    write(folder)  # deleted, and made again
    mounts.remove(str(tmp_path / "mount"))
    for vanished in ("deep", ""):
        shutil.rmtree(tmp_path / "mount" / vanished)
        with contextlib.suppress(OSError, faults.Outage):
            write(folder)
        assert not folder.exists() and not (tmp_path / "mount" / "deep").exists()
    mounts.add(str(tmp_path / "mount"))
    write(folder)


# --- files that a command may write no longer


def test_a_file_that_grows_no_further_is_named_in_one_line(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/page'") as raised:
            write_whole(tmp_path / "page", bytes(20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code_of(raised.value) == EXIT_WRONG_SETTING
    assert not list(tmp_path.iterdir())


def test_a_growing_file_that_is_deleted_meanwhile_has_every_record_from_then_on(tmp_path):
    file = GrowingFile(epath.Path(tmp_path / "inside" / "lines"), b"")
    for number in range(3):
        file.append(b"%d\n" % number)
    shutil.rmtree(tmp_path / "inside")
    file.append(b"3\n")
    file.append(b"4\n")
    assert (tmp_path / "inside" / "lines").read_bytes() == b"3\n4\n"


@pytest.mark.exhaustive
def test_a_folder_too_deep_for_sockets_is_named_in_one_line(tmp_path):
    deep = tmp_path / ("a" * 100)
    deep.mkdir()
    program = f"""
import tempfile
from pathlib import Path
from cassle_jax.checks import ConfigError
from cassle_jax.sweep.evaluation import Evaluation
from cassle_jax.sweep.pool import WorkerPool
from cassle_jax.sweep.worker import Job
try:
    WorkerPool(1).run([Job("a", (), Path({str(tmp_path / "run")!r}), Evaluation(), False)], print)
except ConfigError as error:
    assert {str(deep)!r} in str(error), error
"""
    environment = {**os.environ, "TMPDIR": str(deep)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)


def test_the_quickstarts_page_waits_for_room(tmp_path, monkeypatch):
    for name in ("pretrain_command", "factor_scores", "write_results"):
        monkeypatch.setattr(quickstart, name, lambda *_: {})
    failed = failing(monkeypatch, quickstart, "write_whole", errno.ENOSPC, 2)
    monkeypatch.setattr(quickstart, "group_means", lambda *_: {})
    quickstart.quickstart("simclr", tmp_path)
    assert len(failed) == 2 and (tmp_path / "quickstart.json").exists()


def test_the_page_of_a_table_waits_for_room(tmp_path, monkeypatch):
    row = Row("a", f"{CONFIG}:method=simclr", ("steps=1",))
    table = Table("A", "?", (row,), seeds=(0,), datasets=("scenes",), tasks=("knn",))
    finished(tmp_path, table)
    results = experiment._Results(tmp_path, table, evaluation_of(table))
    monkeypatch.setenv(faults.SECONDS, "60")  # it needs two pauses, however busy the machine is
    failed = failing(monkeypatch, experiment, "write_results", errno.ENOSPC, 2)
    assert results.write_page().exists() and len(failed) == 2


# --- two commands in one folder


def test_a_second_command_is_refused_the_folder_of_the_first(tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file(encoder_state("resnet18"), weights)
    evaluated = {"runs": [str(weights)], "datasets": ["scenes"], "tasks": ["knn"], "size": 16}
    table = Table("A", "?", (Row("a", f"{CONFIG}:method=simclr"),))
    with folder_held(tmp_path):
        for name, run in (
            ("table", lambda: experiment.run_table(table, tmp_path)),
            ("sweep", lambda: sweep(SweepRequest(CONFIG, grid="seed=0"), tmp_path)),
            ("evaluation", lambda: evaluate.evaluate_command(to=str(tmp_path), **evaluated)),
        ):
            with pytest.raises(ConfigError, match=rf"in use by another {name} \(process \d+ on"):
                run()
    assert {each.name for each in tmp_path.iterdir()} == {"lock", weights.name}


def _worked(job):
    worker.pretrain_and_evaluate = lambda job: (job.workdir / "ran").touch()
    worker.work(job, {})


def test_the_worker_of_a_table_waits_for_that_of_a_killed_one(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    job = worker.Job("a", (), tmp_path, Evaluation(), keep_weights=False)
    process = multiprocessing.get_context("spawn").Process(target=_worked, args=(job,))
    with (tmp_path / JOB_LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process.start()
        until = time.monotonic() + 60
        while not (tmp_path / "log.txt").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        process.join(1)
        assert process.is_alive() and not (tmp_path / "ran").exists()
    process.join()
    assert process.exitcode == 0 and (tmp_path / "ran").exists()
    assert RunRecord(tmp_path).state == FINISHED and not (tmp_path / "checkpoints").exists()


@pytest.mark.exhaustive
def test_what_a_worker_has_recorded_as_done_is_not_done_again(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    write_outcome(tmp_path, 0, "", seconds=7.0)
    job = worker.Job("a", (), tmp_path, Evaluation(), keep_weights=False)
    process = multiprocessing.get_context("spawn").Process(target=_worked, args=(job,))
    process.start()
    process.join(120)
    assert process.exitcode == 0 and not (tmp_path / "ran").exists()
    assert outcome_of(tmp_path)["seconds"] == 7 and not (tmp_path / "checkpoints").exists()


def test_files_that_cannot_be_locked_are_used_all_the_same(tmp_path, monkeypatch):
    with (tmp_path / JOB_LOCK).open("w") as file:
        failing(monkeypatch, fcntl, "flock", errno.ENOSYS, 1)
        await_turn(file)


def test_what_a_link_leads_to_keeps_its_modes(tmp_path):
    (secret := tmp_path / "secret").write_text("mine")
    secret.chmod(0o600)
    (shared := tmp_path / "shared").mkdir()
    shared.chmod(0o777)
    (inside := shared / "inside").mkdir()
    for folder in (shared, inside):
        (folder / "link").symlink_to(secret)
    share(inside)
    share(shared / "link")
    (outside := tmp_path / "outside").mkdir(mode=0o700)
    (outside / "secret").symlink_to(secret)
    (file := outside / "file").touch(0o600)
    (shared / "folder").symlink_to(outside)
    share(shared / "folder")
    assert [each.stat().st_mode & 0o777 for each in (outside, file)] == [0o700, 0o600]
    assert secret.stat().st_mode & 0o777 == 0o600
    assert inside.stat().st_mode & 0o777 == 0o777
