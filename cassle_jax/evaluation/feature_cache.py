"""Keeps arrays in a folder of bounded size; removes the least recently read ones first."""

import contextlib
import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cassle_jax.storage import make_shared, open_to_read, remove_dead_partials, written_whole

LOG = logging.getLogger(__name__)

CACHE_GIB = 20.0

_NAME = re.compile(r"[0-9a-f]{16}")


class FeatureCache:
    """Files `<folder>/<subject>/<key>.npz` of bounded total size.

    Several processes may share the folder. A file that cannot be read or written only costs time.

    Args:
      folder: the folder of all subjects; made by the first write. Other files in it are left alone.
      gib: bound of the total size, GiB; 0 keeps nothing.
    """

    def __init__(self, folder: Path, gib: float = CACHE_GIB):
        self._folder, self._bytes = folder, gib * 2**30

    def read(self, subject: str, key: str) -> Mapping[str, np.ndarray] | None:
        """The arrays by name; `None` where there is no file, or one that cannot be read."""
        path = self._path(subject, key)
        try:
            with open_to_read(path) as file, np.load(file) as kept:
                arrays = dict(kept)
        except FileNotFoundError:
            return None
        except Exception as error:  # A damaged file raises any type, depending on its bytes.
            LOG.warning("%s cannot be read and is written again: %s", path, error)
            return None
        with contextlib.suppress(OSError):  # the cache belongs to another user
            os.utime(path)
        return arrays

    def write(self, subject: str, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps arrays, and removes the least recently read ones beyond the bound.

        Args:
          subject: 16 hexadecimal digits.
          key: 16 hexadecimal digits that identify the arrays.
          arrays: the arrays by name.
        """
        if sum(each.nbytes for each in arrays.values()) > self._bytes:
            return
        path = self._path(subject, key)
        try:
            make_shared(path.parent)
            with written_whole(path) as file:
                np.savez(file, **arrays)
        except OSError as error:
            LOG.warning("features cannot be kept in %s: %s", path.parent, error)
        with contextlib.suppress(OSError):  # the folder is out of reach
            self._trim(path)

    def _path(self, subject: str, key: str) -> Path:
        return self._folder / subject / f"{key}.npz"

    def _trim(self, newest: Path) -> None:
        """Removes files beyond the bound, the newest last, and leftovers of killed processes."""
        found = []
        for path in self._folder.glob("*/*.npz"):
            if _NAME.fullmatch(path.stem) and _NAME.fullmatch(path.parent.name):
                with contextlib.suppress(OSError):  # another process removed it
                    found.append((path == newest, *_read_and_size(path), path))
        for folder in {path.parent for *_, path in found}:
            remove_dead_partials(folder)
        total = 0
        for *_, size, path in sorted(found, reverse=True):
            total += size
            if total > self._bytes:
                with contextlib.suppress(OSError):
                    path.unlink()


def _read_and_size(path: Path) -> tuple[int, int]:
    """The time of a file's last read, in ns, not later than now; and its bytes."""
    known, now = path.stat(), time.time_ns()
    if known.st_mtime_ns > now:  # the clock was set back: the file would stay until then
        with contextlib.suppress(PermissionError):  # it is another user's
            os.utime(path)
    return min(known.st_mtime_ns, now), known.st_size
