"""The faults of docs/storage.md's table, each as it happens to a tiny run."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from pytest import MonkeyPatch

from cassle_jax.data.folder import FolderSource
from cassle_jax.lock import folder_held
from cassle_jax.storage import GrowingFile
from cassle_jax.training import loop, read_back
from cassle_jax.training.checkpoints import Checkpoints
from cassle_jax.training.metrics import MetricsWriter

_RECORDS = ("config.json", "metrics.jsonl", "starts.jsonl")
ONE_FILE = 5  # index of the file that a fault of one file hits


@dataclasses.dataclass
class Case:
    """One repetition: what a fault may reach.

    Attributes:
      config: configuration of the run; a fault may change it.
      images: root of the image folder.
      workdir: workdir of the run.
      patch: what it replaces is put back when the fault ends.
      step: the random step at which the fault begins.
    """

    config: ConfigDict
    images: Path
    workdir: Path
    patch: MonkeyPatch
    step: int

    def at_step(self, act: Callable[[], Any]) -> None:
        """Lets something happen once, when the metrics of the random step are written."""
        write, steps = MetricsWriter.write, [self.step]

        def and_then(writer, step, metrics):
            write(writer, step, metrics)
            if step in steps:
                steps.clear()
                act()

        self.patch.setattr(MetricsWriter, "write", and_then)

    def reading(self, fails: Callable[[int], bool]) -> None:
        """Lets the reads of the images for which `fails` is true end with EIO or ESTALE."""
        read = FolderSource.__getitem__

        def failing(source, index):
            if fails(index):
                raise _error(random.choice((errno.EIO, errno.ESTALE)))
            return read(source, index)

        self.patch.setattr(FolderSource, "__getitem__", failing)

    def failing(self, owner: Any, name: str, code: int, *, times: float = float("inf")) -> None:
        """Lets the first `times` calls of a function end with an error."""
        function, left = getattr(owner, name), [times]

        def fail(*arguments, **settings):
            left[0] -= 1
            if left[0] >= 0:
                raise _error(code)
            return function(*arguments, **settings)

        self.patch.setattr(owner, name, fail)


@dataclasses.dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
      name: as in the table.
      inject: a context in which the fault happens to a case.
      codes: exit codes that the table has; 0 where the run goes on.
      begun: whether the run was begun, and stopped at a random step, before.
      damages: whether one image is damaged: the run is compared with one without that file.
      continues: whether the same command continues afterwards.
      forgets: whether the metrics before the fault are gone.
    """

    name: str
    inject: Callable[[Case], Any]
    codes: Sequence[int] = (0,)
    begun: bool = False
    damages: bool = False
    continues: bool = True
    forgets: bool = False


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def _one_read(case: Case) -> None:
    failed: set[int] = set()

    def once(index: int) -> bool:
        fails = index not in failed and random.random() < 0.2
        failed.update([index] if fails else [])
        return fails

    case.reading(once)


def _one_file(case: Case) -> None:
    case.reading(lambda index: index == ONE_FILE)


def _too_many(case: Case) -> None:
    case.config.data.max_bad_fraction = 0.0
    gone: list[bool] = []
    case.at_step(lambda: gone.append(True))
    case.reading(lambda index: bool(gone) and index == ONE_FILE)


@contextlib.contextmanager
def _moved(path: Path) -> Iterator[None]:
    away = path.with_name("away")
    path.rename(away)
    yield
    away.rename(path)


@contextlib.contextmanager
def _root_gone(case: Case, then: Callable[[], Any] = lambda: None) -> Iterator[None]:
    away = case.images.with_name("away")
    case.at_step(lambda: (case.images.rename(away), then()))
    yield
    if away.exists():
        away.rename(case.images)


def _stopped_in_outage(case: Case) -> Any:
    case.patch.setenv("CASSLE_STORAGE_SECONDS", "600")
    # While the run waits; before that, it would stop after the step.
    stop = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    return _root_gone(case, stop.start)


@contextlib.contextmanager
def _a_file_in_place(case: Case) -> Iterator[None]:
    case.workdir.write_text("")
    yield
    case.workdir.unlink()


