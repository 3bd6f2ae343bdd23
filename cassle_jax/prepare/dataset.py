"""The story of a preparation: plan, write the shards on all CPUs, describe them for tfds."""

import json
import logging
import multiprocessing
import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from cassle_jax.checks import ConfigError
from cassle_jax.command import EXIT_NOT_SAVED, EXIT_PREEMPTED, Stop
from cassle_jax.data import DataError, Source, open_source
from cassle_jax.data.decode import allow_pixels
from cassle_jax.faults import FULL, passing
from cassle_jax.prepare.plan import PLAN, Preparation, Shard, lacking_bytes, plan_of, shards_of
from cassle_jax.prepare.progress import PreparationProgress
from cassle_jax.prepare.shards import (
    Written,
    features_of,
    remove_leftovers,
    write_shard,
    written_shard,
)
from cassle_jax.storage import path_of, write_whole

LOG = logging.getLogger(__name__)

VERSION = "1.0.0"
_INFO, _UNREADABLE = "dataset_info.json", "unreadable.txt"


def prepare(
    data: ConfigDict,
    splits: Sequence[str],
    to: str,
    preparation: Preparation,
    *,
    workers: int = 0,
) -> Path:
    """Prepares splits of a dataset, or continues where an earlier call was stopped.

    Args:
      data: `data` settings as `open_source` takes them.
      splits: names of the splits.
      to: folder of prepared datasets: `data.path` of the runs that read it.
      preparation: how to prepare.
      workers: number of processes; 0 for one per CPU.

    Returns:
      The folder of the dataset, which `tfds.builder_from_directory` opens.

    Raises:
      ConfigError: a setting cannot work, or the folder holds another preparation.
      DataError: the dataset cannot be opened, or no image of a split can be read.
      Outage: the images, or the folder, are out of reach.
      Stop: the disk is or would become full, or a worker was killed.
    """
    _check(splits, to, preparation, workers)
    sources = {split: open_source(data, split) for split in splits}
    folder = Path(path_of(to)).absolute() / preparation.name / VERSION
    plan = plan_of(sources, folder, preparation)
    if (folder / _INFO).exists():
        return folder
    _check_space(plan, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / PLAN, json.dumps(plan, indent=2) + "\n")
    written = _write_shards(sources, plan, folder, workers, data.max_pixels)
    _check_any(written)
    _write_unreadable(written, folder)
    _write_info(sources, written, folder, preparation.name)
    remove_leftovers(folder)
    return folder


def _check(splits: Sequence[str], to: str, preparation: Preparation, workers: int) -> None:
    if not to:
        raise ConfigError("--to is empty; give the folder to write to")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", preparation.name):
        raise ConfigError(
            f"--as={preparation.name!r} is no name of a dataset; use a-z, 0-9 and _, such as mine"
        )
    if not splits or len(set(splits)) < len(splits):
        raise ConfigError(f"--splits={','.join(splits)} names no split, or one twice")
    for split in splits:
        if not re.fullmatch(r"\w+", split):
            raise ConfigError(f"--splits: {split!r} is no name of a split, such as train")
    for flag, value, least, most in (
        ("short_side", preparation.short_side, 1, 1 << 16),
        ("quality", preparation.quality, 1, 100),
        ("shard_mib", preparation.shard_mib, 1, 1 << 16),
        ("workers", workers, 0, 1 << 10),
    ):
        if not least <= value <= most:
            raise ConfigError(f"--{flag}={value} is out of range; use {least} to {most}")


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
    max_pixels: int,
) -> dict[str, list[Written]]:
    """Writes the shards that are missing; returns what each shard of a split holds, in order."""
    shards = shards_of(plan, folder)
    written = {shard.path: written_shard(shard.path) for shard in shards}
    missing = [shard for shard in shards if written[shard.path] is None]
    images = sum(len(shard.indices) for shard in shards)
    settings = sources, plan["short_side"], plan["quality"], max_pixels
    with (
        PreparationProgress(images, images - sum(len(s.indices) for s in missing)) as progress,
        _pool(min(workers or os.cpu_count() or 1, len(missing)), settings) as pool,
    ):
        futures = {pool.submit(_write, shard): shard for shard in missing}
        try:
            for future in as_completed(futures):
                shard = futures[future]
                written[shard.path] = future.result()
                progress.add(len(shard.indices))
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise _plain(error, folder) from error
    return {
        split: [written[shard.path] for shard in shards if shard.split == split]
        for split in sources
    }


def _plain(error: BaseException, folder: Path) -> BaseException:
    """The error as a user reads it; itself where it says what to do."""
    fault = passing(error)
    if fault is not None and fault.errno in FULL:
        return Stop(
            f"{folder}: {fault.strerror}; free some space, and the same command continues",
            EXIT_NOT_SAVED,
        )
    if isinstance(error, BrokenProcessPool):
        return Stop(
            "a worker was killed, perhaps for lack of memory; the same command continues, and "
            "needs less with a smaller --workers",
            EXIT_PREEMPTED,
        )
    return error


def _pool(workers: int, settings: tuple) -> Executor:
    """Processes, as decoding holds Python's lock between images; one worker needs no process."""
    if workers < 2:
        return ThreadPoolExecutor(1, initializer=_begin_worker, initargs=settings)
    spawned = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, spawned, _begin_worker, settings)


_of_worker: dict[str, Any] = {}


def _begin_worker(
    sources: Mapping[str, Source], short_side: int, quality: int, max_pixels: int
) -> None:
    _of_worker.update(sources=sources, settings=(short_side, quality))
    allow_pixels(max_pixels)
    parent = multiprocessing.parent_process()
    if parent is not None:  # a worker whose parent was killed would wait for work for ever
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _write(shard: Shard) -> Written:
    source = _of_worker["sources"][shard.split]
    return write_shard(shard.path, source, shard.indices, *_of_worker["settings"])


def _check_any(written: Mapping[str, Sequence[Written]]) -> None:
    for split, shards in written.items():
        if not any(shard.records for shard in shards):
            name, reason = shards[0].unreadable[0]
            raise DataError(f"no image of split {split!r} can be read, such as {name}: {reason}")


def _write_unreadable(written: Mapping[str, Sequence[Written]], folder: Path) -> None:
    """Lists the images that were left out: split, name and reason, between tabs."""
    lines = [
        f"{split}\t{name}\t{reason}\n"
        for split, shards in written.items()
        for shard in shards
        for name, reason in shard.unreadable
    ]
    write_whole(folder / _UNREADABLE, "".join(lines))
    if lines:
        LOG.warning("left out %d images that cannot be read: %s", len(lines), folder / _UNREADABLE)


def _write_info(
    sources: Mapping[str, Source], written: Mapping[str, Sequence[Written]], folder: Path, name: str
) -> None:
    """Writes what tfds reads first, and so last of all."""
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
            name=name,
            version=tfds.core.Version(VERSION),
            data_dir=str(folder),
            module_name="cassle_jax.prepare",
        ),
        features=features_of(next(iter(sources.values()))),
        description="Prepared by cassle_jax.prepare.",
        split_dict=tfds.core.splits.SplitDict(splits),
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    info.write_to_directory(folder)
