"""Reads any tensorflow-datasets builder prepared as array_record, without TensorFlow."""

import copy
import functools
import re
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from jaxtyping import Int
from tensorflow_datasets.core import read_only_builder

from cassle_jax.checks import first_line
from cassle_jax.data.decode import DamagedImage
from cassle_jax.data.errors import DataError
from cassle_jax.data.feature_paths import (
    FeaturePath,
    features_at,
    image_path,
    label_path,
    leaves,
    nested,
    value_at,
)
from cassle_jax.data.kept_numbers import kept_numbers, numbers_file
from cassle_jax.data.listing import is_folder
from cassle_jax.data.shards import Shards
from cassle_jax.data.sources import (
    DAMAGED,
    Record,
    check_classes,
    check_index,
    closest,
    digest_of,
    read_class_list,
)
from cassle_jax.storage import check_address, is_utf8, path_of

_SCAN_CHUNK = 32  # records; reading 256 at a time is slower
_CORRUPT = (RuntimeError, ValueError, KeyError)  # what array_record and protobuf raise


class TfdsSource:
    """One split of a prepared builder, its images left encoded.

    The image and the label are found by their feature's type. The image is the `Image` called
    'image', else the first one in colour; the label is the `ClassLabel` called 'label', else the
    first. Features are ordered by name. Without a `ClassLabel` every label is -1.
    """

    def __init__(self, tfds_builder: tfds.core.DatasetBuilder, split: str, classes: str = ""):
        """Opens a split.

        Args:
          tfds_builder: a builder whose array_record files exist.
          split: a split expression of tfds.
          classes: see `open_source`. A subset needs the labels of the whole split: they are read
            once and kept in the user's cache folder, see `kept_numbers`.

        Raises:
          DataError: no image feature, no such split, wrong file format, an unknown class, or a
            file that cannot be read.
        """
        features = tfds_builder.info.features
        self._image_key = image_path(features)
        self._label_key = label_path(features)
        self.name = f"{tfds_builder.info.full_name} {split}"
        if self._image_key is None:
            found = ((".".join(path), type(leaf).__name__) for path, leaf in leaves(features))
            raise DataError(
                f"data.name={tfds_builder.info.full_name!r} has no Image among its features, "
                f"only {', '.join(f'{name} ({kind})' for name, kind in found)}"
            )
        self.class_names = _class_names(tfds_builder, self._label_key)
        wanted = read_class_list(classes)
        if wanted is not None:
            self._check_subset(classes, wanted)
        self._records = _open_split(tfds_builder, split)
        # What else a record holds may be slow to decode, or damaged.
        needed = [path for path in (self._image_key, self._label_key) if path]
        self._features = features_at(features, needed)
        self._decoders = nested({self._image_key: tfds.decode.SkipDecoding()})
        files = tfds_builder.info.splits[split].file_instructions
        self._shards = Shards(self.name, files)
        self._split = split
        self._kept: Int[np.ndarray, " kept"] | None = None
        self._new_label: Int[np.ndarray, " classes"] | None = None
        if wanted is not None:
            self._keep_classes(wanted)

    def __len__(self) -> int:
        return len(self._records) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int) -> Record:
        check_index(index, self)
        position = index if self._kept is None else int(self._kept[index])
        name = f"{self.name} #{position}"
        try:
            stored = self._records.data_source[position]
            example = self._features.deserialize_example_np(stored, decoders=self._decoders)
            image = value_at(example, self._image_key)
            if image is None:  # an empty record: its file was cut short while it was open
                raise ValueError("it is empty")
        except _CORRUPT as error:
            self._check_file(position, error)
            reason = f"the record is corrupt: {first_line(error)}"
            raise DamagedImage(reason, name) from error
        return Record(image, self._label(example), name)

    @property
    def names(self) -> str:
        """See `names_of`; covers the files, and the places in them of the kept classes."""
        if self._kept is None:
            return self._shards.names
        return digest_of(self._shards.names.encode(), np.asarray(self._kept, "<i8").tobytes())

    @property
    def content(self) -> str:
        """See `content_of`."""
        return self._shards.content

    def has_changed(self) -> bool:
        """See `sources.has_changed`."""
        return self._shards.has_changed()

    def _check_file(self, position: int, error: Exception) -> None:
        """See `Shards.check`; replaces the readers after an outage, as a failed one stays broken.

        Other threads finish with the old readers.
        """
        try:
            self._shards.check(position, error)
        except OSError:
            records = copy.copy(self._records)
            records.data_source = copy.copy(self._records.data_source)
            self._records = records
            raise

    @functools.cached_property
    def labels(self) -> Int[np.ndarray, " images"]:
        """The label of every image, see `labels_of`."""
        if self._label_key is None:
            return np.full(len(self), -1, np.int32)
        labels = self.numbers([self._label_key])[:, 0]
        return labels if self._new_label is None else self._new_label[labels]

    def numbers(self, paths: Sequence[FeaturePath]) -> Int[np.ndarray, "images numbers"]:
        """Whole numbers stored with every image, such as labels and landmarks, without the images.

        The numbers are read once and kept in the user's cache folder, see `kept_numbers`.
        They are `DAMAGED` for a record that cannot be read.
        """
        numbers = self._numbers_of_records(paths)
        return numbers if self._kept is None else numbers[self._kept]

    def _label(self, example: dict) -> int:
        if self._label_key is None:
            return -1
        label = int(value_at(example, self._label_key))
        return label if self._new_label is None or label < 0 else int(self._new_label[label])

    def _check_subset(self, classes: str, wanted: tuple[str, ...]) -> None:
        if self._label_key is None:
            raise DataError(
                f"data.classes={classes!r} needs labels, and {self.name} has none; leave it ''"
            )
        check_classes(classes, wanted, self.class_names)

    def _keep_classes(self, wanted: tuple[str, ...]) -> None:
        labels = self._numbers_of_records([self._label_key])[:, 0]
        new_label = np.full(len(self.class_names), -1, np.int32)
        for new, name in enumerate(wanted):
            new_label[self.class_names.index(name)] = new
        # An unlabelled record has label -1 and a corrupt one DAMAGED; neither may read an entry
        # from the end.
        keep = (labels >= 0) & (new_label[labels] >= 0)
        self._kept = np.flatnonzero(keep)
        self._new_label = new_label
        self.class_names = wanted
        if not len(self._kept):
            raise DataError(f"data.classes leaves no image of {self.name}")

    def _numbers_of_records(
        self, paths: Sequence[FeaturePath]
    ) -> Int[np.ndarray, "records numbers"]:
        shape = (len(self._records), len(paths))
        info = self._records.dataset_info
        file = numbers_file(info, self._split, paths, self.content)
        return kept_numbers(functools.partial(self._scan, paths), shape, file)

    def _scan(self, paths: Sequence[FeaturePath]) -> Iterator[list[list[int]]]:
        # Parse only the requested features: five times as quick for CelebA, which has fifty.
        features = features_at(self._records.dataset_info.features, paths)

        def read(places: Sequence[int]) -> list[list[int]]:
            stored = self._records.data_source.__getitems__(places)
            examples = [features.deserialize_example_np(each) for each in stored]
            return [[int(value_at(example, path)) for path in paths] for example in examples]

        def read_or_mark(place: int) -> list[int]:
            try:
                return read([place])[0]
            except _CORRUPT as error:
                self._check_file(place, error)
                return [DAMAGED] * len(paths)

        for start in range(0, len(self._records), _SCAN_CHUNK):
            places = range(start, min(start + _SCAN_CHUNK, len(self._records)))
            try:
                rows = read(places)
            except _CORRUPT:
                rows = [read_or_mark(place) for place in places]
            yield rows


