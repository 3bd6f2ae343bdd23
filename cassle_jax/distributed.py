"""Joins the processes of a run, and lets none of them wait for one that is gone.

JAX's multi-controller runtime is the engine. What is added: it is found where a run is one of
several processes and left alone where it is not, and a process that ends, by a mistake or by
`kill -9`, takes the others with it within a minute, each with a line that says why.
"""

import atexit
import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import jax

# The key-value store that processes meet in has no public name.
from jax._src import distributed as runtime

from cassle_jax.command import EXIT_WRONG_SETTING, Stop
from cassle_jax.config import ConfigError
from cassle_jax.data import DataError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
JOIN_SECONDS = "CASSLE_JOIN_SECONDS"

# A process that has not been heard of for so long is dead; JAX then ends the others.
HEARTBEAT_SECONDS = 30
# As a process that JAX aborts: what starts runs again limits how often.
EXIT_LOST = 134
_FAREWELL = "cassle_jax/farewell"
_FAREWELL_SECONDS = 5
# Reading a dataset's labels may take an hour; a process that is gone is told by its heartbeat.
_AGREE_MILLISECONDS = 2 * 3600 * 1000
# What one process may take longer than another to look at features that both have.
_ARRIVE_SECONDS = 120
_FOREVER_MILLISECONDS = 2**40
_CONTINUES = "what was saved is whole, and the same command continues"
# What the runtime says where another process is the reason.
_LOST = re.compile(
    "gloo|nccl|connection|socket|barrier|heartbeat|coordination|UNAVAILABLE|DEADLINE_EXCEEDED", re.I
)


