"""Defines a source of labelled images, and the classes that a config keeps of it."""

import collections
import hashlib
import importlib.resources
import itertools
import os
import pathlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from cassle_jax.checks import did_you_mean
from cassle_jax.data.decode import DamagedImage, check_bytes
from cassle_jax.data.errors import DataError
from cassle_jax.faults import reason_of
from cassle_jax.storage import open_to_read, path_of, read_whole

DAMAGED = -2
"""The label of an image that cannot be read."""

CLASS_LISTS = ("imagenet100", "tiny_imagenet80", "tiny_imagenet20")
"""Named subsets of classes: ImageNet-100's, and Tiny-ImageNet's to pretrain on and to hold out."""

_LABEL_THREADS = 8
_STRETCH = 256


class Record(NamedTuple):
    """One stored image.

    Attributes:
      image: the bytes of an image file, or uint8 pixels of shape [height, width, 3].
      label: index into the source's `class_names`; -1 where the image has none.
      name: text by which a user finds the image, for example its path.
    """

    image: bytes | np.ndarray
    label: int
    name: str


@runtime_checkable
class Source(Protocol):
    """Labelled images in a fixed order with random access.

    Thread-safe and picklable. `name` identifies the dataset and split; `class_names` has the name
    of every label, and is empty where images have no labels. A source that knows its labels without
    reading images has them, in its order, as `labels`; `labels_of` takes any source.
    """

    class_names: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, index: int) -> Record:
        """The image at `index` in [0, len)."""
        ...


def read_image(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image's file.

    Raises:
      DamagedImage: the file has more bytes than any image.
      OSError: the file cannot be read.
    """
    with open_to_read(path, buffering=0) as file:
        check_bytes(os.fstat(file.fileno()).st_size, os.fspath(path))
        return file.read()


class FileOfMany(OSError):
    """A file that holds many images cannot be opened; it has the errno, the reason and the path.

    Substitutes for all its images would silently change the data of a run.
    """


def is_gone(folder: str) -> bool:
    """Whether a folder is missing or empty, as when it is not mounted any more.

    Raises:
      DataError: it is there, but this user may not read it.
    """
    try:
        with os.scandir(folder) as entries:
            return not any(entries)
    except PermissionError as error:
        raise DataError(
            f"the folder {folder} cannot be read ({reason_of(error)}); give this user permission, "
            "and the same command continues"
        ) from error
    except OSError:
        return True


def check_index(index: int, source: Source) -> None:
    """Raises IndexError unless the source has an image at `index`."""
    if not 0 <= index < len(source):
        raise IndexError(f"index {index} is outside [0, {len(source)})")


def labels_of(source: Source) -> Int[np.ndarray, " images"]:
    """The label of every image: the source's `labels` where it has them, else its records'.

    Records are read but not decoded; the label of one that cannot be read is `DAMAGED`.
    """
    labels = getattr(source, "labels", None)
    if labels is not None:
        return labels

    def label(index: int) -> int:
        try:
            return source[index].label
        except (DamagedImage, FileNotFoundError, PermissionError):
            return DAMAGED

    def stretch(first: int) -> list[int]:
        return [label(index) for index in range(first, min(first + _STRETCH, len(source)))]

    with ThreadPoolExecutor(_LABEL_THREADS) as threads:
        stretches = threads.map(stretch, range(0, len(source), _STRETCH))
        return np.fromiter(itertools.chain.from_iterable(stretches), np.int32, len(source))


def content_of(source: Source) -> object:
    """Identifies a source's images: its `repr` differs where they do, even under the same name."""
    return getattr(source, "content", None)


def content_at(source: Source, places: range) -> object:
    """`content_of` the images at `places`, or of all where the source cannot separate them."""
    return getattr(source, "content_at", lambda _: content_of(source))(places)


def has_changed(source: Source) -> bool:
    """Whether a file has changed since `content_of` was first called; looks at every file."""
    return getattr(source, "has_changed", lambda: False)()


def root_of(source: Source) -> str:
    """The folder in which a source's files lie; "" where there is none, or more than one."""
    return getattr(source, "root", "")


def stored_of(source: Source) -> Source:
    """The source that reads from storage, where this one answers from memory; else itself."""
    return getattr(source, "stored", source)


def views_of(source: Source) -> int:
    """Number of consecutive images that show the same object; 1 for a source without objects."""
    return getattr(source, "views", 1)


def names_of(source: Source) -> str | None:
    """A digest of the images' names in their order, from a listing alone; `None` where drawn.

    It does not depend on where the images lie.
    """
    return getattr(source, "names", None)


def digest_of(*parts: bytes) -> str:
    """A digest of 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def content_of_files(paths: Iterable[str | os.PathLike[str]]) -> str:
    """A digest of files' names, sizes and times of change."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        try:
            found = pathlib.Path(path).stat()
            known = found.st_size, found.st_mtime_ns
        except OSError:
            known = None
        digest.update(f"{os.fspath(path)}\0{known}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_class_list(classes: str) -> tuple[str, ...] | None:
    """The class names that `data.classes` selects, in label order; None where it keeps all.

    Raises:
      DataError: the file is missing or empty, or names a class twice.
    """
    if not classes:
        return None
    if classes in CLASS_LISTS:
        text = importlib.resources.files(__package__).joinpath(f"{classes}_wnids.txt").read_text()
    else:
        try:
            text = read_whole(path_of(classes)).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError, ImportError) as error:  # a store's package
            raise DataError(
                f"data.classes={classes!r} cannot be read ({reason_of(error)}); give '' for all "
                f"classes, {', '.join(map(repr, CLASS_LISTS))}, or a text file with one class name "
                "per line"
            ) from error
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names:
        raise DataError(f"data.classes={classes!r} names no class; write one per line")
    repeated = sorted(name for name, count in collections.Counter(names).items() if count > 1)
    if repeated:
        raise DataError(f"data.classes={classes!r} names {repeated[0]!r} more than once")
    return names


def check_classes(classes: str, wanted: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Checks that a class list only names classes of the dataset.

    Raises:
      DataError: reports the number of unknown names, the first one, and the closest known class.
    """
    known_set = set(known)
    unknown = [name for name in wanted if name not in known_set]
    if unknown:
        raise DataError(
            f"data.classes={classes!r}: {len(unknown)} of its {len(wanted)} classes are not in the "
            f"dataset, the first is {unknown[0]!r}{closest(unknown[0], known)}; "
            f"the dataset has {len(known)}, such as {', '.join(known[:3])}"
        )


def closest(name: str, known) -> str:
    """' (did you mean …?)' with the known name closest to `name`, or '' where none is close."""
    hint = did_you_mean(name, known).removeprefix("; ")
    return f" ({hint})" if hint else ""
