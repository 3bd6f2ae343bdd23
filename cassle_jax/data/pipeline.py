"""Turns a source into batches: one global order, one decode per image, restarts at any step."""

import os
import threading
import weakref
from collections.abc import Callable

import grain
import numpy as np
from jaxtyping import Int

from cassle_jax.data.damaged import DamagedLog
from cassle_jax.data.errors import DataError
from cassle_jax.data.images import Batch, Images
from cassle_jax.data.sources import Source

_MAX_AUTOMATIC_THREADS = 32
_CHUNK_BYTES = 8 * 2**20
_MAX_CHUNK = 64
_KEPT_EPOCHS = 3
_ENDLESS = 2**62
_STRETCH_SEED = 0x5CE11E

IndicesOf = Callable[[int], Int[np.ndarray, " rows"]]
"""Step to the source indices of this process's rows; -1 for a row without an image."""


def training_batches(
    source: Source,
    *,
    batch: int,
    canvas: int,
    seed: int,
    damaged: DamagedLog,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 0,
    start_step: int = 0,
    cache_bytes: int = 0,
) -> grain.DatasetIterator:
    """Yields endless shuffled batches: this process's slice of every global batch.

    Every epoch is a permutation of the dataset by `seed` and the epoch's number, without its last
    partial batch. The global order is a function of seed and step alone. Process p of n takes
    positions [p·batch/n, (p+1)·batch/n) of each global batch, so the concatenated slices of all
    processes are the batch of a single process. The next good record in the dataset's order
    replaces a damaged one.

    Args:
      source: the dataset.
      batch: number of images in a global batch; a multiple of `process_count`.
      canvas: side of the square each image is decoded into, pixels.
      seed: seed of the order, in [0, 2⁶³).
      damaged: the log of this dataset's damaged records.
      process_index: number of this process, in [0, process_count).
      process_count: number of processes.
      threads: number that read and decode; 0 for half this process's CPUs, from 2 to 32.
      start_step: the step of the first batch.
      cache_bytes: memory for images that stay once they are read: all of them where their canvases
        fit, else the first ones, see `what_to_keep`. 0 keeps none.

    Returns:
      An iterator of `{'image': uint8[b, canvas, canvas, 3], 'size': int32[b, 2], 'label': int32[b],
      'index': int32[b]}` with b = batch / process_count. An image fills the top left `size`
      (height, width) pixels of its canvas, the rest is 0. `index` is its place in the source, or
      that of its substitute. The state, `{'step', 'batch', 'length', 'seed'}`, is the same for any
      number of processes; `set_state` continues with that step's batch and reads nothing before it.

    Raises:
      DataError: `batch` is larger than the dataset, or not a multiple of `process_count`.
      TooManyDamaged: from `next`, see `DamagedLog`.
    """
    steps = steps_per_epoch(len(source), batch)
    rows = _rows_of_process(batch, process_index, process_count)
    epoch_order = EpochOrder(len(source), seed)

    def indices(step: int) -> Int[np.ndarray, " rows"]:
        epoch, step_of_epoch = divmod(step, steps)
        return epoch_order(epoch)[step_of_epoch * batch :][rows]

    images = Images(source, canvas, damaged, substitute=True, cache_bytes=cache_bytes)
    loader = _Loader(images, indices, rows.stop - rows.start)
    identity = {"batch": batch, "length": len(source), "seed": seed}
    return BatchIterator(loader, thread_count(threads), identity, start_step)


