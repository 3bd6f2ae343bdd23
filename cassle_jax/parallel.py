"""The one place where code written for one device is mapped over all of them.

Everything else is written for a single device that knows the name of an axis: it averages with
`pmean` and looks around with `all_gather`. `parallel` runs such a function on every device of a
one-axis mesh, of one process or of many. It does what `jax.pmap` did; pmap itself is in maintenance
and, since JAX 0.10, a wrapper around the `jax.shard_map` used here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "devices"
REPLICATED = PartitionSpec()
SHARDED = PartitionSpec(AXIS)

PyTree = Any


def device_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all processes (or those given) as one axis named `AXIS`.

    A process's devices stand together, in the order of the processes, so that the rows each
    process reads make up the global batch in that order.
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
    """Compiles `function` to run on every device of the mesh at once, each on its shard.

    Args:
      function: written for one device; may use collectives over `AXIS`.
      mesh: the devices.
      inputs: for each argument, `SHARDED` along its first axis or `REPLICATED`.
      outputs: for each result, likewise; a replicated result must be equal on all devices.
      donate: positions of the arguments whose memory the results may take.
    """
    # As under pmap, replication is the function's own promise (check_vma=False): gradients stay
    # this device's own until they are averaged explicitly.
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=tuple(inputs), out_specs=outputs, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=tuple(donate))


def on_every_device(make: Callable[..., PyTree], mesh: Mesh, *arguments: np.ndarray) -> PyTree:
    """What `make` computes of host arrays, the same on every device of every process."""
    return jax.jit(make, out_shardings=NamedSharding(mesh, REPLICATED))(*arguments)


def shard_batch(tree: PyTree, mesh: Mesh) -> PyTree:
    """This process's rows of a global batch as global arrays, split over the mesh's devices.

    Args:
      tree: host arrays of shape [global batch / processes, …]; the rows of process 0 come first.
      mesh: the devices.
    """
    sharding = NamedSharding(mesh, SHARDED)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Host arrays, the same in every process, as arrays on every device.

    That they are the same is not checked, which would send them all between the processes.
    """
    sharding = NamedSharding(mesh, REPLICATED)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x), np.shape(x)), tree
    )
