"""Runs a table's jobs in several worker processes, in a call of limited length."""

import logging
import multiprocessing
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import wait

from cassle_jax.checks import ConfigError
from cassle_jax.command import EXIT_PREEMPTED, stopping_signals
from cassle_jax.faults import Outage, retried
from cassle_jax.storage import make_shared
from cassle_jax.sweep.jobs import OUTCOME, import_in_processes, visible_gpus, write_outcome
from cassle_jax.sweep.restarts import first_pause, pause_before_restart
from cassle_jax.sweep.worker import Job, work

LOG = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
# Time between SIGTERM and SIGKILL; a killed worker loses the steps since its last checkpoint.
GRACE_SECONDS = 40.0
# Share of a GPU's memory for all workers on it; every worker allocates its part at its start.
_MEMORY_SHARE = 0.9
_KILLED = (-signal.SIGTERM, -signal.SIGKILL)


class WorkerPool:
    """Worker processes that share this machine, with one run per process.

    They are forked from a process that has imported everything, so a run starts at once.

    Args:
      parallel: number of processes at a time.
      seconds: time from now after which all runs save and end; 0 for no limit.

    Raises:
      ConfigError: see `first_pause`.
    """

    def __init__(self, parallel: int, seconds: float = 0.0):
        self.parallel = parallel
        first_pause()  # refuses what is no number, which an outage would read hours later
        self._until = time.monotonic() + seconds if seconds else float("inf")
        self._free = deque(gpu_shares(visible_gpus(), parallel))
        self._stop_requested = False
        import_in_processes()  # the fork server imports from Python's default search path only
        self._forks = multiprocessing.get_context("forkserver")
        self._forks.set_forkserver_preload([work.__module__])
        resource_tracker.ensure_running()  # else started in `_start`, it would let signals through

    def run(self, jobs: Sequence[Job], on_end: Callable[[Job, int], None]) -> bool:
        """Starts jobs in their order; calls `on_end` with a job that ended and its exit code.

        Returns:
          Whether all jobs ended; `False` after the time limit or a signal.
        """
        waiting, running = deque(jobs), {}
        starts, due = dict.fromkeys(jobs, 0), dict.fromkeys(jobs, 0.0)
        handlers = {
            number: signal.signal(number, self._request_stop) for number in stopping_signals()
        }
        try:
            while (waiting or running) and not self._is_over:
                for job in [job for job in waiting if due[job] <= time.monotonic()]:
                    if not self._free:
                        break
                    waiting.remove(job)
                    share = self._free.popleft()
                    starts[job] += 1
                    running[self._start(job, share)] = job, share, time.monotonic()
                for process, (job, share, start) in self._ended(running):
                    self._free.append(share)
                    pause = pause_before_restart(process.exitcode, starts[job])
                    if pause is not None:
                        due[job] = time.monotonic() + pause
                        waiting.appendleft(job)
                        continue
                    _record_silent_end(job, process.exitcode, time.monotonic() - start)
                    on_end(job, process.exitcode)
        finally:
            for process, (job, *_) in self._stop(running):
                if process.exitcode not in (EXIT_PREEMPTED, *_KILLED):
                    on_end(job, process.exitcode)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return not waiting and not running

    @property
    def _is_over(self) -> bool:
        return self._stop_requested or time.monotonic() > self._until

    def _request_stop(self, *_) -> None:
        self._stop_requested = True

    def _start(self, job: Job, environment: dict[str, str]):
        retried(str(job.workdir), lambda: make_shared(job.workdir))
        (job.workdir / OUTCOME).unlink(missing_ok=True)
        process = self._forks.Process(target=work, args=(job, environment))
        try:
            # The fork server, which starts with the first run, must report how runs end. So it
            # blocks the signals that a terminal or SLURM sends to all processes.
            signal.pthread_sigmask(signal.SIG_BLOCK, stopping_signals())
            process.start()
        except OSError as error:
            if "AF_UNIX" not in str(error):
                raise
            raise ConfigError(
                f"TMPDIR={tempfile.gettempdir()} is too long for the name of a socket in it; use "
                "another, such as /tmp"
            ) from error
        except EOFError as error:
            said = "the process that starts the runs was killed; the same command continues"
            raise Outage(said) from error
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping_signals())
        LOG.info("%s starts", job.workdir.name)
        return process

    def _ended(self, running: dict):
        wait([process.sentinel for process in running], _POLL_SECONDS)
        for process in [process for process in running if not process.is_alive()]:
            yield process, running.pop(process)

    def _stop(self, running: dict):
        """Ends the running processes; returns them with their jobs."""
        if running:
            LOG.info("%d runs save and end", len(running))
        for process in running:
            process.terminate()
        until = time.monotonic() + GRACE_SECONDS
        for process in list(running):
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                LOG.warning("%s did not end in time; killing it", running[process][0].workdir.name)
                process.kill()
                process.join()
        return list(running.items())


def gpu_shares(gpus: Sequence[str], parallel: int) -> list[dict[str, str]]:
    """Environment variables that give every process its share of the GPUs.

    With fewer processes than GPUs, every process has the same number of GPUs. Otherwise every
    process has one GPU, whose memory it shares with the other processes on it.

    Args:
      gpus: names of the GPUs; empty on a CPU.
      parallel: number of processes.

    Returns:
      One dictionary of variables per process.
    """
    per_gpu = -(-parallel // max(1, len(gpus)))
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_MEMORY_SHARE / per_gpu:.3f}"}
    if not gpus:
        return [memory] * parallel
    count = max(1, len(gpus) // parallel)
    own = [[gpus[(i * count + k) % len(gpus)] for k in range(count)] for i in range(parallel)]
    return [{**memory, "CUDA_VISIBLE_DEVICES": ",".join(names)} for names in own]


def _record_silent_end(job: Job, code: int, seconds: float) -> None:
    """Writes the outcome of a process that could not write it itself."""
    if not (job.workdir / OUTCOME).exists():
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        write_outcome(job.workdir, code, f"the process ended with {how}", seconds=seconds)
