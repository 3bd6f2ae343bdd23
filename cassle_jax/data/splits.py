"""Sources made of other sources: parts, two sources joined, and the ten crops of one.

Images are chosen by hash, so the choice is the same everywhere.
"""

import hashlib
import os
import threading
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from jaxtyping import Float32, Int

from cassle_jax.data.decode import ANY_SIDE, DamagedImage, decode
from cassle_jax.data.errors import DataError
from cassle_jax.data.objects import ObjectSource
from cassle_jax.data.sources import (
    Record,
    Source,
    check_index,
    content_of,
    digest_of,
    has_changed,
    labels_of,
    root_of,
    views_of,
)
from cassle_jax.data.squares import PLACES, Square, check_short_side, squares_of

_CROPS = 2 * PLACES  # those of the image and of its mirror image


class Part:
    """Some images of a source, in the source's order; with their targets where it has targets."""

    def __init__(self, source: Source, indices: Int[np.ndarray, " images"], name: str):
        """Reads nothing.

        Args:
          source: the whole source.
          indices: places in the source.
          name: name of the part, such as 'validation'; added to the source's name.
        """
        self.name = f"{source.name} ({name} part)"
        self.class_names = source.class_names
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        check_index(index, self)
        return self._source[int(self._indices[index])]

    @property
    def root(self) -> str:
        """See `root_of`."""
        return root_of(self._source)

    @property
    def labels(self) -> Int[np.ndarray, " images"]:
        """The label of every image, see `labels_of`.

        Raises:
          AttributeError: the source does not have them without reading images.
        """
        return self._source.labels[self._indices]

    @property
    def targets(self) -> Float32[np.ndarray, "images numbers"]:
        """The numbers to predict per image, see `cassle_jax.data.landmarks`.

        Raises:
          AttributeError: the source has classes instead.
        """
        return self._source.targets[self._indices]

    @property
    def content(self) -> tuple[object, str]:
        """See `content_of`."""
        return content_of(self._source), digest_of(np.asarray(self._indices, "<i8").tobytes())

    def has_changed(self) -> bool:
        """See `sources.has_changed`."""
        return has_changed(self._source)


class ObjectPart(Part):
    """Some objects of a source, each in all of its views, or in the first few."""

    def __init__(
        self,
        source: ObjectSource,
        objects: Int[np.ndarray, " objects"],
        name: str,
        views: int | None = None,
    ):
        """Reads nothing.

        Args:
          source: the whole source.
          objects: numbers of the objects, from 0 in the source's order.
          name: name of the part, as for `Part`.
          views: number of views; `None` for all.
        """
        self.views, self.changing = views or source.views, source.changing
        places = objects[:, None] * source.views + np.arange(self.views)
        super().__init__(source, places.ravel(), name)

    def factors_of(self, places: Int[np.ndarray, " images"]) -> dict[str, np.ndarray]:
        """See `ObjectSource`."""
        return self._source.factors_of(self._indices[places])


class Joined:
    """The images of two sources of the same classes, one source after the other."""

    def __init__(self, first: Source, second: Source):
        """Reads nothing."""
        self.name = f"{first.name} and {second.name}"
        self.class_names = first.class_names
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def __getitem__(self, index: int) -> Record:
        check_index(index, self)
        before = len(self._first)
        return self._first[index] if index < before else self._second[index - before]

    @property
    def root(self) -> str:
        """See `root_of`: the folder in which both lie."""
        roots = root_of(self._first), root_of(self._second)
        return os.path.commonpath(roots) if all(roots) else ""

    @property
    def labels(self) -> Int[np.ndarray, " images"]:
        """The label of every image, see `labels_of`."""
        return np.concatenate([labels_of(self._first), labels_of(self._second)])

    @property
    def content(self) -> tuple[object, object]:
        """See `content_of`."""
        return content_of(self._first), content_of(self._second)

    def has_changed(self) -> bool:
        """See `sources.has_changed`."""
        return has_changed(self._first) or has_changed(self._second)


class TenCrops:
    """Ten squares cut out of every image, each a separate record with the image's label.

    An image's short side is resized to `short_side` pixels, bicubic. The crops are those of
    torchvision's TenCrop, in its order: top left, top right, bottom left, bottom right and centre,
    then the same of the mirrored image. The crops of an image follow each other.

    Attributes:
      stored: see `stored_of`.
    """

    def __init__(self, source: Source, size: int, short_side: int):
        """Reads nothing.

        Args:
          source: the images.
          size: side of a crop, pixels.
          short_side: short side of the resized images, pixels, ≥ `size`.

        Raises:
          DataError: `short_side` is smaller than `size`.
        """
        check_short_side(short_side, size)
        self.name = f"{source.name} (ten crops of {size} pixels, short side {short_side})"
        self.class_names = source.class_names
        self.stored, self._size, self._short_side = source, size, short_side
        self._last = threading.local()

    def __len__(self) -> int:
        return len(self.stored) * _CROPS

    def __getitem__(self, index: int) -> Record:
        check_index(index, self)
        image, crop = divmod(index, _CROPS)
        square, label, name = self._resized(image)
        return Record(square(crop), label, f"{name}, crop {crop}")

    def __reduce__(self):
        return TenCrops, (self.stored, self._size, self._short_side)

    @property
    def root(self) -> str:
        """See `root_of`."""
        return root_of(self.stored)

    @property
    def content(self) -> object:
        """See `content_of`."""
        return content_of(self.stored)

    def has_changed(self) -> bool:
        """See `sources.has_changed`."""
        return has_changed(self.stored)

    def _resized(self, image: int) -> tuple[Callable[[int], Square], int, str]:
        """An image's squares, label and name; each thread keeps its last one for further crops."""
        if getattr(self._last, "image", None) != image:
            record = self.stored[image]
            try:
                pixels = decode(record.image, ANY_SIDE)
            except DamagedImage as error:
                raise DamagedImage(str(error), record.name) from error
            squares = squares_of(pixels, self._size, self._short_side)
            self._last.image, self._last.found = image, (squares, record.label, record.name)
        return self._last.found


