"""Measures the training step: synthetic and real images, rivals, with and without CASSLE."""

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks.contest import Contender, Row, TimedCall, contest
from benchmarks.rivals import published, stable_pretraining
from benchmarks.workload import Workload, folder_of, synthetic_batch
from cassle_jax.data import open_source
from cassle_jax.data.damaged import DamagedLog
from cassle_jax.data.opening import open_feed
from cassle_jax.models.attention import have_flash_attention
from cassle_jax.parallel import device_mesh, on_every_device, shard_batch
from cassle_jax.prepare import Preparation, prepare
from cassle_jax.training.run import build_run
from cassle_jax.training.step import make_train_step

SYNTHETIC = 10**6  # images per synthetic epoch: enough for any batch
SMALL_IMAGES = 10_000
NO_FLASH = "needs bfloat16 on an NVIDIA GPU of compute capability 8.0 or more"
READ_AHEAD = 6  # largest number of batches that the input pipeline prefetches

Batches = Callable[[ConfigDict, Mesh], Iterator[dict]]


def moco_v2(work: Workload) -> list[Row]:
    """Measures images/s of MoCo-v2 with CASSLE, and of PyTorch's, with images on the device."""
    return _step(
        "step, MoCo-v2",
        work,
        Contender(
            "PyTorch, published: float32, no crop, no ω",
            partial(published.step, work, tuned=False),
        ),
        Contender(
            f"PyTorch, tuned: channels_last, {work.dtype}, compiled",
            partial(published.step, work, tuned=True),
        ),
    )


def simclr(work: Workload) -> list[Row]:
    """Measures images/s of SimCLR with CASSLE, and of stable-pretraining's in JAX."""
    return _step(
        "step, SimCLR",
        work,
        Contender(
            "stable-pretraining's JAX: no hue, saturation, blur, ω",
            partial(stable_pretraining.step, work),
        ),
    )


def _step(measurement: str, work: Workload, *rivals: Contender) -> list[Row]:
    """Compares ours with rivals on one device; adds ours on all, with the same local batch."""
    name = measurement.removeprefix("step, ")
    config = work.config(f"method={name.lower().replace('-', '_')},conditioning=cassle")
    one = Contender(
        f"cassle_jax: {name} + CASSLE", partial(steps, config, work, devices=jax.devices()[:1])
    )
    count, everywhere = len(jax.devices()), []
    if count > 1:
        config = ConfigDict(config)
        config.batch_size *= count
        everywhere = [
            Contender(
                f"cassle_jax on all {count} devices",
                partial(steps, config, work),
                count * work.steps * work.batch,
            )
        ]
    return contest(
        measurement,
        "images/s",
        work.steps * work.batch,
        [one, *rivals, *everywhere],
        work.rounds,
        lead_in=True,
    )


def conditioning(work: Workload) -> list[Row]:
    """Measures the cost of CASSLE: its ratio is the plain method's rate divided by its own.

    A second copy of the plain method shows the noise of a ratio of 1 on this machine.
    """
    plain, cassle = (
        partial(steps, work.config(f"method=moco_v2,conditioning={name}"), work)
        for name in ("none", "cassle")
    )
    return contest(
        "conditioning",
        "images/s",
        work.steps * work.batch,
        [
            Contender("MoCo-v2, plain", plain),
            Contender("MoCo-v2 + CASSLE", cassle),
            Contender("MoCo-v2, plain, once more", plain),
        ],
        3 * work.rounds,
    )


def whole_run(work: Workload) -> list[Row]:
    """Compares steps fed from JPEG files with steps on images that are on the device."""
    with tempfile.TemporaryDirectory() as folder:
        root = folder_of(work.jpegs, Path(folder))
        made = partial(work.config, "method=moco_v2", data__cache_gib=0.0)
        real, half = (made(data__source="folder", data__path=str(root)) for _ in range(2))
        half.data.cache_gib = len(work.jpegs) * 3 * half.data.canvas**2 / 2 / 2**30
        side = work.size * 8 // 7
        how = Preparation(f"side_{side}", short_side=side)
        prepare(real.data, ["train"], folder, how)
        prepared = made(data__source="tfds", data__name=how.name, data__path=folder)
        ways = {
            "decoded as it goes": real,
            "half of the images kept in memory": half,
            f"prepared at short side {side}": prepared,
        }
        return _beside_synthetic("whole run on JPEGs", work, ways)


