"""Lists the image files below a folder, and counts by kind what it leaves out."""

import errno
import logging
import os
import pathlib
import stat
from collections.abc import Iterator

from etils import epath

from cassle_jax.data.decode import EXTENSIONS
from cassle_jax.data.errors import DataError
from cassle_jax.faults import passing
from cassle_jax.storage import on_object_store, path_of

LOG = logging.getLogger(__name__)

HIDDEN = "hidden"
NOT_AN_IMAGE = "not an image by its extension"
DANGLING = "a dangling link"
CIRCLE = "a link in a circle"
UNREADABLE = "unreadable"
SPECIAL = "neither file nor folder"

# Folders of file systems, archives and disk stations; the last ones' have a thumbnail per image.
_NOT_OURS = (b"lost+found", b"$RECYCLE.BIN", b"System Volume Information", b"__MACOSX", b"@eaDir")

_FOLDER, _IMAGE = "folder", "image"
# Most datasets have these; a user should learn of other files that are left out.
_HARMLESS = (HIDDEN, NOT_AN_IMAGE)
_ENDINGS = tuple(each.encode() for each in EXTENSIONS)


class Skipped:
    """Paths that a listing leaves out: their number per kind, and the first of them."""

    def __init__(self):
        self._found: dict[str, tuple[int, str]] = {}

    def note(self, kind: str, path: str | bytes) -> None:
        """Counts one more path of a kind."""
        count, first = self._found.get(kind, (0, os.fsdecode(path)))
        self._found[kind] = count + 1, first

    def log(self, name: str) -> None:
        """Logs one line per kind with what was left out of the listing called `name`."""
        for kind, (count, first) in self._found.items():
            level = logging.INFO if kind in _HARMLESS else logging.WARNING
            LOG.log(level, "%s: skipped %d: %s, such as %r", name, count, kind, first)

    def __str__(self) -> str:
        """A summary such as ' (skipped: 3: hidden, such as 'a/.x')'; '' if nothing was left out."""
        each = [f"{count}: {kind}, such as {one!r}" for kind, (count, one) in self._found.items()]
        return f" (skipped: {'; '.join(each)})" if each else ""


def list_images(root: pathlib.Path) -> tuple[list[bytes], Skipped]:
    """The images below a folder at any depth, in an order that no file system changes.

    A file is an image by its extension, see `EXTENSIONS`. Links are followed.

    Returns:
      The paths relative to `root`, sorted by their bytes, and what was left out.

    Raises:
      DataError: the folder itself cannot be listed.
    """
    skipped = Skipped()
    return sorted(_images(root, skipped)), skipped


def list_folders(root: pathlib.Path) -> tuple[str, ...]:
    """The names of the folders in a folder, sorted by their bytes; hidden ones are left out.

    Raises:
      DataError: the folder cannot be listed.
    """
    found = [entry.name for entry in _entries(root) if _kind(entry) == _FOLDER]
    return tuple(map(os.fsdecode, found))


def _images(root: pathlib.Path, skipped: Skipped) -> Iterator[bytes]:
    """The images below a folder, in no order."""
    # Folders, and those above: device and inode. A link to one above the root holds the root again.
    beyond = tuple(map(_identity, root.resolve().parents))
    waiting: list[tuple[bytes, tuple]] = [(b"", beyond)]
    while waiting:
        inside, above = waiting.pop()
        folder = root / os.fsdecode(inside)
        try:
            entries = _entries(folder)
        except DataError as error:
            if not inside or not isinstance(error.__cause__, PermissionError):
                raise
            skipped.note(UNREADABLE, inside)
            continue
        here = _identity(folder)
        if here in above:
            skipped.note(CIRCLE, inside)
            continue
        for entry in entries:
            path, kind = inside + b"/" * bool(inside) + entry.name, _kind(entry)
            if kind == _FOLDER:
                waiting.append((path, (*above, here)))
            elif kind == _IMAGE:
                yield path
            else:
                skipped.note(kind, path)


def _identity(folder: pathlib.Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def local_root(path: str, wanted: str) -> pathlib.Path:
    """The absolute path of the local folder that `data.path` gives.

    Args:
      path: the setting.
      wanted: the folder it should give, for the message.

    Raises:
      DataError: the path is empty, not a folder, or on an object store.
    """
    if on_object_store(path):
        raise DataError(f"data.path={path!r} is on an object store; mount it, and give {wanted}")
    root = pathlib.Path(path_of(path)).absolute()
    if not path or not is_folder(root):
        raise DataError(f"data.path={path!r} is not a folder; give {wanted}")
    return root


def is_folder(path: epath.PathLike) -> bool:
    """Whether the path is a folder; False without permission to find out.

    Raises:
      OSError: storage is out of reach for now, which a path's own `is_dir` may hide.
    """
    if on_object_store(path):
        return epath.Path(path).is_dir()
    try:
        return stat.S_ISDIR(pathlib.Path(os.fspath(path)).stat().st_mode)
    except OSError as error:
        if passing(error):
            raise
        return False


def _entries(folder: pathlib.Path) -> list[os.DirEntry]:
    try:
        with os.scandir(os.fsencode(folder)) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"data.path: {str(folder)!r} cannot be listed: {error.strerror}") from error


def _kind(entry: os.DirEntry) -> str:
    """Folder, image, or the reason why it is neither; looks at the target of a link."""
    if entry.name.startswith(b".") or entry.name in _NOT_OURS:
        return HIDDEN
    try:
        if entry.is_dir():
            return _FOLDER
        if entry.is_file():
            return _IMAGE if entry.name.lower().endswith(_ENDINGS) else NOT_AN_IMAGE
    except OSError as error:
        if passing(error):
            raise
        return CIRCLE if error.errno == errno.ELOOP else UNREADABLE
    return DANGLING if entry.is_symlink() else SPECIAL