def cut(source: Source, fraction: float, key: str) -> tuple[Part, Part]:
    """Cuts a source in two by the rule of `held_out`; the views of an object stay together.

    Args:
      source: the whole source.
      fraction: share of the images to cut off, above 0 and at most a half. It is rounded to whole
        images (or objects), and at least one.
      key: key of the choice, see `held_out`.

    Returns:
      The kept part, and the part cut off.

    Raises:
      DataError: the source has fewer than two images (or objects).
    """
    kind, what = (ObjectPart, "object") if views_of(source) > 1 else (Part, "image")
    count = len(source) // views_of(source)
    if count < 2:
        raise DataError(
            f"{source.name} has {count} {what}; cutting off a validation part takes 2 or more"
        )
    held = held_out(count, max(1, round(fraction * count)), key)
    kept = np.delete(np.arange(count), held)
    return kind(source, kept, "training"), kind(source, held, "validation")


def held_out(count: int, holdout: int, key: str) -> Int[np.ndarray, " holdout"]:
    """Chooses the records to hold out: one from each of `holdout` consecutive blocks of `count`.

    Block b is the records from ⌊b·count/holdout⌋ up to but not including ⌊(b+1)·count/holdout⌋. Its
    record with the smallest BLAKE2b digest (8 bytes, of `<key>/<index>` in ASCII) is held out. A
    folder lists its images class by class, so every class gives its share, to within one image. A
    tfds builder shuffles its records, so its cut is random.

    Args:
      count: number of records.
      holdout: number of records to hold out, in [1, count].
      key: `<dataset>/<split>`, such as 'cifar10/train'.

    Returns:
      The indices of the held-out records, ascending.
    """
    edges = np.arange(holdout + 1) * count // holdout
    digests = [
        hashlib.blake2b(f"{key}/{index}".encode(), digest_size=8).digest() for index in range(count)
    ]
    first = [min(range(*block), key=digests.__getitem__) for block in pairwise(edges.tolist())]
    return np.array(first, np.int64)


def cut_shots(source: Source, shots: int) -> tuple[Part, Part]:
    """Keeps a few images of every class, and cuts these in two.

    Each class keeps the `shots` images with the smallest BLAKE2b digests (8 bytes, of the index in
    decimal ASCII), so fewer shots are a subset of more. The first fifth of them, rounded down but
    at least one image, is cut off.

    Args:
      source: the whole source.
      shots: images per class, ≥ 2.

    Returns:
      The kept part, and the part cut off.

    Raises:
      DataError: a class has too few images.
    """
    by_class = hashed_by_class(labels_of(source))
    for label, name in enumerate(source.class_names):
        found = len(by_class.get(label, ()))
        if found < shots:
            raise DataError(
                f"{source.name} has {found} images of {name!r}; {shots} of every class are needed"
            )
    held = max(1, shots // 5)
    chosen = np.stack([by_class[label][:shots] for label in range(len(source.class_names))])
    return (
        Part(source, np.sort(chosen[:, held:], axis=None), f"{shots}-shot training"),
        Part(source, np.sort(chosen[:, :held], axis=None), f"{shots}-shot validation"),
    )


def hashed_by_class(labels: Int[np.ndarray, " images"]) -> dict[int, Int[np.ndarray, " _"]]:
    """Each label's images, ordered by the BLAKE2b digests (8 bytes) of their decimal indices.

    Negative labels are left out.
    """
    digests = b"".join(
        hashlib.blake2b(str(index).encode(), digest_size=8).digest() for index in range(len(labels))
    )
    order = np.argsort(np.frombuffer(digests, ">u8"), kind="stable")
    by_label = rows_by_label(labels[order])
    return {label: order[rows] for label, rows in by_label.items() if label >= 0}


def rows_by_label(labels: Int[np.ndarray, " rows"]) -> dict[int, Int[np.ndarray, " _"]]:
    """The rows of every label that occurs, both ascending.

    One sort finds them, whatever the number of labels.
    """
    order = np.argsort(labels, kind="stable")
    present, first = np.unique(labels[order], return_index=True)
    return dict(zip(present.tolist(), np.split(order, first[1:]), strict=True))
