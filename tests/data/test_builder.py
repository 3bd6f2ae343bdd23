"""Reading tfds builders: tiny ones are generated as array_record, without TensorFlow."""

import io
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from cassle_jax.data import (
    DamagedLog,
    DataError,
    decode,
    evaluation_batches,
    kept_numbers,
    open_source,
    training_batches,
)
from cassle_jax.data import builder as builder_module
from cassle_jax.data.decode import DamagedImage
from cassle_jax.data.feature_paths import image_path, label_path
from cassle_jax.data.reading import RecordReader, UnreadableRecord
from cassle_jax.data.sources import DAMAGED, content_of, has_changed, labels_of, names_of
from cassle_jax.data.splits import Part
from cassle_jax.faults import Outage

KINDS = ("ant", "bee", "cat", "dog")
TWO = {
    "c": {"right": tfds.features.Image(), "left": tfds.features.Image()},
    "d": tfds.features.Image(),
}
TRAIN, UNLABELLED, TEST = 30, 6, 8


def example(split: str, number: int, image_bytes, seed: int = 0):
    label = -1 if split == "unlabelled" else (number + seed) % len(KINDS)
    seed += {"train": 0, "unlabelled": 100, "test": 200}[split] + number
    return image_bytes(seed, 9 + seed % 5, 8 + seed % 7), label


def build_animals(root, image_bytes, seed=0):
    """Prepares the builder `tiny_animals`; keys of its features are not the usual ones."""

    # A module without a file: tfds then looks for no download checksums beside the code.
    class TinyAnimals(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "generated"
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            features = {
                "id": tfds.features.Text(),
                "outline": tfds.features.Image(shape=(None, None, 1)),
                "photo": {"pixels": tfds.features.Image(shape=(None, None, 3))},
                "kind": tfds.features.ClassLabel(names=KINDS),
                "details": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 1))),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            counts = {"train": TRAIN, "unlabelled": UNLABELLED, "test": TEST}
            return {name: self._generate_examples(name, n) for name, n in counts.items()}

        def _generate_examples(self, split, count):
            for number in range(count):
                data, label = example(split, number, image_bytes, seed)
                yield (
                    number,
                    {
                        "id": f"{split} {number}",
                        "outline": io.BytesIO(b"never decoded"),
                        "photo": {"pixels": io.BytesIO(data)},
                        "kind": label,
                        "details": [io.BytesIO(b"never decoded")],
                    },
                )

    TinyAnimals(data_dir=root, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, image_bytes):
    """A tfds data_dir with two builders."""

    class TinyNumbers(tfds.core.GeneratorBasedBuilder):
        __module__ = "generated"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"value": tfds.features.Scalar(np.int64)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"value": 1}

    root = tmp_path_factory.mktemp("tfds")
    build_animals(root, image_bytes)
    TinyNumbers(data_dir=root, file_format="array_record").download_and_prepare()
    return root


@pytest.fixture
def tiny(data_dir, settings, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(**changed):
        return settings(
            **{"source": "tfds", "name": "tiny_animals", "path": str(data_dir), **changed}
        )

    return make


def stored(split, count, image_bytes) -> dict[bytes, int]:
    """Encoded image to label, of one split."""
    return dict(example(split, number, image_bytes) for number in range(count))


def test_records_are_what_was_written(tiny, image_bytes):
    source = open_source(tiny(), "train")
    assert source.class_names == KINDS
    assert len(source) == TRAIN
    records = [source[i] for i in range(TRAIN)]
    assert {r.image: r.label for r in records} == stored("train", TRAIN, image_bytes)
    assert len({r.name for r in records}) == TRAIN
    assert all("tiny_animals" in r.name for r in records)
    for outside in (-1, TRAIN):
        with pytest.raises(IndexError):
            source[outside]


def test_splits_are_tfds_expressions(tiny, image_bytes):
    whole = [open_source(tiny(), "train")[i].image for i in range(TRAIN)]
    part = open_source(tiny(), "train[20%:]")
    assert [part[i].image for i in range(len(part))] == whole[6:]
    both = open_source(tiny(), "train+unlabelled")
    assert [both[i].image for i in range(TRAIN)] == whole
    rest = {both[i].image: both[i].label for i in range(TRAIN, len(both))}
    assert rest == stored("unlabelled", UNLABELLED, image_bytes)
    assert set(rest.values()) == {-1}


def test_threads_and_pickling(tiny):
    source = open_source(tiny(), "train")
    alone = [source[i] for i in range(TRAIN)]
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.__getitem__, list(range(TRAIN)) * 5)) == alone * 5


