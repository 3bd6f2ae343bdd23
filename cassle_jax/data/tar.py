"""Reads images from the tar files of WebDataset, as a source with random access."""

import contextlib
import io
import json
import logging
import os
import pathlib
import posixpath
import re
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from cassle_jax.data.decode import EXTENSIONS, check_bytes
from cassle_jax.data.errors import DataError
from cassle_jax.data.listing import (
    CIRCLE,
    DANGLING,
    HIDDEN,
    SPECIAL,
    Skipped,
    is_folder,
    local_root,
)
from cassle_jax.data.sources import FileOfMany, Record, check_index, content_of_files, digest_of
from cassle_jax.faults import hurry, reason_of
from cassle_jax.storage import check_ends, open_to_read

T = TypeVar("T")

LOG = logging.getLogger(__name__)

_CLASS, _JSON = ".cls", ".json"
_READ = EXTENSIONS | {_CLASS, _JSON}
_SPARSE = "stored without its holes, as by tar --sparse"
_DOTTED = "an image with another dot in its name, where its extension begins"
_REPLACED = "an image that another of the same name replaces"
_MOST_CLASSES = 1 << 20
_PAUSES = (0.1, 0.4, 1.5)  # seconds
_CHECKING = threading.Lock()
_LARGEST_NOTE = 1 << 20  # bytes of a .cls or .json that is read for its label
_TAIL = 1 << 16  # bytes after the last member that are looked at
_MOST_PADDING = 4 << 20  # bytes after the last member; tar pads to 10 KiB, or --blocking-factor


class TarSource:
    """The images of uncompressed tar files, in the files' and their members' order.

    Members whose names differ only in their extension belong together: one is the image, and
    `.cls`, or `label` or `cls` in `.json`, has the number of its class, from 0 on. Follows links to
    other members, and logs those that lead to none.

    Attributes:
      name: name of the source.
      root: folder in which the files lie, see `root_of`.
      labels: class of every image; -1 for none.
      class_names: names by label; empty without labels.
      content: see `content_of`.
    """

    def __init__(self, name: str, paths: Sequence[str], root: str = ""):
        """Reads the index of every file, not the images.

        Args:
          name: name of the source.
          paths: the tar files.
          root: folder in which they lie, see `root_of`.

        Raises:
          DataError: a file is compressed or damaged, there are no images, or only some have labels.
        """
        self.name, self.root = name, root
        self._tars = [os.fspath(path) for path in paths]
        # Before the index is read. Were the files replaced in between, the cache would keep
        # features of the old images as those of the new files.
        self.content = content_of_files(self._tars)
        skipped = Skipped()
        indexed = [_indexed(tar, skipped) for tar in self._tars]
        self._seen = [version for _, version in indexed]
        found = [(number, *each) for number, (images, _) in enumerate(indexed) for each in images]
        if not found:
            raise DataError(
                f"data.path: the tar files of {name} hold no images, such as 0001.jpg{skipped}; "
                "the extension of a member begins at the first dot of its name"
            )
        skipped.log(name)
        tars, self._members, offsets, sizes, labels = zip(*found, strict=True)
        self._places = np.array([tars, offsets, sizes], np.int64).T
        self.labels = np.array(labels, np.int32)
        without = int((self.labels < 0).sum())
        if 0 < without < len(found):
            first = self._members[int(np.argmin(self.labels))]
            raise DataError(
                f"data.path: {without} of the {len(found)} images of {name} have no class number, "
                f"such as {first!r}; give each a {_CLASS} or none"
            )
        self.class_names = () if without else tuple(map(str, range(1 + int(self.labels.max()))))

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Record:
        check_index(index, self)
        tar, offset, size = self._places[index].tolist()
        name = f"{self._tars[tar]}/{self._members[index]}"
        check_bytes(size, name)
        with contextlib.ExitStack() as opened:
            try:
                # It may be missing for a moment, while it is being replaced.
                file = opened.enter_context(
                    _patiently(lambda: open_to_read(self._tars[tar]), FileNotFoundError)
                )
            except OSError as error:
                raise FileOfMany(error.errno, reason_of(error), self._tars[tar]) from error
            try:
                file.seek(offset)
                image = file.read(size)
                version = _version(os.fstat(file.fileno()))
            except OSError as error:
                raise OSError(error.errno, reason_of(error), name) from error
        if version != self._seen[tar]:
            self._check_same(tar, version)
            return self[index]  # the bytes may come from a half-written file
        return Record(image, int(self.labels[index]), name)

    def has_changed(self) -> bool:
        """See `sources.has_changed`."""
        return content_of_files(self._tars) != self.content

    @property
    def names(self) -> str:
        """See `names_of`."""
        files = (os.path.basename(tar) for tar in self._tars)  # noqa: PTH119 - stays a string
        listed = "\0".join((*files, *self._members)).encode(errors="surrogateescape")
        return digest_of(listed, self._places[:, 0].tobytes())

    def _check_same(self, number: int, version: tuple[int, int]) -> None:
        """Raises DataError where a file was rewritten with its images at other offsets.

        The old offsets would then give other bytes, with the labels of the old images.
        """
        tar = self._tars[number]
        with _CHECKING:  # one thread reads the index for all
            if version == self._seen[number]:
                return  # another thread has read it meanwhile
            mine = [
                (self._members[index], *self._places[index, 1:].tolist(), int(self.labels[index]))
                for index in np.flatnonzero(self._places[:, 0] == number)
            ]
            # It may be cut short for a moment, while it is being written.
            images, version = _patiently(
                lambda: _indexed(tar, Skipped()), DataError, FileNotFoundError
            )
            if images != mine:
                raise DataError(
                    f"data.path: {tar} was rewritten with other images since it was opened; the "
                    "same command reads the new ones"
                )
            self._seen[number] = version


