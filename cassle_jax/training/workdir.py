"""Checks that a run can use its folder, and that all its processes see the same one."""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from cassle_jax import storage
from cassle_jax.checks import ConfigError
from cassle_jax.lock import folder_held
from cassle_jax.storage import (
    absolute,
    check_address,
    check_no_file,
    is_utf8,
    on_object_store,
    path_of,
)

# The longest time until one host sees what another has written to a shared folder.
SHARED_FOLDER_SECONDS = 60


def known_path(workdir: epath.PathLike, *, setting: str = "workdir") -> epath.Path:
    """The path that a setting gives, to write checkpoints in.

    Raises:
      ConfigError: checkpoints cannot be written there, as with an unknown scheme.
    """
    if not os.fspath(workdir):
        raise ConfigError(f"{setting}='' names no folder; give one, as in --{setting}=runs/first")
    if re.search(r"://|^(gs|s3):/", str(workdir)) and not on_object_store(workdir):
        raise ConfigError(
            f"{setting}={workdir} has a scheme that is unknown; use a local path, gs://… or s3://…"
        )
    path = path_of(workdir)
    check_address(setting, workdir)
    check_no_file(setting, path)
    whole = str(absolute(path))
    # Orbax makes `gs://` of every `gs:/`.
    if "\\" in whole or not is_utf8(whole) or "gs:/" in f"{whole}/".removeprefix("gs://"):
        raise ConfigError(
            f"{setting}={whole!r} has a backslash or bytes that are not UTF-8, or a folder whose "
            "name ends in 'gs:'; arrays cannot be written there; use a folder without them"
        )
    return path


def written(workdir: epath.Path, write: Callable[[], Any]) -> Any:
    """Writes as `storage.written` does, for the setting `workdir`."""
    return storage.written("workdir", workdir, write)


@contextlib.contextmanager
def workdir_held(workdir: epath.Path, holder: str) -> Iterator[None]:
    """Makes a workdir, and holds it while entered.

    Args:
      workdir: the folder.
      holder: word for the holder in the message, such as run.

    Raises:
      ConfigError: it cannot be written, or another process of this host holds it.
      Outage: it cannot be written for now.
    """
    with contextlib.ExitStack() as held:
        written(workdir, lambda: held.enter_context(folder_held(workdir, holder=holder)))
        yield


def check_seen(workdir: epath.Path) -> None:
    """Raises ConfigError where a process sees another folder than the first under this name."""
    seen = workdir / "config.json"
    until = time.monotonic() + SHARED_FOLDER_SECONDS
    while not seen.exists():
        if time.monotonic() > until:
            raise ConfigError(
                f"workdir={workdir} is not the folder that process 0 writes: {seen} is not there "
                f"for process {jax.process_index()}; use a folder that all processes share"
            )
        time.sleep(0.5)
