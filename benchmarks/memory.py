"""Memory of the training step: as compiled, and where the device tells, as used at most."""

import jax

from benchmarks.contest import Row
from benchmarks.training import SYNTHETIC, steps
from benchmarks.workload import Workload
from cassle_jax.parallel import device_mesh
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
        rows.append(Row("memory, as compiled", name, "GiB", (compiled_bytes(config) / GIB,)))
        used = peak_bytes(config, work)
        if used:
            rows.append(Row("memory, most since the start", name, "GiB", (used / GIB,)))
    return rows


def compiled_bytes(config) -> int:
    """What XLA plans for: arguments, results that take no argument's place, and temporaries."""
    mesh = device_mesh()
    run = build_run(config, mesh, SYNTHETIC)
    canvas = config.data.canvas
    batch = {
        "image": jax.ShapeDtypeStruct((run.batch_size, canvas, canvas, 3), "uint8"),
        "size": jax.ShapeDtypeStruct((run.batch_size, 2), "int32"),
    }
    lowered = make_train_step(run, mesh).lower(jax.eval_shape(run.initial_state), batch)
    plan = lowered.compile().memory_analysis()
    return (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes
    )


def peak_bytes(config, work: Workload) -> int:
    """The most the device had in use after two steps; 0 where it does not tell."""
    if not (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
        return 0
    steps(config, work)
    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
