"""Shows a person the progress of a run: a bar on a terminal, an occasional line elsewhere."""

import logging
import sys
from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

LOG = logging.getLogger(__name__)


class ProgressReport:
    """Shows steps done, rate, time left and the latest loss.

    Args:
      total: number of steps of the run.
      step: number of steps done at the start.
    """

    def __init__(self, total: int, step: int):
        self._total = total
        self._bar = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("pretraining", total=total, completed=step, figures="")
            self._bar.start()

    def advance(self, step: int) -> None:
        """Moves the bar; costs nothing where there is none."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, metrics: Mapping[str, float], seconds_left: float) -> None:
        """Shows the figures of a logged step."""
        figures = ", ".join(
            f"{name} {metrics[name]:.4g}"
            for name in ("loss", "knn_accuracy", "rank_me", "images_per_second")
            if name in metrics
        )
        if self._bar:
            self._bar.update(self._task, completed=step, figures=figures)
        else:
            minutes, seconds = divmod(round(seconds_left), 60)
            left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
            LOG.info("step %d/%d, %s, %s left", step, self._total, figures, left)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar:
            self._bar.stop()
