"""Lets a command that a test starts run in a fork of a process that has already imported it.

Python imports this module whenever it starts with this folder on PYTHONPATH. Where it starts as
`python -m MODULE`, the process of `preloaded.py` forks one that runs the module with this process's
arguments, environment, files, limits and signals. This process passes signals on and ends as the
fork does; where it is killed, so is the fork.
"""

import os
import sys

MODULES = ("cassle_jax.", "tests.training.run_")


def hand_over(address):
    """Ends this process as the fork ends; returns where no fork can take its place."""
    import contextlib
    import signal

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    ignored = [number for number in numbers if before[number] is signal.SIG_IGN]
    process, early = 0, []

    def pass_on(number, _):
        if process:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(process, number)
        else:
            early.append(number)

    try:
        request = describe(ignored)
        for number in set(numbers) - set(ignored):
            signal.signal(number, pass_on)
        process, connection = requested(address, request)
    except OSError:  # a closed standard stream, or the preloaded process has ended
        process = 0
    if not process:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in early:
            os.kill(os.getpid(), number)
        return
    try:
        for number in early:
            pass_on(number, None)
        end_as(int.from_bytes(connection.recv(8) or b"\xff\x00", "big"))
    finally:
        os._exit(255)  # the module never runs twice


def describe(ignored):
    """All of this process that its module may look at."""
    import resource
    import signal
    from pathlib import Path

    for stream in (0, 1, 2):
        os.fstat(stream)
    limits = (getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_"))
    umask = os.umask(0)
    os.umask(umask)
    return {
        "executable": sys.executable,
        "module": sys.orig_argv[2],
        "arguments": sys.orig_argv[3:],
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "ignored": ignored,
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "limits": [(number, resource.getrlimit(number)) for number in limits],
        "umask": umask,
    }


def requested(address, request):
    """The number of the fork's process, 0 for none, and the connection that learns of its end."""
    import array
    import json
    import socket

    message = json.dumps(request).encode()
    files = array.array("i", (0, 1, 2))
    length = len(message).to_bytes(8, "big")
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    connection.sendmsg([length], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    connection.sendall(message)
    return int.from_bytes(connection.recv(8), "big"), connection


def end_as(status):
    """Ends this process with a status of `os.waitpid`."""
    import signal

    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


ADDRESS = os.environ.get("CASSLE_JAX_PRELOADED")
if ADDRESS and sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2].startswith(MODULES):
    hand_over(ADDRESS)
