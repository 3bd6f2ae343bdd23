"""The table of evaluation datasets: real tfds schemas with made-up records, and image folders."""

import csv
import hashlib
import io
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.testing import mocking

from cassle_jax.data import DataError, Record, decode
from cassle_jax.data.builder import TfdsSource
from cassle_jax.data.datasets import DATASETS, open_dataset
from cassle_jax.data.folder import open_folder
from cassle_jax.data.landmarks import LandmarkFolder
from cassle_jax.data.reading import RecordReader
from cassle_jax.data.sources import content_of, has_changed, labels_of, root_of
from cassle_jax.data.splits import Joined, Part, TenCrops, cut, cut_shots, held_out
from cassle_jax.faults import Outage

SPEC = {
    "300w",
    "aircraft",
    "caltech101",
    "cars",
    "celeba",
    "cifar10",
    "cifar100",
    "cub200",
    "dtd",
    "fc100",
    "flowers102",
    "food101",
    "imagenet100",
    "lsp",
    "mit67",
    "pets",
    "plant_village",
    "stl10",
    "sun397",
}

# What the catalogue of tensorflow-datasets says, of the splits that are read: images.
CATALOGUE = {
    "caltech101": {"train": 3_059, "test": 6_085},
    "caltech_birds2011": {"train": 5_994, "test": 5_794},
    "cars196": {"train": 8_144, "test": 8_041},
    "celeb_a": {"train": 162_770, "validation": 19_867, "test": 19_962},
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "dtd": {"train": 1_880, "validation": 1_880, "test": 1_880},
    "food101": {"train": 75_750, "validation": 25_250},
    "imagenet2012": {"train": 1_281_167, "validation": 50_000},
    "oxford_flowers102": {"train": 1_020, "validation": 1_020, "test": 6_149},
    "oxford_iiit_pet": {"train": 3_680, "test": 3_669},
    "plant_village": {"train": 54_303},
    "stl10": {"train": 5_000, "test": 8_000, "unlabelled": 100_000},
    "sun397/standard-part1-120k": {"train": 19_850, "test": 19_850},
}

# Without the background, which has 467 images, 29 of them in tfds' training split.
NOT_ALL_CLASSES = {"caltech101": {"train": 3_030, "test": 5_647}}

DOCUMENT = Path(__file__).parents[2] / "docs" / "datasets.md"
IN_BUILDERS = sorted(name for name, entry in DATASETS.items() if entry.builder and not entry.shots)
MADE_UP = {"train": 20, "validation": 6, "test": 8, "unlabelled": 2}
EYES_TO_MOUTH = ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")