def evaluation_batches(
    source: Source,
    *,
    batch: int,
    canvas: int,
    damaged: DamagedLog,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 0,
    limit: int = 0,
    short_side: int = 0,
) -> grain.DatasetIterator:
    """Yields one pass in the dataset's order: this process's slice of every global batch.

    Slices are cut as in `training_batches`; every process yields the same number of batches. Rows
    without an image have mask False, label and index -1 and a black 1×1 image. They fill up the
    last batch, and stand for damaged records.

    Args:
      source: the dataset.
      batch: number of images in a global batch; a multiple of `process_count`.
      canvas: side of the square each image is decoded into, pixels.
      damaged: the log of this dataset's damaged records.
      process_index: number of this process, in [0, process_count).
      process_count: number of processes.
      threads: as in `training_batches`.
      limit: number of images, one from each of `limit` equal stretches of the dataset, always the
        same ones; in a dataset sorted by class, every class gets its share. 0 takes all.
      short_side: pixels to resize an image's short side to, bicubic, as Pillow and torchvision do;
        the canvas is the centre of the result. 0 reduces whole images to fit the canvas.

    Returns:
      An iterator of batches as in `training_batches`, with `'mask': bool[b]`.

    Raises:
      DataError: `batch` is not a positive multiple of `process_count`, the dataset is empty, or
        `short_side` is smaller than the canvas.
      TooManyDamaged: from `next`, see `DamagedLog`.
    """
    if len(source) == 0:
        raise DataError(f"the dataset {source.name!r} has no images to evaluate")
    rows = _rows_of_process(batch, process_index, process_count)
    chosen = evenly_spaced(len(source), limit)
    steps = -(-len(chosen) // batch)
    padded = np.pad(chosen, (0, steps * batch - len(chosen)), constant_values=-1)

    def indices(step: int) -> Int[np.ndarray, " rows"]:
        return padded[step * batch :][rows]

    images = Images(source, canvas, damaged, substitute=False, short_side=short_side)
    loader = _Loader(images, indices, rows.stop - rows.start)
    identity = {"batch": batch, "length": len(source), "limit": limit}
    return BatchIterator(loader, thread_count(threads), identity, 0, steps)


def steps_per_epoch(source_length: int, batch: int) -> int:
    """Number of whole global batches in a dataset of `source_length` images, ≥ 1.

    Raises:
      DataError: there is no whole batch.
    """
    if not 0 < batch <= source_length:
        raise DataError(
            f"batch_size={batch} does not fit the dataset's {source_length} images; "
            f"use a batch_size in [1, {source_length}]"
        )
    return source_length // batch


def check_state(state: dict[str, int], identity: dict[str, int]) -> None:
    """Raises DataError where a data state does not belong to the order `identity` describes."""
    for name, value in identity.items():
        if state.get(name) != value:
            hint = ", or --accept_changes to continue in its order" if name == "length" else ""
            raise DataError(
                f"the checkpoint has data of {name}={state.get(name)}, this run {value}: the "
                f"order would not continue; use the checkpoint's settings and dataset{hint}"
            )


class BatchIterator(grain.DatasetIterator):
    """Batches of consecutive steps, decoded ahead by Grain's threads.

    Not thread-safe itself. `next` raises an error of a thread unchanged, and the iterator stays at
    the same step.
    """

    def __init__(
        self,
        loader: "_Loader",
        threads: int,
        identity: dict[str, int],
        start_step: int,
        stop_step: int | None = None,
    ):
        """Starts at `start_step`; a state must agree with `identity` to be continued."""
        super().__init__()
        self._loader = loader
        self._threads = threads
        self._identity = identity
        self._stop_step = stop_step
        self._batches: grain.DatasetIterator | None = None
        self._go_to(start_step)

    def __next__(self) -> Batch:
        """The batch of the next step."""
        if self._closed:
            raise ValueError("the iterator is closed")
        try:
            batch = next(self._batches)
        except StopIteration:
            raise
        except BaseException:
            self._go_to(self._step)
            raise
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The next step, and the facts on which its meaning depends."""
        return {"step": self._step, **self._identity}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to the step of a state from `get_state`.

        Raises:
          DataError: the state has another dataset length, batch or seed.
        """
        check_state(state, self._identity)
        self._go_to(int(state["step"]))

    def close(self) -> None:
        """Stops the threads."""
        self._closed = True
        if self._batches is not None:
            self._batches.close()

    def _go_to(self, step: int) -> None:
        if self._batches is not None:
            self._batches.close()
        self._step = step
        self._batches = iter(self._loader.batches(step, self._stop_step, self._threads))


class _Loader:
    """Makes batches in chunks of rows, so that several threads work on the same batch."""

    def __init__(self, images: Images, indices: IndicesOf, rows: int):
        self._images = images
        self._indices = indices
        self._rows = rows
        self._chunk_rows = min(_MAX_CHUNK, max(1, _CHUNK_BYTES // images.canvas_bytes))
        self._chunks = -(-rows // self._chunk_rows)
        # A batch lives as long as one of its chunks is held: by a thread, Grain, or the consumer.
        self._started: weakref.WeakValueDictionary[int, _StartedBatch]
        self._started = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def batches(self, start: int, stop: int | None, threads: int) -> grain.IterDataset:
        """The batches of steps [start, stop), decoded by `threads` threads some batches ahead."""
        end = _ENDLESS if stop is None else stop * self._chunks
        ahead = self._chunks + max(threads, self._chunks)
        return (
            grain.MapDataset.range(start * self._chunks, end)
            .map(self._load_chunk)
            .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
            .batch(self._chunks, batch_fn=lambda chunks: chunks[0].arrays)
        )

    def _load_chunk(self, chunk: int) -> "_StartedBatch":
        step, chunk_of_step = divmod(int(chunk), self._chunks)
        first = chunk_of_step * self._chunk_rows
        started = self._start(step)
        indices = started.indices[first : first + self._chunk_rows]
        self._images.fill(started.arrays, first, indices)
        return started

    def _start(self, step: int) -> "_StartedBatch":
        with self._lock:
            started = self._started.get(step)
            if started is None:
                started = _StartedBatch(self._indices(step), self._images.blank(self._rows))
                self._started[step] = started
            return started


class _StartedBatch:
    """The arrays that the chunks of one batch are decoded into, and the indices to decode."""

    def __init__(self, indices: Int[np.ndarray, " rows"], arrays: Batch):
        self.indices = indices
        self.arrays = arrays


class EpochOrder:
    """Maps an epoch to a permutation of the dataset by `seed`; keeps the last few."""

    def __init__(self, length: int, seed: int):
        self._length = length
        self._seed = seed
        self._kept: dict[int, Int[np.ndarray, " length"]] = {}
        self._lock = threading.Lock()

    def __call__(self, epoch: int) -> Int[np.ndarray, " length"]:
        """The image at each place of the epoch."""
        with self._lock:
            if epoch not in self._kept:
                self._kept[epoch] = self._permutation(epoch)
                if len(self._kept) > _KEPT_EPOCHS:
                    del self._kept[next(iter(self._kept))]
            return self._kept[epoch]

    def _permutation(self, epoch: int) -> Int[np.ndarray, " length"]:
        # Sorted raw Philox output rather than Generator.permutation, whose algorithm NumPy may
        # change between versions: a continued run must find its original order.
        key = np.array([self._seed, epoch], np.uint64)
        drawn = np.random.Philox(key=key).random_raw(self._length)
        return np.argsort(drawn, kind="stable").astype(np.int32)


def evenly_spaced(length: int, limit: int) -> Int[np.ndarray, " chosen"]:
    """One index from each of `limit` equal stretches, at a fixed random place in it."""
    if not 0 < limit < length:
        return np.arange(length)
    edges = np.arange(limit + 1) * length // limit
    drawn = np.random.Philox(key=_STRETCH_SEED).random_raw(limit)
    return edges[:-1] + (drawn % np.diff(edges).astype(np.uint64)).astype(np.int64)


def _rows_of_process(batch: int, process_index: int, process_count: int) -> slice:
    if batch < 1 or batch % process_count:
        raise DataError(
            f"batch_size={batch} cannot be divided among {process_count} processes; "
            f"use a multiple of {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index={process_index} is not in [0, {process_count})")
    rows = batch // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


def thread_count(threads: int) -> int:
    """The requested number, or for 0 half the CPUs: a core gains little from a second thread.

    Raises:
      DataError: the number is negative.
    """
    if threads < 0:
        raise DataError(f"data.threads={threads} is negative; 0 chooses by the CPUs")
    return threads or min(max(2, usable_cpus() // 2), _MAX_AUTOMATIC_THREADS)


def usable_cpus() -> int:
    """The number of CPUs that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
