"""Keeps the next batches on the devices, each with the data state that follows it."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from cassle_jax.parallel import shard_batch


class DeviceFeed:
    """Reads ahead in a thread: puts host batches on the devices while a step runs.

    Iterating yields `(batch, data state)`: the batch as global arrays, and the state from which the
    iterator continues after it. An exception of the iterator is raised here.

    Args:
      batches: an iterator of host batches with `get_state`.
      mesh: the devices.
      depth: number of batches kept ready.

    Attributes:
      waited: total seconds the consumer has waited for data.
    """

    def __init__(self, batches: Iterator, mesh: Mesh, depth: int = 2):
        self.waited = 0.0
        self._ready: queue.Queue = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(batches, mesh), daemon=True)
        self._thread.start()

    def __iter__(self):
        return self

    def __next__(self) -> tuple[Any, Any]:
        start = time.perf_counter()
        item = self._ready.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            self._ready.put(item)  # the next call raises it again
            raise item
        return item

    def close(self) -> None:
        """Stops reading ahead."""
        self._stopped.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)

    def _fill(self, batches: Iterator, mesh: Mesh) -> None:
        try:
            while not self._stopped.is_set():
                batch = shard_batch(next(batches), mesh)
                self._ready.put((batch, batches.get_state()))
        except BaseException as error:
            self._ready.put(error)
