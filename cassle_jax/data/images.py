"""Puts decoded images onto the canvases of a batch, and handles damaged ones."""

import threading
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from cassle_jax.data.damaged import DamagedLog
from cassle_jax.data.decode import ANY_SIDE, decode
from cassle_jax.data.errors import DataError
from cassle_jax.data.memory import KeptRecords, what_to_keep
from cassle_jax.data.pool import BufferPool
from cassle_jax.data.reading import RecordReader, UnreadableRecord
from cassle_jax.data.sources import Source
from cassle_jax.data.squares import CENTRE, check_short_side, squares_of

Batch = dict[str, np.ndarray]


class Images:
    """Decodes a source's images into batch arrays. Thread-safe."""

    def __init__(
        self,
        source: Source,
        canvas: int,
        damaged: DamagedLog,
        *,
        substitute: bool,
        short_side: int = 0,
        cache_bytes: int = 0,
    ):
        """Reads nothing, except a few images where `cache_bytes` holds a part of the dataset.

        Args:
          source: the dataset.
          canvas: side of the square canvas, pixels.
          damaged: records every damaged record.
          substitute: True for training: the next good record replaces a damaged one, and images
            larger than the canvas are fitted to it roughly, see `decode`. If False, the row of a
            damaged record stays blank, and batches have a 'mask'.
          short_side: pixels to resize an image's short side to; the canvas is the centre of the
            result, see `squares_of`. 0 reduces whole images to fit the canvas.
          cache_bytes: memory for images that stay, see `what_to_keep`; only with `substitute`.
        """
        if canvas < 1:
            raise DataError(f"data.canvas={canvas} is not a size in pixels; use 1 or more")
        if short_side:
            check_short_side(short_side, canvas)
        self.canvas_bytes = canvas * canvas * 3
        self._canvas = canvas
        self._damaged = damaged
        self._substitute = substitute
        self._short_side = short_side
        self._pools: dict[int, BufferPool] = {}
        self._scratch = threading.local()
        memory = cache_bytes if substitute else 0
        keep = what_to_keep(source, self.canvas_bytes, self._pixels, memory)
        self._source = KeptRecords(source, keep.encoded, memory) if keep.encoded else source
        self._read = RecordReader(self._source, damaged.knows)
        # A batch of the first images, and which of its rows are filled.
        canvases = np.zeros((keep.decoded, canvas, canvas, 3), np.uint8)
        self._kept = self._batch(keep.decoded, canvases)
        self._is_kept = np.zeros(keep.decoded, bool)

    def blank(self, rows: int) -> Batch:
        """A batch to fill: canvases not cleared yet, sizes 1×1, labels and indices -1."""
        if rows not in self._pools:
            self._pools[rows] = BufferPool((rows, self._canvas, self._canvas, 3))
        return self._batch(rows, self._pools[rows].lend())

    def _batch(self, rows: int, canvases: UInt8[np.ndarray, "rows canvas canvas 3"]) -> Batch:
        batch = {
            "image": canvases,
            "size": np.ones((rows, 2), np.int32),
            "label": np.full(rows, -1, np.int32),
            "index": np.full(rows, -1, np.int32),
        }
        return batch if self._substitute else {**batch, "mask": np.zeros(rows, bool)}

    def fill(self, batch: Batch, first_row: int, indices: Int[np.ndarray, " rows"]) -> None:
        """Decodes the records `indices` into the rows from `first_row` of a blank batch.

        Raises:
          TooManyDamaged: see `DamagedLog`.
          DataError: no record of the whole dataset can be decoded.
        """
        for row, index in enumerate(indices.tolist(), first_row):
            if not 0 <= index < len(self._is_kept):
                self._decode_into(batch, row, index)
            elif not self._is_kept[index]:
                # Two threads may decode the same image at once: they write the same values.
                self._decode_into(self._kept, index, index)
                self._is_kept[index] = True
        self._copy_kept(batch, first_row, indices)

    def _copy_kept(self, batch: Batch, first_row: int, indices: Int[np.ndarray, " rows"]) -> None:
        kept = (indices >= 0) & (indices < len(self._is_kept))
        rows = np.arange(first_row, first_row + len(indices))[kept]
        for name, values in self._kept.items():
            if kept.all():  # ten times as fast for small images
                np.take(
                    values, indices, axis=0, out=batch[name][rows[0] : rows[-1] + 1], mode="clip"
                )
                continue
            for row, index in zip(rows, indices[kept], strict=True):
                batch[name][row] = values[index]

    def _decode_into(self, batch: Batch, row: int, index: int) -> None:
        """Fills one row; with a black canvas for a damaged record and for index -1."""
        found = None
        if index >= 0:
            found = self._good_record(index) if self._substitute else self._try_record(index)
        canvas = batch["image"][row]
        if found is None:
            canvas[:] = 0
            return
        height, width = found.image.shape[:2]
        canvas[:height, :width] = found.image
        canvas[:height, width:] = 0
        canvas[height:] = 0
        batch["size"][row] = height, width
        batch["label"][row] = found.label
        batch["index"][row] = found.index
        if not self._substitute:
            batch["mask"][row] = True

    def _good_record(self, index: int) -> "_Decoded":
        """The record at `index`, or the next good one in the dataset's order, wrapping around."""
        for step in range(len(self._source)):
            found = self._try_record((index + step) % len(self._source))
            if found is not None:
                return found
        raise DataError(f"no image of {self._source.name!r} can be decoded")

    def _try_record(self, index: int) -> "_Decoded | None":
        """The record at `index`; None, after logging it, where it is damaged."""
        try:
            record, pixels = self._read(index, self._pixels)
        except UnreadableRecord as error:
            self._damaged.add(error.name, error.reason)
            return None
        return _Decoded(pixels, record.label, index)

    def _pixels(self, image: bytes | np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
        """An image decoded and resized for the canvas."""
        scratch = self._thread_scratch()
        if not self._short_side:
            return decode(image, self._canvas, scratch, roughly=self._substitute)
        pixels = decode(image, ANY_SIDE, scratch)
        return squares_of(pixels, self._canvas, self._short_side)(CENTRE)

    def _thread_scratch(self) -> UInt8[np.ndarray, " bytes"]:
        """This thread's memory for a decoded image until it is on its canvas."""
        if not hasattr(self._scratch, "memory"):
            self._scratch.memory = np.empty(4 * self.canvas_bytes, np.uint8)
        return self._scratch.memory


class _Decoded(NamedTuple):
    image: UInt8[np.ndarray, "height width 3"]
    label: int
    index: int
