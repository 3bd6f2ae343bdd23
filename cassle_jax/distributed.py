"""Joins the processes of a run, and ends all of them when one ends.

Builds on JAX's multi-controller runtime, which starts only where the process is one of several.
When a process fails or dies, even by `kill -9`, the others end within a minute, and every process
prints one line with the reason.
"""

import atexit
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax

# The key-value store that the processes share has no public name.
from jax._src import distributed as runtime
from jax.experimental import multihost_utils

from cassle_jax.checks import ConfigError, differing, first_line, whole_number
from cassle_jax.command import (
    EXIT_OUTAGE,
    Stop,
    end_undisturbed,
    say_error,
    stop_of,
    stopping_signals,
)
from cassle_jax.faults import hurry
from cassle_jax.launchers import ADDRESS, runtime_arguments

JOIN_SECONDS = "CASSLE_JOIN_SECONDS"

# JAX declares a process dead after this time without a heartbeat, and ends the others.
HEARTBEAT_SECONDS = 30
_FAILURE_KEY = "cassle_jax/failure"
_STOP_KEY = "RECEIVED_PREEMPTION_NOTICE"  # JAX sets it when one of the processes gets SIGTERM
_FAILURE_SECONDS = 5  # time for a failure message to reach the other processes
# Reading a dataset's labels may take an hour; the heartbeat detects a dead process earlier.
_AGREE_MILLISECONDS = 2 * 3600 * 1000
# Largest difference in time between processes that evaluate the same features.
_ARRIVE_SECONDS = 120
_FOREVER_MILLISECONDS = 2**40
# Modules whose warnings concern the settings and the data, which all processes share.
_SHARED_MATTERS = (
    *("pretrain", "evaluate", "subjects", "data.datasets", "data.folder", "data.tar"),
    *("evaluation.bench", "evaluation.trainable", "evaluation.plan", "interop.weights"),
    *("training.probe", "training.recorded", "training.start_records"),
)
_RESUMABLE = "the last checkpoint is intact, and the same command continues from it"
# Matches errors of the runtime that another process causes.
_LOST = re.compile(
    "gloo|nccl|connection|socket|barrier|heartbeat|coordination|UNAVAILABLE|DEADLINE_EXCEEDED", re.I
)


@contextlib.contextmanager
def all_processes(*, saves_when_stopped: bool = False) -> Iterator[None]:
    """Context in which this process is joined with the other processes of the run, if any.

    Enter it before the first use of a device. An error inside ends this process with one line, and
    the others with the same line and exit code. A `Stop` that all processes raise together passes
    through. Processes other than the first log only what may concern one of them alone.

    Args:
      saves_when_stopped: whether `reached_preemption_sync_point` handles SIGTERM.

    Raises:
      ConfigError: the environment describes the processes incorrectly.
    """
    arguments = runtime_arguments(os.environ)
    if arguments is None:
        yield
        return
    group = _join(arguments, saves_when_stopped)
    try:
        _check_devices()
        # The first exchange of CPUs waits 30 s for the slowest process, each later one much longer.
        multihost_utils.sync_global_devices("cassle_jax: all have joined")
        yield
    except Stop as stop:
        if stop.alone:
            group.fail(str(stop), stop.code)
        raise
    except BaseException as error:
        if stop := stop_of(error):
            group.fail(str(stop), stop.code)
        group.fail_after(error)


def _check_devices() -> None:
    """Raises ConfigError unless all processes have as many devices, as they read equal shares."""
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"the processes have {', '.join(map(str, counts.values()))} devices; give all the same "
            "number (SLURM: equal --ntasks-per-node and --gpus-per-node on all hosts)"
        )


def agree(facts: Mapping[str, Any]) -> None:
    """Checks that all processes have the same facts, such as settings and data; waits for them all.

    Args:
      facts: JSON-serialisable values by name.

    Raises:
      ConfigError: a fact differs; the message gives its values here and in process 0.
    """
    if _group:
        _group.agree(dict(facts))


def first_says(value: Any) -> Any:
    """The JSON-serialisable value of process 0, in all processes; all must call this."""
    return _group.first_says(value) if _group else value


