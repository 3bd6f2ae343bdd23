"""Shows the progress of long work: a bar if standard error is a terminal, else nothing."""

import contextlib
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """A bar with the share that is done, the time left and figures.

    Args:
      what: name of the work, one word.
      total: amount of work.
      done: amount that is done at the start.

    Attributes:
      shown: whether there is a bar; `update` does nothing where there is none.
    """

    def __init__(self, what: str, total: int, done: int):
        self.shown = sys.stderr.isatty()
        if self.shown:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(what, total=total, completed=done, figures="")
            self._bar.start()

    def update(self, done: int, **fields: str) -> None:
        """Moves the bar; `figures`, where given, replaces the text behind it."""
        if self.shown:
            self._bar.update(self._task, completed=done, **fields)

    def close(self) -> None:
        """Removes the bar, where the terminal is still open."""
        if self.shown:
            with contextlib.suppress(OSError):
                self._bar.stop()


def duration_text(seconds: float) -> str:
    """A duration as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