def resident(work: Workload) -> list[Row]:
    """Compares small images that stay on the device with one synthetic batch."""
    small = {"augment__size": 32, "data__canvas": 32, "encoder__small_images": True}
    on_device = work.config("method=moco_v2", **small, data__on_device="always")
    on_device.data.scenes = SMALL_IMAGES
    ways = {"32 px, all of them on the device": on_device}
    return _beside_synthetic("small images", work, ways)


def attention(work: Workload) -> list[Row]:
    """Compares a ViT-S/16 with cuDNN's flash attention and with XLA's, as MoCo-v3 trains it."""
    name = "ViT-S/16, MoCo-v3 + CASSLE"
    if work.dtype != "bfloat16" or not have_flash_attention():
        return [Row(name, "cuDNN's flash attention", "images/s", note=NO_FLASH)]
    settings = {"encoder__name": "vit_small"}
    flash = work.config("method=moco_v3", **settings)
    plain = work.config("method=moco_v3", **settings, encoder__flash_attention=False)
    return contest(
        name,
        "images/s",
        work.steps * work.batch,
        [
            Contender("cuDNN's flash attention", partial(steps, flash, work)),
            Contender("XLA's attention", partial(steps, plain, work)),
        ],
        work.rounds,
    )


def _beside_synthetic(measurement: str, work: Workload, ways: dict[str, ConfigDict]) -> list[Row]:
    """Compares ways to feed the step with one synthetic batch, at the first way's configuration."""
    # The lead-in must use up all prefetched batches.
    work = dataclasses.replace(work, steps=max(work.steps, READ_AHEAD))
    fed = [Contender(how, partial(steps, each, work, from_source)) for how, each in ways.items()]
    first, *_ = ways.values()
    on_device = Contender("one synthetic batch, on the device", partial(steps, first, work))
    items = work.steps * work.batch
    return contest(measurement, "images/s", items, [*fed, on_device], work.rounds, lead_in=True)


def synthetic(config: ConfigDict, mesh: Mesh) -> Iterator[dict]:
    """Yields the same batch on the devices of all processes forever."""
    batch = synthetic_batch(config.batch_size // jax.process_count(), config.data.canvas)
    return itertools.repeat(shard_batch(batch, mesh))


def from_source(config: ConfigDict, mesh: Mesh) -> Iterator[dict]:
    """Yields the batches of a run with this configuration."""
    source = open_source(config.data, config.data.train_split)
    damaged = DamagedLog(len(source), 1.0)
    settings = {"batch": config.batch_size, "seed": 0, "damaged": damaged, "state": None}
    feed = open_feed(config.data, source, mesh, **settings)
    try:
        yield from (batch for batch, _ in feed)
    finally:
        feed.close()  # otherwise its threads keep reading files that are deleted afterwards


def steps(
    config: ConfigDict,
    work: Workload,
    batches_of: Batches = synthetic,
    devices: Sequence[jax.Device] | None = None,
) -> TimedCall:
    """Compiles and warms up training steps of a configuration; returns the call to time."""
    mesh = device_mesh(devices)
    run = build_run(config, mesh, SYNTHETIC)
    state = on_every_device(run.initial_state, mesh)
    further = repeated(make_train_step(run, mesh), state, work.steps)
    once = partial(further, batches_of(config, mesh))
    once()
    return once


def repeated(train_step: Callable, state: Any, count: int) -> Callable[[Iterator[dict]], dict]:
    """Returns a function that trains `count` more steps on the batches it gets, and waits."""

    def further(batches):
        nonlocal state
        for _ in range(count):
            state, metrics = train_step(state, inputs_of(next(batches)))
        return jax.block_until_ready(metrics)

    return further


def inputs_of(batch: dict) -> dict:
    """What a step takes of a batch."""
    return {name: batch[name] for name in ("image", "size")}
