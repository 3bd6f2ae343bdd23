"""The table of evaluation datasets: their origin, their splits, and what is measured.

`docs/datasets.md` describes their layout, and how a missing validation part is cut.
"""

import dataclasses
import importlib.resources
import logging
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Literal

from cassle_jax.checks import UserError
from cassle_jax.data.errors import DataError
from cassle_jax.data.folder import open_folder, split_there
from cassle_jax.data.landmarks import CelebaSource, LandmarkFolder
from cassle_jax.data.listing import is_folder
from cassle_jax.data.objects import RenderedObjects
from cassle_jax.data.sources import Source, closest
from cassle_jax.data.splits import Joined, cut, cut_shots
from cassle_jax.storage import path_of

LOG = logging.getLogger(__name__)

Task = Literal["classification", "regression", "few-shot", "unlabelled"]
Metric = Literal["accuracy", "mean_per_class", "r2"]

OWN_FOLDER = "folder:"
"""Prefix of a dataset's name that marks a folder outside the table."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A dataset of the table.

    Attributes:
      builder: tfds builder, with its config; '' for an image folder.
      outputs: number of classes, or, for regression, of numbers to predict; 0 for the dataset's own
        number.
      sizes: published number of images for training, validation and test. Where the validation part
        is cut off the training part, the first two give its fraction.
      val: tfds' name of the validation part; '' cuts it off the training part. In a folder it is
        'val'.
      test: tfds' name of the test part. In a folder it is 'test'.
      metric: metric of the test part.
      task: purpose of the dataset. Few-shot episodes are drawn from the test part alone.
      builder_classes: classes to keep of a builder, see `read_class_list`.
      folder_classes: classes to keep of a folder.
      folder_test: name of the test part in a folder, where it is not 'test'.
      ten_crops: whether linear evaluation fits to ten crops per image.
      shots: images per class in the training and validation parts together, see `cut_shots`; 0 for
        all.
      opens: opens a split from the folder's root and the split's name; `None` for image folders.
    """

    builder: str
    outputs: int
    sizes: tuple[int, int, int]
    val: str = ""
    test: str = "test"
    metric: Metric = "accuracy"
    task: Task = "classification"
    builder_classes: str = ""
    folder_classes: str = ""
    folder_test: str = "test"
    ten_crops: bool = False
    shots: int = 0
    opens: Callable[[str, str], Source] | None = None


@dataclasses.dataclass(frozen=True)
class EvaluationData:
    """A dataset to evaluate on.

    Attributes:
      name: name in the table; 'folder:<path>' for a folder outside it.
      train: part to fit on; None for few-shot.
      val: part to choose the penalty on; None for few-shot. Protocols refit on train and val.
      test: part to measure on; for few-shot, to draw episodes from.
      classes: number of classes; 0 for images without labels and for regression, whose sources are
        `TargetSource`s.
      metric: metric of the test part.
      task: purpose of the dataset; a user's folder without labels is 'unlabelled', for protocols
        that look at images alone.
      ten_crops: whether linear evaluation fits to ten crops per image.
    """

    name: str
    train: Source | None
    val: Source | None
    test: Source
    classes: int
    metric: Metric
    task: Task
    ten_crops: bool = False


# Caltech's classes without the background, which the published evaluation leaves out.
_CALTECH = str(importlib.resources.files(__package__).joinpath("caltech101_classes.txt"))
_FOLDER = ""
_MEAN: Metric = "mean_per_class"

_few_shot = partial(Entry, task="few-shot")
_flowers = partial(Entry, "oxford_flowers102", 102, val="validation", metric=_MEAN)
_points = partial(Entry, val="validation", metric="r2", task="regression")

