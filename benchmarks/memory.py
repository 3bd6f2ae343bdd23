"""Memory of the training step: as compiled, and where the device tells, as used at most."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import jax
from ml_collections import ConfigDict

from benchmarks.contest import Row, one_line
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
        rows.append(_row("memory, as compiled", name, partial(compiled_bytes, config)))
        if _peak():
            rows.append(_row("memory, most in use", name, partial(peak_bytes, config, work)))
    return rows


def _row(measurement: str, name: str, bytes_of: Callable[[], int]) -> Row:
    try:
        return Row(measurement, name, "GiB", (bytes_of() / GIB,))
    except Exception as error:  # a batch that does not fit must not hide those that do
        return Row(measurement, name, "GiB", note=one_line(error), failed=True)


def compiled_bytes(config: ConfigDict) -> int:
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


def peak_bytes(config: ConfigDict, work: Workload) -> int:
    """The most the device has in use during steps of a process of their own.

    A device only tells the most since its process began, whichever settings that was with.

    Raises:
      RuntimeError: they failed there.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(_steps_and_peak, config, work).result()


def _steps_and_peak(config: ConfigDict, work: Workload) -> int:
    try:
        steps(config, work)
    except Exception as error:  # not every library's errors travel between processes
        raise RuntimeError(one_line(error)) from None
    return _peak()


def _peak() -> int:
    """The most since the process began; 0 where the device does not tell."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