def how_to_join(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` needs to be told here; `None` for a process alone.

    In this order: the variables `JAX_COORDINATOR_ADDRESS` (host:port of process 0),
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; Open MPI; SLURM; a TPU pod. Of the last three JAX
    knows the addresses. A single task of SLURM, the shell of an allocation and a TPU of one host
    are processes alone.

    Args:
      environment: variables.

    Raises:
      ConfigError: variables that cannot work, or only some of them.
    """
    if environment.get(COUNT) or environment.get(INDEX):
        return _by_variables(environment)
    found = _open_mpi(environment) or _slurm(environment) or _tpu_pod(environment)
    if environment.get(ADDRESS) and not found:
        return _by_variables(environment)
    return found


def _by_variables(environment: Mapping[str, str]) -> dict[str, Any] | None:
    missing = [name for name in (ADDRESS, COUNT, INDEX) if not environment.get(name)]
    if missing and environment.get(COUNT) != "1":
        raise ConfigError(
            f"{' and '.join(missing)} must be set too where any of {ADDRESS}, {COUNT} and {INDEX} "
            "is; unset them all to run as one process"
        )
    count = _number(COUNT, environment[COUNT], least=1)
    if count == 1:
        return None
    index = _number(INDEX, environment[INDEX], least=0)
    if index >= count:
        raise ConfigError(f"{INDEX}={index} is not below {COUNT}={count}; use 0 to {count - 1}")
    if not re.fullmatch(r".+:\d+", environment[ADDRESS]):
        raise ConfigError(
            f"{ADDRESS}={environment[ADDRESS]!r} has no port; use host:port of process 0, such as "
            "10.0.0.1:7654"
        )
    return {
        "coordinator_address": environment[ADDRESS],
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _number(name: str, value: str, *, least: int) -> int:
    if not value.isdecimal() or int(value) < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
    return int(value)


def _open_mpi(environment: Mapping[str, str]) -> dict[str, Any] | None:
    count = environment.get("OMPI_COMM_WORLD_SIZE", "1")
    if count == "1":
        return None
    if "OMPI_MCA_orte_hnp_uri" not in environment:
        # From version 5 on. Alone, every process would write the same workdir.
        raise ConfigError(
            f"OMPI_COMM_WORLD_SIZE={count}, and this Open MPI does not tell where process 0 is; set"
            f" {ADDRESS}, {COUNT}=$OMPI_COMM_WORLD_SIZE and {INDEX}=$OMPI_COMM_WORLD_RANK"
        )
    return {"cluster_detection_method": "ompi"}


def _slurm(environment: Mapping[str, str]) -> dict[str, Any] | None:
    step = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(environment.get(name) for name in step):
        return None  # a batch script or a login shell: tasks are made by srun
    # SLURM_NTASKS counts the allocation's tasks, also in the one shell that salloc opens.
    count = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    if count == "1":
        return None
    return {
        "num_processes": int(count),
        "process_id": int(environment["SLURM_PROCID"]),
        "local_device_ids": _gpus_of_task(environment),
        "cluster_detection_method": "slurm",
    }


def _gpus_of_task(environment: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs it sees a task takes; `None` leaves it to JAX.

    JAX gives the task of number n on its host the GPU n alone. That leaves GPUs idle where a host
    has fewer tasks than GPUs, and fails where SLURM shows each task only its own.
    """
    if environment.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = len(visible.split(",")) if visible else len(list(Path("/dev").glob("nvidia[0-9]*")))
    tasks = _tasks_of_host(environment)
    bind = environment.get("SLURM_GPU_BIND", "")
    # Bound to none, every task sees all GPUs of the host, also where it asked for some of its own.
    own = not bind.endswith("none") and (bind or environment.get("SLURM_GPUS_PER_TASK"))
    if not gpus:
        return None
    if own or tasks == 1 or gpus < tasks:
        return list(range(gpus))
    share, task = gpus // tasks, int(environment["SLURM_LOCALID"])
    return list(range(task * share, (task + 1) * share))


def _tasks_of_host(environment: Mapping[str, str]) -> int:
    """Of `2(x3),1`, which is two tasks on each of three hosts and one on a fourth, ours."""
    described = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    hosts = []
    for tasks, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", described):
        hosts += [int(tasks)] * int(times or 1)
    return hosts[min(int(environment.get("SLURM_NODEID", "0")), len(hosts) - 1)]


def _tpu_pod(environment: Mapping[str, str]) -> dict[str, Any] | None:
    devices = any(list(Path("/dev").glob(each)) for each in ("accel[0-9]*", "vfio/[0-9]*"))
    wanted = environment.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    alone = "TPU_PROCESS_BOUNDS" in environment or "TPU_VISIBLE_CHIPS" in environment
    if not devices or not wanted or alone or not find_spec("libtpu"):
        return None
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        several = "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1
        return {"cluster_detection_method": "gketpu"} if several else None
    if "TPU_SKIP_MDS_QUERY" in environment:
        return None
    return {"cluster_detection_method": "gcetpu"}


@contextlib.contextmanager
def all_processes(*, saves_when_stopped: bool = False) -> Iterator[None]:
    """Joins the other processes of the run, where there are any, and stays with them.

    Must be entered before the first use of a device. An error within ends this process with one
    line, and the others with a line that repeats it and the same exit code; the exception is a
    `Stop` that all processes raise together. Other processes than the first log only warnings.

    Args:
      saves_when_stopped: SIGTERM is left to `reached_preemption_sync_point`.

    Raises:
      ConfigError: what the environment says of the processes cannot work.
    """
    arguments = how_to_join(os.environ)
    if arguments is None:
        yield
        return
    company = _join(arguments, saves_when_stopped)
    try:
        yield
    except Stop as stop:
        if stop.alone:
            company.leave(str(stop), stop.code)
        raise
    except (ConfigError, DataError) as error:
        company.leave(str(error), EXIT_WRONG_SETTING)
    except BaseException as error:
        company.leave_after(error)


def agree(facts: Mapping[str, Any]) -> None:
    """Refuses to go on where another process was told or sees something else than the first.

    Args:
      facts: by name, values that JSON can hold.

    Raises:
      ConfigError: names the first fact that differs, here and in process 0.
    """
    if _company:
        _company.agree(dict(facts))


def all_arrive(where: str) -> None:
    """Waits until all processes have come here, if there are several.

    Args:
      where: names the place; no two calls have the same.

    Raises:
      RuntimeError: another process did not come in time.
    """
    if _company:
        _company.all_arrive(where)


_company: "_Company | None" = None


def _join(arguments: dict[str, Any], saves_when_stopped: bool) -> "_Company":
    global _company
    if _company is None:
        _company = _Company(arguments, saves_when_stopped)
    return _company


class _Company:
    """This process among the others, from joining to the end of the process."""

    def __init__(self, arguments: dict[str, Any], saves_when_stopped: bool):
        jax.config.update("jax_enable_preemption_service", saves_when_stopped)
        _initialize(arguments)
        state = runtime.global_state
        self._client, self._index, self._count = state.client, state.process_id, state.num_processes
        self._agreed = 0
        self._ending = threading.Lock()
        self._words = _LastWords(
            f"{self} ended without a word: it was killed, or JAX ended it because another process "
            f"was; {_CONTINUES}"
        )
        atexit.register(self._part)
        threading.Thread(target=self._listen, daemon=True).start()
        if self._index:
            logging.getLogger("cassle_jax").setLevel(logging.WARNING)

    def __str__(self) -> str:
        return f"process {self._index} of {self._count}"

    def agree(self, facts: dict[str, Any]) -> None:
        """See `agree`; the first process does not wait for the others."""
        self._agreed += 1
        key = f"cassle_jax/facts/{self._agreed}"
        if self._index == 0:
            self._client.key_value_set(key, json.dumps(facts))
            return
        first = json.loads(self._client.blocking_key_value_get(key, _AGREE_MILLISECONDS))
        facts = json.loads(json.dumps(facts))
        for name in sorted(first.keys() | facts.keys()):
            if first.get(name) != facts.get(name):
                raise ConfigError(
                    f"{name}={facts.get(name)!r} in {self} and {first.get(name)!r} in process 0; "
                    "start all processes with the same command, on the same data"
                )

    def all_arrive(self, where: str) -> None:
        """See `all_arrive`."""
        self._client.wait_at_barrier(f"cassle_jax/{where}", 1000 * _ARRIVE_SECONDS)

    def leave(self, message: str, code: int) -> NoReturn:
        """Ends this process with its own mistake, and the others with the same."""
        self._ending.acquire()
        with contextlib.suppress(Exception):  # the first of several mistakes is told
            self._client.key_value_set(_FAREWELL, json.dumps([str(self), code, message]))
        self._end(message, code)

    def leave_after(self, error: BaseException) -> NoReturn:
        """Ends this process after what is a fault of the program, or the loss of another process.

        Whoever ended by a mistake has said so: then `_listen` ends this process meanwhile.
        """
        traceback.print_exception(error)
        if not _LOST.search(f"{type(error).__name__} {error}"):
            self.leave(f"{type(error).__name__}: {_first_line(error)}", 1)
        time.sleep(_FAREWELL_SECONDS)
        self.leave(
            f"{self} probably lost another process ({_first_line(error)}); {_CONTINUES}", EXIT_LOST
        )

    def _listen(self) -> None:
        """Ends this process when another one says that it ends."""
        try:
            said = self._client.blocking_key_value_get(_FAREWELL, _FOREVER_MILLISECONDS)
        except Exception:  # the runtime was shut down, or is about to end this process
            return
        who, code, message = json.loads(said)
        if self._ending.acquire(blocking=False):
            self._end(f"{who} ended: {message}", code)

    def _end(self, message: str, code: int) -> NoReturn:
        # An orderly exit would wait for processes that do not come any more.
        print(f"error: {message}", file=sys.stderr, flush=True)
        self._words.withdraw()
        with contextlib.suppress(Exception):
            self._client.wait_at_barrier("cassle_jax/left", 1000 * _FAREWELL_SECONDS)
        if self._index == 0:
            time.sleep(1)  # JAX aborts processes that still run when the first one is gone
        os._exit(code)

    def _part(self) -> None:
        with self._ending:
            jax.distributed.shutdown()
            self._words.withdraw()


def _initialize(arguments: dict[str, Any]) -> None:
    """Calls `jax.distributed.initialize`; where the processes do not meet, ends with one line."""
    seconds = _number(JOIN_SECONDS, os.environ.get(JOIN_SECONDS, "300"), least=1)
    address = os.environ.get(ADDRESS)
    if address:
        # gRPC would ask a proxy of the web for the way to process 0.
        os.environ.setdefault("no_grpc_proxy", address.rpartition(":")[0])
        jax.config.update("jax_check_proxy_envs", False)
    which = f"process {arguments['process_id']}" if "process_id" in arguments else "a process"
    trouble = (
        f"{which} did not meet the others at {ADDRESS}={address or '(found by JAX)'}; check that "
        "all were started, each with an id of its own, and can reach that address"
    )
    words = _LastWords(trouble)

    def give_up():
        print(f"error: {trouble} within {JOIN_SECONDS}={seconds} s", file=sys.stderr, flush=True)
        words.withdraw()
        os._exit(EXIT_WRONG_SETTING)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=seconds + 60,  # after which JAX aborts
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"{trouble} ({_first_line(error)})") from error
    finally:
        timer.cancel()
        words.withdraw()


class _LastWords:
    """A line on standard error for when this process ends and can say nothing itself.

    A shell waits at a pipe that closes with this process, whatever ends it: `kill -9`, the system
    short of memory, or JAX, which aborts a process that cannot go on without another.
    """

    def __init__(self, line: str):
        waiting = 'trap "" HUP INT TERM; read -r _ || echo "error: $1" >&2'
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", waiting, "sh", line], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )

    def withdraw(self) -> None:
        """Says nothing any more."""
        with contextlib.suppress(OSError):
            self._shell.communicate(b"\n")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
