"""The processes of a table's runs: how each ends is recorded, and none is left behind."""

import errno
import os
import signal
import sys
import threading
import time
from multiprocessing import forkserver
from types import SimpleNamespace

import pytest

from cassle_jax.checks import ConfigError
from cassle_jax.command import EXIT_NOT_SAVED, EXIT_OUTAGE, EXIT_PREEMPTED, Stop
from cassle_jax.faults import Outage
from cassle_jax.sweep import experiment, pool, worker
from cassle_jax.sweep.evaluation import Evaluation
from cassle_jax.sweep.jobs import outcome_of, write_outcome
from cassle_jax.sweep.pool import WorkerPool
from cassle_jax.sweep.space import SweepRequest
from cassle_jax.sweep.sweep import sweep
from cassle_jax.sweep.table import Row, Table, runs_of_table
from cassle_jax.sweep.worker import Job

CONFIG = "configs/quickstart.py"
HANDLE = signal.signal


@pytest.fixture
def job(tmp_path):
    workdir = tmp_path / "runs" / "plain-0"
    workdir.mkdir(parents=True)
    return Job("plain", (f"--config={CONFIG}",), workdir, Evaluation(), True)


def wait_to_be_stopped(job, environment):
    """In the place of `work`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_PREEMPTED))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    (job.workdir / "new").write_text(str(os.getpid()))
    (job.workdir / "new").rename(job.workdir / "pid")
    time.sleep(100)


class Process:
    """Ends with a code after SIGTERM; without a code, only SIGKILL ends it."""

    def __init__(self, code=None):
        self.exitcode, self._code = None, code

    def is_alive(self):
        return self.exitcode is None

    def terminate(self):
        self.exitcode = self._code

    def kill(self):
        self.exitcode = -signal.SIGKILL

    def join(self, seconds=None):
        pass


@pytest.fixture
def make_pool(monkeypatch):
    """`make_pool(*codes)`: a pool whose processes end with these codes, one after the other."""
    monkeypatch.setattr(pool, "import_in_processes", lambda: None)

    def make(*codes, process=Process, seconds=0.0):
        found, left = WorkerPool(1, seconds), iter(codes)
        monkeypatch.setattr(found, "_start", lambda job, share: process())

        def ended(running):
            for each in [*running] if codes else []:
                each.exitcode = next(left)
                yield each, running.pop(each)

        monkeypatch.setattr(found, "_ended", ended)
        return found

    return make


def test_an_outage_starts_a_run_again_and_a_silent_end_is_recorded(make_pool, job, monkeypatch):
    monkeypatch.setenv("CASSLE_RESTART_SECONDS", "0")
    ended = []
    assert make_pool(EXIT_OUTAGE, EXIT_OUTAGE, -11).run([job], lambda *end: ended.append(end))
    assert ended == [(job, -11)]
    outcome = outcome_of(job.workdir)
    assert outcome["exit_code"] == -11
    assert outcome["last_line"] == "the process ended with signal 11"


@pytest.mark.parametrize("start", [lambda: WorkerPool(1), lambda: sweep(SweepRequest(""), "to")])
def test_a_pause_that_is_no_number_is_refused_before_the_first_run(monkeypatch, start):
    monkeypatch.setenv("CASSLE_RESTART_SECONDS", "soon")
    with pytest.raises(ConfigError, match=r"^CASSLE_RESTART_SECONDS='soon' is not a number"):
        start()


@pytest.mark.parametrize(
    ("code", "codes"), [(None, []), (EXIT_PREEMPTED, []), (3, [3]), (EXIT_NOT_SAVED, [74])]
)
def test_at_the_time_limit_runs_save_and_are_killed_where_they_do_not_end(
    make_pool, job, monkeypatch, caplog, code, codes
):
    monkeypatch.setattr(pool, "GRACE_SECONDS", 0.0)
    ended = []
    limited = make_pool(process=lambda: Process(code), seconds=0.05)
    assert not limited.run([job], lambda _, code: ended.append(code))
    assert ended == codes
    assert ("plain-0 did not end in time; killing it" in caplog.text) == (code is None)


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (EOFError(), Outage, "the process that starts the runs was killed; the same command"),
        (OSError("AF_UNIX path too long"), ConfigError, r"^TMPDIR=.* is too long"),
        (OSError(errno.EMFILE, "Too many open files"), OSError, "Too many open files"),
    ],
)
def test_a_process_that_cannot_be_started_says_why(job, monkeypatch, error, raised, said):
    def refused():
        raise error

    monkeypatch.setattr(pool, "import_in_processes", lambda: None)
    found = WorkerPool(1)
    process = SimpleNamespace(start=refused)
    found._forks = SimpleNamespace(Process=lambda **_: process)
    with pytest.raises(raised, match=said):
        found.run([job], lambda *_: None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes_stops_and_is_no_failure(job, monkeypatch, number):
    monkeypatch.setattr(pool, "import_in_processes", lambda: None)
    monkeypatch.setattr(pool, "work", wait_to_be_stopped)
    ended, stopping = [], WorkerPool(1)

    def stop_all():
        while not (job.workdir / "pid").exists():
            time.sleep(0.05)
        server = forkserver._forkserver._forkserver_pid
        for process in (server, int((job.workdir / "pid").read_text()), os.getpid()):
            os.kill(process, number)

    threading.Thread(target=stop_all).start()
    assert not stopping.run([job], lambda *end: ended.append(end))
    assert not ended and outcome_of(job.workdir) is None


@pytest.fixture
def work(job, monkeypatch):
    """`work(error)`: the exit code of a worker whose run raises it, in this process."""
    monkeypatch.setattr(worker, "_redirect_output", lambda folder: (folder / "turn").open("w"))
    monkeypatch.setattr(worker, "_stop_with_parent", lambda: None)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)

    def make(error):
        def run(_):
            if error:
                raise error

        monkeypatch.setattr(worker, "pretrain_and_evaluate", run)
        with pytest.raises(SystemExit) as ended:
            worker.work(job, {})
        return ended.value.code

    return make


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (Stop("the loss is NaN", 3), 3, "the loss is NaN"),
        (ConfigError("seed=-1 is not a seed"), 2, "seed=-1 is not a seed"),
        (ZeroDivisionError("by 0\nmore"), 1, "ZeroDivisionError: by 0"),
        (KeyboardInterrupt(), EXIT_PREEMPTED, None),
        (Stop("saved", EXIT_PREEMPTED), EXIT_PREEMPTED, None),
    ],
)
def test_how_a_run_ended_is_recorded_unless_it_continues(work, job, capsys, error, code, line):
    assert work(error) == code
    outcome = outcome_of(job.workdir)
    assert (outcome and (outcome["exit_code"], outcome["last_line"])) == (
        None if line is None else (code, line)
    )
    assert ("Traceback" in capsys.readouterr().err) == (code == 1)


def test_a_signal_after_its_end_makes_no_failure_of_a_run(work, job, monkeypatch):
    def interrupted(*outcome, **facts):
        signal.raise_signal(signal.SIGTERM)
        write_outcome(*outcome, **facts)

    monkeypatch.setattr(worker.signal, "signal", HANDLE)
    monkeypatch.setattr(worker, "write_outcome", interrupted)
    assert work(None) == 0 and outcome_of(job.workdir)["exit_code"] == 0


def test_an_outcome_that_cannot_be_written_is_the_error(work, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "outcome.json")

    monkeypatch.setattr(worker, "write_outcome", full)
    assert work(None) == 2
    assert "error: outcome.json: Read-only file system" in capsys.readouterr().err


def test_a_worker_whose_parent_is_gone_saves(monkeypatch):
    sent = []
    parent = SimpleNamespace(join=lambda: None)
    monkeypatch.setattr(worker.multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(os, "kill", lambda *call: sent.append(call))
    worker._stop_with_parent()
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_weights_are_exported_where_the_table_requests_it(job, monkeypatch):
    done = {}
    update = SimpleNamespace(config=SimpleNamespace(update=lambda *setting: None))
    monkeypatch.setattr(worker, "jax", update)
    monkeypatch.setattr(worker, "set_up_devices", lambda _: None)
    monkeypatch.setattr(worker, "pretrain_command", lambda _, workdir: done.update(run=workdir))
    monkeypatch.setattr(worker, "export_command", lambda **asked: done.update(asked))
    wanted = Job("plain", job.arguments, job.workdir, Evaluation(), True, ("timm",), toy=True)
    worker.pretrain_and_evaluate(wanted)
    exported = str(job.workdir / "exported")
    assert done == {"run": str(job.workdir), "to": exported, "formats": ("timm",)}


class Measuring(WorkerPool):
    """Whose only run ends with a code, or does not end."""

    def __init__(self, code):
        self.parallel, self._code = 1, code

    def run(self, jobs, on_end):
        for each in jobs if self._code is not None else ():
            each.workdir.mkdir(parents=True)
            write_outcome(each.workdir, self._code, "error: the disk is full")
            on_end(each, self._code)
        return self._code is not None


@pytest.mark.parametrize(
    ("code", "said", "ends"),
    [
        (74, r"^plain failed during its measurement: the disk is full \(see ", 74),
        (None, "rerun the same command to resume", EXIT_PREEMPTED),
    ],
)
def test_a_measurement_that_fails_ends_the_command(tmp_path, code, said, ends):
    runs = runs_of_table(Table("T", "Q", (Row("plain", CONFIG),)), seeds=(0,))
    with pytest.raises(Stop, match=said) as stop:
        experiment._plan(tmp_path, 5.0, runs, Evaluation(), Measuring(code), False)
    assert stop.value.code == ends
