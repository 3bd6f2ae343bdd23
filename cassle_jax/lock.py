"""Holds a folder for one command, by a lock of the kernel, which ends with the process.

Three things are locked:

- `<folder>/lock`, by `folder_held`: a second command in a folder of results is refused.
- The folder itself, by `folder_held(leaves_file=False)`: likewise, for a folder that the user
  passes on, such as an export.
- `job.lock` in a run's folder, by `await_turn`: a job of a sweep or table waits for the one before
  it, which may still save after its parent was killed. Child processes inherit the open file.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import stat
from collections.abc import Iterator
from functools import partial
from typing import IO

from etils import epath

from cassle_jax.checks import ConfigError
from cassle_jax.faults import retried
from cassle_jax.storage import make_shared, on_object_store, open_shared

LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def folder_held(
    folder: epath.PathLike,
    *,
    setting: str = "workdir",
    holder: str = "run",
    leaves_file: bool = True,
    waits: bool = True,
) -> Iterator[None]:
    """Makes a folder where it is missing, and holds it while entered.

    The lock never expires, and also holds between the hosts of a shared file system. Reading needs
    no lock. On object stores and file systems without locks, nothing is held.

    Args:
      folder: the folder, such as the workdir of a run.
      setting: setting or flag that names the folder, for the message.
      holder: word for the holder in the message.
      leaves_file: whether `lock` may stay in the folder; False for a folder that users pass on.
      waits: whether to wait while a fault may pass; otherwise it is raised at once.

    Raises:
      ConfigError: another process of this host holds it; the message names it and its start.
      OSError, Outage: the folder or its lock cannot be written, for good or for now, as while a
        process of another host holds it.
    """
    take = partial(_taken, folder, setting, holder, leaves_file)
    descriptor = retried(f"{setting}={folder}", take) if waits else take()
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def await_turn(file: IO) -> None:
    """Waits until no other process holds the open file, and holds it until its last copy closes.

    Returns at once on file systems without locks.
    """
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            LOG.info("%s is in use; waiting for its end", file.name)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        LOG.info("%s cannot be locked: %s", file.name, error.strerror)


def _taken(folder: epath.PathLike, setting: str, holder: str, leaves_file: bool) -> int | None:
    """Makes the folder, and opens and locks its file or itself; `None` on an object store."""
    make_shared(folder)
    if on_object_store(folder):
        return None
    if leaves_file:
        descriptor = _opened(epath.Path(folder) / "lock")
    else:
        descriptor = os.open(os.fspath(folder), os.O_RDONLY | os.O_CLOEXEC)
    try:
        _take(descriptor, folder, setting, holder)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _opened(path: epath.Path) -> int:
    """Opens the lock's file; all users who can write to its folder can lock it."""
    try:
        return open_shared(path, os.O_RDWR)
    except PermissionError:  # another user made it before locks had the modes of their folders
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _take(descriptor: int, folder: epath.PathLike, setting: str, holder: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        other, host = _holder(descriptor)
        said = f"in use by another {holder} ({other})"
        if host not in (None, socket.gethostname()):
            # A host that died leaves its lock until the server's lease ends.
            raise OSError(errno.EAGAIN, said) from error
        raise ConfigError(
            f"{setting}={folder} is {said}; wait for its end, or use another {setting}"
        ) from None
    except OSError as error:
        if error.errno == errno.EBADF and stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return  # NFS locks files, not folders
        LOG.info(
            "%s has no locks (%s): ensure that only one %s uses it", folder, error.strerror, holder
        )
        return
    this = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    # For people only: on a full disk the lock still holds.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(this).encode(), 0)


def _holder(descriptor: int) -> tuple[str, str | None]:
    """The holder of the lock, in words, and its host, where it is known."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        words = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        return words, holder["host"]
    except (OSError, ValueError, TypeError, KeyError):
        return "its lock does not name it", None
