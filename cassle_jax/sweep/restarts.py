"""Decides whether, and when, to restart a command of a sweep or table that ended."""

import signal

from cassle_jax.command import EXIT_OUTAGE, EXIT_PREEMPTED
from cassle_jax.faults import seconds_in

FIRST_PAUSE = "CASSLE_RESTART_SECONDS"  # the pause after the first outage; launch/run.sh reads it
_LONGEST_PAUSE = 300.0
_MOST_STARTS = {
    EXIT_PREEMPTED: 100,  # more than that are hardly preemptions
    -signal.SIGTERM: 100,
    EXIT_OUTAGE: 20,
}


def pause_before_restart(code: int, starts: int) -> float | None:
    """Seconds until the restart of a command that ended; `None` for no restart.

    A command that was stopped and has saved restarts at once. After outages, the pauses double.

    Args:
      code: exit code of the command; -15 where SIGTERM ended it.
      starts: number of its starts so far.

    Raises:
      ConfigError: `CASSLE_RESTART_SECONDS` is not a number.
    """
    if starts >= _MOST_STARTS.get(code, 0):
        return None
    return 0.0 if code != EXIT_OUTAGE else min(first_pause() * 2 ** (starts - 1), _LONGEST_PAUSE)


def first_pause() -> float:
    """Seconds of the pause after the first outage: `CASSLE_RESTART_SECONDS`, or ten.

    Raises:
      ConfigError: it is not a number.
    """
    return seconds_in(FIRST_PAUSE, 10.0)
