"""Runs commands of this project as submitit jobs, on this machine or on SLURM."""

import errno
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission

from cassle_jax.checks import LONGEST, ConfigError, check_at_least
from cassle_jax.command import EXIT_PREEMPTED
from cassle_jax.faults import retried
from cassle_jax.lock import await_turn
from cassle_jax.storage import kept_json, make_shared, open_shared, read_whole, write_surely
from cassle_jax.sweep.restarts import pause_before_restart

OUTCOME, LOG_FILE, JOB_LOCK = "outcome.json", "log.txt", "job.lock"
SUBMITIT_LOG = "submitit.log"

_POLL_SECONDS = 0.5
_CHECK_SECONDS = 30.0
_SAME_CTRL_C_SECONDS = 5.0
_WEEK_MINUTES = 7 * 24 * 60
# What sbatch says where the controller of the cluster is busy or restarts.
_BUSY = re.compile("timed out|unable to contact|temporarily", re.IGNORECASE)
_PROGRAMS = ("sbatch", "srun", "squeue", "scontrol")
# Requeues by submitit at a job's time limit; practically unlimited.
_MOST_REQUEUES = 10_000


class Command:
    """`python -m <module> <arguments>` as a job that resumes after preemption and time limits.

    The job appends its output to `<folder>/log.txt`. At its end it writes exit code and last line
    to `<folder>/outcome.json`; a killed job leaves no such file. Two jobs of one folder take turns.

    Args:
      module: a module of this project.
      arguments: command-line arguments.
      folder: folder of the log and the outcome; created where missing.

    Attributes:
      environment: variables to set; `None` as a value unsets one.
    """

    def __init__(self, module: str, arguments: Sequence[str], folder: Path):
        self.module, self.arguments, self.folder = module, tuple(arguments), folder
        self.environment: dict[str, str | None] = {}
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Runs the command inside the job; returns the exit code."""
        job = submitit.JobEnvironment()
        is_first = job.global_rank == 0
        make_shared(self.folder)
        with (
            open(self.folder / JOB_LOCK, "w", opener=open_shared) as lock,
            open(self.folder / LOG_FILE, "a", opener=open_shared) as log,
        ):
            if is_first:
                await_turn(lock)
            code, starts = self._run(lock, log), 1 + int(os.environ.get("SLURM_RESTART_COUNT", 0))
            # It resumes in the requeued SLURM job, or here in the same job.
            while (pause := pause_before_restart(code, starts)) is not None:
                if job.cluster == "slurm":  # SLURM itself waits before it restarts a job
                    if is_first:
                        _requeue(os.environ["SLURM_JOB_ID"])
                    sys.exit(EXIT_PREEMPTED)  # submitit gets no result
                time.sleep(pause)
                code, starts = self._run(lock, log), starts + 1
            if is_first:
                lines = (
                    read_whole(self.folder / LOG_FILE).decode(errors="replace").strip().splitlines()
                )
                write_outcome(self.folder, code, lines[-1] if lines else "")
        return code

    def checkpoint(self) -> DelayedSubmission:
        """Saves, and returns the job that resumes; submitit calls this before it requeues."""
        if self._process:
            self._process.send_signal(signal.SIGINT)
            self._wait()
        self._process = None
        return DelayedSubmission(self)

    def _run(self, lock, log) -> int:
        interrupted, sent_at = False, -math.inf

        def interrupt(*_) -> None:
            # One Ctrl-C comes from the terminal, and again through submitit; two kill the command.
            nonlocal interrupted, sent_at
            interrupted, now = True, time.monotonic()
            if self._process and now - sent_at > _SAME_CTRL_C_SECONDS:
                sent_at = now
                self._process.send_signal(signal.SIGINT)

        self._process, before = None, signal.signal(signal.SIGINT, interrupt)
        try:
            self._process = self._started(lock, log)
            if interrupted:
                interrupt()
            code = self._wait()
        finally:
            signal.signal(signal.SIGINT, before)
        if interrupted:
            raise KeyboardInterrupt
        return code

    def _started(self, lock, log):
        environment = {**os.environ, **self.environment}
        # submitit's signals reach all processes of a job, and would kill the command.
        ignoring_signals = ["/bin/sh", "-c", 'trap "" USR1 USR2; exec "$@"', "sh"]
        return subprocess.Popen(
            [*ignoring_signals, sys.executable, "-m", self.module, *self.arguments],
            env={name: value for name, value in environment.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock.fileno()],  # the command keeps the lock even if the job is killed
            start_new_session=True,  # Ctrl-C arrives through the job alone
        )

    def _wait(self) -> int:
        # Polls, because a signal handler's own `_wait` would block inside Popen.wait.
        while self._process.poll() is None:
            time.sleep(_POLL_SECONDS)
        return self._process.returncode


def write_outcome(folder: Path, code: int, line: str, **facts: float) -> None:
    """Writes `outcome.json`: exit code, last line, and facts such as the duration in seconds."""
    outcome = {"exit_code": code, "last_line": line}
    outcome |= {name: round(value, 1) for name, value in facts.items()}
    write_surely(folder / OUTCOME, json.dumps(outcome))


def outcome_of(folder: Path) -> dict[str, object] | None:
    """Reads `outcome.json` of a command; returns `None` where no command ended in the folder.

    A damaged file counts as missing, so that the command runs again.
    """
    return kept_json(folder / OUTCOME, {"exit_code": int, "last_line": str})


class Local:
    """Runs commands on this machine, with an equal share of the GPUs per command.

    Args:
      folder: folder of submitit's files.
      parallel: number of commands at a time.

    Raises:
      ConfigError: `parallel` does not divide the number of GPUs.
    """

    def __init__(self, folder: Path, parallel: int):
        check_at_least("parallel", parallel, 1, LONGEST)
        gpus = visible_gpus()
        if len(gpus) % parallel:
            raise ConfigError(
                f"parallel={parallel} cannot share the {len(gpus)} GPUs of this machine; use a "
                "divisor of their number"
            )
        share = len(gpus) // parallel
        self._shares = [gpus[i * share : (i + 1) * share] for i in range(parallel)]
        self._executor = submitit.LocalExecutor(folder, max_num_timeout=_MOST_REQUEUES)
        self._executor.update_parameters(timeout_min=_WEEK_MINUTES)

    def run(self, commands: Sequence[Command], on_end: Callable[[Command], None]) -> None:
        """Runs commands; calls `on_end` with each command that ended.

        If `on_end` raises, the running commands save and end.

        Raises:
          KeyboardInterrupt: Ctrl-C.
          Outage: a command could not be submitted for now.
        """
        waiting, free = deque(commands), deque(self._shares)
        running: dict[submitit.Job, tuple[Command, list[str]]] = {}
        try:
            while waiting or running:
                while waiting and free:
                    command, gpus = waiting.popleft(), free.popleft()
                    # submitit hides the GPUs from a job that requests none.
                    command.environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus) or None
                    submit = partial(self._submitted, command)
                    running[retried(f"to={self._executor.folder}", submit)] = command, gpus
                for job in [job for job in running if job.done()]:
                    command, gpus = running.pop(job)
                    free.append(gpus)
                    on_end(command)
                time.sleep(_POLL_SECONDS)
        except BaseException:
            for job in running:
                job.cancel()
            raise

    def _submitted(self, command: Command) -> submitit.Job:
        # Ctrl-C ends submitit's processes with tracebacks, which would hide this command's line.
        with open(self._executor.folder / SUBMITIT_LOG, "ab", opener=open_shared) as log:
            shown = os.dup(2)
            # A closed terminal would kill them, and leave their command running.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
            try:
                os.dup2(log.fileno(), 2)
                return self._executor.submit(command)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
                os.dup2(shown, 2)
                os.close(shown)


class Slurm:
    """Runs commands on a SLURM cluster; the jobs outlive the process that submits them.

    Args:
      folder: folder of submitit's files, on storage that all hosts share.
      parallel: largest number of jobs at a time.
      options: sbatch options under submitit's names, such as `gpus_per_node=8`, `time=1440`
        (minutes) and `partition=…`, joined by commas.

    Raises:
      ConfigError: SLURM is not installed here, or an option is unknown.
    """

    def __init__(self, folder: Path, parallel: int, options: str):
        if absent := [name for name in _PROGRAMS if not shutil.which(name)]:
            raise ConfigError(
                f"where=slurm needs {', '.join(absent)}, not found on this machine; use local"
            )
        check_at_least("parallel", parallel, 1)
        # Without SLURM's accounting, submitit warns at every poll.
        logging.getLogger("submitit").setLevel(logging.ERROR)
        self._executor = submitit.SlurmExecutor(folder, max_num_timeout=_MOST_REQUEUES)
        self._options = options
        chosen = {"job_name": "cassle", "signal_delay_s": 120, "array_parallelism": parallel}
        try:
            self._executor.update_parameters(**chosen, **_options(options))
        except (ValueError, TypeError) as error:
            lines = [line.strip(" -") for line in str(error).splitlines()]
            raise ConfigError(f"slurm={options}: {', '.join(lines)}") from error

    def run(self, commands: Sequence[Command], on_end: Callable[[Command], None]) -> None:
        """Submits commands as one array, waits, and calls `on_end` with a command that ended.

        Raises:
          ConfigError: SLURM refuses them.
          Outage: they could not be submitted for now.
        """
        jobs = retried(f"to={self._executor.folder}", partial(self._submitted, commands))
        running = dict(zip(jobs, commands, strict=True))
        last_check, missing = time.monotonic(), set()
        while running:
            cancelled = set()
            if time.monotonic() - last_check > _CHECK_SECONDS:
                # Without SLURM's accounting, submitit waits forever for a cancelled job. A job
                # counts as cancelled after two checks, as its result may arrive after its end.
                now = _missing(running)
                cancelled, missing, last_check = missing & now, now, time.monotonic()
            for job in [job for job in running if job in cancelled or job.done()]:
                on_end(running.pop(job))
            time.sleep(_POLL_SECONDS)

    def _submitted(self, commands: Sequence[Command]) -> list[submitit.Job]:
        try:
            with self._executor.batch():
                return [self._executor.submit(command) for command in commands]
        except (FailedJobError, FailedSubmissionError) as error:  # of sbatch
            said = (str(error).splitlines() or ["sbatch failed without a message"])[-1]
            # A job that SLURM accepted nevertheless finds no command, and ends after a minute.
            if _BUSY.search(said):
                raise OSError(errno.EBUSY, said) from error
            raise ConfigError(f"slurm={self._options}: {said}") from error


def _requeue(job_id: str) -> None:
    """Requeues a running SLURM job whose command has saved and ended.

    SLURM requeues only the jobs it ends itself, not one that ends within its grace time. A job that
    is cancelled or already requeued no longer runs, and stays as it is.
    """
    if _queue(f"--jobs={job_id}", "--format=%T") == ["RUNNING"]:
        subprocess.run(["scontrol", "requeue", job_id], capture_output=True, check=False)


def _missing(jobs: Iterable[submitit.Job]) -> set[submitit.Job]:
    """The jobs that SLURM neither queues nor runs; empty where squeue fails."""
    queued = _queue("--me", "--array", "--format=%i")
    return {job for job in jobs if queued is not None and job.job_id not in queued}


def _queue(*options: str) -> list[str] | None:
    """The output of squeue, one word per job; `None` where squeue fails."""
    query = ["squeue", "--noheader", *options]
    result = subprocess.run(query, capture_output=True, text=True, check=False)
    return None if result.returncode else result.stdout.split()


def _options(text: str) -> dict[str, str | int]:
    options: dict[str, str | int] = {}
    for item in filter(None, text.split(",")):
        name, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"{item!r} is not name=value")
        options[name.strip()] = int(value) if value.strip().isdecimal() else value.strip()
    return options


def import_in_processes() -> None:
    """Lets processes that are started from here import this project from its clone."""
    root = str(Path(__file__).resolve().parents[2])
    if root != sysconfig.get_path("purelib"):  # its packages must not precede Python's own
        path = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))


def visible_gpus() -> list[str]:
    """Names of this machine's GPUs that are visible to this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    if os.environ.get("JAX_PLATFORMS", "cuda").startswith("cpu") or not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, check=False)
    return result.stdout.split() if result.returncode == 0 else []
