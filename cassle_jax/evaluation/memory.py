"""Refuses features that this machine's memory cannot hold, before they are extracted."""

import os
from collections.abc import Callable
from pathlib import Path

import jax

from cassle_jax.data import DataError
from cassle_jax.evaluation.bench import Bench

_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_memory(
    bench: Bench, bytes_of: Callable[[int, int], tuple[int, int]], *, copies: int = 1
) -> None:
    """Refuses features that, with the solver's arrays, are sure to exceed the memory.

    Args:
      bench: the dataset; its training and validation parts are fitted together at the end.
      bytes_of: bytes that the solver takes for rows × features, on the host and on a device. On
        CPUs both are the host's.
      copies: rows per image of these parts.

    Raises:
      DataError: the memory of this machine, or of its device, is smaller.
    """
    images = [len(bench.store.limited(part)) for part in (bench.data.train, bench.data.val)]
    rows, features = copies * sum(images), bench.subject.feature_width
    solver, device = bytes_of(rows, features)
    both = 2 * 4 * rows * features  # float32, of both parts and of their union
    on_host = jax.default_backend() == "cpu"
    for what, needed, there in (
        ("this machine", both + (max(solver, device) if on_host else solver), host_bytes()),
        ("a device", device, None if on_host else _device_bytes()),
    ):
        if there is not None and needed > there:
            fitting = int(0.8 * max(images) * there / needed)
            raise DataError(
                f"{rows} × {features} features of {bench.data.name} need {needed / 1e9:.1f} GB of "
                f"memory, and {what} has {there / 1e9:.1f} GB; limit={max(fitting, 1)} would fit"
            )


def host_bytes() -> int:
    """Bytes of memory that this process may use."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in _CGROUPS:  # limits of a container
        try:
            there = min(there, int(Path(name).read_text()))
        except (OSError, ValueError):  # none, or without a limit
            continue
    return there


def _device_bytes() -> int | None:
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
