"""Averages the metrics of the steps between two reports, and measures their speed."""

import contextlib
import time
from collections import deque

import jax
import numpy as np

from cassle_jax.data import Feed


class Window:
    """Metrics of the steps since the last report; they stay on the device until `summary`."""

    def __init__(self, feed: Feed, batch_size: int, steps: int):
        self._feed, self._batch_size = feed, batch_size
        self._metrics: deque[dict] = deque(maxlen=max(steps, 1))
        self._seconds = 0.0

    def start(self) -> None:
        """Begins a window."""
        self._metrics.clear()
        self._steps = 0
        self._since, self._waited = time.perf_counter(), self._feed.waited

    def add(self, metrics: dict) -> None:
        """Adds the metrics of a step."""
        self._metrics.append(metrics)
        self._steps += 1

    @contextlib.contextmanager
    def paused(self):
        """Excludes the time spent within from the window."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    @property
    def seconds(self) -> float:
        """Seconds per step: of this window so far, or of the previous one."""
        if self._steps:
            self._seconds = (time.perf_counter() - self._since) / self._steps
        return self._seconds

    def summary(self) -> dict[str, float]:
        """Means over the window, images/s, share of time waiting for data; begins a new window."""
        values = jax.device_get(list(self._metrics))
        elapsed = self.seconds * self._steps
        summary = {name: float(np.mean([each[name] for each in values])) for name in values[0]}
        summary["learning_rate"] = float(values[-1]["learning_rate"])
        summary["images_per_second"] = self._batch_size / self.seconds
        summary["data_wait_share"] = (self._feed.waited - self._waited) / elapsed
        self.start()
        return summary