def open_tars(path: str, split: str) -> TarSource:
    """Opens a split: `<path>/<split>/*.tar`, else `<path>/*<split>*.tar`; '' is all of `path`.

    Raises:
      DataError: there are no such files, or an error of `TarSource`.
    """
    folder = local_root(path, "the folder of the tar files")
    inside = folder / split
    tars = _tars_in(inside) if is_folder(inside) else []
    tars = tars or _named_after(split, _tars_in(folder))
    if not tars:
        raise DataError(
            f"data.path={path!r} has no tar files of split {split!r}; they lie in "
            "<path>/<split>/*.tar or <path>/*<split>*.tar, uncompressed"
        )
    paths = [str(tar) for tar in tars]
    return TarSource(f"{folder} {split}".rstrip(), paths, root=str(tars[0].parent))


def _patiently(act: Callable[[], T], *passing: type[Exception]) -> T:
    """The result of `act`; repeats it for some seconds while it raises an error that may pass."""
    for seconds in _PAUSES:
        with contextlib.suppress(*passing):
            return act()
        hurry.wait(seconds)
    return act()


def _version(status: os.stat_result) -> tuple[int, int]:
    """Identifies what was last written to a file: its bytes, and the time in nanoseconds."""
    return status.st_size, status.st_mtime_ns


def _indexed(tar: str, skipped: Skipped) -> tuple[list[tuple[str, int, int, int]], tuple[int, int]]:
    """The `_images` of a file, and its `_version` before they were read."""
    check_ends(tar)
    version = _version(os.stat(tar))  # noqa: PTH116

    def note(kind: str, name: str) -> None:
        skipped.note(kind, f"{tar}/{name}")

    try:
        with tarfile.open(tar, "r:") as file:
            return list(_images(tar, file, note)), version
    except tarfile.TarError as error:
        raise DataError(
            f"data.path: {tar} cannot be read ({error}); it must be a whole, uncompressed tar file"
        ) from error


def _tars_in(folder: pathlib.Path) -> list[pathlib.Path]:
    found = (each for each in folder.iterdir() if each.suffix.lower() == ".tar")
    return sorted(each for each in found if not each.name.startswith("."))


