"""Runs a function in a separate process, whose memory and devices are free afterwards."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from benchmarks.contest import one_line

_OUTERMOST = "CASSLE_BENCHMARKS_PROCESS"  # the leader of the process group to kill


def run_isolated(function: Callable, *arguments: object, seconds: float = 1800.0) -> object:
    """Calls a function in a new process, returns its result, and leaves no process behind.

    Args:
      function: a function of an importable module, not of `__main__`.
      *arguments: its arguments; arguments and result must be picklable.
      seconds: time after which the process is killed.

    Raises:
      RuntimeError: the function failed, or its process was killed.
    """
    spawn = multiprocessing.get_context("spawn")  # a device cannot be shared with a fork
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send_result, args=(sender, function, *arguments))
    process.start()
    sender.close()  # the receiver then detects the end of the process
    try:
        if not receiver.poll(seconds):
            raise RuntimeError(f"the call took more than {seconds:g} s")
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process ended with {process.exitcode}") from None
    finally:
        _kill(process)
        process.join()
    if error:
        raise RuntimeError(error)
    return result


def _kill(process: BaseProcess) -> None:
    """Kills a process and its children, which would occupy the device."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # a nested call: the process leads no group
        process.kill()


def _send_result(sender: Connection, function: Callable, *arguments: object) -> None:
    if _OUTERMOST not in os.environ:
        os.environ[_OUTERMOST] = str(os.getpid())
        os.setpgid(0, 0)
    try:
        sender.send((function(*arguments), ""))
    except Exception as error:  # the exceptions of some libraries cannot be pickled
        sender.send((None, one_line(error)))