DATASETS: dict[str, Entry] = {
    "3diebench": Entry(
        _FOLDER, 55, (1_886_400, 209_600, 527_600), folder_test="val", opens=RenderedObjects
    ),
    "300w": _points(_FOLDER, 136, (180, 180, 240)),
    "aircraft": Entry(_FOLDER, 100, (3_334, 3_333, 3_333), val="validation", metric=_MEAN),
    "caltech101": Entry(
        "caltech101", 101, (2_525, 505, 5_647), metric=_MEAN, builder_classes=_CALTECH
    ),
    "cars": Entry("cars196", 196, (6_494, 1_650, 8_041)),
    "celeba": _points("celeb_a", 10, (162_770, 19_867, 19_962)),
    "cifar10": Entry("cifar10", 10, (45_000, 5_000, 10_000)),
    "cifar100": Entry("cifar100", 100, (45_000, 5_000, 10_000)),
    "cub200": Entry("caltech_birds2011", 200, (5_394, 600, 5_794), ten_crops=True),
    "cub200_few_shot": _few_shot("caltech_birds2011", 200, (0, 0, 11_788), test="train+test"),
    "dtd": Entry("dtd", 47, (1_880, 1_880, 1_880), val="validation"),
    "fc100": _few_shot(_FOLDER, 20, (0, 0, 12_000)),
    "flowers102": _flowers((1_020, 1_020, 6_149)),
    "flowers102_5shot": _flowers((408, 102, 6_149), ten_crops=True, shots=5),
    "flowers102_10shot": _flowers((816, 204, 6_149), ten_crops=True, shots=10),
    "flowers17": Entry(_FOLDER, 17, (680, 340, 340), val="validation"),
    "food101": Entry("food101", 101, (68_175, 7_575, 25_250), test="validation"),
    "imagenet100": Entry(
        "imagenet2012",
        100,
        (114_020, 12_669, 5_000),
        test="validation",
        builder_classes="imagenet100",
        folder_classes="imagenet100",
        folder_test="val",
    ),
    "lsp": _points(_FOLDER, 28, (960, 240, 800), val=""),
    "mit67": Entry(_FOLDER, 67, (4_690, 670, 1_340)),
    "pets": Entry("oxford_iiit_pet", 37, (2_940, 740, 3_669), metric=_MEAN),
    "plant_village": _few_shot("plant_village", 38, (0, 0, 54_303), test="train"),
    "stl10": Entry("stl10", 10, (4_500, 500, 8_000)),
    "sun397": Entry("sun397/standard-part1-120k", 397, (15_880, 3_970, 19_850)),
    # Often only some of its 200 classes are used.
    "tiny_imagenet": Entry(_FOLDER, 0, (90_000, 10_000, 10_000), folder_test="val"),
    # The classes that a run with data.classes=tiny_imagenet80 has not seen.
    "tiny_imagenet20": Entry(
        _FOLDER, 20, (9_000, 1_000, 1_000), folder_classes="tiny_imagenet20", folder_test="val"
    ),
}

_OWN = Entry(_FOLDER, 0, (9, 1, 0))


def open_dataset(name: str, *, path: str = "", data_dir: str = "") -> EvaluationData:
    """Opens a dataset of the table, or a user's folder.

    Args:
      name: a line of the table, or 'folder:<path>' for an image folder
        `<path>/<split>/<class>/<file>` with the splits 'train', 'test' and optionally 'val'. Where
        'test' is missing or has no labels, 'val' is the test part.
      path: image folder to read the dataset from, even where it has a tfds builder.
      data_dir: data_dir of tfds; '' for its default. Without a `path`, a dataset that has no
        builder lies in `<data_dir>/<name>`.

    Returns:
      The dataset. No pixels are read: at most the images' headers (landmarks) or the labels (tfds).

    Raises:
      DataError: the name is unknown; a folder, a split, a class or an image's target is missing;
        the splits differ in their classes; there is only one class, or another number of classes
        than the dataset has; a class has too few images for the shots.
    """
    if name.startswith(OWN_FOLDER):
        entry, path = _OWN, _own_path(name, path)
    elif name in DATASETS:
        entry = DATASETS[name]
        path = path or _default_folder(name, entry, data_dir)
    else:
        raise DataError(
            f"dataset {name!r} is unknown{closest(name, DATASETS)}; "
            f"known: {', '.join(DATASETS)}, and 'folder:<path>' for one of your own"
        )
    try:
        data = _open(name, entry, path, data_dir)
    except UserError as error:
        raise DataError(f"dataset {name!r}: {_in_our_terms(error, path)}") from error
    _compare_sizes(data, entry)
    return data


def _in_our_terms(error: UserError, path: str) -> str:
    """A source's message, with the pretraining settings in it replaced by our arguments."""
    setting = "path" if path else "data_dir"
    return str(error).replace("data.path", setting).replace("data.name=", "tfds builder ")


def _own_path(name: str, path: str) -> str:
    own = name.removeprefix(OWN_FOLDER)
    if path:
        raise DataError(f"dataset {name!r} names its folder itself; leave path={path!r} out")
    if not own:
        raise DataError(f"dataset {name!r} names no folder; write 'folder:<path>'")
    return own


