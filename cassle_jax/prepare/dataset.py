"""Prepares a dataset: plans, writes the shards on all CPUs, and describes them for tfds."""

import contextlib
import json
import logging
import multiprocessing
import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from cassle_jax.checks import LARGEST_SIDE, LONGEST, ConfigError, UserError, check_fraction
from cassle_jax.command import EXIT_NOT_SAVED, EXIT_OUTAGE, EXIT_PREEMPTED, Stop
from cassle_jax.data import DataError, Source, open_source
from cassle_jax.data.decode import allow_pixels
from cassle_jax.data.folder import check_outside
from cassle_jax.data.pipeline import usable_cpus
from cassle_jax.data.sources import content_at
from cassle_jax.faults import FULL, hurry, passing
from cassle_jax.lock import folder_held
from cassle_jax.prepare.plan import (
    INFO,
    PLAN,
    Preparation,
    Shard,
    lacking_bytes,
    plan_of,
    shards_of,
)
from cassle_jax.prepare.progress import PreparationProgress
from cassle_jax.prepare.shards import (
    Encoding,
    Written,
    features_of,
    is_whole,
    remove_partials,
    write_shard,
    written_shard,
)
from cassle_jax.storage import check_writable, is_there, is_utf8, local_folder, path_of, write_whole

LOG = logging.getLogger(__name__)

VERSION = "1.0.0"
_UNREADABLE = "unreadable.txt"


def prepare(
    data: ConfigDict,
    splits: Sequence[str],
    to: str,
    preparation: Preparation,
    *,
    workers: int = 0,
    max_bad_fraction: float = 0.01,
) -> Path:
    """Prepares splits of a dataset, or continues where an earlier call was stopped.

    Args:
      data: `data` settings as `open_source` takes them.
      splits: names of the splits.
      to: local folder of prepared datasets: `data.path` of the runs that read it.
      preparation: the settings of the files.
      workers: number of processes; 0 for one per CPU.
      max_bad_fraction: largest fraction of a split's images that may be unreadable.

    Returns:
      The folder of the dataset, which `tfds.builder_from_directory` opens.

    Raises:
      ConfigError: a setting cannot work, the folder holds another preparation, or another call
        writes to it.
      DataError: the dataset cannot be opened, or too many images of a split cannot be read.
      Outage: the images, or the folder, are out of reach.
      Stop: the disk is or would become full, a worker was killed, or the user stopped the call.
    """
    _check(splits, to, preparation, workers, max_bad_fraction)
    sources = {split: _opened(data, split) for split in splits}
    for source in sources.values():
        check_outside("--to", to, source)
    folder = Path(path_of(to)).absolute() / preparation.name / VERSION
    _check_name_free(folder)
    check_writable("--to", folder)
    with folder_held(folder.parent, setting="--to", holder="call"):
        remove_partials(folder)
        try:
            plan = plan_of(sources, folder, preparation, data.max_pixels)
            if not _is_complete(plan, folder):
                _check_space(plan, folder)
                write_whole(folder / PLAN, json.dumps(plan, indent=2) + "\n")
                written = _write_shards(sources, plan, folder, workers, max_bad_fraction)
                _check_unreadable(written, folder, max_bad_fraction)
                _write_info(plan, written, folder)
                remove_partials(folder)  # a killed call's workers may have outlived it
        except BaseException as error:
            plain = _plain(error, folder)
            if plain is None:
                raise
            raise plain from error
    return folder


def _opened(data: ConfigDict, split: str) -> Source:
    try:
        return open_source(data, split)
    except UserError as error:
        raise DataError(_with_flags(str(error))) from error


def _with_flags(text: str) -> str:
    """A source's message with flags in the place of settings, which have the same names."""
    return re.sub(r"\bdata\.(source|path|name|classes|max_pixels)\b", r"--\1", text)


def _check_name_free(folder: Path) -> None:
    """Refuses the name of another dataset: its files would be replaced, or read instead."""
    layouts = (f"*/{INFO}", f"*/*/{INFO}")  # <version>/…, and <configuration>/<version>/…
    for info in sorted(path for layout in layouts for path in folder.parent.glob(layout)):
        if info.parent != folder or not is_there(folder / PLAN):
            raise ConfigError(
                f"--as={folder.parent.name!r}: {info.parent} holds another dataset of this name; "
                "choose another --as or --to"
            )


