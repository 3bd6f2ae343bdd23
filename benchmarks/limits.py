"""How far the step is from what the device can do: its FLOPs and bytes, and measured peaks."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.contest import Row
from benchmarks.scaling import lower_step
from benchmarks.scaling import work as work_of
from benchmarks.training import steps
from benchmarks.workload import Workload
from cassle_jax.parallel import device_mesh


def measure(work: Workload) -> list[Row]:
    """The device's peaks, what a step asks of them, and the share of it that this explains."""
    config = work.config("method=moco_v2")
    flops, bandwidth = peak_flops(work.dtype), peak_bandwidth()
    asked = work_of(lower_step(config, device_mesh()))
    once = steps(config, work)
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


def peak_flops(dtype: str) -> float:
    """Of the largest square matrix product that is quickly done, the best of several."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((side, side), dtype)
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
    seconds_of(function)
    return min(seconds_of(function) for _ in range(10))