def test_class_subset_has_the_lists_labels(tiny, image_bytes, tmp_path):
    listed = tmp_path / "classes.txt"
    listed.write_text("dog\nant\n")
    source = open_source(tiny(classes=str(listed)), "train+unlabelled")
    assert source.class_names == ("dog", "ant")
    expected = {
        image: {3: 0, 0: 1}[label]
        for image, label in stored("train", TRAIN, image_bytes).items()
        if label in (0, 3)
    }
    records = [source[i] for i in range(len(source))]
    assert {r.image: r.label for r in records} == expected
    assert pickle.loads(pickle.dumps(source))[3] == source[3]


def test_as_many_images_of_other_classes_are_other_images(tiny, tmp_path):
    def names_under(listed):
        (tmp_path / "classes.txt").write_text(listed)
        source = open_source(tiny(classes=str(tmp_path / "classes.txt")), "train")
        return len(source), names_of(source)

    cats, dogs = names_under("cat\n"), names_under("dog\n")
    assert cats[0] == dogs[0] and cats[1] != dogs[1]  # a continued run refuses them by name
    assert names_under("cat\n") == cats


def test_labels_are_scanned_once(tiny, tmp_path, monkeypatch):
    listed = tmp_path / "classes.txt"
    listed.write_text("bee\n")
    config = tiny(classes=str(listed))
    first = open_source(config, "train")
    (cached,) = kept_numbers.label_cache_folder().iterdir()
    assert "tiny_animals-1.2.0-train" in cached.name

    def scan(*_):
        raise AssertionError("scanned again")

    with monkeypatch.context() as patched:
        patched.setattr(builder_module.TfdsSource, "_scan", scan)
        second = open_source(config, "train")
        assert [second[i] for i in range(len(second))] == [first[i] for i in range(len(first))]
        with pytest.raises(AssertionError, match="scanned again"):
            open_source(config, "train[:50%]")

    whole = cached.read_bytes()
    unwritten = whole[: len(whole) * 3 // 4].ljust(len(whole), b"\0")  # as after a power cut
    empty_zip = b"PK\x05\x06" + bytes(18)
    for content in (b"torn by a kill", b"", unwritten, empty_zip):
        cached.write_bytes(content)
        assert len(open_source(config, "train")) == len(first)
    cached.unlink()
    os.mkfifo(cached)
    assert len(open_source(config, "train")) == len(first)
    assert cached.is_file()


def test_a_builder_rebuilt_in_place_is_read_anew(tiny, tmp_path, image_bytes):
    listed = tmp_path / "classes.txt"
    listed.write_text("bee\n")
    root = tmp_path / "tfds"

    def opened(seed):
        shutil.rmtree(root, ignore_errors=True)
        build_animals(root, image_bytes, seed)
        whole = open_source(tiny(path=str(root)), "train")
        labels = [whole[index].label for index in range(TRAIN)]
        assert labels_of(whole).tolist() == labels
        bees = open_source(tiny(path=str(root), classes=str(listed)), "train")
        assert [bees[index].label for index in range(len(bees))] == [0] * labels.count(1)
        return whole.name, len(whole), content_of(whole)

    (*before, its_content), (*after, other_content) = opened(0), opened(1)
    assert before == after and its_content != other_content
    opened_before = open_source(tiny(path=str(root)), "train")
    assert not has_changed(opened_before)
    opened(2)
    assert has_changed(opened_before)
    (kept,) = kept_numbers.label_cache_folder().iterdir()  # what nobody can read has gone
    assert "tiny_animals-1.2.0-train" in kept.name


def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tiny, tmp_path, image_bytes):
    root = tmp_path / "tfds"
    build_animals(root, image_bytes)
    file = next(root.rglob("*-train.*"))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError, match="a pipe or a device"):
        open_source(tiny(path=str(root)), "train")


def test_labels_read_while_a_builder_is_rebuilt_are_not_those_of_the_new_one(
    tiny, tmp_path, image_bytes
):
    listed = tmp_path / "classes.txt"
    listed.write_text("bee\n")
    root = tmp_path / "tfds"
    build_animals(root, image_bytes, 0)
    before = open_source(tiny(path=str(root)), "train")
    assert before[0].image  # its file is open, and stays the former one
    shutil.rmtree(root)
    build_animals(root, image_bytes, 1)
    assert len(labels_of(before)) == TRAIN
    after = open_source(tiny(path=str(root)), "train")
    expected = [after[index].label for index in range(TRAIN)]
    assert labels_of(after).tolist() == expected != labels_of(before).tolist()
    bees = open_source(tiny(path=str(root), classes=str(listed)), "train")
    assert len(bees) == expected.count(1)


