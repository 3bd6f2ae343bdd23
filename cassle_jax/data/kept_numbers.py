"""Keeps whole numbers of every record, such as labels, in the user's cache folder."""

import glob
import hashlib
import logging
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from cassle_jax.data.feature_paths import FeaturePath
from cassle_jax.data.sources import DAMAGED
from cassle_jax.storage import cache_folder, make_shared, open_to_read, written_whole

LOG = logging.getLogger(__name__)


def label_cache_folder() -> pathlib.Path:
    """`$XDG_CACHE_HOME/cassle_jax/labels`, `~/.cache` where the variable is not set.

    It holds one .npz file of labels or landmarks per dataset, version and split that needed them.
    It is safe to delete: the numbers are then read again.
    """
    return cache_folder() / "labels"


def numbers_file(
    info: tfds.core.DatasetInfo, split: str, paths: Sequence[FeaturePath], content: str
) -> pathlib.Path:
    """The file that keeps numbers, named after the dataset, the features and their content."""
    files = info.splits[split].file_instructions
    described = repr(
        ([(str(f.filename), f.skip, f.take, f.examples_in_shard) for f in files], list(paths))
    )
    digest = hashlib.sha256(described.encode()).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{info.full_name}-{split}")
    return label_cache_folder() / f"{readable}-{digest}-{content}.npz"


def kept_numbers(
    scan: Callable[[], Iterator[list[list[int]]]], shape: tuple[int, int], file: pathlib.Path
) -> Int[np.ndarray, "records numbers"]:
    """The numbers of all records, read from the file, or scanned and then kept there.

    Args:
      scan: yields rows of numbers, some records at a time.
      shape: number of records, and of numbers per record.
      file: see `numbers_file`.
    """
    try:
        with open_to_read(file) as opened, np.load(opened) as kept:  # compares its checksum
            numbers = kept["numbers"]
        if numbers.shape == shape:
            return numbers
    except Exception:  # A damaged file raises any type, depending on its bytes.
        pass
    LOG.info("Reading the labels of %d records once; kept in %s", shape[0], file)
    numbers = np.empty(shape, np.int32)
    done, logged = 0, time.monotonic()
    for chunk in scan():
        numbers[done : done + len(chunk)] = chunk
        done += len(chunk)
        if time.monotonic() - logged > 30:
            logged = time.monotonic()
            LOG.info("%d of %d labels read", done, len(numbers))
    # Corrupt records may be repaired later, without a change of the file's name.
    if not (numbers == DAMAGED).all(axis=1).any():
        _keep(numbers, file)
    return numbers


def _keep(numbers: Int[np.ndarray, "records numbers"], path: pathlib.Path) -> None:
    """Writes numbers, and deletes those of earlier contents of the same files."""
    try:
        make_shared(path.parent)
        with written_whole(path) as file:
            np.savez(file, numbers=numbers)
        stem = glob.escape(path.stem.rpartition("-")[0])
        for other in path.parent.glob(f"{stem}-*.np[yz]"):  # .npy of earlier versions
            if other != path:
                other.unlink(missing_ok=True)
    except OSError as error:
        LOG.warning("Labels not kept, the next start reads them again: %s", error)
