"""Compares the training step with the device's roofline: FLOPs, bytes, and measured peaks."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.augmentation import augmented
from benchmarks.contest import Row
from benchmarks.isolated import run_isolated
from benchmarks.scaling import Work, trace_step
from benchmarks.scaling import work as work_of
from benchmarks.training import steps
from benchmarks.workload import Workload, synthetic_batch
from cassle_jax.parallel import device_mesh

_CALLS = 10  # per measurement, as a single call is not much longer than the synchronisation


def measure(work: Workload) -> list[Row]:
    """Measures the device's peaks, and compares a step with the roofline that they give."""
    flops, bandwidth = peak_flops(work.dtype), peak_bandwidth()
    share = work.batch // device_mesh().size  # images per device
    step = run_isolated(work_per_device, work.config("method=moco_v2", batch_size=share))
    config = work.config("method=moco_v2")
    batch = synthetic_batch(config.batch_size, config.data.canvas)
    once, views = steps(config, work), augmented(config, batch, work.steps, device_mesh())
    times, alone = [], []
    for _ in range(work.rounds):
        times.append(seconds_of(once) / work.steps)
        alone.append(seconds_of(views) / work.steps)
    roofline = max(step.flops / flops, step.bytes / bandwidth)
    name = "limits"
    return [
        Row(name, f"matrix products, {work.dtype}", "TFLOP/s", (flops / 1e12,)),
        Row(name, "memory", "GB/s", (bandwidth / 1e9,)),
        Row(name, "a step's FLOPs", "TFLOP", (step.flops / 1e12,)),
        Row(name, "a step's bytes at convolutions and products", "GB", (step.bytes / 1e9,)),
        Row(name, "roofline time", "s", (roofline,)),
        Row(name, "a step", "s", tuple(times)),
        Row(
            name, "augmentation alone as a share of it", "", tuple(np.divide(alone, times).tolist())
        ),
        Row(name, "roofline time as a share of a step", "", tuple(roofline / t for t in times)),
    ]


def work_per_device(config: ConfigDict) -> Work:
    """FLOPs and bytes of a step on one device; runs on the CPU, so it needs a separate process."""
    jax.config.update("jax_platforms", "cpu")
    return work_of(trace_step(config, device_mesh(jax.devices()[:1])))


def peak_flops(dtype: str) -> float:
    """FLOP/s of a large square matrix product, the best of several measurements."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    # Accelerators multiply zeros or ones faster than real data.
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    return 2 * side**3 / _best(lambda: product(a))


def peak_bandwidth() -> float:
    """Bytes/s that an addition reads and writes, the best of several measurements."""
    count = 2**25 if jax.default_backend() == "cpu" else 2**28
    x = jnp.ones(count, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / _best(lambda: add(x))


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds of a call, including the computation of the arrays it returns."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def _best(function: Callable[[], object]) -> float:
    def several():
        return [function() for _ in range(_CALLS)][-1]

    several()
    return min(seconds_of(several) for _ in range(10)) / _CALLS