def test_labels_are_those_of_the_records(tiny, tmp_path):
    listed = tmp_path / "classes.txt"
    listed.write_text("dog\nant\n")
    for classes in ("", str(listed)):
        source = open_source(tiny(classes=classes), "train+unlabelled")
        expected = [source[index].label for index in range(len(source))]
        assert labels_of(source).tolist() == expected
        assert labels_of(pickle.loads(pickle.dumps(source))).tolist() == expected


def test_labels_are_read_around_corrupt_records_and_not_kept(tiny, monkeypatch):
    source = open_source(tiny(), "train")
    expected = [source[index].label for index in range(TRAIN)]
    stored = source._records.data_source
    read = type(stored).__getitems__

    def torn(self, places):
        if 3 in places:
            raise RuntimeError("data loss")
        return read(self, places)

    with monkeypatch.context() as patched:
        patched.setattr(type(stored), "__getitems__", torn)
        assert labels_of(source).tolist() == [*expected[:3], DAMAGED, *expected[4:]]
    assert labels_of(open_source(tiny(), "train")).tolist() == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [(["data loss\nin chunk 3"], "data loss"), ([], "RuntimeError")],
)
def test_a_corrupt_record_is_a_damaged_image(tiny, monkeypatch, words, said):
    source = open_source(tiny(), "train")

    def torn(self, place):
        raise RuntimeError(*words)

    monkeypatch.setattr(type(source._records.data_source), "__getitem__", torn)
    with pytest.raises(DamagedImage, match=rf"^the record is corrupt: {said}$"):
        source[3]


def test_what_cannot_be_read_is_named_by_its_place_among_all_records(tiny, tmp_path, monkeypatch):
    (tmp_path / "some.txt").write_text("bee\ndog\n")
    kept = open_source(tiny(classes=str(tmp_path / "some.txt")), "train")
    source = Part(kept, np.array([3, 5]), "some")
    name, reasons = source[1].name, ["data loss", "pread() failed: Input/output error; reading"]

    def torn(self, place):
        raise RuntimeError(reasons.pop())

    monkeypatch.setattr(type(kept._records.data_source), "__getitem__", torn)
    read = RecordReader(source, lambda name: True)  # which does not wait for it
    while reasons:
        with pytest.raises(UnreadableRecord) as caught:
            read(1, bytes)
        assert caught.value.name == name


def test_a_folder_that_vanishes_is_an_outage(tiny, data_dir, tmp_path, monkeypatch):
    shutil.copytree(data_dir, tmp_path / "tfds")
    source = open_source(tiny(path=str(tmp_path / "tfds")), "train")
    shutil.rmtree(tmp_path / "tfds")
    monkeypatch.setenv("CASSLE_STORAGE_SECONDS", "0.1")
    with pytest.raises(Outage, match="the folder is gone, or empty, for"):
        RecordReader(source, lambda name: False)(0, bytes)


def test_a_file_of_records_that_cannot_be_opened_for_now_is_no_damaged_record(tiny, monkeypatch):
    source = open_source(tiny(), "train")
    kind = type(source._records.data_source)
    read = kind.__getitem__

    def closed(self, place):
        if place == 3:
            raise RuntimeError("open() failed: Input/output error; opening records")
        return read(self, place)

    monkeypatch.setattr(kind, "__getitem__", closed)
    monkeypatch.setenv("CASSLE_STORAGE_SECONDS", "0.1")
    with pytest.raises(Outage, match="Input/output error, for"):
        RecordReader(source, lambda name: False)(3, bytes)


def test_readers_that_failed_while_storage_was_out_of_reach_are_opened_anew(tiny, monkeypatch):
    """One that failed once fails again, also once storage is back."""
    expected = labels_of(open_source(tiny(), "train")).tolist()
    monkeypatch.setattr(builder_module, "kept_numbers", lambda scan, *_: np.vstack([*scan()]))
    source = open_source(tiny(), "train")
    stored, kind = source._records.data_source, type(source._records.data_source)
    failed, reads = (
        [stored],
        {name: getattr(kind, name) for name in ("__getitem__", "__getitems__")},
    )

    def failing(name):
        def read(self, place):
            if any(self is each for each in failed):
                raise RuntimeError("pread() failed: Input/output error; reading records")
            return reads[name](self, place)

        return read

    for name in reads:
        monkeypatch.setattr(kind, name, failing(name))
    with pytest.raises(OSError, match="Input/output error"):
        source[3]
    assert source[3].label == expected[3]
    failed.append(source._records.data_source)
    with pytest.raises(OSError, match="Input/output error"):
        labels_of(source)
    assert labels_of(source).tolist() == expected


