"""Records the images that could not be read, and stops a run with too many of them."""

import logging
import os
import threading

from etils import epath

from cassle_jax.data.errors import DataError
from cassle_jax.storage import GrowingFile, is_there, make_shared, read_whole

LOG = logging.getLogger(__name__)

_LISTED = 20


class TooManyDamaged(DataError):
    """More images are damaged than the run tolerates; the message lists them."""


class DamagedLog:
    """Counts the distinct damaged records of one dataset, logs each once, and remembers them.

    Thread-safe. With a `path` every name is appended to `<path>/damaged-<process>.txt` (one line
    per name: name, tab, reason) before it counts. A later log with the same path neither writes nor
    logs these names again, and counts only those that fail again: the others may have been repaired
    or removed. Give every dataset its own path.
    """

    def __init__(
        self,
        total: int,
        max_fraction: float,
        path: str | os.PathLike[str] | None = None,
        *,
        process_index: int = 0,
        setting: str | None = "data.max_bad_fraction",
    ):
        """Opens the log.

        Args:
          total: number of records in the dataset.
          max_fraction: the tolerated share of damaged records, in [0, 1]; more stops the run.
          path: directory that keeps their names, created if missing; None keeps none.
          process_index: number of this process in the run; each process writes its own file.
          setting: the one that gives `max_fraction`; None in an evaluation, which has none, and
            whose bound of an image's pixels is a flag.

        Raises:
          DataError: `max_fraction` is outside [0, 1].
        """
        if not 0.0 <= max_fraction <= 1.0:
            raise DataError(
                f"data.max_bad_fraction={max_fraction} is not a fraction; give a value in [0, 1]"
            )
        self._total = total
        self._max_fraction, self._setting = max_fraction, setting
        self._lock = threading.Lock()
        self._reasons: dict[str, str] = {}
        self._remembered: dict[str, str] = {}
        self._file: GrowingFile | None = None
        if path is not None:
            directory = epath.Path(path)
            make_shared(directory)
            own = directory / f"damaged-{process_index:05d}.txt"
            for known in sorted(directory.glob("damaged-*.txt")):
                self._remembered.update(_reasons_in(_whole_lines(known)))
            self._file = GrowingFile(own, _whole_lines(own) if is_there(own) else b"")

    def __len__(self) -> int:
        """Number of distinct damaged records that count."""
        return len(self._reasons)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the damaged records that count, sorted."""
        with self._lock:
            return tuple(sorted(self._reasons))

    @property
    def remembered(self) -> tuple[str, ...]:
        """Names under `path` when the log was opened, sorted."""
        return tuple(sorted(self._remembered))

    def knows(self, name: str) -> bool:
        """Whether the record `name` has been added before."""
        return _printable(name) in self._reasons

    def add(self, name: str, reason: str) -> None:
        """Counts the record `name` as damaged, once.

        Raises:
          TooManyDamaged: this record takes the damaged ones over `max_fraction` of the dataset.
        """
        name, reason = _printable(name), _printable(reason)
        if self._setting is None:
            reason = reason.replace("data.max_pixels", "--max_pixels")
        with self._lock:
            if name not in self._reasons and name not in self._remembered:
                if self._file is not None:
                    self._file.append(f"{name}\t{reason}\n".encode())
                LOG.warning("damaged image: %s (%s)", name, reason)
            self._reasons.setdefault(name, reason)
            self._stop_if_too_many()

    def _stop_if_too_many(self) -> None:
        count = len(self._reasons)
        if count <= self._max_fraction * self._total:
            return
        listed = sorted(self._reasons.items())[:_LISTED]
        rest = f", and {count - len(listed)} more" if count > len(listed) else ""
        most = f"{self._max_fraction:g}"
        bound = f"the tolerated fraction {most}; repair or remove them"
        if self._setting:
            bound = f"{self._setting}={most} allows; repair them, or raise it"
        raise TooManyDamaged(
            f"{count} of {self._total} images are damaged, more than {bound}: "
            + "; ".join(f"{name} ({reason})" for name, reason in listed)
            + rest
        )


def _whole_lines(path: epath.Path) -> bytes:
    """The content without a torn last line: a kill may have cut it before its newline."""
    content = read_whole(path)
    return content[: content.rfind(b"\n") + 1]


def _reasons_in(content: bytes) -> dict[str, str]:
    lines = content.decode("utf-8", "replace").split("\n")
    return dict(line.split("\t", 1) for line in lines if "\t" in line)


def _printable(text: str) -> str:
    """One line without tabs; bytes of a file name that are not UTF-8 are escaped."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode("utf-8").split())
