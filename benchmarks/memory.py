"""Memory of the training step: as compiled, and where the device tells, as used at most."""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree
from ml_collections import ConfigDict

from benchmarks.apart import apart
from benchmarks.contest import Row
from benchmarks.training import SYNTHETIC, steps
from benchmarks.workload import Workload
from cassle_jax.parallel import REPLICATED, SHARDED, device_mesh
from cassle_jax.training.run import build_run
from cassle_jax.training.step import make_train_step

GIB = 2**30


def measure(work: Workload) -> list[Row]:
    """GiB of one device for the batch, four times it, with recomputation and in chunks."""
    rows = []
    large, chunk = 4 * work.batch, work.batch
    for name, settings in (
        (f"batch {work.batch}", {}),
        (f"batch {large}", {"batch_size": large}),
        (f"batch {large}, encoder.remat", {"batch_size": large, "encoder__remat": True}),
        (f"batch {large}, chunk_size={chunk}", {"batch_size": large, "chunk_size": chunk}),
    ):  # fmt: skip
        config = work.config("method=moco_v2", **settings)
        rows += _rows("memory, as compiled", name, compiled_bytes, config)
        rows += _rows("memory, most in use", name, peak_bytes, config, work)
    return sorted(rows, key=lambda row: row.measurement)


def _rows(measurement: str, name: str, bytes_of: Callable, *arguments: object) -> list[Row]:
    """A row, or none where the device does not tell."""
    try:
        # A device only tells the most since its process began, whichever settings that was with.
        found = apart(bytes_of, *arguments)
    except RuntimeError as error:  # a batch that does not fit must not hide those that do
        return [Row(measurement, name, "GiB", note=str(error), failed=True)]
    return [Row(measurement, name, "GiB", (found / GIB,))] if found else []


def compiled_bytes(config: ConfigDict) -> int:
    """What XLA plans for: arguments, results that take no argument's place, and temporaries."""
    mesh = device_mesh()
    run = build_run(config, mesh, SYNTHETIC)
    canvas = config.data.canvas
    batch = {
        "image": jax.ShapeDtypeStruct((run.batch_size, canvas, canvas, 3), "uint8"),
        "size": jax.ShapeDtypeStruct((run.batch_size, 2), "int32"),
    }
    arguments = (
        _placed(jax.eval_shape(run.initial_state), mesh, REPLICATED),
        _placed(batch, mesh, SHARDED),
    )
    plan = make_train_step(run, mesh).lower(*arguments).compile().memory_analysis()
    return (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes
    )


def _placed(tree: PyTree, mesh: Mesh, where: PartitionSpec) -> PyTree:
    """As real arrays are, so that the program is the one that is run, and compiled once."""
    sharding = NamedSharding(mesh, where)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def peak_bytes(config: ConfigDict, work: Workload) -> int:
    """The most a device had in use since this process began, after steps; 0: it does not tell."""
    if "peak_bytes_in_use" not in (jax.local_devices()[0].memory_stats() or {}):
        return 0
    steps(config, dataclasses.replace(work, steps=2))
    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
