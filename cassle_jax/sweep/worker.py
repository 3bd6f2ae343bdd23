"""One run of a table in a process of its own: it is pretrained, evaluated, and its end noted."""

import dataclasses
import json
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

import jax

from cassle_jax import command
from cassle_jax.config import ConfigError
from cassle_jax.data import DataError
from cassle_jax.evaluate import evaluate_command
from cassle_jax.evaluation.tasks import Settings
from cassle_jax.export import export_command
from cassle_jax.pretrain import pretrain_command, set_up_devices
from cassle_jax.report.evaluation_page import JSON
from cassle_jax.storage import write_whole
from cassle_jax.sweep.jobs import LOG_FILE, OUTCOME
from cassle_jax.sweep.space import parsed
from cassle_jax.training.saved_config import write_config

LOG = logging.getLogger(__name__)

RESULT, EXPORTED = "evaluation", "exported"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How every run of a table is evaluated.

    Attributes:
      datasets: as the evaluation command's; none for no evaluation.
      tasks: the same; empty for the usual ones.
      data_dir: of tensorflow-datasets.
      limit: of the images of each part; 0 for all.
      network: `online`, or `momentum`.
      batch: images of all devices together.
      settings: of the protocols.
    """

    datasets: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    data_dir: str = ""
    limit: int = 0
    network: str = "online"
    batch: int = 256
    settings: Settings = dataclasses.field(default_factory=Settings)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker is given.

    Attributes:
      subject: what the run is called in its report.
      arguments: of the pretraining command, but for the workdir.
      workdir: of the run; gets the log, the report, and how it ended.
      evaluation: of the run.
      keep_weights: whether its checkpoints stay once it is evaluated.
      export: formats that its weights are written in, to `exported` in the workdir.
      weights: workdir of a run with the same settings, whose weights it takes instead of
        pretraining; `None` for none.
      toy: whether programs are compiled quickly rather than well.
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
    """Runs in a process of its own, whose exit code tells how the run ended.

    SIGTERM, or the end of the process that began this one, saves and ends it with 75.

    Args:
      job: the run.
      environment: variables that the devices are set up by.
    """
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    _log_to(job.workdir / LOG_FILE)
    code, line, start = 0, "", time.monotonic()
    try:
        pretrain_and_evaluate(job)
    except command.Stop as stop:
        code, line = stop.code, str(stop)
    except KeyboardInterrupt:
        code, line = command.EXIT_PREEMPTED, "stopped"
    except (ConfigError, DataError) as error:
        code, line = command.EXIT_WRONG_SETTING, str(error)
    except BaseException as error:
        traceback.print_exc()
        code, line = 1, f"{type(error).__name__}: {error}".splitlines()[0]
    if code:
        print(f"error: {line}", file=sys.stderr, flush=True)
    if code != command.EXIT_PREEMPTED:
        note_end(job.workdir, code, line, time.monotonic() - start)
    sys.exit(code)


def note_end(workdir: Path, code: int, line: str, seconds: float) -> None:
    """Notes in `outcome.json` how a run ended, and how long its last start took."""
    outcome = {"exit_code": code, "last_line": line, "seconds": round(seconds, 1)}
    write_whole(workdir / OUTCOME, json.dumps(outcome).encode())


def pretrain_and_evaluate(job: Job) -> None:
    """What a run consists of, each part where it is not done already."""
    config, report = parsed(job.arguments), job.workdir / RESULT
    set_up_devices(config)
    # Runs of a table compile the same programs, also the small ones, of which there are many.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if job.toy:
        jax.config.update("jax_disable_most_optimizations", True)
    if not (report / JSON).exists():
        if job.weights:
            LOG.info("the weights are those of %s", job.weights)
            write_config(config, job.workdir)
        else:
            LOG.info("python -m cassle_jax.pretrain %s", " ".join(job.arguments))
            pretrain_command(config, job.workdir)
        source = job.weights or job.workdir
        if job.export:
            folder = job.workdir / EXPORTED
            export_command(run=str(source), to=str(folder), formats=job.export)
        if job.evaluation.datasets:
            _evaluate(job, source, report)
    if not job.keep_weights:
        shutil.rmtree(job.workdir / "checkpoints", ignore_errors=True)


def _evaluate(job: Job, source: Path, report: Path) -> None:
    wanted = job.evaluation
    evaluate_command(
        runs=[f"{job.subject}={source}"],
        datasets=wanted.datasets,
        to=str(report),
        tasks=wanted.tasks,
        network=wanted.network,
        data_dir=wanted.data_dir,
        batch=wanted.batch,
        limit=wanted.limit,
        settings=wanted.settings,
    )


def _log_to(path: Path) -> None:
    """Appends to a file all that this process prints."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    command.set_up_logging()


def _stop(*_) -> None:
    # Pretraining takes SIGTERM while it steps, and saves; at any other time it ends the process.
    raise command.Stop("stopped; the same table goes on", command.EXIT_PREEMPTED)


def _stop_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
