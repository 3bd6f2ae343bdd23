"""Writes a stretch of a source's images as one shard that tensorflow-datasets reads."""

import contextlib
import errno
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core import example_serializer

from cassle_jax.data.reading import RecordReader, UnreadableRecord
from cassle_jax.data.sources import Source, content_at
from cassle_jax.faults import Outage, code_in, hurry
from cassle_jax.prepare.reencode import reencoded
from cassle_jax.storage import PARTIAL, becoming, is_there, kept_json, write_whole

_NOTE = ".written.json"
_NOTED = {
    "records": int,
    "size": int,
    "unreadable": [(str, str)],
    "content": str,
    "file_size": int,
}
_GROUP = "group_size:1,uncompressed"  # images are compressed; random access reads one record


class Written(NamedTuple):
    """The content of a shard.

    Attributes:
      records: number of its records.
      size: their bytes.
      unreadable: name and reason per image that is left out.
      content: `content_at` of the images, before they were read.
      file_size: bytes of the file.
    """

    records: int
    size: int
    unreadable: list[tuple[str, str]]
    content: str
    file_size: int


class Encoding(NamedTuple):
    """The settings that determine a shard's records.

    Attributes:
      short_side: see `reencoded`.
      quality: see `reencoded`.
      class_names: names by label; empty where images have none.
    """

    short_side: int
    quality: int
    class_names: tuple[str, ...]


def features_of(class_names: Sequence[str]) -> tfds.features.FeaturesDict:
    """The features of the records: image, name, and the label where there are classes."""
    features = {"image": tfds.features.Image(), "name": tfds.features.Text()}
    if class_names:
        features["label"] = tfds.features.ClassLabel(names=class_names)
    return tfds.features.FeaturesDict(features)


def written_shard(path: pathlib.Path) -> Written | None:
    """The content of a complete shard; `None` for one that is missing or cut short."""
    noted = kept_json(_note(path), _NOTED)
    if noted is None or not path.exists() or path.stat().st_size != noted["file_size"]:
        return None
    written = Written(*(noted[name] for name in Written._fields))
    return written._replace(unreadable=[tuple(each) for each in written.unreadable])


def is_whole(path: pathlib.Path) -> bool:
    """Whether a shard is there, as large as its note states; earlier versions left no notes."""
    return is_there(path) and (not is_there(_note(path)) or written_shard(path) is not None)


def write_shard(path: pathlib.Path, source: Source, indices: range, encoding: Encoding) -> Written:
    """Writes the images `indices` of a source, and reads the shard back.

    The shard gets its name when it is whole; a note beside it then says what it holds.

    Args:
      path: path of the shard.
      source: the images.
      indices: their places in the source, in the shard's order.
      encoding: the settings of its records.

    Raises:
      OSError: the shard cannot be written, or what was read back is not what was written.
      DataError: an image cannot be read, and is not damaged.
      Outage: the images are out of reach.
    """
    content = repr(content_at(source, indices))
    unreadable: list[tuple[str, str]] = []
    sums: list[int] = []
    size = 0
    with becoming(path) as unfinished, _system_errors(path):
        writer = ArrayRecordWriter(str(unfinished), _GROUP)
        for record in _records(source, indices, encoding, unreadable):
            writer.write(record)
            sums.append(zlib.crc32(record))
            size += len(record)
        writer.close()
        if _sums_in(unfinished) != sums:
            raise OSError(errno.EIO, "what was written cannot be read back", str(path))
    written = Written(len(sums), size, unreadable, content, path.stat().st_size)
    write_whole(_note(path), json.dumps(written._asdict()))
    return written


@contextlib.contextmanager
def _system_errors(path: pathlib.Path) -> Iterator[None]:
    """Turns errors that array_record reports in words alone into an `OSError` of this file."""
    try:
        yield
    except Outage:  # of the images
        raise
    except RuntimeError as error:
        code = code_in(str(error))
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def remove_partials(folder: pathlib.Path) -> None:
    """Removes what killed calls left half written."""
    for unfinished in folder.glob(f"*{PARTIAL}"):
        unfinished.unlink(missing_ok=True)


def _note(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}{_NOTE}")


def _records(
    source: Source, indices: range, encoding: Encoding, unreadable: list[tuple[str, str]]
) -> Iterator[bytes]:
    """The serialized records; notes those that cannot be read."""
    features = features_of(encoding.class_names)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    read = RecordReader(source, lambda name: any(name == known for known, _ in unreadable))
    decode = partial(reencoded, short_side=encoding.short_side, quality=encoding.quality)
    for index in indices:
        if hurry.is_set():
            raise KeyboardInterrupt
        try:
            record, image = read(index, decode)
        except UnreadableRecord as error:
            unreadable.append((error.name, error.reason))
            continue
        example = {"image": image, "name": record.name.encode(errors="surrogateescape")}
        if "label" in features:
            example["label"] = record.label
        message = serializer.get_tf_example(features.encode_example(example))
        yield message.SerializeToString(deterministic=True)  # else the order varies by process


def _sums_in(path: epath.PathLike) -> list[int]:
    """The checksum of every record of a file, in its order."""
    reader = ArrayRecordReader(str(path))
    try:
        return [zlib.crc32(record) for record in reader.read_all()]
    finally:
        reader.close()