def open_builder(name: str, data_dir: str, split: str, classes: str = "") -> TfdsSource:
    """Opens one split of a builder that `tfds build` has prepared as array_record.

    Args:
      name: builder, optionally with config and version, such as 'imagenet_resized/64x64:0.1.0'.
      data_dir: tfds' data_dir; '' is its default.
      split: a split expression of tfds.
      classes: see `open_source`.

    Raises:
      DataError: the builder is unknown or not prepared, or an error of `TfdsSource`.
    """
    return TfdsSource(_find_builder(name, data_dir), split, classes)


def _find_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    if not name:
        raise DataError("data.name='' names no tfds builder; give one, such as 'cifar10'")
    folder = _data_folder(data_dir) if data_dir else None
    try:
        # From files, not by tfds.builder: reads whichever version is prepared.
        return read_only_builder.builder_from_files(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(_why_not_found(name, folder)) from error
    except Exception as error:  # A damaged description raises any type, depending on its bytes.
        raise DataError(f"data.name={name!r} cannot be opened: {_unquoted(error)}") from error


def _data_folder(data_dir: str) -> epath.Path:
    """The folder; raises UserError where there is none, or where libraries cannot read it."""
    if str(data_dir).startswith("s3://"):
        raise DataError(f"data.path={data_dir!r} is on S3, and array_record reads gs://; mount it")
    check_address("data.path", data_dir)
    folder = path_of(data_dir)
    if not is_folder(folder):
        raise DataError(f"data.path={data_dir!r} is not a folder; give tfds' data_dir, or ''")
    if not is_utf8(folder):
        raise DataError(
            f"data.path={data_dir!r} has bytes that are not UTF-8, which array_record cannot open"
        )
    return folder


def _why_not_found(name: str, folder: epath.Path | None) -> str:
    where = folder or epath.Path(tfds.core.constants.DATA_DIR)
    plain = re.split("[/:]", name)[0]
    for inside in (where, *where.parents):
        if inside.name == plain and _is_in(name, inside.parent):
            return f"data.path={str(where)!r} is a folder of {name!r} itself; give {inside.parent}"
    known = tfds.list_builders(with_community_datasets=False)
    prepared = sorted(entry.name for entry in where.iterdir()) if where.is_dir() else []
    if plain not in known and plain not in prepared:
        return f"data.name={name!r} is not a tfds builder{closest(plain, [*known, *prepared])}"
    option = f" --data_dir={folder}" if folder else ""
    return (
        f"data.name={name!r} is not prepared in {where}; run "
        f"`tfds build {name} --file_format=array_record{option}`, or set data.path to where it is"
    )


def _is_in(name: str, folder: epath.Path) -> bool:
    """Whether a folder has the builder's files."""
    try:
        read_only_builder.builder_from_files(name, data_dir=folder)
    except Exception:  # as in `_find_builder`
        return False
    return True


def _open_split(tfds_builder: tfds.core.DatasetBuilder, split: str):
    info = tfds_builder.info
    formats = sorted(file_format.value for file_format in info.available_file_formats())
    if "array_record" not in formats:
        raise DataError(
            f"data.name={info.full_name!r} is prepared as {', '.join(formats)}, without random "
            f"access; run `tfds convert_format --dataset_version_dir={tfds_builder.data_dir} "
            "--out_file_format=array_record`"
        )
    try:
        if info.splits[split].num_examples < 1:
            raise ValueError("it is empty")
        return tfds_builder.as_data_source(split, file_format="array_record")
    except Exception as error:  # A bad split expression fails in tfds' parser in many ways.
        splits = list(info.splits)
        raise DataError(
            f"data.name={info.full_name!r} has no split {split!r}{closest(split, splits)} "
            f"({_unquoted(error)}); there: {', '.join(splits)}"
        ) from error


def _class_names(
    tfds_builder: tfds.core.DatasetBuilder, label_key: FeaturePath | None
) -> tuple[str, ...]:
    if label_key is None:
        return ()
    label = value_at(tfds_builder.info.features, label_key)
    found = len(set(label.names))
    if found != label.num_classes:  # tfds itself takes whatever is in the file
        raise DataError(
            f"data.name={tfds_builder.info.full_name!r} has {label.num_classes} classes, and its "
            f"file {'-'.join(label_key)}.labels.txt names {found}; restore the file"
        )
    return tuple(label.names)


def _unquoted(error: Exception) -> str:
    """The first line of an error's message; a `KeyError` quotes its own."""
    return first_line(error).strip("\"'")
