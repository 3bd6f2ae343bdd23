"""The process that has imported what commands need, and forks one for each; see sitecustomize.py.

python tests/forking/preloaded.py FILE_DESCRIPTOR PROCESS   # a listening socket, its owner
"""

import array
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
COMMANDS = ("evaluate", "export", "prepare", "pretrain", "sweep", "tables", "transfer")
READ_LATER = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
FIXED = (signal.SIGKILL, signal.SIGSTOP)
HANDLERS = {each: signal.getsignal(each) for each in range(1, 32) if each not in FIXED}


def read_at_import(environment):
    """What a process reads of its environment while it imports JAX and this project."""
    names = [name for name in environment if name.startswith(("JAX_", "PYTHON", "LC_", "LANG"))]
    path = environment.get("PYTHONPATH", "").split(os.pathsep)
    read = {name: environment[name] for name in names if name not in READ_LATER}
    return {**read, "PYTHONPATH": set(path) - {str(ROOT), str(FOLDER), ""}}


def fits(request):
    """Whether a fork has imported what the process itself would import."""
    environment, folder = request["environment"], Path(request["folder"])
    if request["executable"] != sys.executable:
        return False
    if folder != ROOT:  # which Python looks through first
        path = environment.get("PYTHONPATH", "").split(os.pathsep)
        packages = any((folder / name).exists() for name in ("cassle_jax", "tests"))
        if packages or str(ROOT) not in path:
            return False
    return read_at_import(environment) == read_at_import(os.environ)


def received(connection):
    """A request, or nothing from a process that has ended, and its files."""
    size = array.array("i").itemsize
    length, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * size))
    files, message = array.array("i"), b""
    for _, _, data in ancillary:
        files.frombytes(data)
    while len(message) < int.from_bytes(length, "big"):
        if not (part := connection.recv(1 << 16)):
            return None, files
        message += part
    return (json.loads(message) if message else None), files


def become(request, files):
    """Gives a fork all that its module may look at, except the ids of its process and group."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    for number, handler in HANDLERS.items():
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    for number, limit in request["limits"]:
        resource.setrlimit(number, limit)
    os.umask(request["umask"])
    os.chdir(request["folder"])
    sys.path[0] = request["folder"]
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # of another TMPDIR
    sys.argv = [request["module"], *request["arguments"]]


class Server:
    """Forks, waits for the forks, and kills those whose process was killed."""

    def __init__(self, listening, tests):
        self.listening, self.tests = listening, tests
        self.events = selectors.DefaultSelector()
        self.events.register(listening, selectors.EVENT_READ)
        self.forks = {}  # their connections, by process

    def serve(self):
        """Forks as long as the tests run; returns in a fork, with its request and files."""
        while os.getppid() == self.tests:
            ready = [key.fileobj for key, _ in self.events.select(0.02 if self.forks else 1.0)]
            # First ends the forks of killed processes: one that starts later must not meet them.
            for process, connection in list(self.forks.items()):
                killed = connection in ready
                if killed:
                    os.kill(process, signal.SIGKILL)
                ended, status = os.waitpid(process, 0 if killed else os.WNOHANG)
                if ended:
                    self.forget(process, status)
            if self.listening in ready and (begun := self.begin(self.listening.accept()[0])):
                return begun
        for process in self.forks:
            os.kill(process, signal.SIGKILL)
        sys.exit()

    def begin(self, connection):
        """Forks for a process that has just started, or lets it go on by itself."""
        try:
            request, files = received(connection)
            fork = request is not None and fits(request)
        except OSError:  # the process has ended, or its folder cannot be read
            connection.close()
            return None
        process = os.fork() if fork else 0
        if fork and not process:
            return request, files
        for file in files:
            os.close(file)
        if fork:
            self.events.register(connection, selectors.EVENT_READ)
            self.forks[process] = connection
        with contextlib.suppress(OSError):  # of a process that was killed meanwhile
            connection.sendall(process.to_bytes(8, "big"))
        if not fork:
            connection.close()
        return None

    def forget(self, process, status):
        connection = self.forks.pop(process)
        self.events.unregister(connection)
        with connection, contextlib.suppress(OSError):
            connection.sendall(status.to_bytes(8, "big"))


def start():
    """Starts the process for all Pythons that this one and its children start.

    Returns:
      What ends it; `None` where nothing is started. Coverage measures a process from its start on.
    """
    if sys.platform != "linux" or "COVERAGE_PROCESS_CONFIG" in os.environ:
        return None
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # a socket's path is short
    address = os.environ["CASSLE_JAX_PRELOADED"] = str(folder / "socket")
    path = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        file = listening.fileno()
        command = [sys.executable, __file__, str(file), str(os.getpid())]
        null = subprocess.DEVNULL
        process = subprocess.Popen(command, pass_fds=[file], stdin=null, stdout=null)

    def end():
        process.kill()
        process.wait()
        shutil.rmtree(folder)

    return end


def main(descriptor, tests):
    sys.path[0] = str(ROOT)
    listening = socket.socket(fileno=descriptor)
    for name in (*(f"cassle_jax.{command}" for command in COMMANDS), "tests.tiny"):
        importlib.import_module(name)
    gc.freeze()
    server = Server(listening, tests)
    request, files = server.serve()
    server.events.close()
    for connection in (listening, *server.forks.values()):
        connection.close()
    become(request, files)
    sys.modules["cassle_jax"].switch_off_ynnpack()  # as its import does
    sys.modules.pop(request["module"], None)
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
