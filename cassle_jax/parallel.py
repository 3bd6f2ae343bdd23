"""Maps code written for one device over all devices, in this one place.

All other code is written for a single device with a named axis: it averages with `pmean` and
collects with `all_gather`. `parallel` runs such a function on every device of a one-axis mesh, in
one process or several. It replaces `jax.pmap`, which is in maintenance mode and, since JAX 0.10, a
wrapper around the `jax.shard_map` used here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "devices"
REPLICATED = PartitionSpec()
SHARDED = PartitionSpec(AXIS)

PyTree = Any


def device_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices of all processes (or the given ones), with one axis named `AXIS`.

    Devices are sorted by process, so the global batch is the concatenation of the processes' rows.
    """
    devices = jax.devices() if devices is None else devices
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def parallel(
    function: Callable,
    mesh: Mesh,
    *,
    inputs: Sequence[PartitionSpec],
    outputs: PartitionSpec | Sequence[PartitionSpec],
    donate: Sequence[int] = (),
) -> Callable:
    """Compiles `function` to run on every device of the mesh, on that device's shard.

    Args:
      function: a function for one device; may use collectives over `AXIS`.
      mesh: the devices.
      inputs: one spec per argument: `SHARDED` along its first axis, or `REPLICATED`.
      outputs: one spec per result; a replicated result must be equal on all devices.
      donate: positions of the arguments whose memory the results may reuse.
    """
    # As under pmap, the function guarantees replication itself (check_vma=False): gradients are
    # local to a device until the function averages them.
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=tuple(inputs), out_specs=outputs, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=tuple(donate))


def on_every_device(make: Callable[..., PyTree], mesh: Mesh, *arguments: np.ndarray) -> PyTree:
    """Computes `make` of host arrays, with the result on every device of every process."""
    return jax.jit(make, out_shardings=NamedSharding(mesh, REPLICATED))(*arguments)


def shard_batch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Builds global arrays, split over the mesh, from this process's rows of a global batch.

    Args:
      tree: host arrays of shape [global batch / processes, …]; the rows of process 0 come first.
      mesh: the devices.
    """
    sharding = NamedSharding(mesh, SHARDED)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies host arrays, equal in all processes, to every device.

    Does not check that they are equal; that would send all of them between the processes.
    """
    sharding = NamedSharding(mesh, REPLICATED)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x), np.shape(x)), tree
    )


def in_all_processes(here: bool) -> bool:
    """Whether `here` is true in every process; all processes must call this."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.array(here)).all())
