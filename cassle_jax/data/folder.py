"""An image folder in any of the usual layouts, as a source that holds millions of files."""

import functools
import logging
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Int

from cassle_jax.checks import ConfigError
from cassle_jax.data.errors import DataError
from cassle_jax.data.listing import Skipped, is_folder, list_folders, list_images, local_root
from cassle_jax.data.sources import (
    Record,
    Source,
    check_classes,
    check_index,
    closest,
    content_of_files,
    digest_of,
    read_class_list,
    read_image,
)
from cassle_jax.faults import reason_of
from cassle_jax.storage import on_object_store, path_of, read_whole, real_path

LOG = logging.getLogger(__name__)

NO_LINE = "without a line in the annotations"
NO_IMAGE = "a line of the annotations without its image"
BESIDE_CLASSES = "beside the class folders"

_STAND_INS = {
    "test": ("val", "valid", "validation"),
    "val": ("valid", "validation"),
    "validation": ("val", "valid"),
}
_SPLIT = re.compile(r"(train(ing)?|test(ing)?|val(id(ation)?)?)[\W\d_]*", re.IGNORECASE)


class FolderSource:
    """Image files in a fixed order, with their labels. Keeps no file open."""

    def __init__(
        self,
        root: pathlib.Path,
        files: Sequence[bytes],
        labels: Int[np.ndarray, " images"],
        class_names: tuple[str, ...],
    ):
        """Reads nothing.

        Args:
          root: the folder; also the source's name.
          files: paths relative to `root`.
          labels: labels of the files; -1 for none.
          class_names: names by label; empty where images have no labels.
        """
        self.name = self.root = str(root)
        self.class_names = class_names
        self.labels = labels
        # One buffer instead of one Python string per file: a third of the memory; quick to pickle.
        self._ends = np.cumsum(np.fromiter(map(len, files), np.int64, len(files)))
        self._paths = b"".join(files)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        check_index(index, self)
        path = self._path(index)
        return Record(read_image(path), int(self.labels[index]), path)

    def _path(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return f"{self.name}/{os.fsdecode(self._paths[start : int(self._ends[index])])}"

    @property
    def names(self) -> str:
        """See `names_of`."""
        return digest_of(self._paths, self._ends.tobytes())

    @functools.cached_property
    def content(self) -> tuple[str, str]:
        """See `content_of`."""
        return self.content_at(range(len(self)))

    def content_at(self, places: range) -> tuple[str, str]:
        """See `sources.content_at`; labels may come from a file beside the images."""
        labels = self.labels[places.start : places.stop]
        return content_of_files(map(self._path, places)), digest_of(labels.tobytes())

    def has_changed(self) -> bool:
        """See `sources.has_changed`."""
        return self.content_at(range(len(self))) != self.content


def open_folder(path: str, split: str, classes: str = "") -> FolderSource:
    """Opens `<path>/<split>`, or all of `<path>` where it has no splits.

    The folders that hold images, at any depth below them, are the classes. If more images lie next
    to these folders than in them, no image has a label, whatever its depth. Where at most one
    folder holds images, a file `<split>/<split>_annotations.txt`, as Tiny-ImageNet has it, gives
    the labels. Images are ordered by class, then by path.

    Args:
      path: root of the image folder.
      split: name of the folder inside it. '', or any name where `path` has no folder that looks
        like a split, stands for all of `path`, without labels.
      classes: see `open_source`.

    Raises:
      DataError: the folder or the split is missing or without images, a class is missing or empty,
        or `classes` is set for images without labels.
    """
    top = local_root(path, "the root of <split>/<class>/<file>")
    root = _root_of(top, split)
    files, skipped = list_images(root)
    if not files:
        raise DataError(
            f"data.path={path!r}: split {split!r} has no images{skipped}; "
            "images lie in <split>/<class>/<file>, or without labels in <split> or <path>"
        )
    class_of, known = ({}, ()) if root == top else _classes_of_files(root, files, skipped)
    wanted = read_class_list(classes)
    if class_of:
        if wanted is not None:
            check_classes(classes, wanted, known)
        source = _labelled(root, class_of, known if wanted is None else wanted, skipped)
    elif wanted is not None:
        raise DataError(
            f"data.classes={classes!r} needs labels, and the images of {str(root)!r} have none"
        )
    else:
        LOG.info("%s: %d images without labels", root, len(files))
        source = FolderSource(root, files, np.full(len(files), -1, np.int32), ())
    skipped.log(source.name)
    return source


def check_outside(setting: str, folder: epath.PathLike, source: Source) -> None:
    """Refuses a folder among a source's images, since images written there would be its own.

    Args:
      setting: setting or flag that names the folder, for the message.
      folder: the folder to write to; need not exist.
      source: any source; only an image folder reads every image in it.

    Raises:
      ConfigError: the folder lies among the images.
    """
    if not isinstance(source, FolderSource) or on_object_store(folder):
        return
    root, target = real_path(source.root), real_path(path_of(folder))
    if not target.is_relative_to(root):
        return
    hidden = any(part.startswith(".") for part in target.relative_to(root).parts)
    if not hidden:  # a source ignores hidden files
        images = f"the images of {source.root}"
        raise ConfigError(f"{setting}={folder} lies among {images}; use another folder")


def split_there(path: str, split: str) -> str:
    """The split, or the validation part as its substitute where `path` lacks it; logs which."""
    top = pathlib.Path(path_of(path))
    if not is_folder(top / split):
        for other in _STAND_INS.get(split, ()):
            if is_folder(top / other):
                LOG.info("%s has no split %r: using %r", path, split, other)
                return other
    return split


def _root_of(top: pathlib.Path, split: str) -> pathlib.Path:
    """The folder of the split; `top` itself where there are no splits."""
    if not split:
        return top
    folders = list_folders(top)
    if split in folders:
        return top / split
    splits = [name for name in folders if _SPLIT.fullmatch(name)]
    inner = next((name for name in folders if is_folder(top / name / split)), None)
    likely = closest(split, folders)
    if splits or inner or likely:
        better = f" (did you mean data.path={str(top / inner)!r}?)" if inner else likely
        raise DataError(
            f"data.path={str(top)!r} has no split {split!r}{better}; there: {', '.join(folders)}; "
            "the split '' is all images below, without labels"
        )
    LOG.warning("%s has no split %r and no other: using all images below it", top, split)
    return top


def _classes_of_files(
    root: pathlib.Path, files: Sequence[bytes], skipped: Skipped
) -> tuple[dict[bytes, str], tuple[str, ...]]:
    """The classes of the files by path, and the names of all classes; empty without labels."""
    folder_of = {file: file.split(b"/", 1)[0] for file in files if b"/" in file}
    names = {folder: os.fsdecode(folder) for folder in folder_of.values()}
    annotations = root / f"{root.name}_annotations.txt"
    if len(names) < 2 and annotations.is_file():
        class_of = _annotated(annotations, files, skipped)
        return class_of, tuple(sorted(set(class_of.values()), key=os.fsencode))
    if 2 * len(folder_of) < len(files):
        return {}, ()
    for file in files:
        if file not in folder_of:
            skipped.note(BESIDE_CLASSES, file)
    # A folder without images still counts as a class.
    return {file: names[folder] for file, folder in folder_of.items()}, list_folders(root)


def _annotated(
    annotations: pathlib.Path, files: Sequence[bytes], skipped: Skipped
) -> dict[bytes, str]:
    """The classes of the files: the field after a name in an annotation line, between tabs."""
    try:
        lines = read_whole(annotations).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.path: {str(annotations)!r} cannot be read: {reason_of(error)}"
        ) from error
    classes: dict[str, dict[str, None]] = {}  # by name, in the order of the lines
    for name, label in (line.split("\t")[:2] for line in lines if "\t" in line):
        classes.setdefault(name, {})[label] = None
    class_of, missing = {}, dict.fromkeys(classes)
    for file in files:
        name = os.fsdecode(file.rsplit(b"/", 1)[-1])
        missing.pop(name, None)
        label, *others = classes.get(name, [None])
        if others:
            raise DataError(
                f"data.path: {str(annotations)!r} gives {name!r} two classes, {label!r} and "
                f"{others[-1]!r}"
            )
        if label is None:
            skipped.note(NO_LINE, file)
        else:
            class_of[file] = label
    for name in missing:
        skipped.note(NO_IMAGE, name)
    if not class_of:
        raise DataError(
            f"data.path: {str(annotations)!r} names none of the images beside it{skipped}; each of "
            "its lines is a file's name, a tab and its class"
        )
    return class_of


def _labelled(
    root: pathlib.Path, class_of: dict[bytes, str], names: tuple[str, ...], skipped: Skipped
) -> FolderSource:
    """The files of the classes, by class and then by path."""
    empty = set(names) - set(class_of.values())
    if empty:
        raise DataError(
            f"data.path: class folder {str(root / min(empty))!r} has no images{skipped}; "
            "put images into it or remove it"
        )
    label_of = {name: label for label, name in enumerate(names)}
    files = [file for file, name in class_of.items() if name in label_of]
    labels = np.fromiter((label_of[class_of[file]] for file in files), np.int32, len(files))
    order = np.argsort(labels, kind="stable")
    return FolderSource(root, [files[place] for place in order], labels[order], names)