def png(seed: int, height: int, width: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def made_up_label(features, seed: int) -> int:
    """Every second image of ImageNet is of one of ImageNet-100's first classes."""
    names = features["label"].names
    if "n02869837" in names:
        return names.index(("n02869837", "n01440764", "n01749939", "n01443537")[seed % 4])
    if "background_google" in names:
        return names.index(("background_google", "accordion", "yin_yang", "ant")[seed % 4])
    return seed % len(names)


def made_up_example(features, seed: int) -> dict:
    """tfds's own mock of an example, with images that are files and labels that are known."""
    example = mocking.RandomFakeGenerator(features, 1, seed=seed)[0]
    for key, feature in features.items():
        if isinstance(feature, tfds.features.Image):
            height, width = (side or 6 + seed % 3 for side in feature.shape[:2])
            example[key] = io.BytesIO(png(seed, height, width))
        elif isinstance(feature, tfds.features.BBoxFeature):
            example[key] = tfds.features.BBox(0.1, 0.2, 0.3, 0.4)
    if "label" in features:
        example["label"] = made_up_label(features, seed)
    return example


def made_up(features, name: str, split: str) -> list[dict]:
    start = 50 * list(CATALOGUE[name]).index(split)
    return [made_up_example(features, start + number) for number in range(MADE_UP[split])]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepares a real builder with made-up records, as `tfds build` would; gives the data_dir."""
    root = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()

    def prepare(name: str) -> Path:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
        if not Path(builder.data_dir).exists():
            features = builder.info.features
            if name == "stl10":  # It learns the names of its classes from the download.
                features["label"].names = [f"class {number}" for number in range(10)]
            splits = {split: made_up(features, name, split) for split in CATALOGUE[name]}
            builder._split_generators = lambda _: {s: enumerate(each) for s, each in splits.items()}
            with mock.patch.object(tfds.core.DatasetBuilder, "url_infos", {}):
                builder.download_and_prepare()
        return root

    return prepare


def images(source) -> list[bytes]:
    return [source[index].image for index in range(len(source))]


def test_the_table_has_every_dataset_of_the_evaluation():
    assert set(DATASETS) > SPEC
    means = {name for name, entry in DATASETS.items() if entry.metric == "mean_per_class"}
    few_flowers = {"flowers102_5shot", "flowers102_10shot"}
    assert means == {"pets", "caltech101", "flowers102", "aircraft"} | few_flowers
    assert {name for name, entry in DATASETS.items() if entry.ten_crops} == {"cub200"} | few_flowers
    regressions = {name for name, entry in DATASETS.items() if entry.task == "regression"}
    assert regressions == {"300w", "celeba", "lsp"}
    assert regressions == {name for name, entry in DATASETS.items() if entry.metric == "r2"}
    few_shot = {name for name, entry in DATASETS.items() if entry.task == "few-shot"}
    assert few_shot == {"cub200_few_shot", "fc100", "plant_village"}


def test_the_table_is_written_down():
    rows = {}
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if named := re.match(r"\| `(\w+)` \|", line):
            rows[named[1]] = line
    assert rows.keys() == DATASETS.keys()
    for name, entry in DATASETS.items():
        sizes = [
            int("".join(digits.split())) for digits in re.findall(r"\| (\d[\d ]*)", rows[name])
        ]
        outputs = [entry.outputs] if entry.outputs else []
        assert sizes == [*outputs, *(size for size in entry.sizes if size)]
        assert ("cut" in rows[name]) == (not entry.val and entry.task != "few-shot")
        assert f"`{entry.builder}`" in rows[name] or not entry.builder
        said = {"accuracy": "accuracy", "mean_per_class": "mean per class", "r2": "R²"}
        assert rows[name].endswith(f"| {said[entry.metric]} |") or entry.task == "few-shot"


@pytest.mark.parametrize("name", sorted(set(IN_BUILDERS) - {"imagenet100"}))
def test_published_sizes_are_what_the_builders_hold(name):
    entry = DATASETS[name]
    catalogue = NOT_ALL_CLASSES.get(entry.builder, CATALOGUE[entry.builder])
    train, val, test = entry.sizes
    assert test == sum(catalogue[split] for split in entry.test.split("+"))
    if entry.task == "few-shot":
        assert (train, val) == (0, 0)
    elif entry.val:
        assert (train, val) == (catalogue["train"], catalogue[entry.val])
    else:
        assert train + val == catalogue["train"]


class Numbered:
    """A source of nothing but its length, which notices being read."""

    class_names = ()
    name = "numbered"

    def __init__(self, count: int, views: int = 1):
        self.count, self.views, self.changing = count, views, {}

    def factors_of(self, places):
        raise AssertionError("read")

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        raise AssertionError("read")


@pytest.mark.parametrize(
    "name", sorted(name for name, entry in DATASETS.items() if not entry.val and entry.sizes[0])
)
def test_a_cut_has_the_published_sizes(name):
    train, val, _ = DATASETS[name].sizes
    views = 50 if name == "3diebench" else 1
    kept, held = cut(Numbered(train + val, views), val / (train + val), f"{name}/train")
    assert (len(kept), len(held)) == (train, val)
    assert sorted([*kept._indices, *held._indices]) == list(range(train + val))


def test_every_class_of_a_folder_gives_its_share():
    """As of 67 classes of 80 images; these are MIT-67's numbers."""
    assert set(np.bincount(held_out(67 * 80, 670, "mit67/train") // 80)) == {10}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", IN_BUILDERS)
def test_every_builder_is_read_by_its_real_schema(name, prepared, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entry = DATASETS[name]
    data_dir = prepared(entry.builder)
    features = tfds.builder(entry.builder, data_dir=data_dir).info.features
    data = open_dataset(name, data_dir=str(data_dir))
    assert (data.name, data.metric, data.task) == (name, entry.metric, entry.task)
    assert data.classes == (0 if data.task == "regression" else entry.outputs)

    def written(splits: str) -> dict[bytes, str | None]:
        """Image to the name of its class."""
        known = {}
        for split in splits.split("+"):
            for example in made_up(features, entry.builder, split):
                label = features["label"].int2str(example["label"]) if data.classes else None
                if name == "imagenet100" and label in ("n01440764", "n01443537"):
                    continue
                if label != "background_google":
                    known[example["image"].getvalue()] = label
        return known

    def read(source) -> dict[bytes, str | None]:
        records = [source[index] for index in range(len(source))]
        names = source.class_names
        return {r.image: names[r.label] if data.classes else None for r in records}

    for part in (data.train, data.val, data.test):
        if data.classes and part is not None:
            assert labels_of(part).tolist() == [part[index].label for index in range(len(part))]
    assert data.ten_crops == (name == "cub200")
    assert read(data.test) == written(entry.test)
    if data.task == "few-shot":
        assert data.train is None
        assert data.val is None
    elif entry.val:
        assert read(data.train) == written("train")
        assert read(data.val) == written(entry.val)
    else:
        assert read(data.train).keys().isdisjoint(read(data.val))
        assert {**read(data.train), **read(data.val)} == written("train")
        share = entry.sizes[1] / sum(entry.sizes[:2])
        assert len(data.val) == max(1, round(share * len(written("train"))))


def test_celeba_has_five_points_in_the_central_square(prepared):
    data_dir = prepared("celeb_a")
    features = tfds.builder("celeb_a", data_dir=data_dir).info.features
    data = open_dataset("celeba", data_dir=str(data_dir))
    expected = {}
    for example in made_up(features, "celeb_a", "test"):
        marks = example["landmarks"]
        expected[example["image"].getvalue()] = [
            place
            for point in EYES_TO_MOUTH
            for place in (marks[f"{point}_x"] / 178, (marks[f"{point}_y"] - 20) / 178)
        ]
    assert data.test.targets.shape == (MADE_UP["test"], 10)
    for image, targets in zip(images(data.test), data.test.targets, strict=True):
        np.testing.assert_allclose(targets, expected[image], rtol=1e-6)
    assert {data.train[index].label for index in range(len(data.train))} == {-1}
    again = open_dataset("celeba", data_dir=str(data_dir))
    assert content_of(again.test) == content_of(data.test) != content_of(data.train)
    assert not has_changed(data.test)


def test_landmarks_are_read_once(prepared, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data_dir = str(prepared("celeb_a"))
    first = open_dataset("celeba", data_dir=data_dir).train.targets
    monkeypatch.setattr(TfdsSource, "_scan", lambda *_: pytest.fail("read again"))
    assert open_dataset("celeba", data_dir=data_dir).train.targets.tolist() == first.tolist()


@pytest.mark.exhaustive
def test_no_tensorflow_at_run_time(prepared):
    """In a process of its own: the files alone must do."""
    script = f"""
import sys
from cassle_jax.data.datasets import open_dataset
data = open_dataset("celeba", data_dir={str(prepared("celeb_a"))!r})
data.train[0]
print(data.train.targets.shape)
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(20, 10)"


# -- the cut ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "holdout"), [(20, 2), (17, 5), (8, 8), (5360, 670), (9, 1)])
def test_one_record_of_each_block_is_held_out(count, holdout):
    held = held_out(count, holdout, "pets/train")
    assert held.tolist() == held_out(count, holdout, "pets/train").tolist()
    for block, index in enumerate(held.tolist()):
        start, stop = block * count // holdout, (block + 1) * count // holdout
        digests = [
            hashlib.blake2b(b"pets/train/%d" % place, digest_size=8).hexdigest()
            for place in range(start, stop)
        ]
        assert index == start + digests.index(min(digests))


def test_other_keys_hold_out_other_records():
    assert held_out(1000, 100, "pets/train").tolist() != held_out(1000, 100, "cars/train").tolist()


def test_held_out_records_stay_what_they_are():
    """The rule as `docs/datasets.md` has it: figures of different years must compare."""
    assert held_out(30, 5, "cifar10/train").tolist() == [2, 7, 13, 21, 24]


def test_a_cut_covers_the_source(image_folder):
    root = image_folder({"ant": 8, "bee": 8, "cat": 8})
    train = open_dataset(f"folder:{with_test(root)}").train
    whole = train._source
    kept, held = cut(whole, 0.25, "mine/train")
    assert sorted(images(kept) + images(held)) == sorted(images(whole))
    assert np.bincount([held[i].label for i in range(len(held))]).tolist() == [2, 2, 2]
    assert held[0] in [whole[i] for i in range(len(whole))]
    assert "validation" in held.name
    with pytest.raises(IndexError, match="outside"):
        kept[len(kept)]
    assert not hasattr(kept, "targets")
    assert root_of(kept) == root_of(whole) == f"{root}/train"


# -- a few shots -----------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_a_few_shots_are_as_many_of_each_class(tmp_path):
    """The shots of all 102 flowers follow the rule of `docs/datasets.md`."""
    classes = [f"flower {number:03d}" for number in range(102)]
    for split, each in (("train", 5), ("val", 6), ("test", 1)):
        with_test(tmp_path, classes, split, each)
    whole = open_dataset("flowers102", path=str(tmp_path))
    pool = [*records(whole.train), *records(whole.val)]
    labels = [*labels_of(whole.train), *labels_of(whole.val)]
    chosen = {}
    for shots in (5, 10):
        data = open_dataset(f"flowers102_{shots}shot", path=str(tmp_path))
        assert [len(data.train), len(data.val)] == list(DATASETS[data.name].sizes[:2])
        assert (len(data.test), data.classes, data.ten_crops) == (102, 102, True)
        assert set(np.bincount(labels_of(data.val))) == {shots // 5}
        expected = {}
        for label, name in enumerate(classes):
            places = [place for place, each in enumerate(labels) if each == label]
            places.sort(key=lambda place: hashlib.blake2b(b"%d" % place, digest_size=8).digest())
            expected[name] = {pool[place].name for place in places[:shots]}
            held = {pool[place].name for place in places[: shots // 5]}
            assert held <= {each.name for each in records(data.val)}
        chosen[shots] = {each.name for part in (data.train, data.val) for each in records(part)}
        assert chosen[shots] == set().union(*expected.values())
    assert chosen[5] < chosen[10]


def records(source) -> list[Record]:
    return [source[index] for index in range(len(source))]


def test_too_few_images_for_the_shots(prepared, monkeypatch, tmp_path):
    """By the real schema: the made-up flowers are fewer than their classes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError) as caught:
        open_dataset("flowers102_5shot", data_dir=str(prepared("oxford_flowers102")))
    assert_one_line(caught, ["'flowers102_5shot'", "images of 'pink primrose'; 5 of every class"])


def test_shots_leave_out_images_without_a_label():
    labels = np.repeat([0, 1, -1], 6).tolist()
    train, val = cut_shots(Pictures(labels), 4)
    assert [sorted(labels_of(part).tolist()) for part in (train, val)] == [
        [0] * 3 + [1] * 3,
        [0, 1],
    ]


# -- sources of other sources ----------------------------------------------------------------------


class Pictures:
    """Noise of one size, which does not know its labels before it is read."""

    name = "pictures"
    class_names = ("a", "b")

    def __init__(self, labels, height=40, width=55):
        self.own, self.shape = labels, (height, width)

    def __len__(self):
        return len(self.own)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return Record(png(index, *self.shape), self.own[index], f"picture {index}")


def test_joined_sources_follow_each_other():
    first, second = Pictures([0, 1]), Pictures([1, 1, 0], 9)
    both = Joined(first, second)
    assert records(both) == records(first) + records(second)
    assert labels_of(both).tolist() == [0, 1, 1, 1, 0]
    assert labels_of(Part(both, np.array([1, 4]), "some")).tolist() == [1, 0]
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            both[outside]


@pytest.mark.parametrize("kind", ["crops", "joined", "landmarks"])
def test_a_folder_that_vanishes_is_an_outage_for_all_that_is_made_of_it(
    image_folder, tmp_path, monkeypatch, kind
):
    monkeypatch.setenv("CASSLE_STORAGE_SECONDS", "0.1")
    root = image_folder({"ant": 2})
    image_folder({"ant": 2}, "val")
    train, val = (open_folder(str(root), split) for split in ("train", "val"))
    source = {
        "crops": lambda: TenCrops(train, 8, 8),
        "joined": lambda: Joined(train, val),
        "landmarks": lambda: LandmarkFolder(
            str(landmark_folder(tmp_path / "points", 6)), "test", 6
        ),
    }[kind]()
    read = RecordReader(source, lambda name: False)
    read(0, bytes)
    for folder in (root, tmp_path / "points"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()  # the mount point stays
    with pytest.raises(Outage, match="the folder is gone, or empty"):
        read(len(source) - 1, bytes)


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_joined_has_changed_where_either_has(image_folder, split):
    root = image_folder({"ant": 2})
    image_folder({"ant": 2}, "val")
    both = Joined(open_folder(str(root), "train"), open_folder(str(root), "val"))
    content_of(both)
    assert not has_changed(both)
    os.utime(root / split / "ant" / "000.png", (0, 0))
    assert has_changed(both)


def test_what_is_joined_is_other_content_where_one_of_it_is(image_folder):
    root = image_folder({"ant": 2})
    image_folder({"ant": 2}, "val")

    def content():
        return content_of(Joined(open_folder(str(root), "train"), open_folder(str(root), "val")))

    before = content()
    assert content() == before
    for split in ("train", "val"):
        os.utime(root / split / "ant" / "000.png", (0, 0))
        assert content() != before
        before = content()


def by_hand(pixels: np.ndarray, size: int) -> list[np.ndarray]:
    """The ten crops of an image that has been resized."""

    def five(pixels):
        height, width = pixels.shape[:2]
        top, left = round((height - size) / 2), round((width - size) / 2)
        centre = pixels[top : top + size, left : left + size]
        return [
            pixels[:size, :size], pixels[:size, -size:],
            pixels[-size:, :size], pixels[-size:, -size:], centre,
        ]  # fmt: skip

    # Mirrored first, as torchvision does: an odd margin is then on the other side.
    return five(pixels) + five(pixels[:, ::-1])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 45), (47, 32), (32, 200)])
def test_ten_crops_of_an_image_that_needs_no_resizing(height, width):
    source = Pictures([1, 0, 1], height, width)
    crops = TenCrops(source, 28, 32)
    assert len(crops) == 30
    for image in range(3):
        pixels = np.asarray(Image.open(io.BytesIO(source[image].image)))
        for place, expected in enumerate(by_hand(pixels, 28)):
            record = crops[10 * image + place]
            np.testing.assert_array_equal(record.image, expected)
            assert (record.label, record.name) == (
                source.own[image],
                f"picture {image}, crop {place}",
            )


@pytest.mark.parametrize(("height", "width"), [(20, 31), (90, 64), (61, 47), (3, 70)])
def test_crops_are_those_of_pillows_resized_image(height, width):
    source = Pictures([0], height, width)
    resized = tuple(32 * side // min(height, width) for side in (width, height))
    picture = Image.open(io.BytesIO(source[0].image)).resize(resized, Image.Resampling.BICUBIC)
    expected = by_hand(np.asarray(picture), 27)
    found = [record.image for record in records(TenCrops(source, 27, 32))]
    # A box is given to Pillow in single precision: a rare pixel is rounded the other way.
    difference = np.abs(np.stack(found).astype(int) - np.stack(expected))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_crops_as_a_source():
    source = Pictures([0, 1])
    ten = TenCrops(source, 24, 28)
    assert len({source.name, ten.name, TenCrops(source, 24, 27).name}) == 3
    copy = pickle.loads(pickle.dumps(ten))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(copy.__getitem__, [*range(20), *range(20)]))
    for record, expected in zip(found, 2 * records(ten), strict=True):
        np.testing.assert_array_equal(record.image, expected.image)
    for outside in (-1, 20):
        with pytest.raises(IndexError, match="outside"):
            ten[outside]
    with pytest.raises(DataError, match="short_side=20 is smaller than the crops' size=24"):
        TenCrops(source, 24, 20)


# -- image folders ---------------------------------------------------------------------------------


def with_test(
    root: Path, classes=("ant", "bee", "cat"), split: str = "test", each: int = 2
) -> Path:
    for seed, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for number in range(each):
            (root / split / name / f"{number}.png").write_bytes(png(900 + 10 * seed + number, 7, 8))
    return root


def test_a_folder_of_ones_own(image_folder):
    root = with_test(image_folder({"ant": 10, "bee": 10, "cat": 10}))
    data = open_dataset(f"folder:{root}")
    assert (data.classes, data.metric, data.task) == (3, "accuracy", "classification")
    assert [len(part) for part in (data.train, data.val, data.test)] == [27, 3, 6]
    assert [data.val[index].label for index in range(3)] == [0, 1, 2]
    before = images(data.val)
    moved = root.rename(root.with_name("moved"))
    assert images(open_dataset(f"folder:{moved}").val) == before


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_is_used_where_there_is_one(image_folder, name):
    root = with_test(with_test(image_folder({"ant": 4, "bee": 4, "cat": 4})), split=name, each=1)
    data = open_dataset(f"folder:{root}")
    assert [len(part) for part in (data.train, data.val, data.test)] == [12, 3, 6]
    assert data.val.name == str(root / name)


def test_a_dataset_with_a_builder_can_be_a_folder(image_folder, caplog):
    classes = {f"class {number}": 5 for number in range(10)}
    root = with_test(image_folder(classes), classes)
    with caplog.at_level(logging.WARNING):
        data = open_dataset("cifar10", path=str(root))
    assert (data.name, data.classes) == ("cifar10", 10)
    assert [len(part) for part in (data.train, data.val, data.test)] == [45, 5, 20]
    assert "the test part has 20 images; the published one has 10000" in caplog.text


def test_data_dir_holds_folders_by_the_datasets_name(image_folder):
    root = with_test(image_folder({"ant": 4, "bee": 4, "cat": 4}), split="val")
    root.rename(root.with_name("tiny_imagenet"))
    data = open_dataset("tiny_imagenet", data_dir=str(root.parent))
    assert (data.classes, len(data.test)) == (3, 6)
    assert "val" in data.test.name


def test_few_shot_needs_only_its_own_classes(tmp_path):
    classes = [f"class {number:02d}" for number in range(20)]
    data = open_dataset("fc100", path=str(with_test(tmp_path, classes)))
    assert (data.train, data.val, data.classes, len(data.test)) == (None, None, 20, 40)


WRONG_FOLDERS = {
    "no test": (lambda root: rename(root / "test", "tests"), ["no split 'test'", "'tests'?"]),
    "no train": (lambda root: rename(root / "train", "training"), ["no split 'train'"]),
    "an empty class": (lambda root: empty(root / "test" / "bee"), ["bee", "has no images"]),
    "no such class": (
        lambda root: rename(root / "train" / "cat", "cta"),
        ["train lacks 1 of the 3 classes", "the first is 'cat'", "'cta'?"],
    ),
    "a class too few in test": (
        lambda root: rename(root / "test" / "cat", ".cat"),
        ["test lacks 1 of the 3 classes of", "the first is 'cat'"],
    ),
    "one class": (
        lambda root: [
            rename(root / split / name, f".{name}")
            for split in ("train", "test")
            for name in ("ant", "bee")
        ],
        ["1 class;"],
    ),
    "nothing": (lambda root: rename(root, "elsewhere"), ["path=", "is not a folder"]),
}


def rename(path: Path, name: str):
    path.rename(path.with_name(name))


def empty(directory: Path):
    for file in directory.iterdir():
        file.unlink()


@pytest.mark.parametrize(("spoil", "said"), WRONG_FOLDERS.values(), ids=WRONG_FOLDERS)
def test_a_wrong_folder_is_reported_in_one_line(spoil, said, image_folder):
    root = with_test(image_folder({"ant": 3, "bee": 3, "cat": 3}))
    spoil(root)
    with pytest.raises(DataError) as caught:
        open_dataset(f"folder:{root}")
    assert_one_line(caught, [f"dataset 'folder:{root}'", *said])
    assert "data.path" not in str(caught.value)


def assert_one_line(caught, said):
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message


def test_wrong_names_and_places(image_folder, tmp_path):
    root = with_test(image_folder({"ant": 3, "bee": 3, "cat": 3}))
    wrong = {
        ("cifr10", "", ""): ["'cifr10' is unknown", "'cifar10'?", "sun397", "folder:"],
        ("folder:", "", ""): ["'folder:' names no folder", "folder:<path>"],
        (f"folder:{root}", str(tmp_path), ""): [f"leave path='{tmp_path}' out"],
        ("mit67", "", ""): ["'mit67' has no tfds builder", "path", "data_dir"],
        ("mit67", "", str(tmp_path)): [f"path='{tmp_path}/mit67' is not a folder"],
        ("mit67", str(root), ""): ["test has 3 classes; this dataset has 67"],
        ("dtd", str(root), ""): ["'dtd': path=", "no split 'val'"],
        ("imagenet100", str(root), ""): ["imagenet100", "no split 'val'"],
        ("pets", "", str(tmp_path)): [
            "'pets': tfds builder 'oxford_iiit_pet' is not prepared",
            "tfds build oxford_iiit_pet --file_format=array_record",
            "set data_dir to where it is",
        ],
        ("pets", "", "/no/such/folder"): ["data_dir='/no/such/folder' is not a folder"],
    }
    for (name, path, data_dir), said in wrong.items():
        with pytest.raises(DataError) as caught:
            open_dataset(name, path=path, data_dir=data_dir)
        assert_one_line(caught, said)


def test_one_image_cannot_be_cut(image_folder):
    root = with_test(image_folder({"ant": 1, "bee": 1}), ("ant", "bee"))
    assert len(open_dataset(f"folder:{root}").val) == 1
    source = open_dataset(f"folder:{root}").val
    with pytest.raises(DataError, match="has 1 image"):
        cut(source, 0.5, "mine/train")


# -- landmarks -------------------------------------------------------------------------------------


SIZES = {"b.png": (10, 30), "a.png": (40, 20), "c.png": (8, 8)}
"""File to (height, width)."""


def landmark_folder(root: Path, numbers: int, splits=("train", "test")) -> Path:
    """Each image's points are its corners and centre, over and over."""
    for split in splits:
        (root / split).mkdir(parents=True)
        rows = []
        for seed, (file, (height, width)) in enumerate(SIZES.items()):
            (root / split / file).write_bytes(png(seed, height, width))
            corners = [0, 0, width, height, width / 2, height / 2]
            rows.append([file, *np.resize(corners, numbers)])
        write_table(root / f"{split}.csv", [["file"], *rows])
    return root


def write_table(path: Path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def read_table(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_points_are_fractions_of_the_central_square(tmp_path):
    source = LandmarkFolder(str(landmark_folder(tmp_path, 6)), "test", 6)
    assert [Path(source[index].name).name for index in range(3)] == ["a.png", "b.png", "c.png"]
    assert images(source)[1] == png(0, *SIZES["b.png"])
    expected = [
        [0, -0.5, 1, 1.5, 0.5, 0.5],  # 40 high, 20 wide: the square begins 10 below the top
        [-1, 0, 2, 1, 0.5, 0.5],
        [0, 0, 1, 1, 0.5, 0.5],
    ]
    np.testing.assert_allclose(source.targets, expected, rtol=1e-6)
    assert source.targets.dtype == np.float32
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            source[outside]


@pytest.mark.parametrize("changed", ["test.csv", "test/a.png"])
def test_other_points_and_other_images_are_other_content(tmp_path, changed):
    root = landmark_folder(tmp_path, 6)
    source = LandmarkFolder(str(root), "test", 6)
    before = content_of(source)
    assert content_of(LandmarkFolder(str(root), "test", 6)) == before and not has_changed(source)
    os.utime(root / changed, (0, 0))
    assert content_of(source) == before and has_changed(source)
    assert content_of(LandmarkFolder(str(root), "test", 6)) != before


def sideways(form: str) -> bytes:
    """A camera held sideways stores 20 × 30 pixels and shows 30 × 20."""
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    form, where = form.split(" in ")
    options = {"exif": exif} if where == "EXIF" else {"xmp": xmp}
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, form, **options)
    stored = file.getvalue()
    if form == "PNG":  # Pillow writes it before the pixels; others after them
        found = stored.index(b"eXIf") - 4
        length = 12 + int.from_bytes(stored[found : found + 4])
        chunk, end = stored[found : found + length], stored[-12:]
        stored = stored[:found] + stored[found + length : -12] + chunk + end
    return stored


@pytest.mark.parametrize(
    "form", ["JPEG in EXIF", "JPEG in XMP", "PNG in EXIF", "WEBP in EXIF", "TIFF in EXIF"]
)
def test_points_follow_an_image_shown_upright(tmp_path, form):
    root = landmark_folder(tmp_path, 6)
    (root / "test" / "a.png").write_bytes(sideways(form))
    source = LandmarkFolder(str(root), "test", 6)
    assert decode(source[0].image, 64).shape == (30, 20, 3)
    np.testing.assert_allclose(source.targets[0][:2], [0, -5 / 20], rtol=1e-6)


def test_a_landmark_dataset_is_cut_with_its_targets(tmp_path):
    data = open_dataset("lsp", path=str(landmark_folder(tmp_path, 28)))
    assert (data.task, data.metric, data.classes) == ("regression", "r2", 0)
    assert [len(part) for part in (data.train, data.val, data.test)] == [2, 1, 3]
    whole = LandmarkFolder(str(tmp_path), "train", 28)
    of_image = dict(zip(images(whole), whole.targets.tolist(), strict=True))
    for part in (data.train, data.val):
        assert [of_image[image] for image in images(part)] == part.targets.tolist()


def test_landmarks_with_a_validation_folder(tmp_path):
    data = open_dataset("300w", path=str(landmark_folder(tmp_path, 136, ("train", "val", "test"))))
    assert data.val.targets.shape == (3, 136)


WRONG_TABLES = {
    "no line": (lambda rows: rows[:-1], ["no line below", "1 of the 3 images", "'c.png'"]),
    "no image": (lambda rows: [*rows, ["d.png", *rows[1][1:]]], ["lacks 1 of the 4", "'d.png'"]),
    "twice": (lambda rows: [*rows, rows[1]], ["more than one line for 'b.png'"]),
    "too few": (
        lambda rows: [rows[0], rows[1][:-1], *rows[2:]],
        ["27 numbers", "this dataset has 28"],
    ),
    "a word": (lambda rows: [rows[0], ["b.png", *["x"] * 28], *rows[2:]], ["'b.png'", "'x'"]),
    "NaN": (lambda rows: [rows[0], ["b.png", *["nan"] * 28], *rows[2:]], ["'b.png'", "not finite"]),
}


@pytest.mark.parametrize(("spoil", "said"), WRONG_TABLES.values(), ids=WRONG_TABLES)
def test_a_wrong_table_is_reported_in_one_line(spoil, said, tmp_path):
    root = landmark_folder(tmp_path, 28)
    write_table(root / "train.csv", spoil(read_table(root / "train.csv")))
    with pytest.raises(DataError) as caught:
        open_dataset("lsp", path=str(root))
    assert_one_line(caught, ["dataset 'lsp'", "train.csv", *said])


def test_other_wrong_landmark_folders(tmp_path, monkeypatch):
    def said_of(root) -> str:
        with pytest.raises(DataError) as caught:
            open_dataset("lsp", path=str(root))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "path='/no/such' is not a folder" in said_of("/no/such")
    root = landmark_folder(tmp_path, 28, ("train",))
    assert "no split 'test'" in said_of(root)
    landmark_folder(tmp_path, 28, ("test",))
    table = root / "train.csv"
    whole = table.read_text()
    table.write_text(whole.split("\n", 1)[1])  # its first line of an image is now the heading
    said = said_of(root)
    assert "no line below its heading for 1 of the 3 images" in said and said.endswith("png'")
    table.write_text(whole)
    (root / "train" / "b.png").write_bytes(b"torn")
    assert "b.png' cannot be read as an image" in said_of(root)
    (root / "train" / "b.png").write_bytes(b"P6 1 x1 255 ")  # a number that Pillow cannot parse
    assert "b.png' cannot be read as an image" in said_of(root)
    with monkeypatch.context() as patched:
        patched.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        assert ".png' cannot be read as an image: Image size" in said_of(root)
    (root / "train.csv").unlink()
    assert "train.csv' cannot be read" in said_of(root)
    empty(root / "train")
    assert "has no images" in said_of(root)
