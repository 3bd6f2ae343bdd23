"""Commands of this project as submitit's jobs, on this machine or on SLURM."""

import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import submitit
from submitit.helpers import DelayedSubmission

from cassle_jax.command import EXIT_PREEMPTED
from cassle_jax.config import ConfigError
from cassle_jax.storage import write_whole

OUTCOME, LOG_FILE = "outcome.json", "log.txt"

_POLL_SECONDS = 0.5
_LOOK_SECONDS = 30.0
_WEEK_MINUTES = 7 * 24 * 60
# A command that saved and ended, or was stopped before it could, goes on: in the job SLURM started
# again, or here in the same one. So many times, that is something else.
_STOPPED = (EXIT_PREEMPTED, -signal.SIGTERM)
_MOST_STARTS = 100
_PROGRAMS = ("sbatch", "srun", "squeue", "scontrol")
# How often submitit requeues a job at its time limit: as often as it takes.
_MOST_REQUEUES = 10_000


class Command:
    """`python -m <module> <arguments>` as a job that goes on after preemption and time limits.

    What it prints is appended to `<folder>/log.txt`. When it has ended, its exit code and its last
    line are in `<folder>/outcome.json`; a job that was killed leaves no such file. Two jobs of one
    folder take turns.

    Args:
      module: of this project.
      arguments: of the command.
      folder: is made.
      environment: variables that it gets, or that it does not get where the value is `None`.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str | None] | None = None,
    ):
        self.module, self.arguments, self.folder = module, tuple(arguments), folder
        self.environment = dict(environment or {})
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Runs in the job; returns the exit code."""
        job = submitit.JobEnvironment()
        leads = job.global_rank == 0
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            (self.folder / "job.lock").open("w") as lock,
            (self.folder / LOG_FILE).open("a") as log,
        ):
            if leads:
                fcntl.flock(lock, fcntl.LOCK_EX)
            code, starts = self._run(lock, log), 1 + int(os.environ.get("SLURM_RESTART_COUNT", 0))
            while code in _STOPPED and starts < _MOST_STARTS:
                if job.cluster == "slurm":
                    if leads:
                        _requeue(os.environ["SLURM_JOB_ID"])
                    sys.exit(EXIT_PREEMPTED)  # with no result
                code, starts = self._run(lock, log), starts + 1
            if leads:
                self._write_outcome(code)
        return code

    def checkpoint(self) -> DelayedSubmission:
        """What submitit calls before it requeues a job: saves, and goes on in the next one."""
        if self._process:
            self._process.send_signal(signal.SIGINT)
            self._wait()
        self._process = None
        return DelayedSubmission(self)

    def _run(self, lock, log) -> int:
        environment = {**os.environ, **self.environment}
        # submitit's own signal reaches all processes of a job, and would kill this one.
        deaf = ["/bin/sh", "-c", 'trap "" USR1 USR2; exec "$@"', "sh"]
        self._process = subprocess.Popen(
            [*deaf, sys.executable, "-m", self.module, *self.arguments],
            env={name: value for name, value in environment.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock.fileno()],  # it holds the lock until it has ended, whatever ends the job
            start_new_session=True,  # Ctrl-C comes through the job, once
        )
        try:
            return self._wait()
        except KeyboardInterrupt:
            self._process.send_signal(signal.SIGINT)
            raise

    def _wait(self) -> int:
        # Not Popen.wait: while it waits, a signal's handler cannot.
        while self._process.poll() is None:
            time.sleep(_POLL_SECONDS)
        return self._process.returncode

    def _write_outcome(self, code: int) -> None:
        lines = (self.folder / LOG_FILE).read_text(errors="replace").strip().splitlines()
        outcome = {"exit_code": code, "last_line": lines[-1] if lines else ""}
        write_whole(self.folder / OUTCOME, json.dumps(outcome).encode())


def outcome_of(folder: Path) -> dict[str, object] | None:
    """What a command that ended in this folder left; `None` where none did."""
    path = folder / OUTCOME
    return json.loads(path.read_text()) if path.exists() else None


