"""Shows how far a preparation is: a bar on a terminal, an occasional line elsewhere."""

import logging
import time

from cassle_jax.progress import ProgressBar, duration_text

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
        self._start = self._logged = time.monotonic()

    def __enter__(self):
        self._bar = ProgressBar("preparing", self._total, self._done)
        return self

    def __exit__(self, *_):
        self._bar.close()
        if not self._bar.shown:
            self._log()

    def add(self, images: int) -> None:
        """Counts more images as done."""
        self._done += images
        self._bar.update(self._done, figures=f"{self._rate():.0f} images/s")
        if not self._bar.shown and time.monotonic() - self._logged > _PAUSE:
            self._log()

    def _rate(self) -> float:
        return (self._done - self._before) / max(time.monotonic() - self._start, 1e-3)

    def _log(self) -> None:
        self._logged = time.monotonic()
        left = duration_text(min((self._total - self._done) / max(self._rate(), 1e-9), 1e6))
        LOG.info(
            "%d of %d images, %.0f images/s, %s left",
            *(self._done, self._total, self._rate(), left),
        )
