"""Images with points to find in them: a folder with a table beside it, or CelebA from tfds.

A point is given in fractions of the largest square at the centre of the image, which evaluations
crop. (0, 0) is its top left corner and (1, 1) its bottom right one, whatever the size it is resized
to. A point outside the square lies outside [0, 1].
"""

import csv
import functools
import io
import os
import pathlib
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Shaped

from cassle_jax.data.decode import SIDEWAYS, open_image, orientation_of
from cassle_jax.data.errors import DataError
from cassle_jax.data.listing import is_folder, list_folders, list_images, local_root
from cassle_jax.data.sources import (
    Record,
    Source,
    check_index,
    closest,
    content_of_files,
    read_image,
)
from cassle_jax.faults import reason_of
from cassle_jax.storage import open_to_read, read_whole

CELEBA_POINTS = ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")
CELEBA_SIZE = (218, 178)  # height and width, pixels


@runtime_checkable
class TargetSource(Source, Protocol):
    """A source whose images have numbers to predict instead of a class: every label is -1.

    `targets` has one row per image: x and y of every point in turn.
    """

    targets: Float32[np.ndarray, "images numbers"]


class LandmarkFolder:
    """The images `<path>/<split>/<file>` by file name, their points from `<path>/<split>.csv`.

    The first line of the table is a heading. Every other line is a file name and x, y of each point
    in turn, in pixels of the image as shown, from its top left corner.
    """

    class_names = ()

    def __init__(self, path: str, split: str, numbers: int):
        """Reads the table, and the size of every image.

        Args:
          path: root of the folder.
          split: name of the split, such as 'train'.
          numbers: numbers per image, two per point.

        Raises:
          DataError: a folder or table is missing; an image has no line or a line no image; a line
            is not a name and this number of numbers; an image cannot be read.
        """
        root = local_root(path, "the root of <split>/<file>")
        self.name = self.root = str(root / split)
        table = root / f"{split}.csv"
        self._files = _image_files(root, split)
        points = _read_table(table, numbers)
        _check_same_files(self.name, self._files, table, points)
        self.targets = np.stack(
            [_in_square(points[file], *_shown_size(root / split / file)) for file in self._files]
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        check_index(index, self)
        path = pathlib.Path(self.name) / self._files[index]
        return Record(read_image(path), -1, str(path))

    @functools.cached_property
    def content(self) -> str:
        """See `content_of`."""
        return self._files_now()

    def has_changed(self) -> bool:
        """See `sources.has_changed`."""
        return self._files_now() != self.content

    def _files_now(self) -> str:
        files = [f"{self.name}/{file}" for file in self._files]
        return content_of_files([f"{self.name}.csv", *files])


class CelebaSource:
    """A split of tfds' `celeb_a`: aligned faces with five points each."""

    class_names = ()

    def __init__(self, data_dir: str, split: str):
        """Opens a split; its points are read at first use, and kept on disk.

        Raises:
          DataError: see `open_builder`.
        """
        # tensorflow-datasets takes half a second to import: only its users wait for it.
        from cassle_jax.data import builder

        self._images = builder.open_builder("celeb_a", data_dir, split)
        self.name = self._images.name

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        return self._images[index]

    @property
    def content(self) -> str:
        """See `content_of`."""
        return self._images.content

    def has_changed(self) -> bool:
        """See `sources.has_changed`."""
        return self._images.has_changed()

    @functools.cached_property
    def targets(self) -> Float32[np.ndarray, "images 10"]:
        """Left eye, right eye, nose, left and right corner of the mouth, as the annotators see."""
        paths = [("landmarks", f"{point}_{axis}") for point in CELEBA_POINTS for axis in "xy"]
        return _in_square(self._images.numbers(paths), *CELEBA_SIZE)


def _in_square(
    pixels: Shaped[np.ndarray, "*images numbers"], height: int, width: int
) -> Float32[np.ndarray, "*images numbers"]:
    """Points in pixels as fractions of the image's central square."""
    side = min(height, width)
    corner = np.tile([(width - side) / 2, (height - side) / 2], pixels.shape[-1] // 2)
    return ((pixels - corner) / side).astype(np.float32)


def _image_files(root: pathlib.Path, split: str) -> list[str]:
    folder = root / split
    if not is_folder(folder):
        there = list_folders(root)
        raise DataError(
            f"data.path={str(root)!r} has no split {split!r}{closest(split, there)}; "
            f"there: {', '.join(there) or 'no folders at all'}"
        )
    images, skipped = list_images(folder)
    if not images:
        raise DataError(f"{str(folder)!r} has no images{skipped}; put them into it")
    skipped.log(str(folder))
    return [os.fsdecode(image) for image in images]


def _read_table(table: pathlib.Path, numbers: int) -> dict[str, Float[np.ndarray, " numbers"]]:
    """The numbers of every line, by file name."""
    try:
        text = read_whole(table).decode("utf-8-sig")
        lines = list(csv.reader(io.StringIO(text, newline="")))[1:]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{str(table)!r} cannot be read ({reason_of(error)}); it holds a heading, then for "
            f"each image its file name and {numbers} numbers, x and y of each point in pixels"
        ) from error
    points = {}
    for number, (name, *values) in enumerate(filter(None, lines), start=2):
        if name in points:
            raise DataError(f"{str(table)!r} has more than one line for {name!r}")
        points[name] = _numbers(values, numbers, f"{str(table)!r}, entry {number}, {name!r}")
    return points


def _numbers(values: list[str], count: int, where: str) -> Float[np.ndarray, " numbers"]:
    try:
        row = np.array([float(value) for value in values])
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if len(row) != count:
        raise DataError(
            f"{where}: {len(row)} numbers after the file name; this dataset has {count}, "
            "x and y of each point"
        )
    if not np.isfinite(row).all():
        raise DataError(f"{where}: a coordinate is not finite; leave the image out")
    return row


def _check_same_files(
    folder: str, files: list[str], table: pathlib.Path, points: dict[str, object]
) -> None:
    without_line = [file for file in files if file not in points]
    without_image = sorted(points.keys() - set(files))
    if without_line:
        raise DataError(
            f"{str(table)!r} has no line below its heading for {len(without_line)} of the "
            f"{len(files)} images in {folder!r}, the first is {without_line[0]!r}"
            f"{closest(without_line[0], without_image)}"
        )
    if without_image:
        raise DataError(
            f"{folder!r} lacks {len(without_image)} of the {len(points)} images in {str(table)!r}, "
            f"the first is {without_image[0]!r}"
        )


def _shown_size(path: pathlib.Path) -> tuple[int, int]:
    """Height and width of an image when upright; reads only its header, or all of a PNG."""
    try:
        with open_to_read(path) as file, open_image(file) as image:
            width, height = image.size
            # Pillow gives a TIFF's size as it is shown.
            orientation = 1 if image.format == "TIFF" else orientation_of(image)
    except Exception as error:  # Pillow raises any type, depending on the bytes
        raise DataError(f"{str(path)!r} cannot be read as an image: {reason_of(error)}") from error
    return (width, height) if orientation in SIDEWAYS else (height, width)
