"""Opening sources: image folders, class lists, and what a user reads when a setting is wrong."""

import io
import os
import pickle
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cassle_jax.data import DataError, Scenes, Source, open_source
from cassle_jax.data.sources import labels_of, read_class_list


def test_folder_is_ordered_by_class_and_file_name(image_folder, settings, monkeypatch):
    root = image_folder({"cat": 3, "ant": 2, "Zebra": 2})
    expected = [
        ("Zebra", "000.png"),
        ("Zebra", "001.png"),
        ("ant", "000.png"),
        ("ant", "001.png"),
        ("cat", "000.png"),
        ("cat", "001.png"),
        ("cat", "002.png"),
    ]
    config = settings(source="folder", path=str(root))
    source = open_source(config, "train")
    assert isinstance(source, Source)
    assert source.class_names == ("Zebra", "ant", "cat")
    records = [source[i] for i in range(len(source))]
    assert [Path(r.name).parts[-2:] for r in records] == expected
    assert [r.label for r in records] == [0, 0, 1, 1, 2, 2, 2]
    for record in records:
        assert record.image == Path(record.name).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", lambda *_: pytest.fail("read for its label"))
        assert labels_of(source).tolist() == [0, 0, 1, 1, 2, 2, 2]

    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            self.entries = list(scandir(path))[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(os, "scandir", Reversed)
    backwards = open_source(config, "train")
    assert [backwards[i].name for i in range(7)] == [r.name for r in records]


def test_folder_ignores_what_is_hidden_or_no_file(image_folder, settings):
    root = image_folder({"a": 2, "b": 1})
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "README.md").write_text("not a class")
    (root / "train" / "a" / ".DS_Store").write_text("hidden")
    (root / "train" / "a" / "folder").mkdir()
    (root / "train" / "a" / "an image.JPG").write_bytes(b"an extension of any case counts")
    (root / "train" / "a" / "no image.txt").write_bytes(b"but it must be one of an image")
    (root / "train" / "b" / "link.png").symlink_to(root / "train" / "a" / "000.png")
    source = open_source(settings(source="folder", path=str(root)), "train")
    assert source.class_names == ("a", "b")
    assert [source[i].name.rsplit("/", 1)[1] for i in range(len(source))] == [
        "000.png",
        "001.png",
        "an image.JPG",
        "000.png",
        "link.png",
    ]


def test_folder_keeps_names_that_are_not_unicode(image_folder, settings):
    root = image_folder({"a": 1})
    (root / "train" / "a" / os.fsdecode(b"\xff\n.png")).write_bytes(b"odd")
    source = open_source(settings(source="folder", path=str(root)), "train")
    assert source[1].image == b"odd"


def test_folder_serves_threads_and_survives_pickling(image_folder, settings):
    source = open_source(
        settings(source="folder", path=str(image_folder({"a": 9, "b": 5}))), "train"
    )
    alone = [source[i] for i in range(14)]
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.__getitem__, list(range(14)) * 5)) == alone * 5


def test_index_outside_the_source(image_folder, settings):
    for source in (
        open_source(settings(source="folder", path=str(image_folder({"a": 2}))), "train"),
        Scenes(2),
    ):
        for index in (-1, 2):
            with pytest.raises(IndexError):
                source[index]


def test_the_classes_that_are_held_out_are_not_pretrained_on():
    seen, held_out = read_class_list("tiny_imagenet80"), read_class_list("tiny_imagenet20")
    assert (len(set(seen)), len(set(held_out)), len({*seen, *held_out})) == (80, 20, 100)
    assert all(re.fullmatch(r"n\d{8}", name) for name in (*seen, *held_out))


def test_a_list_on_a_store_whose_package_is_missing_is_one_line(monkeypatch):
    def missing(_):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("cassle_jax.data.sources.read_whole", missing)
    with pytest.raises(DataError, match=r"'gs://b/list' cannot be read \(Please install gcsfs"):
        read_class_list("gs://b/list")


def test_a_device_is_no_list_of_classes():
    with pytest.raises(DataError, match=r"data\.classes='/dev/zero' cannot be read .*a device"):
        read_class_list("/dev/zero")


def test_imagenet100_is_a_subset_in_label_order(tmp_path, settings):
    wnids = read_class_list("imagenet100")
    assert len(wnids) == len(set(wnids)) == 100
    assert wnids[:3] == ("n02869837", "n01749939", "n02488291")
    for number, name in enumerate(["n00000001", *wnids]):
        directory = tmp_path / "train" / name
        directory.mkdir(parents=True)
        Image.new("RGB", (3, 2), (number, 0, 0)).save(directory / "x.png")
    source = open_source(
        settings(source="folder", path=str(tmp_path), classes="imagenet100"), "train"
    )
    assert source.class_names == wnids
    assert len(source) == 100
    for label in (0, 41, 99):
        record = source[label]
        assert record.label == label
        pixel = np.asarray(Image.open(io.BytesIO(record.image)))[0, 0, 0]
        assert pixel == label + 1


