"""An image folder `<path>/<split>/<class>/<file>` as a source that holds millions of files."""

import os
import pathlib

import numpy as np
from jaxtyping import Int

from cassle_jax.data.errors import DataError
from cassle_jax.data.sources import (
    Record,
    check_classes,
    closest,
    content_of_files,
    read_class_list,
)


class FolderSource:
    """The files of one split, by class and then by file name, whatever the file system's order.

    Any file counts as an image, whatever its extension; hidden files and folders do not, nor do
    folders inside a class.
    """

    def __init__(self, root: pathlib.Path, class_names: tuple[str, ...]):
        """Lists the files of `<root>/<class>/` for every class, which become the labels in order.

        Raises:
          DataError: a class has no files.
        """
        self.name = str(root)
        self.class_names = class_names
        files = [_list_files(root / name) for name in class_names]
        self._class_ends = np.cumsum([len(names) for names in files])
        # One buffer instead of a Python string a file: a third of the memory, and quick to pickle.
        lengths = np.fromiter((len(file) for names in files for file in names), np.int64)
        self._name_ends = np.cumsum(lengths)
        self._names = b"".join(file for names in files for file in names)

    def __len__(self) -> int:
        return len(self._name_ends)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside [0, {len(self)})")
        path, label = self._path(index)
        return Record(pathlib.Path(path).read_bytes(), label, path)

    def _path(self, index: int) -> tuple[str, int]:
        """Of the image at `index`, with its label."""
        label = int(np.searchsorted(self._class_ends, index, side="right"))
        start = int(self._name_ends[index - 1]) if index else 0
        file = os.fsdecode(self._names[start : int(self._name_ends[index])])
        return f"{self.name}/{self.class_names[label]}/{file}", label

    @property
    def content(self) -> str:
        """See `content_of`."""
        return content_of_files(self._path(index)[0] for index in range(len(self)))

    @property
    def labels(self) -> Int[np.ndarray, " images"]:
        """Of every image, see `labels_of`."""
        counts = np.diff(self._class_ends, prepend=0)
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def open_folder(path: str, split: str, classes: str = "") -> FolderSource:
    """Opens `<path>/<split>`.

    Args:
      path: root of the image folder.
      split: name of the folder inside it.
      classes: see `open_source`.

    Raises:
      DataError: the folder, the split or a class is missing, or a class is empty.
    """
    if not path:
        raise DataError("data.path='' names no folder; give the root of <split>/<class>/<file>")
    root = pathlib.Path(path).expanduser().absolute()
    if not root.is_dir():
        raise DataError(
            f"data.path={path!r} is not a folder; give the root of <split>/<class>/<file>"
        )
    splits = _list_folders(root)
    if split not in splits:
        raise DataError(
            f"data.path={path!r} has no split {split!r}{closest(split, splits)}; "
            f"there: {', '.join(splits) or 'no folders at all'}"
        )
    split_root = root / split
    found = _list_folders(split_root)
    if not found:
        raise DataError(
            f"data.path={path!r}: split {split!r} has no class folders; "
            "images must lie in <split>/<class>/<file>"
        )
    wanted = read_class_list(classes)
    if wanted is not None:
        check_classes(classes, wanted, found)
    return FolderSource(split_root, found if wanted is None else wanted)


def _list_folders(root: pathlib.Path) -> tuple[str, ...]:
    with os.scandir(os.fsencode(root)) as entries:
        names = [e.name for e in entries if not e.name.startswith(b".") and e.is_dir()]
    return tuple(os.fsdecode(name) for name in sorted(names))


def _list_files(directory: pathlib.Path) -> list[bytes]:
    try:
        with os.scandir(os.fsencode(directory)) as entries:
            visible = [e for e in entries if not e.name.startswith(b".")]
        files = sorted(e.name for e in visible if _is_file(e))
    except OSError as error:
        raise DataError(
            f"data.path: class folder {str(directory)!r} cannot be listed: {error.strerror}"
        ) from error
    if not files:
        inside = f", only folders such as {os.fsdecode(visible[0].name)!r}" if visible else ""
        raise DataError(
            f"data.path: class folder {str(directory)!r} has no files{inside}; "
            "put images directly into it or remove it"
        )
    return files


def _is_file(entry: os.DirEntry) -> bool:
    """Whether it is a file or a link to one; a link that leads in a circle leads nowhere."""
    try:
        return entry.is_file()
    except OSError:
        return False
