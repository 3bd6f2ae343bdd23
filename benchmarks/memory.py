"""Measures the memory of the training step: as compiled, and the peak that the device reports."""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree
from ml_collections import ConfigDict

from benchmarks.contest import Row
from benchmarks.isolated import run_isolated
from benchmarks.training import SYNTHETIC, steps
from benchmarks.workload import Workload
from cassle_jax.parallel import REPLICATED, SHARDED, device_mesh
from cassle_jax.training.run import build_run
from cassle_jax.training.step import make_train_step

GIB = 2**30


def measure(work: Workload) -> list[Row]:
    """Measures GiB per device: for the batch, four times the batch, with remat, and in chunks."""
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
    """One row, or none if the device does not report its memory."""
    try:
        # A device reports the peak since the start of the process, so every setting has its own.
        count = run_isolated(bytes_of, *arguments)
    except RuntimeError as error:  # a batch that does not fit must not hide the others
        return [Row(measurement, name, "GiB", note=str(error), failed=True)]
    return [Row(measurement, name, "GiB", (count / GIB,))] if count else []


def compiled_bytes(config: ConfigDict) -> int:
    """Bytes that XLA plans: arguments, results without reuse of arguments, and temporaries."""
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
    """Adds the sharding of real arrays, so the compiled program is the one that training runs."""
    sharding = NamedSharding(mesh, where)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def peak_bytes(config: ConfigDict, work: Workload) -> int:
    """Peak bytes of a device after some steps; 0 if the device does not report it."""
    if "peak_bytes_in_use" not in (jax.local_devices()[0].memory_stats() or {}):
        return 0
    steps(config, dataclasses.replace(work, steps=2))
    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
