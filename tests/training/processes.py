"""Starts the tiny run as several processes on the loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.tiny import on_one_device

ROOT = Path(__file__).parents[2]
SECONDS = 300


def start(workdir, count, *settings, each=None, module="tests.training.run_tiny", **variables):
    """`count` processes of one device; `each` gives the further settings of a process by index."""
    port = free_port()
    environment = {**on_one_device(os.environ), **variables}
    if count > 1:
        environment["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
        environment["JAX_NUM_PROCESSES"] = str(count)
    processes = []
    for index in range(count):
        further = each(index) if each else ()
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", module, str(workdir), *settings, *further],
                cwd=ROOT,
                env={**environment, "JAX_PROCESS_ID": str(index)} if count > 1 else environment,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def ends(processes):
    """Exit codes and standard errors; a process that does not end in time fails the test."""
    try:
        errors = [process.communicate(timeout=SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def steps_saved(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def saved_arrays(workdir):
    """The floating-point arrays of the newest checkpoint, read without the project."""
    path = workdir / "checkpoints" / str(steps_saved(workdir)[-1]) / "state"
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(path).tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    restored = handler.restore(path, args=ocp.args.PyTreeRestore(tree, as_numpy))
    handler.close()
    return {
        jax.tree_util.keystr(key): value
        for key, value in jax.tree_util.tree_leaves_with_path(restored)
        if np.issubdtype(getattr(value, "dtype", int), np.floating)
    }


def assert_same(workdir, expected):
    found, expected = saved_arrays(workdir), saved_arrays(expected)
    assert found.keys() == expected.keys() and len(found) > 20
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
