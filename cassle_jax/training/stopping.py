"""Stops a run on request: a signal to one process stops all of them after the same step."""

import os
import signal
import threading

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

from cassle_jax.command import stopping_signals
from cassle_jax.distributed import when_stopped
from cassle_jax.faults import hurry


class StopRequest:
    """Turns SIGTERM, Ctrl-C and a closed terminal into a request to save and stop after a step.

    A first Ctrl-C restores the previous handler, so a second one kills. SIGTERM may come again, as
    SLURM sends it to a job and to each of its steps. `nohup` hides a closed terminal. With several
    processes, JAX receives SIGTERM, informs the others and finds the next step that none of them
    has started.
    """

    def __enter__(self) -> "StopRequest":
        hurry.clear()
        self._requested, self._previous = threading.Event(), {}
        self._alone = jax.process_count() == 1
        self._first: int | None = None
        when_stopped(hurry.set)
        if threading.current_thread() is threading.main_thread():
            for number in stopping_signals():
                if self._alone or number != signal.SIGTERM:
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        hurry.clear()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, step: int) -> bool:
        """Whether the run ends with `step` done, equal in all processes; all must call this."""
        if self._alone:
            return self._requested.is_set()
        # JAX counts a process's steps from 0: after a signal before the first step, the run ends at
        # 1. A continued run, which starts at a later step, would never reach it.
        self._first = step if self._first is None else self._first
        return reached_preemption_sync_point(step - self._first)

    def _on_signal(self, number, _) -> None:
        if self._alone:
            self._requested.set()
            hurry.set()  # waits may take minutes, but a kill comes in seconds
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])
