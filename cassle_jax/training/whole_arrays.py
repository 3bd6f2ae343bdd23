"""Writes the arrays of a state whole, from one process, instead of a part from each process."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import type_handlers

# The store of arrays' metadata, such as a key's kind, and the context of files have no public name.
from orbax.checkpoint._src.metadata.array_metadata_store import Store, Validator
from orbax.checkpoint._src.serialization import tensorstore_utils

from cassle_jax.training.state import TrainState

# One process writes a checkpoint, into a new folder, so a lock protects nothing. Some file systems,
# such as Lustre without `flock`, have no locks, and every save would fail there. Where a later
# Orbax has another name for its context, saves take locks.
getattr(tensorstore_utils, "_DEFAULT_OCDBT_TS_CONTEXT", {})["file_io_locking"] = {"mode": "none"}


def whole_arrays(alone: ocp.options.MultiprocessingOptions) -> ocp.PyTreeCheckpointHandler:
    """The handler that writes arrays whole, from one process."""
    handler = type_handlers.ArrayHandler(
        primary_host=alone.primary_host, use_replica_parallel=False, array_metadata_store=Store()
    )
    registry = type_handlers.create_type_handler_registry((jax.Array, handler))
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry,
        array_metadata_validator=_OfOneProcess(),
        multiprocessing_options=alone,
    )


class _OfOneProcess(Validator):
    """Accepts arrays that one of several processes wrote; Orbax expects a part from each."""

    def validate_all_array_metadatas(self, array_metadatas: Mapping[int, Any]) -> None:
        """Compares nothing, as there is nothing to compare with."""


def on_one_device(state: TrainState) -> TrainState:
    """The state on a device of this process, which needs no other process to read it."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), state)


def led_from_here(state: TrainState) -> TrainState:
    """The state as arrays whose first copy is this process's: Orbax writes that one."""
    if jax.process_index() == 0:
        return state

    def led(leaf: jax.Array) -> jax.Array:
        devices = leaf.sharding.mesh.devices.ravel().tolist()
        devices.sort(key=lambda device: device.process_index != jax.process_index())
        copies = NamedSharding(Mesh(np.array(devices), "copy"), PartitionSpec())
        parts = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, copies, parts)

    return jax.tree.map(led, state)
