"""Writes a stretch of a source's images as one shard that tensorflow-datasets reads."""

import errno
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core import example_serializer

from cassle_jax.data.decode import DamagedImage
from cassle_jax.data.sources import Source
from cassle_jax.faults import retried
from cassle_jax.prepare.reencode import reencoded
from cassle_jax.storage import PARTIAL, becoming, kept_json, write_whole

_NOTE = ".written.json"
_ONE_FILE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_GROUP = "group_size:1,uncompressed"  # images are compressed; random access reads one record


class Written(NamedTuple):
    """What a shard holds.

    Attributes:
      records: number of its records.
      size: their bytes.
      unreadable: name and reason of each image that is left out.
    """

    records: int
    size: int
    unreadable: list[tuple[str, str]]


def features_of(source: Source) -> tfds.features.FeaturesDict:
    """The features of a prepared source's records: image, name, and the label where it has one."""
    features = {"image": tfds.features.Image(), "name": tfds.features.Text()}
    if source.class_names:
        features["label"] = tfds.features.ClassLabel(names=source.class_names)
    return tfds.features.FeaturesDict(features)


def written_shard(path: pathlib.Path) -> Written | None:
    """What a shard that is there in whole holds; `None` where it is still to write."""
    noted = kept_json(_note(path))
    if noted is None or not path.exists():
        return None
    return Written(noted["records"], noted["size"], [tuple(each) for each in noted["unreadable"]])


def write_shard(
    path: pathlib.Path, source: Source, indices: range, short_side: int, quality: int
) -> Written:
    """Writes the images `indices` of a source, and reads the shard back.

    The shard gets its name when it is whole; a note beside it then says what it holds.

    Args:
      path: of the shard.
      source: the images.
      indices: their places in the source, in the shard's order.
      short_side: see `reencoded`.
      quality: see `reencoded`.

    Raises:
      OSError: the shard cannot be written, or what was read back is not what was written.
      Outage: the images are out of reach.
    """
    unreadable: list[tuple[str, str]] = []
    sums: list[int] = []
    size = 0
    with becoming(path) as partial:
        writer = ArrayRecordWriter(str(partial), _GROUP)
        for record in _records(source, indices, short_side, quality, unreadable):
            writer.write(record)
            sums.append(zlib.crc32(record))
            size += len(record)
        writer.close()
        if _sums_in(partial) != sums:
            raise OSError(errno.EIO, "what was written cannot be read back", str(path))
    write_whole(_note(path), json.dumps(Written(len(sums), size, unreadable)._asdict()))
    return Written(len(sums), size, unreadable)


def remove_leftovers(folder: pathlib.Path) -> None:
    """Removes the notes beside the shards of a folder, and what killed calls left half written."""
    for leftover in (*folder.glob(f".*{_NOTE}"), *folder.glob(f"*{PARTIAL}")):
        leftover.unlink(missing_ok=True)


def _note(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}{_NOTE}")


def _records(
    source: Source,
    indices: range,
    short_side: int,
    quality: int,
    unreadable: list[tuple[str, str]],
) -> Iterator[bytes]:
    """The serialized records; notes those that cannot be read."""
    features = features_of(source)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    for index in indices:
        name = f"{source.name} #{index}"
        try:
            record = retried(name, lambda index=index: source[index])
            name = record.name
            image = reencoded(record.image, short_side, quality)
        except (DamagedImage, *_ONE_FILE) as error:
            unreadable.append((getattr(error, "filename", None) or name, str(error)))
            continue
        example = {"image": image, "name": record.name.encode(errors="surrogateescape")}
        if "label" in features:
            example["label"] = record.label
        message = serializer.get_tf_example(features.encode_example(example))
        yield message.SerializeToString(deterministic=True)  # else in an order of the process's own


def _sums_in(path: epath.PathLike) -> list[int]:
    """The checksum of every record of a file, in its order."""
    reader = ArrayRecordReader(str(path))
    try:
        return [zlib.crc32(record) for record in reader.read_all()]
    finally:
        reader.close()