def all_arrive(where: str) -> None:
    """Waits until all processes reach this call.

    Args:
      where: name of the barrier, unique to the call.

    Raises:
      RuntimeError: another process does not arrive within 120 s.
    """
    if _group:
        _group.all_arrive(where)


def is_first_to(act: str) -> bool:
    """Whether this process is the first to call this with `act`, the name of a task for one."""
    return _group is None or _group.is_first_to(act)


def when_stopped(act: Callable[[], object]) -> None:
    """Calls `act` in a thread as soon as any of several processes gets SIGTERM.

    JAX handles the signal and reports it between steps only: too late for a wait within a step.
    """
    if _group:
        _group.when_stopped(act)


_group: "_ProcessGroup | None" = None


def _join(arguments: dict[str, Any], saves_when_stopped: bool) -> "_ProcessGroup":
    global _group
    if _group is None:
        _group = _ProcessGroup(arguments, saves_when_stopped)
    return _group


class _ProcessGroup:
    """The membership of this process in its run, from joining to the end of the process."""

    def __init__(self, arguments: dict[str, Any], saves_when_stopped: bool):
        jax.config.update("jax_enable_preemption_service", saves_when_stopped)
        with _killed_by_signals(but_for_jax=saves_when_stopped):
            _initialize(arguments)
        state = runtime.global_state
        self._client, self._index, self._count = state.client, state.process_id, state.num_processes
        self._said = 0
        self._ending = threading.Lock()
        self._listeners: list[threading.Thread] = []
        self._death_message = _DeathMessage(
            f"{self} ended abruptly: it was killed, or JAX ended it because another process was; "
            f"{_RESUMABLE}"
        )
        atexit.register(self._leave)
        self._start(self._listen)
        self.when_stopped(hurry.set)
        if self._index:
            _leave_shared_matters_to_the_first()

    def __str__(self) -> str:
        return f"process {self._index} of {self._count}"

    def first_says(self, value: Any) -> Any:
        """See `first_says`; process 0 does not wait for the others."""
        self._said += 1
        key = f"cassle_jax/said/{self._said}"
        if self._index == 0:
            self._client.key_value_set(key, json.dumps(value))
            return value
        return json.loads(self._client.blocking_key_value_get(key, _AGREE_MILLISECONDS))

    def agree(self, facts: dict[str, Any]) -> None:
        """See `agree`."""
        first = self.first_says(facts)
        facts, first = json.loads(json.dumps(facts)), json.loads(json.dumps(first))
        for name in differing(first, facts):
            raise ConfigError(
                f"{name}={facts.get(name)!r} in {self} and {first.get(name)!r} in process 0; "
                "start all processes with the same command, on the same data"
            )
        # Does not return if another process disagrees or has failed.
        self._client.wait_at_barrier(f"cassle_jax/agreed/{self._said}", _AGREE_MILLISECONDS)

    def all_arrive(self, where: str) -> None:
        """See `all_arrive`."""
        self._client.wait_at_barrier(f"cassle_jax/{where}", 1000 * _ARRIVE_SECONDS)

    def is_first_to(self, act: str) -> bool:
        """See `is_first_to`."""
        try:
            self._client.key_value_set(f"cassle_jax/first/{act}", str(self))
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
            return False
        return True

    def when_stopped(self, act: Callable[[], object]) -> None:
        """See `when_stopped`."""

        def listen() -> None:
            with contextlib.suppress(Exception):  # the runtime was shut down
                self._client.blocking_key_value_get(_STOP_KEY, _FOREVER_MILLISECONDS)
                act()

        self._start(listen)

    def fail(self, message: str, code: int) -> NoReturn:
        """Ends this process with a failure, and the others with the same one."""
        end_undisturbed()  # a handler that raised here would come back to the lock
        self._ending.acquire()
        with contextlib.suppress(Exception):  # the first of several failures is the one reported
            self._client.key_value_set(_FAILURE_KEY, json.dumps([str(self), code, message]))
        self._end(message, code)

    def fail_after(self, error: BaseException) -> NoReturn:
        """Ends this process after an unexpected error, or after the loss of another process.

        If another process has reported its failure, `_listen` ends this one during the wait.
        """
        end_undisturbed()
        if self._ending.locked():
            self._ending.acquire()  # for ever: `_listen` is ending this process
        with contextlib.suppress(OSError):  # standard error may be a file on a full disk
            traceback.print_exception(error)
        if not _LOST.search(f"{type(error).__name__} {error}"):
            self.fail(f"{type(error).__name__}: {first_line(error)}", 1)
        time.sleep(_FAILURE_SECONDS)
        self.fail(
            f"{self} probably lost another process ({first_line(error)}); {_RESUMABLE}",
            EXIT_OUTAGE,
        )

    def _listen(self) -> None:
        """Ends this process when another one reports a failure."""
        try:
            failure = self._client.blocking_key_value_get(_FAILURE_KEY, _FOREVER_MILLISECONDS)
        except Exception:  # the runtime was shut down, or is about to end this process
            return
        process, code, message = json.loads(failure)
        if self._ending.acquire(blocking=False):
            self._end(f"{process} ended: {message}", code)

    def _end(self, message: str, code: int) -> NoReturn:
        # An orderly exit would wait for processes that never arrive.
        say_error(message)
        self._death_message.cancel()
        with contextlib.suppress(Exception):
            self._client.wait_at_barrier("cassle_jax/left", 1000 * _FAILURE_SECONDS)
        if self._index == 0:
            time.sleep(1)  # JAX aborts processes that still run after the end of process 0
        os._exit(code)

    def _start(self, listen: Callable[[], None]) -> None:
        self._listeners.append(threading.Thread(target=listen, daemon=True))
        self._listeners[-1].start()

    def _leave(self) -> None:
        with self._ending:
            jax.distributed.shutdown()
            self._death_message.cancel()
        for each in self._listeners:  # one that returned from native code later would abort Python
            each.join(_FAILURE_SECONDS)