def _check(
    splits: Sequence[str], to: str, preparation: Preparation, workers: int, bad: float
) -> None:
    local_folder("--to", to)
    check_fraction("--max_bad_fraction", bad, usual=0.01)
    if not is_utf8(path_of(to)):
        raise ConfigError(f"--to={str(to)!r} has bytes that are not UTF-8; use another")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", preparation.name):
        raise ConfigError(
            f"--as={preparation.name!r} is not a name for a dataset; use a-z, 0-9, _, such as mine"
        )
    if not splits or len(set(splits)) < len(splits):
        raise ConfigError(f"--splits={','.join(splits)} names no split, or one twice")
    for split in splits:
        if not re.fullmatch(r"\w+", split):
            raise ConfigError(f"--splits: {split!r} is not a name of a split, such as train")
        if split == "all":
            raise ConfigError(
                "--splits: 'all' is tensorflow-datasets' word for every split; rename its folder"
            )
    for flag, value, least, most in (
        ("short_side", preparation.short_side, 1, LARGEST_SIDE),
        ("quality", preparation.quality, 1, 100),
        ("shard_mib", preparation.shard_mib, 1, 1 << 16),
        ("workers", workers, 0, LONGEST),
    ):
        if not least <= value <= most:
            raise ConfigError(f"--{flag}={value} is out of range; use {least} to {most}")


def _is_complete(plan: Mapping[str, Any], folder: Path) -> bool:
    """Whether an earlier call has written everything, and no shard was lost or cut short since."""
    return is_there(folder / INFO) and all(is_whole(each.path) for each in shards_of(plan, folder))


def _check_space(plan: Mapping[str, Any], folder: Path) -> None:
    lacking = lacking_bytes(plan, folder)
    if lacking:
        needed, free = (each / 2**30 for each in lacking)
        raise Stop(
            f"--to: {folder} needs about {needed:.2f} GiB and has {free:.2f} GiB free; free some, "
            "or choose a smaller --short_side or --quality",
            EXIT_NOT_SAVED,
        )


def _write_shards(
    sources: Mapping[str, Source],
    plan: Mapping[str, Any],
    folder: Path,
    workers: int,
    allowed: float,
) -> dict[str, list[Written]]:
    """Writes the shards that are missing; returns what the shards of each split hold, in order."""
    shards = shards_of(plan, folder)
    written = _kept(sources, shards, allowed)
    missing = [shard for shard in shards if shard.path not in written]
    if is_there(folder / INFO):
        LOG.warning(
            "%s was finished, and has lost a shard or a part of one; %d of its %d shards are "
            "written again",
            folder,
            len(missing),
            len(shards),
        )
        (folder / INFO).unlink()  # it would not fit the new shards
    images = sum(len(shard.indices) for shard in shards)
    encoding = Encoding(plan["short_side"], plan["quality"], tuple(plan["classes"]))
    settings = sources, encoding, plan["max_pixels"]
    with (
        PreparationProgress(images, images - sum(len(s.indices) for s in missing)) as progress,
        _pool(min(workers or usable_cpus(), len(missing)), settings) as pool,
    ):
        futures = {pool.submit(_write, shard): shard for shard in missing}
        for future in as_completed(futures):
            shard = futures[future]
            written[shard.path] = future.result()
            progress.add(len(shard.indices))
    return {
        split: [written[shard.path] for shard in shards if shard.split == split]
        for split in sources
    }


def _kept(
    sources: Mapping[str, Source], shards: Sequence[Shard], allowed: float
) -> dict[Path, Written]:
    """The content of the shards that earlier calls have written and this one keeps."""
    kept = {}
    for split, source in sources.items():
        own = {shard.path: shard.indices for shard in shards if shard.split == split}
        found = {path: written for path in own if (written := written_shard(path)) is not None}
        bad = sum(len(written.unreadable) for written in found.values())
        again = _are_too_many(bad, len(source), allowed)  # they may be repaired by now
        for path, written in found.items():
            same = written.content == repr(content_at(source, own[path]))
            if same and not (again and written.unreadable):
                kept[path] = written
    return kept


