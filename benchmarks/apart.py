"""Runs a function in a process of its own, whose memory and devices are free once it has ended."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from benchmarks.contest import one_line

_OUTERMOST = "CASSLE_BENCHMARKS_PROCESS"  # leads the group that is killed


def apart(function: Callable, *arguments: object, seconds: float = 1800.0) -> object:
    """What a function returns in a process that runs nothing else, and leaves none.

    Args:
      function: of a module, but not of one that is run as a command.
      *arguments: that can be pickled, as its result can.
      seconds: after which the process is killed.

    Raises:
      RuntimeError: the function failed, or its process was killed.
    """
    spawn = multiprocessing.get_context("spawn")  # a device cannot be shared with a fork
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_tell, args=(sender, function, *arguments))
    process.start()
    sender.close()  # so that its end is seen here
    try:
        if not receiver.poll(seconds):
            raise RuntimeError(f"it took more than {seconds:g} s")
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with {process.exitcode}") from None
    finally:
        _kill(process)
        process.join()
    if error:
        raise RuntimeError(error)
    return result


def _kill(process: BaseProcess) -> None:
    """Kills a process and all it has started, which would keep the device."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # one that leads a group has started it
        process.kill()


def _tell(sender: Connection, function: Callable, *arguments: object) -> None:
    if _OUTERMOST not in os.environ:
        os.environ[_OUTERMOST] = str(os.getpid())
        os.setpgid(0, 0)
    try:
        sender.send((function(*arguments), ""))
    except Exception as error:  # not every library's errors travel between processes
        sender.send((None, one_line(error)))
