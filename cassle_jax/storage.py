"""Files of a run on local disks and object stores: written whole, or growing at their end."""

import contextlib
import errno
import fnmatch
import glob
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import IO, Any, TypeVar

from etils import epath

from cassle_jax.checks import ConfigError
from cassle_jax.faults import reason_of, retried

T = TypeVar("T")

LOG = logging.getLogger(__name__)

OBJECT_STORES = ("gs", "s3")

PARTIAL = ".partial"  # ending of the names of unfinished files
_MOUNTS: set[Path] = set()  # file systems on which this process made a folder, or found one
_DEAD_AFTER = 3600.0  # seconds without a new byte after which the writer counts as killed


def path_of(written: epath.PathLike) -> epath.Path | Path:
    """The path that a setting or flag gives, with a leading `~` replaced by the home folder.

    A local path that epath would take for an address, such as /s3/x, is pathlib's.

    Raises:
      ConfigError: the home folder or the scheme is unknown, or the path has a null character.
    """
    # pathlib's own raises where `~name` is a file of that name and no user.
    path = os.path.expanduser(os.fspath(written))  # noqa: PTH111
    if re.match("~(/|$)", path):
        raise ConfigError(
            f"{path} cannot be found: no home is known; set HOME, or write it in full"
        )
    if "\0" in path:
        raise ConfigError(f"{path!r} is not a path: it has a null character")
    if "://" in path and not on_object_store(path):  # epath's own is a KeyError
        raise ConfigError(
            f"{path} has a scheme that is unknown; use a local path, gs://… or s3://…"
        )
    known = epath.Path(path)
    return Path(path) if "://" in str(known) and not on_object_store(path) else known


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path, which follows no link; the address of an object store unchanged.

    Raises:
      ConfigError: the path is relative, and the current folder was deleted.
    """
    # epath's own `resolve` and `absolute` take an address for a local path.
    if "://" in str(path):
        return epath.Path(path)
    try:
        return epath.Path(os.path.abspath(path))  # noqa: PTH100
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} cannot be found: the current folder was deleted; write it in full"
        ) from error


def check_address(setting: str, written: epath.PathLike) -> None:
    """Raises ConfigError for a path that means another place, or that libraries cannot open.

    epath takes the local path /s3/x for s3://x. An object store needs its package.
    """
    path = path_of(written)
    taken = absolute(path)
    if "://" in str(taken) and not on_object_store(written):
        raise ConfigError(
            f"{setting}={written} is a local path that libraries take for {taken}; "
            "use a link to it, elsewhere"
        )
    try:
        with contextlib.suppress(OSError):  # what is out of reach is waited for later
            if on_object_store(path):
                path.exists()
    except ImportError as error:
        raise ConfigError(f"{path} is on an object store: {error}") from error


def local_folder(flag: str, written: epath.PathLike) -> Path:
    """The local folder that a flag gives, to write to.

    Raises:
      ConfigError: it is empty or on an object store, or see `path_of`, `check_address` and
        `check_no_file`.
    """
    if not os.fspath(written) or on_object_store(written):
        raise ConfigError(f"{flag}={written} is not a local folder; give the one to write to")
    check_address(flag, written)
    check_no_file(flag, path_of(written))
    return Path(path_of(written))


def check_no_file(setting: str, folder: epath.PathLike) -> None:
    """Raises ConfigError where a file or device is in a folder's place, or where it would lie."""
    if on_object_store(folder):
        return
    for each in (path := Path(os.fspath(folder)), *path.parents):
        with contextlib.suppress(OSError):  # what is out of reach is waited for later
            if not is_there(each):
                continue
            if not each.is_dir():
                what = "a file" if each.is_file() else "a pipe or a device"
                raise ConfigError(
                    f"{setting}={folder} is not a folder: {each} is {what}; use another path"
                )
        return


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/cassle_jax`; in `~/.cache` where the variable is not set."""
    return Path(path_of(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "cassle_jax"


def is_utf8(path: epath.PathLike) -> bool:
    """Whether all of a path is text; any other bytes confuse libraries in other languages."""
    return os.fsencode(str(path)).decode("utf-8", "replace") == str(path)


def _glob(folder: epath.Path, pattern: str) -> Iterator[epath.Path]:
    """The matches inside a folder; the folder's own name is not a pattern."""
    # epath's own takes `runs/a[1]` for a pattern: Orbax then finds nothing to put into a checkpoint
    # and silently leaves one that cannot be read.
    first, _, rest = pattern.partition("/")
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for path in paths:
        hidden = path.name.startswith(".") and not first.startswith(".")
        if fnmatch.fnmatchcase(path.name, first) and not hidden:
            yield from _glob(path, rest) if rest else (path,)


type(epath.Path(".")).glob = _glob


def on_object_store(path: epath.PathLike) -> bool:
    """Whether the path is of an object store: without locks, appending and a size."""
    return str(path).startswith(tuple(f"{scheme}://" for scheme in OBJECT_STORES))


def is_there(path: epath.PathLike) -> bool:
    """Whether there is a file or folder of this path.

    The path's own `exists` also says no where storage is out of reach.

    Raises:
      OSError: it cannot be found out.
    """
    if on_object_store(path):
        return epath.Path(path).exists()
    try:
        Path(os.fspath(path)).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_ends(path: epath.PathLike, known: os.stat_result | None = None) -> None:
    """Raises OSError, of ESPIPE, for a pipe or device: reading one may wait, or last, forever."""
    mode = (known or os.stat(path)).st_mode  # noqa: PTH116 - quicker
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.ESPIPE, "it is a pipe or a device, not a file", os.fspath(path))


def open_to_read(path: epath.PathLike, buffering: int = -1) -> IO[bytes]:
    """Opens a local file to read, as `open` does; raises the errors of `check_ends`."""
    return open(path, "rb", buffering, opener=_open_ending)


def _open_ending(path: str, flags: int) -> int:
    try:
        # Without waiting for a pipe's writer; a file's reads wait as ever.
        descriptor = os.open(path, flags | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EAGAIN):  # a socket, or a device that is gone
            check_ends(path)
        if error.errno != errno.EAGAIN:
            raise
        descriptor = os.open(path, flags)  # waits until the holder of a lease gives the file up
    try:
        check_ends(path, os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_whole(path: epath.PathLike) -> bytes:
    """The content of a file; raises the errors of `check_ends`."""
    if on_object_store(path):
        return epath.Path(path).read_bytes()
    with open_to_read(path, buffering=0) as file:
        return file.read()


def read_surely(path: epath.PathLike) -> bytes:
    """The content of a file, as `read_whole` has it; waits while a fault may pass.

    Raises:
      OSError, Outage: it cannot be read, for good or for now.
    """
    return retried(str(path), lambda: read_whole(path))


def open_shared(path: epath.PathLike, flags: int) -> int:
    """Opens a local file for writing, made with the modes that `share` adds.

    An `opener` of `open`. See also `check_ends`.

    Args:
      path: path of the file.
      flags: those of `os.open`.

    Returns:
      The descriptor, which child processes do not inherit.
    """
    flags |= os.O_CREAT | os.O_CLOEXEC
    try:
        made = os.open(path, flags | os.O_EXCL, 0o666)
    except FileExistsError:
        check_ends(path)
        return os.open(path, flags, 0o666)
    with contextlib.suppress(OSError):  # a file system without modes
        wanted = stat.S_IMODE(os.fstat(made).st_mode)
        os.fchmod(made, wanted | _given_in(Path(os.fspath(path)).parent) & 0o666)
    return made


def real_path(path: epath.PathLike) -> Path:
    """The path without links; `Path.resolve` may raise for a circle, epath's follows no link."""
    return Path(os.path.realpath(path))


def make_shared(folder: epath.PathLike) -> None:
    """Makes a folder, and those it lies in, where they are missing; see `share`.

    Raises:
      OSError: it cannot be made, or a file is in its place; ENODEV where a file system on which
        this process made a folder is not mounted now: the folder would hide what lies there.
    """
    if on_object_store(folder):
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        return
    made = Path(os.fspath(folder))
    _check_mounted(real_path(made))
    if _is_folder(made):
        return
    if not is_there(made.parent):
        make_shared(made.parent)
    try:
        made.mkdir()
    except FileExistsError:
        if made.is_symlink() and not is_there(made):
            raise FileNotFoundError(
                errno.ENOENT, f"{made} is a link to what is not there", str(folder)
            ) from None
        if not _is_folder(made):
            raise
        return  # another process was quicker
    share(made)


def _check_mounted(folder: Path) -> None:
    """Raises OSError, of ENODEV, where a file system is gone; remembers the one there is now."""
    for mount in tuple(_MOUNTS):
        if folder.is_relative_to(mount) and not os.path.ismount(mount):
            raise OSError(errno.ENODEV, f"{mount} is not mounted any more", str(folder))
    _MOUNTS.add(next(each for each in (folder, *folder.parents) if os.path.ismount(each)))


def _is_folder(path: Path) -> bool:
    """Whether a local path is a folder; raises OSError where it cannot be found out."""
    return is_there(path) and path.is_dir()


def share(path: epath.PathLike) -> None:
    """Lets users who may write to the enclosing folder write to this file or folder, and inside it.

    Otherwise they could not delete it. Other users get no new permissions, and in a sticky folder,
    such as `/tmp`, where users keep to their own files, nobody does.
    """
    top = Path(os.fspath(path))
    if on_object_store(path) or top.is_symlink():
        return
    with contextlib.suppress(OSError):  # a file system without modes
        modes = _given_in(top.parent)
        if not modes:
            return
        for each in (top, *top.rglob("*")):
            if each.is_symlink():  # what it leads to may be private
                continue
            own = stat.S_IMODE(each.stat().st_mode)
            wanted = own | (modes if each.is_dir() else modes & 0o666)
            if wanted != own:
                each.chmod(wanted)


def _given_in(folder: Path) -> int:
    """A folder's permissions for its group, and for others, where these may write to it."""
    modes = folder.stat().st_mode
    if modes & stat.S_ISVTX:
        return 0
    may_write = [each for each in (stat.S_IRWXG, stat.S_IRWXO) if modes & each & 0o222]
    return modes & sum(may_write)


def written(setting: str, folder: epath.PathLike, write: Callable[[], T]) -> T:
    """Returns what `write` returns; waits while a fault may pass.

    Raises:
      ConfigError: the folder, which the setting names, cannot be written.
      Outage: it cannot be written for now.
    """
    try:
        return retried(f"{setting}={folder}", write)
    except OSError as error:
        raise ConfigError(f"{setting}={folder} cannot be written: {reason_of(error)}") from error


def check_writable(flag: str, folder: Path | epath.Path) -> None:
    """Makes a local folder; raises ConfigError, naming the flag, where it takes no files."""

    def write() -> None:
        make_shared(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass

    written(flag, folder, write)


def free_bytes(folder: epath.PathLike) -> int | None:
    """Bytes free where the folder lies; `None` where they are unlimited or unknown."""
    try:
        return None if on_object_store(folder) else shutil.disk_usage(folder).free
    except OSError:
        return None


def free_files(folder: epath.PathLike) -> int | None:
    """Files and folders that can be made where a folder lies; `None` where no bound is known."""
    try:
        known = None if on_object_store(folder) else os.statvfs(folder)
    except OSError:
        return None
    return known.f_favail if known and known.f_files else None


def kept_json(
    path: epath.PathLike, needed: Mapping[str, Any] | None = None, *, kind: type = dict
) -> Any | None:
    """The content of a JSON file; `None` where it is missing, or damaged as by a power cut.

    Args:
      path: path of the file.
      needed: names, and the types of their values, without which an object counts as damaged.
        `[kind]` is a list of such values, `{str: kind}` an object of them, and a tuple of kinds a
        list of this length.
      kind: `dict` for an object, or `list`.

    Raises:
      OSError, Outage: the file cannot be read, for now or for good.
    """
    try:
        content = json.loads(read_surely(epath.Path(path)), parse_int=number_of)
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    if not isinstance(content, kind):
        return None
    whole = all(has_type(content.get(name), own) for name, own in (needed or {}).items())
    return content if whole else None


def number_of(text: str) -> Real:
    """Parses a whole number of JSON; beyond 64 bits, where only damage writes one, as a float."""
    return int(text) if len(text.removeprefix("-")) < 20 else float(text)


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value of a JSON file has a type, as `needed` of `kept_json` gives it.

    NaN and infinity, which JSON lacks, have none.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(kind, type):
        return isinstance(value, kind) and not isinstance(value, bool)
    if isinstance(kind, dict):
        ((_, own),) = kind.items()
        return isinstance(value, dict) and all(has_type(each, own) for each in value.values())
    if not isinstance(value, list):
        return False
    if isinstance(kind, list):
        return all(has_type(each, kind[0]) for each in value)
    return len(value) == len(kind) and all(map(has_type, value, kind))


def write_whole(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file that is never seen half written: the old one stays until the new is complete.

    Text is written as UTF-8. What UTF-8 cannot hold, such as some byte of a file name, becomes an
    escape, which JSON reads back unchanged.

    Raises:
      OSError: it cannot be written; the old one is untouched.
    """
    path = epath.Path(path)
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    if on_object_store(path):
        path.write_bytes(content)  # an object appears when it is complete
        return
    with becoming(path) as partial:
        partial.write_bytes(content)


def write_surely(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file as `write_whole` does, and waits while a fault may pass.

    Raises:
      OSError, Outage: it cannot be written, for good or for now; the old one is untouched.
    """
    retried(str(path), lambda: write_whole(path, content))


@contextlib.contextmanager
def written_whole(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """A local file to write, which gets its name when the block ends; until then the old one stays.

    Several processes may write the same file at once: each writes its own, and the last one stays.
    A block that raises leaves nothing; a later write removes what a killed process left.

    Raises:
      OSError: it cannot be written.
    """
    with becoming(path) as partial, partial.open("wb") as file:
        yield file


@contextlib.contextmanager
def becoming(path: epath.PathLike) -> Iterator[epath.Path]:
    """A path beside this one, whose file takes its place when the block ends."""
    path = epath.Path(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        yield partial
        share(partial)
        partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a write does not name its file, as opening does
        partial.unlink(missing_ok=True)
        raise
    remove_dead_partials(Path(os.fspath(path)).parent, glob.escape(path.name))


def remove_dead_partials(folder: Path, name: str = "*", *, after: float = _DEAD_AFTER) -> None:
    """Removes half-written files that killed processes left in a folder, of the given name.

    Args:
      folder: the folder.
      name: pattern of the files' names.
      after: seconds without a new byte after which the writer counts as killed; 0 where no other
        process writes such files.
    """
    partials = [*folder.glob(f"{name}.*{PARTIAL}")]
    now = _clock_of(folder) if partials else 0.0
    for partial in partials:
        with contextlib.suppress(OSError):  # its writer finished, or removed it
            if now - partial.stat().st_mtime >= after:
                partial.unlink()


def _clock_of(folder: Path) -> float:
    """Seconds by the clock of a folder's file system; a server's may differ from this machine's."""
    try:
        with tempfile.TemporaryFile(dir=folder) as new:
            return os.fstat(new.fileno()).st_mtime
    except OSError:  # a full disk, which needs what the partial files hold
        return time.time()


class GrowingFile:
    """A file of records that grows at its end; a failed write never ends the run.

    A record that cannot be written, as on a full disk, is kept and written with the next one; one
    line in the log says so. The file never keeps a part of a record. If someone deletes the file, a
    new one gets the later records. An object store cannot append: each record rewrites the file.

    Args:
      path: path of the file.
      content: its present content.
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
                reason = reason_of(error)
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
            make_shared(self._path.parent)  # where it was deleted meanwhile
            with open(self._path, "ab", opener=open_shared) as file:
                self._size = min(self._size, file.tell())  # else zeros would fill the gap
                file.truncate(self._size)  # where a write failed, a part of it may be there
                file.write(self._waiting)
        else:
            self._path.write_bytes(self._content + self._waiting)
            self._content += self._waiting
        self._size += len(self._waiting)
        self._waiting = b""
