"""Keeps a whole small dataset on the devices and draws its batches there."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cassle_jax.data.damaged import DamagedLog
from cassle_jax.data.images import Batch, Images
from cassle_jax.data.pipeline import EpochOrder, check_state, steps_per_epoch, thread_count
from cassle_jax.data.sources import Source
from cassle_jax.parallel import AXIS, REPLICATED, SHARDED, parallel, replicate

_ROWS_A_TASK = 64


def resident_bytes(source: Source, canvas: int) -> int:
    """Bytes of a dataset on each device: its canvases, and four small numbers per image."""
    return len(source) * (canvas * canvas * 3 + 16)


class ResidentFeed:
    """The batches of `training_batches`, drawn on devices that hold all images.

    Every image is decoded once, for the first batch; after that the host only sends the order of
    each epoch. Batches, states and the handling of damaged images are those of `DeviceFeed` over
    `training_batches`, so a run may continue with either.

    Iterating yields `(batch, data state)`, as `DeviceFeed` does.

    Args:
      source: the dataset.
      mesh: the devices; each holds the whole dataset, `resident_bytes` of it.
      batch: number of images in a global batch; a multiple of the number of devices.
      canvas: side of the square each image is decoded into, pixels.
      seed: seed of the order, in [0, 2⁶³).
      damaged: the log of this dataset's damaged records.
      threads: number that read and decode; 0 for half the CPUs this process may use.
      state: a data state to continue from; `None` for the first step.

    Attributes:
      waited: seconds the consumer has waited for data: the duration of the decoding.

    Raises:
      DataError: `batch` is larger than the dataset, or the state belongs to another order.
      TooManyDamaged: from the first `next`, see `DamagedLog`.
    """

    def __init__(
        self,
        source: Source,
        mesh: Mesh,
        *,
        batch: int,
        canvas: int,
        seed: int,
        damaged: DamagedLog,
        threads: int = 0,
        state: dict[str, int] | None = None,
    ):
        self._identity = {"batch": batch, "length": len(source), "seed": seed}
        self._steps_per_epoch = steps_per_epoch(len(source), batch)
        self.waited = 0.0
        self._step = 0
        if state is not None:
            check_state(state, self._identity)
            self._step = int(state["step"])
        self._mesh, self._batch = mesh, batch
        self._epoch_order = EpochOrder(len(source), seed)
        self._epoch: int | None = None
        self._to_decode: Images | None = Images(source, canvas, damaged, substitute=True)
        self._length, self._threads = len(source), thread_count(threads)
        self._images: Batch | None = None
        self._draw = _draw(mesh, batch)

    def __iter__(self):
        return self

    def __next__(self) -> tuple[Any, dict[str, int]]:
        if self._images is None:
            self._load()
        epoch, step_of_epoch = divmod(self._step, self._steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = replicate(self._epoch_order(epoch), self._mesh)
        batch = self._draw(self._images, self._order, step_of_epoch * self._batch)
        self._step += 1
        return batch, {"step": self._step, **self._identity}

    def close(self) -> None:
        """Releases the images."""
        self._images = None

    def _load(self) -> None:
        """Decodes all images and puts them on the devices."""
        start = time.perf_counter()
        decoded = self._to_decode.blank(self._length)

        def decode(first: int) -> None:
            rows = np.arange(first, min(first + _ROWS_A_TASK, self._length))
            self._to_decode.fill(decoded, first, rows)

        with ThreadPoolExecutor(self._threads) as pool:
            for _ in pool.map(decode, range(0, self._length, _ROWS_A_TASK)):
                pass
        self._images = replicate(decoded, self._mesh)
        self._to_decode = None  # its pool would keep the memory of all images
        self.waited += time.perf_counter() - start


def _draw(mesh: Mesh, batch: int):
    """The compiled function of images, an epoch's order and a place in it, that draws a batch."""
    rows = batch // mesh.size

    def draw(images, order, first):
        own = first + rows * jax.lax.axis_index(AXIS)
        chosen = jax.lax.dynamic_slice_in_dim(order, own, rows)
        return jax.tree.map(lambda each: jnp.take(each, chosen, axis=0), images)

    return parallel(draw, mesh, inputs=(REPLICATED, REPLICATED, REPLICATED), outputs=SHARDED)
