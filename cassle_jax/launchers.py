"""Reads from a launcher's variables which of several processes this one is."""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cassle_jax.checks import ConfigError, whole_number

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def runtime_arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; `None` for a single process.

    Reads, in this order: the variables `JAX_COORDINATOR_ADDRESS` (host:port of process 0),
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; Open MPI; SLURM; a TPU pod. JAX finds the addresses of
    the last three. A single SLURM task, the shell of an allocation and a TPU with one host count as
    a single process.

    Args:
      environment: environment variables.

    Raises:
      ConfigError: variables are invalid or incomplete.
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
            f"{' and '.join(missing)} must be set too if any of {ADDRESS}, {COUNT} and {INDEX} is "
            "set; unset all of them to run as one process"
        )
    count = whole_number(COUNT, environment[COUNT], least=1)
    if count == 1:
        return None
    index = whole_number(INDEX, environment[INDEX], least=0)
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


def _open_mpi(environment: Mapping[str, str]) -> dict[str, Any] | None:
    count = environment.get("OMPI_COMM_WORLD_SIZE", "1")
    if count == "1":
        return None
    if "OMPI_MCA_orte_hnp_uri" not in environment:
        # Open MPI 5 and later. Unjoined processes would all write to the same workdir.
        raise ConfigError(
            f"OMPI_COMM_WORLD_SIZE={count}, but this Open MPI does not report the address of "
            f"process 0; set {ADDRESS}, {COUNT}=$OMPI_COMM_WORLD_SIZE and "
            f"{INDEX}=$OMPI_COMM_WORLD_RANK"
        )
    return {"cluster_detection_method": "ompi"}


def _slurm(environment: Mapping[str, str]) -> dict[str, Any] | None:
    step = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(environment.get(name) for name in step):
        return None  # a batch script or a login shell; only srun starts tasks
    # SLURM_NTASKS counts the tasks of the allocation, even in the single shell that salloc opens.
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
    """Indices of the task's GPUs among the visible ones; `None` leaves the choice to JAX.

    JAX gives task n of a host GPU n alone. That leaves GPUs idle on a host with fewer tasks than
    GPUs, and fails where SLURM hides the GPUs of other tasks.
    """
    if environment.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = len(visible.split(",")) if visible else len(list(Path("/dev").glob("nvidia[0-9]*")))
    tasks = _tasks_of_host(environment)
    bind = environment.get("SLURM_GPU_BIND", "")
    # Under a binding to none, a task sees all GPUs of the host, even if it requested its own.
    own = not bind.endswith("none") and (bind or environment.get("SLURM_GPUS_PER_TASK"))
    if not gpus:
        return None
    if own or tasks == 1 or gpus < tasks:
        return list(range(gpus))
    share, task = gpus // tasks, int(environment["SLURM_LOCALID"])
    return list(range(task * share, (task + 1) * share))


def _tasks_of_host(environment: Mapping[str, str]) -> int:
    """Number of tasks on this host; `2(x3),1` is two tasks on three hosts and one on a fourth."""
    described = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    hosts = []
    for tasks, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", described):
        hosts += [int(tasks)] * int(times or 1)
    return hosts[min(int(environment.get("SLURM_NODEID", "0")), len(hosts) - 1)]


def _tpu_pod(environment: Mapping[str, str]) -> dict[str, Any] | None:
    devices = any(list(Path("/dev").glob(name)) for name in ("accel[0-9]*", "vfio/[0-9]*"))
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