def _leave_shared_matters_to_the_first() -> None:
    """Leaves warnings of settings, data and features to the first process; all log their errors."""
    logging.getLogger("cassle_jax").setLevel(logging.WARNING)
    for module in _SHARED_MATTERS:
        logging.getLogger(f"cassle_jax.{module}").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="cassle_jax")


def _initialize(arguments: dict[str, Any]) -> None:
    """Calls `jax.distributed.initialize`; ends with one line if the processes do not connect."""
    seconds = whole_number(JOIN_SECONDS, os.environ.get(JOIN_SECONDS, "300"), least=1)
    address = os.environ.get(ADDRESS)
    if address:
        # gRPC would connect to process 0 through the web proxy.
        os.environ.setdefault("no_grpc_proxy", address.rpartition(":")[0])
        jax.config.update("jax_check_proxy_envs", False)
    which = f"process {arguments['process_id']}" if "process_id" in arguments else "a process"
    trouble = (
        f"{which} did not meet the others at {ADDRESS}={address or '(found by JAX)'}; check that "
        "all processes run, have different ids, and can reach that address"
    )
    death_message = _DeathMessage(trouble)

    def give_up():
        say_error(f"{trouble} within {JOIN_SECONDS}={seconds} s")
        death_message.cancel()
        os._exit(EXIT_OUTAGE)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=seconds + 60,  # JAX aborts after this time
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"{trouble} ({first_line(error)})") from error
    finally:
        timer.cancel()
        death_message.cancel()


@contextlib.contextmanager
def _killed_by_signals(*, but_for_jax: bool) -> Iterator[None]:
    """Lets a signal kill this process while native code waits and runs no Python handler.

    Args:
      but_for_jax: whether JAX handles SIGTERM from then on.
    """
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in stopping_signals():
            handlers[number] = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        if but_for_jax:
            handlers.pop(signal.SIGTERM, None)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _DeathMessage:
    """A line on standard error if this process dies without a chance to print one.

    A shell waits at a pipe that closes with this process, and then prints the line. It covers
    `kill -9`, the kernel's out-of-memory killer, and JAX, which aborts a process that lost another.
    """

    def __init__(self, line: str):
        waiting = 'trap "" HUP INT TERM; read -r _ || echo "error: $1" >&2'
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", waiting, "sh", line], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )

    def cancel(self) -> None:
        """Ends the shell without printing the line."""
        with contextlib.suppress(OSError):
            self._shell.communicate(b"\n")
