"""Decides which part of a dataset stays in memory, and in which form."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from cassle_jax.data.decode import DamagedImage
from cassle_jax.data.sources import Record, Source

LOG = logging.getLogger(__name__)

_SAMPLE = 16


@dataclasses.dataclass(frozen=True)
class Kept:
    """The number of images, from the first on, that stay in memory in one of two forms.

    Attributes:
      decoded: number kept as canvases, which need no decoding; 0 for the other form.
      encoded: number kept as stored, which need decoding; 0 for the other form.
    """

    decoded: int = 0
    encoded: int = 0


def what_to_keep(
    source: Source, canvas_bytes: int, decode: Callable[[bytes | np.ndarray], Any], memory: int
) -> Kept:
    """Chooses the form that saves more time within `memory` bytes, by reading a few images.

    Canvases win where all of them fit, and where decoding takes the time; stored images win where
    storage is slow and they are much smaller than canvases.

    Args:
      source: the dataset.
      canvas_bytes: size of a decoded image, bytes.
      decode: decodes what a record holds.
      memory: upper bound of what is kept, bytes.
    """
    canvases = min(len(source), memory // canvas_bytes)
    if canvases in (0, len(source)):
        return Kept(decoded=canvases)
    measured = list(_measured(source, decode))
    if not measured:  # nothing could be read; the first batches say why
        return Kept(decoded=canvases)
    sizes, *times = zip(*measured, strict=True)
    # Without the slowest: one read that waits decides nothing.
    reading, decoding = (np.mean(sorted(each)[:-1] or each) for each in times)
    records = min(len(source), int(memory / np.mean(sizes)))
    saved = {"decoded": canvases * (reading + decoding), "encoded": records * reading}
    kept = Kept(decoded=canvases) if saved["decoded"] >= saved["encoded"] else Kept(0, records)
    LOG.info(
        "data.cache_gib keeps %d of %d images %s: an image takes %.1f ms to read, %.1f to decode",
        max(kept.decoded, kept.encoded),
        len(source),
        max(saved, key=saved.get),
        1000 * reading,
        1000 * decoding,
    )
    return kept


def _measured(
    source: Source, decode: Callable[[bytes | np.ndarray], Any]
) -> Iterable[tuple[int, float, float]]:
    """Bytes, seconds to read and seconds to decode of images spread over the dataset."""
    for index in sorted({place * len(source) // _SAMPLE for place in range(_SAMPLE)}):
        begin = time.perf_counter()
        try:
            image = source[index].image
            read = time.perf_counter()
            decode(image)
        except (DamagedImage, OSError):
            continue
        yield _bytes_of(image), read - begin, time.perf_counter() - read


class KeptRecords:
    """A source that keeps its first records in memory once they are read. Thread-safe.

    Args:
      source: the dataset, which provides all other records.
      records: number of records to keep.
      memory: bound of their size, bytes; records beyond it are not kept.

    Attributes:
      stored: see `stored_of`.
    """

    def __init__(self, source: Source, records: int, memory: int):
        self.stored, self._records, self._free = source, records, memory
        self.class_names, self.name = source.class_names, source.name
        self._kept: dict[int, Record] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stored, name)

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> Record:
        if index in self._kept:
            return self._kept[index]
        record = self.stored[index]
        size = _bytes_of(record.image)
        if index < self._records and size <= self._free:
            self._kept[index] = record
            self._free -= size
        return record


def _bytes_of(image: bytes | np.ndarray) -> int:
    return image.nbytes if isinstance(image, np.ndarray) else len(image)