def _plain(error: BaseException, folder: Path) -> Stop | DataError | None:
    """An error in words for the user; `None` where its own words say what to do."""
    if isinstance(error, DataError):
        return DataError(_with_flags(str(error)))
    fault = passing(error)
    if fault is not None and fault.errno in FULL:
        folder = fault.filename or folder  # such as the one for temporary files
        reason, code = f"{fault.strerror}; free some space", EXIT_NOT_SAVED
    elif isinstance(error, BrokenProcessPool):
        reason, code = "a worker was killed, for memory perhaps (--workers)", EXIT_OUTAGE
    elif isinstance(error, KeyboardInterrupt):
        reason, code = "stopped", EXIT_PREEMPTED
    else:
        return None
    return Stop(f"{folder}: {reason}; the same command continues", code)


@contextlib.contextmanager
def _pool(workers: int, settings: tuple) -> Iterator[Executor]:
    """Processes, as decoding holds Python's lock between images; one worker needs no process.

    The context ends when no process writes any more. After an error, they finish the shards that
    they have begun; after a request to stop, they finish none.
    """
    if workers < 2:
        pool = ThreadPoolExecutor(1, initializer=_begin_worker, initargs=settings)
    else:
        spawned = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, spawned, _begin_process, settings)
    try:
        yield pool
    except KeyboardInterrupt:
        hurry.set()
        for process in [*(getattr(pool, "_processes", None) or {}).values()]:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        hurry.clear()


_of_worker: dict[str, Any] = {}


def _begin_worker(sources: Mapping[str, Source], encoding: Encoding, max_pixels: int) -> None:
    _of_worker.update(sources=sources, encoding=encoding)
    allow_pixels(max_pixels)


def _begin_process(*settings) -> None:
    _begin_worker(*settings)
    for number in (signal.SIGINT, signal.SIGHUP):  # they reach all; the parent answers
        signal.signal(number, signal.SIG_IGN)
    # A worker whose parent was killed would wait for work forever.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _write(shard: Shard) -> Written:
    source = _of_worker["sources"][shard.split]
    return write_shard(shard.path, source, shard.indices, _of_worker["encoding"])


def _check_unreadable(
    written: Mapping[str, Sequence[Written]], folder: Path, allowed: float
) -> None:
    """Lists the images left out, tab-separated; refuses more than the allowed fraction."""
    lines = [
        f"{split}\t{name}\t{_with_flags(reason)}\n"
        for split, shards in written.items()
        for shard in shards
        for name, reason in shard.unreadable
    ]
    write_whole(folder / _UNREADABLE, "".join(lines))
    for split, shards in written.items():
        bad = sum(len(shard.unreadable) for shard in shards)
        images = bad + sum(shard.records for shard in shards)
        if _are_too_many(bad, images, allowed):
            raise DataError(
                f"{bad} of the {images} images of split {split!r} cannot be read, more than "
                f"--max_bad_fraction={allowed:g}; repair what {folder / _UNREADABLE} lists, or "
                "raise it, and the same command continues"
            )
    if lines:
        LOG.warning("left out %d images that cannot be read: %s", len(lines), folder / _UNREADABLE)


def _are_too_many(bad: int, images: int, allowed: float) -> bool:
    return bad == images or bad > allowed * images


def _write_info(
    plan: Mapping[str, Any], written: Mapping[str, Sequence[Written]], folder: Path
) -> None:
    """Writes the description that tfds reads; the file that it reads first appears last."""
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard.records for shard in shards],
            num_bytes=sum(shard.size for shard in shards),
        )
        for split, shards in written.items()
    ]
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name=plan["name"],
            version=tfds.core.Version(VERSION),
            data_dir=str(folder),
            module_name="cassle_jax.prepare",
        ),
        features=features_of(plan["classes"]),
        description="Prepared by cassle_jax.prepare.",
        split_dict=tfds.core.splits.SplitDict(splits),
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    with tempfile.TemporaryDirectory() as elsewhere:
        info.write_to_directory(elsewhere)
        for file in sorted(Path(elsewhere).iterdir(), key=lambda file: file.name == INFO):
            write_whole(folder / file.name, file.read_bytes())
