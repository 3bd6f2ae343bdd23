"""Reads and decodes one record, and distinguishes a bad one from storage that is out of reach."""

import errno
import pathlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from cassle_jax.data.decode import DamagedImage
from cassle_jax.data.errors import DataError
from cassle_jax.data.sources import FileOfMany, Record, Source, is_gone, root_of, stored_of
from cassle_jax.faults import Outage, is_of_machine, passing, reason_of, retried, storage_seconds

# Distances to other images. If one can be read, the file is at fault, not the storage.
_OTHERS = (1, 17, 1009)
# Time to wait for one file before trying others.
_ONE_FILE_SECONDS = 15.0

# Errors of the file itself, whose image a substitute may replace. Substitutes would hide errors of
# machine or network, and change the order of the images.
_FILE_ERRORS = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ESPIPE,  # a pipe or a device
)


T = TypeVar("T")


class UnreadableRecord(Exception):
    """One record that cannot be read or decoded, and counts as damaged.

    Args:
      name: text by which a user finds it, for example its path.
      reason: why, in words.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class RecordReader:
    """Reads a source's records, and waits for storage that may come back. Thread-safe.

    Args:
      source: the dataset.
      is_known: whether the file of this name is known to be unreadable; the reader does not wait
        for it again.
    """

    def __init__(self, source: Source, is_known: Callable[[str], bool]):
        self._source, self._is_known = source, is_known

    def __call__(self, index: int, decode: Callable[[bytes | np.ndarray], T]) -> tuple[Record, T]:
        """The record at `index`, and what `decode` makes of its image.

        Raises:
          UnreadableRecord: this record alone cannot be read or decoded.
          DataError: it cannot be read for another reason, which is not temporary.
          Outage: no file can be read.
        """
        name = f"{self._source.name} #{index}"
        try:
            record = self._read(index, name)
            name = record.name
            return record, decode(record.image)
        except DamagedImage as error:
            raise UnreadableRecord(error.file or name, str(error)) from error
        except OSError as error:
            reason, fault = reason_of(error), passing(error)
            if isinstance(error, FileOfMany):
                raise DataError(
                    f"the file {error.filename} of {self._source.name} cannot be read ({reason}); "
                    "repair or replace it, and the same command continues"
                ) from error
            if error.errno in _FILE_ERRORS or (fault is not None and not is_of_machine(fault)):
                raise UnreadableRecord(error.filename or name, reason) from error
            raise DataError(f"{name} cannot be read: {reason}") from error

    def _read(self, index: int, name: str) -> Record:
        source, stored = self._source, stored_of(self._source)

        def read(place: int = index, source: Source = source) -> Record:
            try:
                return source[place]
            except OSError as error:
                if error.errno in _FILE_ERRORS:
                    _check_folder_there(error.filename, root_of(source))
                elif passing(error) and self._is_known(error.filename or name):
                    raise _Known(error) from None
                raise

        def can_be_read(place: int) -> bool:
            try:
                read(place, stored)
            except (OSError, _Known):
                return False
            except DamagedImage:
                return True  # a damaged image has been read
            return True

        try:
            return retried(name, read, seconds=min(_ONE_FILE_SECONDS, storage_seconds()))
        except _Known as known:
            raise known.fault from None
        except Outage as outage:
            fault = passing(outage)
            own = index * len(stored) // len(source)
            others = {(own + step) % len(stored) for step in _OTHERS} - {own}
            of_one = not is_of_machine(fault) and not isinstance(fault, FileOfMany)
            if of_one and any(map(can_be_read, others)):
                raise fault from None
        return retried(name, read)


class _Known(Exception):
    """An earlier read has waited for the record's file, and given up."""

    def __init__(self, fault: OSError):
        super().__init__()
        self.fault = fault


def _check_folder_there(file: str | None, root: str) -> None:
    """Raises OSError where the whole folder is missing, as when unmounted, not one file."""
    if file is None or not root or not pathlib.Path(file).is_relative_to(root):
        return
    if is_gone(root):
        raise OSError(errno.ENODEV, "the folder is gone, or empty", root)
