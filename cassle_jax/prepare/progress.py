"""Shows how far a preparation is: a bar on a terminal, an occasional line elsewhere."""

import logging
import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

LOG = logging.getLogger(__name__)

_PAUSE = 30.0  # seconds between two lines


class PreparationProgress:
    """Counts images done, with their rate and the time left. A context manager.

    Args:
      total: number of images.
      done: number of images that an earlier call has done.
    """

    def __init__(self, total: int, done: int):
        self._total, self._before, self._done = total, done, done
        self._start = self._said = time.monotonic()
        self._bar = None

    def __enter__(self):
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("preparing"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[rate]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._done, rate="")
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.stop()
        else:
            self._say()

    def add(self, images: int) -> None:
        """Counts more images as done."""
        self._done += images
        if self._bar:
            self._bar.update(self._task, completed=self._done, rate=f"{self._rate():.0f} images/s")
        elif time.monotonic() - self._said > _PAUSE:
            self._say()

    def _rate(self) -> float:
        return (self._done - self._before) / max(time.monotonic() - self._start, 1e-3)

    def _say(self) -> None:
        self._said = time.monotonic()
        left = (self._total - self._done) / max(self._rate(), 1e-9)
        minutes, seconds = divmod(round(min(left, 1e6)), 60)
        LOG.info(
            "%d of %d images, %.0f images/s, %d:%02d:%02d left",
            *(self._done, self._total, self._rate(), minutes // 60, minutes % 60, seconds),
        )
