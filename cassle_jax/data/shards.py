"""Distinguishes an unreadable file of records from a damaged record in a good file."""

import contextlib
import errno
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from cassle_jax.data.errors import DataError
from cassle_jax.data.sources import FileOfMany, content_of_files, digest_of, is_gone
from cassle_jax.faults import passing, reason_of
from cassle_jax.storage import open_to_read

# A missing file or a failing disk, as array_record reports them.
_SYSTEM_ERROR = re.compile(r"\w+\(\) failed: [^;]+")


class Shards:
    """The array_record files of a split.

    Substitutes for all records of a file that is missing, incomplete or unreadable would silently
    change the data of a run.

    Args:
      name: name of the dataset.
      instructions: tfds' file instructions of the split, in its order.

    Attributes:
      paths: paths of the files, in the split's order.
      content: see `content_of`.

    Raises:
      DataError: a local file is missing, or this user may not read it.
      OSError: storage is out of reach, for now.
    """

    def __init__(self, name: str, instructions: Sequence[Any]):
        self._name = name
        self.paths = [os.fspath(each.filename) for each in instructions]
        # Before the files are opened. Were they replaced in between, the cache would keep numbers
        # of the old records as those of the new files.
        self.content = content_of_files(self.paths)
        self._records = [each.examples_in_shard for each in instructions]
        self._ends = np.cumsum([each.take for each in instructions])
        for path in self.paths:
            if "://" not in path:
                self._check_opens(path)

    def has_changed(self) -> bool:
        """See `sources.has_changed`."""
        return content_of_files(self.paths) != self.content

    @property
    def names(self) -> str:
        """See `names_of`: the files' names, and where their records end in the split."""
        files = "\0".join(path.rpartition("/")[2] for path in self.paths)
        return digest_of(files.encode(errors="surrogateescape"), self._ends.tobytes())

    def _check_opens(self, path: str) -> None:
        try:
            open_to_read(path).close()
        except FileNotFoundError as error:
            raise self._unreadable(path, "it is not there") from error
        except OSError as error:
            if passing(error):
                raise
            raise self._unreadable(path, reason_of(error)) from error

    def check(self, position: int, error: Exception) -> None:
        """Raises DataError where `error` is the fault of a record's file, not of the record.

        Raises OSError where it is the fault of storage, which may come back.

        Args:
          position: place of the record in the split.
          error: the error that reading it raised.
        """
        shard = int(np.searchsorted(self._ends, position, side="right"))
        path = self.paths[shard]
        failed = _SYSTEM_ERROR.search(str(error))
        fault = passing(error)
        if fault and failed and failed[0].startswith("open("):
            raise FileOfMany(fault.errno, fault.strerror, path) from error
        if fault:
            raise OSError(fault.errno, fault.strerror, f"{self._name} #{position}") from error
        if failed:
            folder = os.path.dirname(path)  # noqa: PTH120 - stays a string
            if "://" not in path and is_gone(folder):
                raise FileOfMany(errno.ENODEV, "the folder is gone, or empty", folder) from error
            raise self._unreadable(path, failed[0]) from error
        found = _records_in(path)
        if found != self._records[shard]:
            raise self._unreadable(
                path, f"{found} of its {self._records[shard]} records can be found"
            ) from error

    def _unreadable(self, path: str, reason: str) -> DataError:
        return DataError(
            f"the file {path} of {self._name} cannot be read ({reason}); repair or replace it, and "
            "the same command continues"
        )


def _records_in(path: str) -> int:
    """The number of records in the index at a file's end; 0 where the index is damaged."""
    reader = ArrayRecordReader(path)
    found = reader.num_records()
    with contextlib.suppress(RuntimeError):  # repeats the file's error
        reader.close()
    return found
