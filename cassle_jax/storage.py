"""Files of a run on local disks and object stores: written whole, or growing at their end."""

import logging
import shutil

from etils import epath

LOG = logging.getLogger(__name__)

OBJECT_STORES = ("gs", "s3")


def on_object_store(path: epath.PathLike) -> bool:
    """Whether the path is of an object store: without locks, appending and a size."""
    return str(path).startswith(tuple(f"{scheme}://" for scheme in OBJECT_STORES))


def free_bytes(folder: epath.PathLike) -> int | None:
    """What is free where the folder lies; `None` where that has no limit, or none that is known."""
    try:
        return None if on_object_store(folder) else shutil.disk_usage(folder).free
    except OSError:
        return None


def write_whole(path: epath.PathLike, content: bytes) -> None:
    """Writes a file that is never seen half written: the old one stays until the new is complete.

    Raises:
      OSError: it cannot be written; the old one is untouched.
    """
    path = epath.Path(path)
    if on_object_store(path):
        path.write_bytes(content)  # an object appears when it is complete
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


class GrowingFile:
    """A file of records to whose end more are written, and which never ends a run.

    What cannot be written, as on a full disk, is said once, kept, and written with what comes next;
    half a record is never left. On an object store, which cannot append, the file is written anew
    with every record.

    Args:
      path: of the file.
      content: what is in it already.
    """

    def __init__(self, path: epath.Path, content: bytes = b""):
        self._path = path
        self._appends = not on_object_store(path)
        self._size = len(content)
        self._content = b"" if self._appends else content
        self._waiting = b""
        self._failing = False

    def append(self, record: bytes) -> None:
        """Writes a record, and those before it that could not be written."""
        self._waiting += record
        try:
            self._write()
        except Exception as error:  # OSError, or whatever the store's library raises
            if not self._failing:
                reason = getattr(error, "strerror", None) or error
                LOG.warning("%s cannot be written for now: %s", self._path, reason)
            self._failing = True
        else:
            self._failing = False

    def close(self) -> None:
        """Tries once more to write what could not be written."""
        if self._waiting:
            self.append(b"")
        if self._waiting:
            LOG.warning("%s lacks its last %d bytes", self._path, len(self._waiting))

    def _write(self) -> None:
        if self._appends:
            with self._path.open("ab") as file:
                file.truncate(self._size)  # where a write failed, a part of it may be there
                file.write(self._waiting)
        else:
            self._path.write_bytes(self._content + self._waiting)
            self._content += self._waiting
        self._size += len(self._waiting)
        self._waiting = b""