def test_class_list_from_a_file(image_folder, settings, tmp_path):
    listed = tmp_path / "classes.txt"
    listed.write_text("c\n\n a \n", encoding="utf-8-sig")
    root = image_folder({"a": 1, "b": 2, "c": 2})
    source = open_source(settings(source="folder", path=str(root), classes=str(listed)), "train")
    assert source.class_names == ("c", "a")
    assert [source[i].label for i in range(len(source))] == [0, 0, 1]


def test_a_list_of_as_many_classes_as_imagenet_21k_is_read_at_once(tmp_path):
    names = tuple(f"n{number:08}" for number in range(21_841))
    (tmp_path / "classes.txt").write_text("\n".join(names))
    start = time.perf_counter()
    assert read_class_list(str(tmp_path / "classes.txt")) == names
    assert time.perf_counter() - start < 2  # seconds; comparing each with each takes 8


def test_scenes_of_a_config(settings):
    train = open_source(settings(scenes=50, canvas=48), "train")
    test = open_source(settings(scenes=50, canvas=48), "test")
    assert (len(train), len(test)) == (50, 10)
    assert train[0].image.shape == (48, 48, 3)


WRONG = {
    "unknown source": ({"source": "foldr"}, "train", ["data.source='foldr'", "'folder'", "tfds"]),
    "no path": ({"source": "folder"}, "train", ["data.path=''", "<split>/<class>/<file>"]),
    "missing root": ({"source": "folder", "path": "{root}/no"}, "train", ["data.path=", "/no'"]),
    "missing split": (
        {"source": "folder", "path": "{root}"},
        "trian",
        ["'trian'", "there: train, val"],
    ),
    "no classes": (
        {"source": "folder", "path": "{root}"},
        "val",
        ["'val'", "<split>/<class>/<file>"],
    ),
    "missing list": (
        {"source": "folder", "path": "{root}", "classes": "imagenet10"},
        "train",
        ["data.classes='imagenet10'", "imagenet100"],
    ),
    "unknown class": (
        {"source": "folder", "path": "{root}", "classes": "{root}/typo.txt"},
        "train",
        ["data.classes=", "'tabby'", "did you mean 'tabby_cat'", "1 of its 2"],
    ),
    "repeated class": (
        {"source": "folder", "path": "{root}", "classes": "{root}/twice.txt"},
        "train",
        ["'dog'", "more than once"],
    ),
    "empty list": (
        {"source": "folder", "path": "{root}", "classes": "{root}/none.txt"},
        "train",
        ["names no class"],
    ),
    "no scenes": ({"scenes": 0}, "train", ["data.scenes=0"]),
    "scenes beyond number": ({"scenes": 2**70}, "train", [f"data.scenes={2**70}", "below 2**31"]),
    "small scenes": ({"canvas": 4}, "train", ["data.canvas=4"]),
    "split of scenes": ({}, "training", ["'training'", "train, validation, test"]),
    "classes of scenes": ({"classes": "imagenet100"}, "train", ["data.classes='imagenet100'"]),
    "no builder": ({"source": "tfds"}, "train", ["data.name=''", "cifar10"]),
}


@pytest.mark.parametrize(("changed", "split", "said"), WRONG.values(), ids=WRONG)
def test_wrong_settings_say_what_would_work(image_folder, settings, changed, split, said):
    root = image_folder({"tabby_cat": 1, "dog": 1})
    (root / "val").mkdir()
    (root / "typo.txt").write_text("dog\ntabby\n")
    (root / "twice.txt").write_text("dog\ndog\n")
    (root / "none.txt").write_text("\n")
    filled = {k: v.format(root=root) if isinstance(v, str) else v for k, v in changed.items()}
    with pytest.raises(DataError) as caught:
        open_source(settings(**filled), split)
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message


def test_empty_class_is_named(image_folder, settings):
    root = image_folder({"a": 1})
    (root / "train" / "empty" / "images").mkdir(parents=True)
    with pytest.raises(DataError, match=r"empty.*has no images.*remove it"):
        open_source(settings(source="folder", path=str(root)), "train")


@pytest.mark.exhaustive
def test_only_tfds_users_import_tfds(image_folder, settings):
    script = (
        "import sys, cassle_jax.data; "
        "assert 'tensorflow_datasets' not in sys.modules and 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