def _default_folder(name: str, entry: Entry, data_dir: str) -> str:
    if entry.builder:
        return ""
    if not data_dir:
        raise DataError(
            f"dataset {name!r} has no tfds builder; give path, the root of its image folder, or "
            f"data_dir, the folder that has it as {name!r}"
        )
    return f"{data_dir}/{name}"


def _open(name: str, entry: Entry, path: str, data_dir: str) -> EvaluationData:
    open_split = _opener(entry, path, data_dir)
    val_split, test_split = _split_names(entry, path)
    train = val = None
    test = open_split(test_split)
    if entry is _OWN and val_split and len(test.class_names) < 2:
        LOG.info("dataset %r: %s has no labels, testing on %r", name, test.name, val_split)
        test, val_split = open_split(val_split), ""
    if entry.task != "few-shot":
        train = open_split("train")
        val = open_split(val_split) if val_split else None
    parts = [part for part in (test, train, val) if part is not None]
    task = entry.task
    if entry is _OWN and not all(part.class_names for part in parts):
        LOG.info("dataset %r has no labels: leaving out the tasks that need them", name)
        task = "unlabelled"
    elif task != "regression":
        _check_classes(entry, parts)
    if entry.shots:
        train, val = cut_shots(Joined(train, val), entry.shots)
    elif train is not None and val is None:
        # The cut of a user's folder does not depend on its path.
        key = "folder" if entry is _OWN else name
        train, val = cut(train, entry.sizes[1] / sum(entry.sizes[:2]), f"{key}/train")
    classes = 0 if task == "unlabelled" else len(test.class_names)
    return EvaluationData(name, train, val, test, classes, entry.metric, task, entry.ten_crops)


def _opener(entry: Entry, path: str, data_dir: str) -> Callable[[str], Source]:
    """Returns a function that opens a split by its name."""
    if entry.opens:
        return partial(entry.opens, path)
    if entry.task == "regression":
        if path:
            return partial(LandmarkFolder, path, numbers=entry.outputs)
        return partial(CelebaSource, data_dir)
    if path:
        return partial(open_folder, path, classes=entry.folder_classes)

    def open_split(split: str) -> Source:
        # tensorflow-datasets takes half a second to import: only its users wait for it.
        from cassle_jax.data import builder

        return builder.open_builder(entry.builder, data_dir, split, entry.builder_classes)

    return open_split


def _split_names(entry: Entry, path: str) -> tuple[str, str]:
    """Names of the validation part ('' for none) and of the test part where the dataset lies."""
    if not path:
        return entry.val, entry.test
    test = split_there(path, "test") if entry is _OWN else entry.folder_test
    if test != "test":  # the validation images are the test part
        return "", test
    val = split_there(path, "val")
    return val if entry.val or is_folder(pathlib.Path(path_of(path)) / val) else "", test


def _check_classes(entry: Entry, parts: list[Source]) -> None:
    first, *others = parts
    for other in others:
        _check_same_classes(first, other)
    count = len(first.class_names)
    if entry.outputs and count != entry.outputs:
        raise DataError(f"{first.name} has {count} classes; this dataset has {entry.outputs}")
    if count < 2:
        raise DataError(f"{first.name} has {count} class; a classifier needs 2 or more")


def _check_same_classes(one: Source, other: Source) -> None:
    """Refuses splits whose classes differ: their labels would mean different classes."""
    for having, lacking in ((one, other), (other, one)):
        missing = sorted(set(having.class_names) - set(lacking.class_names))
        if missing:
            raise DataError(
                f"{lacking.name} lacks {len(missing)} of the {len(having.class_names)} classes of "
                f"{having.name}, the first is {missing[0]!r}"
                f"{closest(missing[0], lacking.class_names)}"
            )


def _compare_sizes(data: EvaluationData, entry: Entry) -> None:
    """Logs parts that do not have the published size: their results do not compare."""
    if entry is _OWN:
        return
    parts = {"training": data.train, "validation": data.val, "test": data.test}
    for (part, source), size in zip(parts.items(), entry.sizes, strict=True):
        if source is not None and len(source) != size:
            LOG.warning(
                "dataset %r: the %s part has %d images; the published one has %d",
                data.name,
                part,
                len(source),
                size,
            )
