"""Times the training step on synthetic images: views/s, augmentation's share, peak memory.

python -m benchmarks.step --config=configs/imagenet100.py
"""

import json
import statistics
import time

import jax
from absl import flags
from ml_collections import config_flags

from benchmarks.workload import synthetic_batch
from cassle_jax import command
from cassle_jax.config import FLAG_OPTIONS
from cassle_jax.methods import Canvases
from cassle_jax.methods.views import batch_positions
from cassle_jax.parallel import (
    AXIS,
    REPLICATED,
    SHARDED,
    device_mesh,
    on_every_device,
    parallel,
    shard_batch,
)
from cassle_jax.training.run import build_run
from cassle_jax.training.step import make_train_step, views_of

CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration.", **FLAG_OPTIONS)
REPEATS = flags.DEFINE_integer("repeats", 5, "Number of timings; the median is reported.")
STEPS = flags.DEFINE_integer("steps", 10, "Number of steps per timing.")
flags.mark_flags_as_required(["config"])


def seconds_per_call(function, repeats: int, steps: int) -> list[float]:
    """Seconds per call, measured `repeats` times over `steps` calls; `function` returns arrays."""
    jax.block_until_ready(function())
    timings = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(steps):
            result = function()
        jax.block_until_ready(result)
        timings.append((time.perf_counter() - start) / steps)
    return timings


def measure(config, repeats: int, steps: int) -> dict[str, float]:
    """Times augmentation and training step; returns medians in seconds, rates and memory."""
    mesh = device_mesh()
    run = build_run(config, mesh, config.batch_size * 1000)
    batch = shard_batch(synthetic_batch(config.batch_size, config.data.canvas), mesh)

    def draw(key, batch):
        positions = batch_positions(len(batch["image"]), AXIS)
        return views_of(run, key, 0.0, Canvases(batch["image"], batch["size"], positions))

    make_views = parallel(draw, mesh, inputs=(REPLICATED, SHARDED), outputs=SHARDED)
    key = on_every_device(lambda: jax.random.key(0), mesh)
    augmentation = seconds_per_call(lambda: make_views(key, batch), repeats, steps)

    train_step = make_train_step(run, mesh)
    state = on_every_device(run.initial_state, mesh)

    def advance():
        nonlocal state
        state, metrics = train_step(state, batch)
        return metrics

    start = time.perf_counter()
    jax.block_until_ready(advance())
    first_step = time.perf_counter() - start
    training = seconds_per_call(advance, repeats, steps)
    memory = jax.local_devices()[0].memory_stats() or {}

    step_seconds = statistics.median(training)
    return {
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
        "batch_size": config.batch_size,
        "step_seconds": step_seconds,
        "step_seconds_min": min(training),
        "step_seconds_max": max(training),
        "images_per_second": config.batch_size / step_seconds,
        "views_per_second": 2 * config.batch_size / step_seconds,
        "augmentation_seconds": statistics.median(augmentation),
        "augmentation_share": statistics.median(augmentation) / step_seconds,
        "first_step_seconds": first_step,
        "peak_memory_gib": memory.get("peak_bytes_in_use", 0) / 2**30,
    }


def main() -> None:
    """Runs the command."""
    result = measure(CONFIG.value, REPEATS.value, STEPS.value)
    for name, value in result.items():
        print(f"{name:36} {value:.5g}" if isinstance(value, float) else f"{name:36} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    command.run(main)
