"""Shows a person the progress of a run: a bar on a terminal, an occasional line elsewhere."""

import logging
from collections.abc import Mapping

from cassle_jax.progress import ProgressBar, duration_text

LOG = logging.getLogger(__name__)


class ProgressReport:
    """Shows steps done, rate, time left and the latest loss.

    Args:
      total: number of steps of the run.
      step: number of steps done at the start.
    """

    def __init__(self, total: int, step: int):
        self._total = total
        self._bar = ProgressBar("pretraining", total, step)

    def advance(self, step: int) -> None:
        """Moves the bar; costs nothing where there is none."""
        self._bar.update(step)

    def report(self, step: int, metrics: Mapping[str, float], seconds_left: float) -> None:
        """Shows the figures of a logged step."""
        figures = ", ".join(
            f"{name} {metrics[name]:.4g}"
            for name in ("loss", "knn_accuracy", "rank_me", "images_per_second")
            if name in metrics
        )
        self._bar.update(step, figures=figures)
        if not self._bar.shown:
            left = duration_text(seconds_left)
            LOG.info("step %d/%d, %s, %s left", step, self._total, figures, left)

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()
