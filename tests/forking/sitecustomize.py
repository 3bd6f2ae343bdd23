"""Lets a command that a test starts run in a fork of a process that has already imported it.

Python imports this module whenever it starts with this folder on PYTHONPATH. Where it starts as
`python -m MODULE`, the process of `preloaded.py` forks one that runs the module with this process's
arguments, environment, files, limits and signals. This process passes signals on and ends as the
fork does; where it is killed, so is the fork.
"""

import os
import sys

MODULES = ("cassle_jax.", "submitit.core._submit", "tests.training.run_tiny")
PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


def hand_over(address):
    """Ends this process as the fork ends; returns where no fork can take its place."""
    import array
    import json
    import resource
    import signal
    import socket
    from pathlib import Path

    preloaded = socket.socket(socket.AF_UNIX)
    try:
        preloaded.connect(address)
    except OSError:  # it has ended
        return
    limits = (getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_"))
    numbers = [getattr(signal, name) for name in PASSED_ON]
    before = {number: signal.getsignal(number) for number in numbers}
    process, early = 0, []

    def pass_on(number, _):
        if process:
            os.kill(process, number)
        else:
            early.append(number)

    ignored = [number for number in numbers if before[number] is signal.SIG_IGN]
    for number in set(numbers) - set(ignored):
        signal.signal(number, pass_on)
    umask = os.umask(0)
    os.umask(umask)
    request = {
        "module": sys.orig_argv[2],
        "arguments": sys.orig_argv[3:],
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "ignored": ignored,
        "limits": [(number, resource.getrlimit(number)) for number in limits],
        "umask": umask,
    }
    message = json.dumps(request).encode()
    files = array.array("i", (0, 1, 2))
    length = len(message).to_bytes(8, "big")
    preloaded.sendmsg([length], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    preloaded.sendall(message)
    process = int.from_bytes(preloaded.recv(8), "big")
    if not process:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in early:
        os.kill(process or os.getpid(), number)
    if process:
        status = int.from_bytes(preloaded.recv(8) or b"\xff\x00", "big")  # it has ended
        if os.WIFSIGNALED(status):
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
            os.kill(os.getpid(), os.WTERMSIG(status))
        os._exit(os.WEXITSTATUS(status))


ADDRESS = os.environ.get("CASSLE_JAX_PRELOADED")
if ADDRESS and sys.orig_argv[1:2] == ["-m"] and sys.orig_argv[2].startswith(MODULES):
    hand_over(ADDRESS)
