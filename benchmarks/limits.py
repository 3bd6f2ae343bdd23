"""How far the step is from what the device can do: its FLOPs and bytes, and measured peaks."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.apart import apart
from benchmarks.contest import Row
from benchmarks.scaling import Work, lower_step
from benchmarks.scaling import work as work_of
from benchmarks.training import steps
from benchmarks.workload import Workload
from cassle_jax.parallel import device_mesh

_CALLS = 10  # one waits for them all: a single one is not much longer than the waiting


def measure(work: Workload) -> list[Row]:
    """The device's peaks, what a step asks of them, and the share of it that this explains."""
    flops, bandwidth = peak_flops(work.dtype), peak_bandwidth()
    share = work.batch // device_mesh().size  # of many devices, one's
    asked = apart(asked_of_one, work.config("method=moco_v2", batch_size=share))
    once = steps(work.config("method=moco_v2"), work)
    seconds = tuple(seconds_of(once) / work.steps for _ in range(work.rounds))
    least = max(asked.flops / flops, asked.bytes / bandwidth)
    name = "limits"
    return [
        Row(name, f"matrix products, {work.dtype}", "TFLOP/s", (flops / 1e12,)),
        Row(name, "memory", "GB/s", (bandwidth / 1e9,)),
        Row(name, "a step's FLOPs", "TFLOP", (asked.flops / 1e12,)),
        Row(name, "a step's bytes at convolutions and products", "GB", (asked.bytes / 1e9,)),
        Row(name, "least time for them", "s", (least,)),
        Row(name, "a step", "s", seconds),
        Row(name, "least time's share of a step", "", tuple(least / each for each in seconds)),
    ]


def asked_of_one(config: ConfigDict) -> Work:
    """What a step asks of one device, in a process of its own: a CPU's, as others do not count."""
    jax.config.update("jax_platforms", "cpu")
    return work_of(lower_step(config, device_mesh(jax.devices()[:1])))


def peak_flops(dtype: str) -> float:
    """Of the largest square matrix product that is quickly done, the best of several."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    # Of zeros or ones an accelerator makes products faster than of anything real.
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    return 2 * side**3 / _best(lambda: product(a))


def peak_bandwidth() -> float:
    """Bytes read and written by an addition, the best of several."""
    count = 2**25 if jax.default_backend() == "cpu" else 2**28
    x = jnp.ones(count, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / _best(lambda: add(x))


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds of a call, with the arrays it returns."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def _best(function: Callable[[], object]) -> float:
    def several():
        return [function() for _ in range(_CALLS)][-1]

    several()
    return min(seconds_of(several) for _ in range(10)) / _CALLS
