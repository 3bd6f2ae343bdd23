"""Works through runs with several processes at a time, in a call of limited length."""

import logging
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait

from cassle_jax.command import EXIT_PREEMPTED
from cassle_jax.sweep.jobs import OUTCOME, visible_gpus
from cassle_jax.sweep.table import ROOT
from cassle_jax.sweep.worker import Job, note_end, work

LOG = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
# What a worker gets to save in once it is told to; a kill then costs the steps since it last saved.
GRACE_SECONDS = 40.0
_MOST_STARTS = 3  # of a run in a call, where somebody else stops it
# Of a GPU's memory, for all workers on it; each takes its share at its start.
_MEMORY_SHARE = 0.9


class Crew:
    """Processes that share this machine, each with one run at a time.

    They are forked from one that has imported everything, so a run begins at once.

    Args:
      parallel: how many at a time.
      seconds: after which all are told to save and end; 0 for never.
    """

    def __init__(self, parallel: int, seconds: float = 0.0):
        self._until = time.monotonic() + seconds if seconds else float("inf")
        self._free = deque(shares(visible_gpus(), parallel))
        self._asked = False
        # The server of the forks looks for modules where Python does by itself.
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
        self._forks = multiprocessing.get_context("forkserver")
        self._forks.set_forkserver_preload([work.__module__])

    def run(self, jobs: Sequence[Job], ended: Callable[[Job, int], None]) -> bool:
        """Runs jobs in their order; tells of each that ended, and its exit code.

        Returns:
          Whether all ended; not where the time was over, or a signal came.
        """
        waiting, running, starts = deque(jobs), {}, dict.fromkeys(jobs, 0)
        handlers = {each: signal.signal(each, self._ask) for each in _SIGNALS}
        try:
            while (waiting or running) and not self._is_over:
                while waiting and self._free:
                    job, share = waiting.popleft(), self._free.popleft()
                    starts[job] += 1
                    running[self._start(job, share)] = job, share, time.monotonic()
                for process, (job, share, start) in self._ended(running):
                    self._free.append(share)
                    if process.exitcode == EXIT_PREEMPTED and starts[job] < _MOST_STARTS:
                        waiting.appendleft(job)
                        continue
                    _note_silent_end(job, process.exitcode, time.monotonic() - start)
                    ended(job, process.exitcode)
        finally:
            for process, (job, *_) in self._stop(running):
                if process.exitcode not in (EXIT_PREEMPTED, *_KILLED):
                    ended(job, process.exitcode)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return not waiting and not running

    @property
    def _is_over(self) -> bool:
        return self._asked or time.monotonic() > self._until

    def _ask(self, *_) -> None:
        self._asked = True

    def _start(self, job: Job, environment: dict[str, str]):
        job.workdir.mkdir(parents=True, exist_ok=True)
        (job.workdir / OUTCOME).unlink(missing_ok=True)
        process = self._forks.Process(target=work, args=(job, environment))
        process.start()
        LOG.info("%s begins", job.workdir.name)
        return process

    def _ended(self, running: dict):
        wait([process.sentinel for process in running], _POLL_SECONDS)
        for process in [each for each in running if not each.is_alive()]:
            yield process, running.pop(process)

    def _stop(self, running: dict):
        """Ends what runs; gives back what had ended or ends now."""
        if running:
            LOG.info("%d runs save and end", len(running))
        for process in running:
            process.terminate()
        until = time.monotonic() + GRACE_SECONDS
        for process in list(running):
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                LOG.warning("%s is killed: it did not end", running[process][0].workdir.name)
                process.kill()
                process.join()
        return list(running.items())


_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_KILLED = (-signal.SIGTERM, -signal.SIGKILL)


def shares(gpus: Sequence[str], parallel: int) -> list[dict[str, str]]:
    """The variables by which each of so many processes gets its share of the GPUs.

    Processes fewer than GPUs get several each, as equally many as there are; others one, of whose
    memory they take a share.
    """
    a_gpu = -(-parallel // max(1, len(gpus)))
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_MEMORY_SHARE / a_gpu:.3f}"}
    if not gpus:
        return [memory] * parallel
    each = max(1, len(gpus) // parallel)
    own = [[gpus[(i * each + k) % len(gpus)] for k in range(each)] for i in range(parallel)]
    return [{**memory, "CUDA_VISIBLE_DEVICES": ",".join(names)} for names in own]


def _note_silent_end(job: Job, code: int, seconds: float) -> None:
    """Notes the end of a process that could not do so itself."""
    if not (job.workdir / OUTCOME).exists():
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        note_end(job.workdir, code, f"it ended by {how}", seconds)