def _named_after(split: str, tars: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """The files with a split in their names; those with it as a word alone, where there are any."""
    named = [tar for tar in tars if split in tar.name]
    word = re.compile(rf"(?<![^\W\d_]){re.escape(split)}(?![^\W\d_])")
    as_word = [tar for tar in named if split and word.search(tar.name)]
    if 0 < len(as_word) < len(named):
        other = next(tar.name for tar in named if tar not in as_word)
        LOG.warning("split %r: not reading the tar files of another one, such as %r", split, other)
    elif split and named and not as_word:
        first = named[0].name
        said = "split %r is only part of a word in %r; rename the tar files of other splits"
        LOG.warning(said, split, first)
    return as_word or named


def _images(
    tar: str, file: tarfile.TarFile, note: Callable[[str, str], None]
) -> Iterator[tuple[str, int, int, int]]:
    """Name, offset, bytes and label per image; -1 for no label."""
    for stem, parts in _grouped(file, note).items():
        label = _label(tar, file, stem, parts)
        images = [parts[each] for each in sorted(EXTENSIONS & parts.keys())]
        if images:
            (name, image), *replaced = images
            yield name, image.offset_data, image.size, label  # each link to a damaged image counts
            for name, _ in replaced:
                note(_REPLACED, name)
            continue
        for name, _ in parts.values():
            if posixpath.splitext(name.lower())[1] in EXTENSIONS:
                hidden = posixpath.basename(name).startswith(".")  # macOS adds them
                note(HIDDEN if hidden else _DOTTED, name)


def _grouped(
    file: tarfile.TarFile, note: Callable[[str, str], None]
) -> dict[str, dict[str, tuple[str, tarfile.TarInfo]]]:
    """The members' names, and the files they lead to, by key and extension; notes the others."""
    named = {_path(member): member for member in file if not _is_own_link(member)}
    _check_end(file)
    keys: dict[str, dict[str, tuple[str, tarfile.TarInfo]]] = {}
    for member in file:
        stem, extension = _split_name(_path(member))  # so that ./a.png is a.png
        content = _content(member, named)
        if isinstance(content, str):
            if extension in _READ:
                note(content, member.name)
            continue
        parts = keys.setdefault(stem, {})
        if extension in EXTENSIONS and parts.get(extension, (None, content))[1] != content:
            note(_REPLACED, member.name)
        parts[extension] = member.name, content
    return keys


def _content(
    member: tarfile.TarInfo, named: Mapping[str, tarfile.TarInfo]
) -> tarfile.TarInfo | str:
    """The file that a member is, or that its links lead to; or the kind of what is there instead.

    Args:
      member: the member.
      named: all members by path.
    """
    passed = set()
    while member.issym() or member.islnk():
        target = _target(member)
        if target in passed:
            return CIRCLE
        if target not in named:
            return DANGLING
        passed.add(target)
        member = named[target]
    if member.issparse():  # its bytes are not those between its offset and its size
        return _SPARSE
    return member if member.isfile() else SPECIAL


def _path(member: tarfile.TarInfo) -> str:
    return posixpath.normpath(member.name)


def _target(link: tarfile.TarInfo) -> str:
    """The path that a link leads to; a symbolic one begins at its own folder."""
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return posixpath.normpath(posixpath.join(folder, link.linkname))


def _is_own_link(member: tarfile.TarInfo) -> bool:
    """Whether a member is a hard link to its own path: tar was given a file twice."""
    return member.islnk() and _target(member) == _path(member)


def _check_end(file: tarfile.TarFile) -> None:
    """Raises ReadError unless zeros follow the last member; tarfile accepts anything there.

    Too many zeros are the rest of a file whose download was interrupted.
    """
    file.fileobj.seek(file.offset)
    tail = file.fileobj.read(_TAIL)
    if len(tail) < tarfile.BLOCKSIZE or any(tail):
        raise tarfile.ReadError(f"cut short, damaged or joined to another at byte {file.offset}")
    zeros = file.fileobj.seek(0, io.SEEK_END) - file.offset
    if zeros > _MOST_PADDING:
        raise tarfile.ReadError(f"never written from byte {file.offset} on: {zeros} zeros follow")


def _split_name(name: str) -> tuple[str, str]:
    """WebDataset's key and extension: the name is cut at the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    return folder + slash + stem, (dot + extension).lower()


def _label(
    tar: str, file: tarfile.TarFile, stem: str, parts: Mapping[str, tuple[str, tarfile.TarInfo]]
) -> int:
    """The class number of an image; -1 for none."""
    _, note = parts.get(_CLASS) or parts.get(_JSON) or (None, None)
    if note is None or note.size > _LARGEST_NOTE:
        return -1
    text = file.extractfile(note).read()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = text
    if isinstance(content, dict):
        content = content.get("label", content.get("cls"))
    if _CLASS not in parts and (content is None or isinstance(content, list)):
        return -1  # such as captions or boxes
    if type(content) is not int or not -1 <= content < _MOST_CLASSES:
        raise DataError(f"data.path: {tar}/{stem} has the class {text[:40]!r}; use 0, 1, 2, …")
    return content
