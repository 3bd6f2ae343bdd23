"""One run of a table in its own process: pretrains, evaluates, and records the outcome."""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO

import jax

from cassle_jax import command
from cassle_jax.evaluate import evaluate_command
from cassle_jax.export import export_command
from cassle_jax.faults import Outage, hurry, retried
from cassle_jax.lock import await_turn
from cassle_jax.pretrain import pretrain_command, set_up_devices
from cassle_jax.report.files import JSON, is_complete
from cassle_jax.storage import is_there, make_shared, open_shared, read_whole, write_whole
from cassle_jax.sweep.evaluation import Evaluation
from cassle_jax.sweep.jobs import JOB_LOCK, LOG_FILE, outcome_of, write_outcome
from cassle_jax.sweep.space import parsed
from cassle_jax.training.saved_config import write_config
from cassle_jax.training.start_records import STARTS

LOG = logging.getLogger(__name__)

RESULT, EXPORTED = "evaluation", "exported"


@dataclasses.dataclass(frozen=True)
class Job:
    """A run and its evaluation, as a worker executes them.

    Attributes:
      subject: name of the run in its report.
      arguments: arguments of the pretraining command, without the workdir.
      workdir: the run's folder; the log, the report and the outcome go there.
      evaluation: the run's evaluation.
      keep_weights: whether the checkpoints stay after the evaluation.
      export: formats of the weights exported to `exported` in the workdir.
      weights: workdir of a run with the same settings, whose weights replace pretraining; `None`
        to pretrain.
      toy: whether programs are compiled with most optimizations off.
    """

    subject: str
    arguments: tuple[str, ...]
    workdir: Path
    evaluation: Evaluation
    keep_weights: bool
    export: tuple[str, ...] = ()
    weights: Path | None = None
    toy: bool = False


def work(job: Job, environment: dict[str, str]) -> None:
    """Executes a job in its own process; the exit code reports the outcome.

    SIGTERM, or the end of the parent process, saves the run and ends it with 75.

    Args:
      job: the run.
      environment: variables that select the devices.
    """
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    code, line, start, done = 0, "", time.monotonic(), False
    try:
        # The pool blocks all signals that stop it, and on any of them sends SIGTERM.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        turn = retried(str(job.workdir), lambda: _redirect_output(job.workdir))
        await_turn(turn)  # a worker of a killed command may still be saving
        start, done = time.monotonic(), _is_done(job)
        if not done:
            pretrain_and_evaluate(job)
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it comes from the pool, too
        if stop := command.stop_of(error):
            code, line = stop.code, str(stop)
        else:
            with contextlib.suppress(OSError):  # the log may be on a full disk
                traceback.print_exc()
            code, line = 1, f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it has nothing left to stop
    if code != command.EXIT_PREEMPTED and not done:
        try:
            write_outcome(job.workdir, code, line, seconds=time.monotonic() - start)
        except (OSError, Outage) as error:
            code, line = command.code_of(error) or 1, command.words_of(error)
    if code:
        command.say_error(line)
    elif not job.keep_weights:  # also where a process was killed before it could remove them
        shutil.rmtree(job.workdir / "checkpoints", ignore_errors=True)
    hurry.set()  # Python waits for reading threads before it ends
    command.flush_log()
    sys.exit(code)


def _is_done(job: Job) -> bool:
    """Whether an earlier worker has finished the run."""
    recorded = outcome_of(job.workdir)
    return recorded is not None and recorded["exit_code"] == 0


def pretrain_and_evaluate(job: Job) -> None:
    """Pretrains, exports and evaluates a run; skips the parts that are done already."""
    config, report = parsed(job.arguments), job.workdir / RESULT
    set_up_devices(config)
    # Cache small programs, too: the runs of a table share them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if job.toy:
        jax.config.update("jax_disable_most_optimizations", True)
    if not is_complete(report / JSON):
        if job.weights:
            LOG.info("using the weights of %s", job.weights)
            write_config(config, job.workdir)
            starts = job.weights / STARTS
            if is_there(starts):  # with the names of the images that the weights have seen
                write_whole(job.workdir / STARTS, read_whole(starts))
        else:
            LOG.info("python -m cassle_jax.pretrain %s", " ".join(job.arguments))
            pretrain_command(config, job.workdir)
        source = job.weights or job.workdir
        if job.export:
            folder = job.workdir / EXPORTED
            make_shared(folder)
            export_command(run=str(source), to=str(folder), formats=job.export)
        if job.evaluation.datasets:
            _evaluate(job, source, report)


def _evaluate(job: Job, source: Path, report: Path) -> None:
    evaluation = job.evaluation
    make_shared(report)
    evaluate_command(
        runs=[f"{job.subject}={source}"],
        datasets=evaluation.datasets,
        to=str(report),
        tasks=evaluation.tasks,
        data_dir=evaluation.data_dir,
        **evaluation.settings,
    )


def _redirect_output(workdir: Path) -> IO:
    """Redirects this process's output to the run's log; returns the file whose lock is its turn."""
    file = open_shared(workdir / LOG_FILE, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    command.set_up_logging()
    return open(workdir / JOB_LOCK, "w", opener=open_shared)


def _stop(*_) -> None:
    # Pretraining handles SIGTERM itself during its steps, and saves; elsewhere the process ends.
    raise command.Stop("stopped; rerun the same table to resume", command.EXIT_PREEMPTED)


def _stop_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