class Local:
    """This machine, which runs so many commands at a time, each with its share of the GPUs.

    Raises:
      ConfigError: the GPUs cannot be shared by so many.
    """

    def __init__(self, folder: Path, parallel: int):
        gpus = visible_gpus()
        if parallel < 1 or len(gpus) % parallel:
            raise ConfigError(
                f"parallel={parallel} cannot share the {len(gpus)} GPUs of this machine; use a "
                "divisor of their number"
            )
        share = len(gpus) // parallel
        self._shares = [gpus[i * share : (i + 1) * share] for i in range(parallel)]
        self._executor = submitit.LocalExecutor(folder, max_num_timeout=_MOST_REQUEUES)
        self._executor.update_parameters(timeout_min=_WEEK_MINUTES)

    def run(self, commands: Sequence[Command], ended: Callable[[Command], None]) -> None:
        """Runs commands; tells of each that it ended.

        Raises:
          KeyboardInterrupt: after the commands were told to save and end.
        """
        waiting, free = deque(commands), deque(self._shares)
        running: dict[submitit.Job, tuple[Command, list[str]]] = {}
        try:
            while waiting or running:
                while waiting and free:
                    command, gpus = waiting.popleft(), free.popleft()
                    # submitit hides the GPUs from a job that asks for none.
                    command.environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus) or None
                    running[self._executor.submit(command)] = command, gpus
                for job in [each for each in running if each.done()]:
                    command, gpus = running.pop(job)
                    free.append(gpus)
                    ended(command)
                time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            for job in running:
                job.cancel()
            raise


class Slurm:
    """A cluster with SLURM; jobs go on when whoever submitted them does not.

    Args:
      folder: of submitit's files; on a folder that all hosts see.
      parallel: how many jobs run at a time at most.
      options: of sbatch, by the names submitit has for them, such as `gpus_per_node=8`, `time=1440`
        (minutes) and `partition=…`, joined by commas.

    Raises:
      ConfigError: there is no SLURM here, or an option is unknown.
    """

    def __init__(self, folder: Path, parallel: int, options: str):
        if absent := [name for name in _PROGRAMS if not shutil.which(name)]:
            raise ConfigError(
                f"where=slurm needs {', '.join(absent)}, which cannot be found; use local"
            )
        if parallel < 1:
            raise ConfigError(f"parallel={parallel} must be at least 1")
        # Without SLURM's accounting it warns at every look at the jobs.
        logging.getLogger("submitit").setLevel(logging.ERROR)
        self._executor = submitit.SlurmExecutor(folder, max_num_timeout=_MOST_REQUEUES)
        chosen = {"job_name": "cassle", "signal_delay_s": 120, "array_parallelism": parallel}
        try:
            self._executor.update_parameters(**chosen, **_options(options))
        except (ValueError, TypeError) as error:
            lines = [line.strip(" -") for line in str(error).splitlines()]
            raise ConfigError(f"slurm={options}: {', '.join(lines)}") from error

    def run(self, commands: Sequence[Command], ended: Callable[[Command], None]) -> None:
        """Submits commands as one array, waits, and tells of each that it ended."""
        with self._executor.batch():
            jobs = [self._executor.submit(command) for command in commands]
        running = dict(zip(jobs, commands, strict=True))
        looked, missing = time.monotonic(), set()
        while running:
            gone = set()
            if time.monotonic() - looked > _LOOK_SECONDS:
                # Without SLURM's accounting submitit waits forever for what was cancelled. Missing
                # twice, as a result may be seen later than the end of its job.
                now = _missing(running)
                gone, missing, looked = missing & now, now, time.monotonic()
            for job in [each for each in running if each in gone or each.done()]:
                ended(running.pop(job))
            time.sleep(_POLL_SECONDS)


def _requeue(job_id: str) -> None:
    """Has SLURM start a job again whose command saved and ended.

    By itself SLURM does so only with jobs it had to end, not with one that was quicker than the
    time it gives. Who was cancelled, or is requeued already, runs no longer and is left alone.
    """
    if _queue(f"--jobs={job_id}", "--format=%T") == ["RUNNING"]:
        subprocess.run(["scontrol", "requeue", job_id], capture_output=True, check=False)


def _missing(jobs: Iterable[submitit.Job]) -> set[submitit.Job]:
    """Those that SLURM has neither waiting nor running; none where it does not answer."""
    queued = _queue("--me", "--array", "--format=%i")
    return {job for job in jobs if queued is not None and job.job_id not in queued}


def _queue(*options: str) -> list[str] | None:
    """What squeue tells, a word a job; `None` where it does not answer."""
    asked = ["squeue", "--noheader", *options]
    told = subprocess.run(asked, capture_output=True, text=True, check=False)
    return None if told.returncode else told.stdout.split()


def _options(text: str) -> dict[str, str | int]:
    options: dict[str, str | int] = {}
    for item in filter(None, text.split(",")):
        name, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"{item!r} is not name=value")
        options[name.strip()] = int(value) if value.strip().isdecimal() else value.strip()
    return options


def visible_gpus() -> list[str]:
    """Names of the GPUs of this machine that are not hidden from this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [each for each in visible.split(",") if each]
    if os.environ.get("JAX_PLATFORMS", "cuda").startswith("cpu") or not shutil.which("nvidia-smi"):
        return []
    asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.split() if found.returncode == 0 else []