@contextlib.contextmanager
def _locked_elsewhere(case: Case) -> Iterator[None]:
    case.workdir.mkdir()
    (case.workdir / "lock").write_text(json.dumps({"host": "another", "pid": 7, "since": "today"}))
    with (case.workdir / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _locked_here(case: Case) -> Iterator[None]:
    case.workdir.mkdir()
    with folder_held(case.workdir):
        yield


@contextlib.contextmanager
def _other_images(case: Case) -> Iterator[None]:
    """One image has another name, or is gone."""
    image = case.images / "train" / "a" / f"{2 * ONE_FILE:02}.png"
    other = image.with_name(random.choice(("99.png", "99.txt")))
    image.rename(other)
    yield
    other.rename(image)


@contextlib.contextmanager
def _in_place_of(case: Case, put: Callable[[Path], Any], *names: str) -> Iterator[None]:
    """One of the files gives way to something else."""
    file = case.workdir / random.choice(names)
    with _moved(file):
        put(file)
        yield
        if file.is_dir():
            file.rmdir()


def _deleted(case: Case) -> None:
    away = case.workdir.with_name("deleted")

    def delete() -> None:
        case.workdir.rename(away)  # while it is written to, deleting it may fail
        shutil.rmtree(away, ignore_errors=True)

    case.at_step(delete)


def _newest_damaged(case: Case) -> None:
    newest = max((case.workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for file in (newest / "state").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


def _saves_fail(case: Case, code: int, times: float) -> None:
    case.failing(ocp.CheckpointManager, "save", code, times=times)


def _no_metrics(case: Case) -> None:
    case.at_step(lambda: case.failing(GrowingFile, "_write", errno.ENOSPC, times=4))


def _no_probe(case: Case) -> None:
    case.config.probe.update({"every_epochs": 2, "test_split": "train"})
    case.failing(loop.OnlineProbe, "__call__", errno.EINVAL)


FAULTS = (
    Fault("one read fails (EIO, ESTALE)", _one_read),
    Fault("one file stays unreadable", _one_file, damages=True),
    Fault("more than that fraction", _too_many, [2]),
    Fault("all images unreadable, mount or root gone", _root_gone, [69]),
    Fault(
        "the same while splits are listed at the start",
        lambda case: case.failing(os, "scandir", errno.EIO),
        [69],
    ),
    Fault("a path that is not there at the start", lambda case: _moved(case.images), [2]),
    Fault(
        "workdir at the start: no space, EIO, ESTALE",
        lambda case: case.failing(
            loop, "write_config", random.choice((errno.ENOSPC, errno.EIO, errno.ESTALE))
        ),
        [69],
    ),
    Fault("workdir at the start: not permitted, read-only, a file", _a_file_in_place, [2]),
    Fault("workdir locked by a run of another host", _locked_elsewhere, [69]),
    Fault("workdir locked by a run of this host", _locked_here, [2]),
    Fault("other images than before", _other_images, [2], begun=True),
    Fault("the newest checkpoint fails to be read", _newest_damaged, begun=True),
    Fault(
        "no checkpoint can be read for now",
        lambda case: case.failing(Checkpoints, "_read", errno.EIO),
        [69],
        begun=True,
    ),
    Fault(
        "a checkpoint fails to be written, one process",
        lambda case: _saves_fail(case, random.choice((errno.EIO, errno.ENOSPC)), 1),
    ),
    Fault(
        "the last checkpoint, after 10 minutes",
        lambda case: _saves_fail(case, errno.EIO, float("inf")),
        [69],
    ),
    Fault(
        "the last checkpoint, disk full",
        lambda case: _saves_fail(case, errno.ENOSPC, float("inf")),
        [74],
    ),
    Fault(
        "the first checkpoints cannot be read back",
        lambda case: case.failing(read_back, "read_checkpoint", errno.EINVAL),
        [74],
    ),
    Fault("the probe fails, or the run is killed in it", _no_probe),
    Fault("metrics cannot be written", _no_metrics),
    Fault("the workdir is deleted during the run", _deleted, forgets=True),
    Fault(
        "any file: not permitted, read-only, a folder in its place",
        lambda case: _in_place_of(case, Path.mkdir, *_RECORDS),
        [2],
        begun=True,
    ),
    Fault(
        "settings, weights or results of a run: damaged",
        lambda case: _in_place_of(case, Path.touch, "config.json"),
        [2],
        begun=True,
    ),
    Fault(
        "a fault of the program",
        lambda case: case.at_step(lambda: 1 / 0),
        [1],
    ),
    Fault(
        "SIGTERM, Ctrl-C",
        lambda case: case.at_step(lambda: signal.raise_signal(signal.SIGTERM)),
        [75],
    ),
    Fault("SIGTERM while the images are gone", _stopped_in_outage, [69, 75]),
    Fault(
        "the loss is not finite",
        lambda case: case.config.optimizer.update({"base_learning_rate": 1e30}),
        [3],
        continues=False,
    ),
)