def test_a_long_scan_says_how_far_it_is(tiny, monkeypatch, caplog):
    clock = itertools.count(0, 31)
    monkeypatch.setattr(kept_numbers, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(builder_module, "_SCAN_CHUNK", 20)
    with caplog.at_level("INFO", logger="cassle_jax"):
        labels_of(open_source(tiny(), "train"))
    said = [each for each in caplog.messages if "labels read" in each]
    assert said == ["20 of 30 labels read", "30 of 30 labels read"]


@pytest.fixture
def unlabelled(data_dir, tmp_path):
    """The same builder, as if its records had no class."""
    shutil.copytree(data_dir / "tiny_animals", tmp_path / "bare" / "tiny_animals")
    file = tmp_path / "bare" / "tiny_animals" / "1.2.0" / "features.json"
    features = json.loads(file.read_text())
    del features["featuresDict"]["features"]["kind"]
    file.write_text(json.dumps(features))
    return tmp_path / "bare"


def test_records_without_a_class_have_no_label(tiny, unlabelled, tmp_path):
    source = open_source(tiny(path=str(unlabelled)), "train")
    assert source.class_names == () and source[0].label == -1
    assert labels_of(source).tolist() == [-1] * TRAIN
    listed = tmp_path / "classes.txt"
    listed.write_text("bee\n")
    with pytest.raises(DataError, match=r"data\.classes='.*' needs labels, and .* has none"):
        open_source(tiny(path=str(unlabelled), classes=str(listed)), "train")
    with pytest.raises(DataError, match=r"data\.classes leaves no image of .* unlabelled"):
        open_source(tiny(classes=str(listed)), "unlabelled")


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize("content", ["", "{", "null", '{"pythonClassName": 3}'])
def test_a_builder_whose_description_is_damaged_is_one_line(tiny, unlabelled, file, content):
    (unlabelled / "tiny_animals" / "1.2.0" / file).write_text(content)
    with pytest.raises(DataError, match=r"^data\.name='tiny_animals' cannot be opened: ") as caught:
        open_source(tiny(path=str(unlabelled)), "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "found"),
    [("ant\nbee\ncat\n", 3), ("ant\nbee\ncat\ncat\n", 3), ("a\nb\nc\nd\ne\n", 5)],
)
def test_a_builder_whose_names_of_classes_are_damaged_is_refused(tiny, tmp_path, names, found):
    shutil.copytree(tiny().path, tmp_path / "copy")
    (tmp_path / "copy" / "tiny_animals" / "1.2.0" / "kind.labels.txt").write_text(names)
    with pytest.raises(
        DataError, match=rf"has 4 classes, and .* kind\.labels\.txt names {found}; r"
    ):
        open_source(tiny(path=str(tmp_path / "copy")), "train")


def test_an_unwritable_cache_only_costs_time(tiny, tmp_path, monkeypatch):
    (tmp_path / "blocked").write_text("a file where the cache folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    listed = tmp_path / "classes.txt"
    listed.write_text("bee\n")
    assert len(open_source(tiny(classes=str(listed)), "test")) == 2


def test_batches_of_a_builder(tiny):
    source = open_source(tiny(), "train")
    damaged = DamagedLog(len(source), 0.0)
    batch = next(training_batches(source, batch=8, canvas=16, seed=1, damaged=damaged, threads=2))
    for row, index in enumerate(batch["index"]):
        height, width = batch["size"][row]
        record = source[int(index)]
        np.testing.assert_array_equal(
            batch["image"][row, :height, :width], decode(record.image, 16)
        )
        assert batch["label"][row] == record.label


@pytest.mark.exhaustive
def test_no_tensorflow_at_run_time(tiny, tmp_path):
    """In a process of its own, where the builder's code does not exist: files alone must do."""
    listed = tmp_path / "classes.txt"
    listed.write_text("dog\nant\n")
    script = f"""
import sys
from types import SimpleNamespace
from cassle_jax.data import DamagedLog, evaluation_batches, open_source
config = SimpleNamespace(source="tfds", name="tiny_animals", path={tiny().path!r},
                         classes={str(listed)!r}, canvas=16, scenes=0, max_pixels=1000)
source = open_source(config, "train")
batches = evaluation_batches(source, batch=4, canvas=16, damaged=DamagedLog(len(source), 0.0))
print(sum(int(batch["mask"].sum()) for batch in batches))
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "15"


@pytest.fixture
def as_tfrecord(data_dir, tmp_path):
    """The same builder, as if it had been prepared in tfds' default format."""
    copy = tmp_path / "tfrecord"
    shutil.copytree(data_dir / "tiny_animals", copy / "tiny_animals")
    info = copy / "tiny_animals" / "1.2.0" / "dataset_info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "fileFormat": "tfrecord"}))
    return copy


WRONG = {
    "misspelt": ({"name": "cifr10"}, "train", ["'cifr10'", "did you mean 'cifar10'"]),
    "misspelt, only on disk": ({"name": "tiny_animal"}, "train", ["did you mean 'tiny_animals'"]),
    "not prepared": (
        {"name": "cifar10"},
        "train",
        ["tfds build cifar10 --file_format=array_record --data_dir="],
    ),
    "config not prepared": (
        {"name": "imagenet_resized/64x64"},
        "train",
        ["tfds build imagenet_resized/64x64 --file_format=array_record"],
    ),
    "wrong version": ({"name": "tiny_animals:9.9.9"}, "train", ["9.9.9", "not prepared"]),
    "wrong split": ({}, "tran", ["'tran'", "did you mean 'train'", "test", "unlabelled"]),
    "empty slice": ({}, "train[3:1]", ["no split 'train[3:1]'", "(it is empty)", "there:"]),
    "bad slice": ({}, "train[:ten]", ["'train[:ten]'", "there:"]),
    "no image": (
        {"name": "tiny_numbers"},
        "train",
        ["no Image among", "value (Scalar)"],
    ),
    "no folder": ({"path": "/no/such/folder"}, "train", ["data.path='/no/such/folder'"]),
    "unknown classes": ({"classes": "imagenet100"}, "train", ["100 of its 100", "ant, bee"]),
}


@pytest.mark.parametrize(("changed", "split", "said"), WRONG.values(), ids=WRONG)
def test_wrong_settings_say_what_would_work(tiny, changed, split, said):
    with pytest.raises(DataError) as caught:
        open_source(tiny(**changed), split)
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message


@pytest.mark.parametrize("step", [1, -1])
def test_image_and_label_do_not_depend_on_the_order_of_features(step):
    """tfds reads features in another order in every process."""
    features = tfds.features.FeaturesDict(
        {
            name: tfds.features.ClassLabel(names=KINDS) if name[0] in "ab" else TWO[name[0]]
            for name in ("b", "a", "d", "c")[::step]
        }
    )
    assert label_path(features) == ("a",)
    assert image_path(features) == ("c", "left")


def test_a_path_that_is_not_utf8_is_refused(tiny, data_dir, tmp_path):
    path = tmp_path / os.fsdecode(b"\xff")
    path.symlink_to(data_dir)
    with pytest.raises(DataError, match="bytes that are not UTF-8"):
        open_source(tiny(path=str(path)), "train")


@pytest.mark.parametrize("inside", ["tiny_animals", "tiny_animals/1.2.0"])
def test_a_path_into_the_builder_is_led_back_to_the_folder_above(tiny, data_dir, inside):
    with pytest.raises(DataError, match=rf"/{inside}' is a folder of .* itself; give {data_dir}$"):
        open_source(tiny(path=str(data_dir / inside)), "train")


def test_a_folder_of_the_builders_name_without_its_files_is_none_of_it(tiny, tmp_path):
    (tmp_path / "tiny_animals").mkdir()
    with pytest.raises(DataError, match="'tiny_animals' is not a tfds builder"):
        open_source(tiny(path=str(tmp_path / "tiny_animals")), "train")


def test_tfrecord_is_refused_with_the_command_that_converts_it(tiny, as_tfrecord):
    with pytest.raises(DataError, match=r"prepared as tfrecord.*--out_file_format=array_record"):
        open_source(tiny(path=str(as_tfrecord)), "train")


def test_masks_follow_the_end_of_a_split(tiny):
    source = open_source(tiny(), "test")
    batches = list(
        evaluation_batches(source, batch=5, canvas=16, damaged=DamagedLog(len(source), 0.0))
    )
    assert [batch["mask"].tolist() for batch in batches] == [[True] * 5, [True] * 3 + [False] * 2]
