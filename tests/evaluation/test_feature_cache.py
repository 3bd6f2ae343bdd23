"""Features on disk: which are read again, and which go when the folder is full."""

import contextlib
import errno
import os
import time
from contextlib import closing

import jax
import numpy as np
import pytest
from PIL import Image

from cassle_jax.data import DataError, Motifs
from cassle_jax.data.folder import FolderSource, open_folder
from cassle_jax.data.splits import Part
from cassle_jax.evaluation import feature_cache, store
from cassle_jax.evaluation.feature_cache import FeatureCache
from cassle_jax.evaluation.store import FeatureStore
from tests.evaluation.analysed import devices
from tests.evaluation.taught import colour_subject

SUBJECT = "0123456789abcdef"
ARRAYS = {"features": np.ones(1000, np.float32), "labels": np.zeros(3, np.int32)}
KIB = 2.0**-20  # GiB


def key(number):
    return f"{number:016x}"


def aged(path, hours):
    os.utime(path, (time.time() - 3600 * hours,) * 2)


def test_what_was_read_longest_ago_goes_first(tmp_path):
    cache = FeatureCache(tmp_path, 10 * KIB)  # room for two
    others = [tmp_path / SUBJECT / "mine.npz", tmp_path / "photos" / f"{key(0)}.npz"]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(bytes(20000))
    for number in range(2):
        cache.write(SUBJECT, key(number), ARRAYS)
        aged(tmp_path / SUBJECT / f"{key(number)}.npz", hours=5 - number)
    read = cache.read(SUBJECT, key(0))
    np.testing.assert_array_equal(read["features"], ARRAYS["features"])
    cache.write("f" * 16, key(2), ARRAYS)
    assert cache.read(SUBJECT, key(1)) is None
    assert cache.read(SUBJECT, key(0)) and cache.read("f" * 16, key(2))
    assert all(other.exists() for other in others)
    FeatureCache(tmp_path, 1 * KIB).write(SUBJECT, key(3), ARRAYS)
    assert cache.read(SUBJECT, key(3)) is None  # what fits nowhere pushes nothing out
    assert cache.read(SUBJECT, key(0))


def test_times_of_a_clock_that_was_ahead_keep_no_file_for_ever_and_cost_no_new_one(tmp_path):
    cache = FeatureCache(tmp_path, 10 * KIB)  # room for two
    for number in range(2):
        cache.write(SUBJECT, key(number), ARRAYS)
        aged(tmp_path / SUBJECT / f"{key(number)}.npz", hours=-9000 - number)
    for number in range(2, 5):
        cache.write(SUBJECT, key(number), ARRAYS)
        assert cache.read(SUBJECT, key(number))
        time.sleep(0.02)  # times of files may be as coarse as a tick of the kernel
    assert [number for number in range(5) if cache.read(SUBJECT, key(number))] == [3, 4]


def test_a_file_of_another_user_counts_and_goes_whatever_its_time(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    cache = FeatureCache(tmp_path, 10 * KIB)  # room for two
    for number in range(2):
        cache.write(SUBJECT, key(number), ARRAYS)
        aged(tmp_path / SUBJECT / f"{key(number)}.npz", hours=-9000)
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refused)
        cache.write(SUBJECT, key(2), ARRAYS)
    kept = [path.stem for path in (tmp_path / SUBJECT).glob("*.npz")]
    assert key(2) in kept and len(kept) == 2


def test_nothing_half_written_stays(tmp_path, monkeypatch, caplog):
    cache = FeatureCache(tmp_path)
    dead = tmp_path / SUBJECT / f"{key(9)}.npz.0a1b2c3d.partial"
    alive = tmp_path / SUBJECT / f"{key(8)}.npz.0a1b2c3d.partial"
    dead.parent.mkdir()
    for path in (dead, alive):
        path.write_bytes(b"half")
    aged(dead, hours=2)

    def full(file, **arrays):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    cache.write(SUBJECT, key(1), ARRAYS)
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache.np, "savez", full)
        cache.write(SUBJECT, key(2), ARRAYS)
    assert "No space left on device" in caplog.text
    assert sorted(path.name for path in dead.parent.iterdir()) == [f"{key(1)}.npz", alive.name]


@pytest.mark.parametrize("damage", [b"", b"torn", b"PK\3\4 torn", "a pipe"])
def test_a_damaged_file_is_made_anew(tmp_path, caplog, damage):
    cache = FeatureCache(tmp_path)
    cache.write(SUBJECT, key(1), ARRAYS)
    path = tmp_path / SUBJECT / f"{key(1)}.npz"
    if damage == "a pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_bytes(damage)
    assert cache.read(SUBJECT, key(1)) is None
    assert f"{key(1)}.npz cannot be read and is written again" in caplog.text
    cache.write(SUBJECT, key(1), ARRAYS)
    np.testing.assert_array_equal(cache.read(SUBJECT, key(1))["features"], ARRAYS["features"])


def test_a_folder_in_the_place_of_a_file_is_the_reason_in_the_log(tmp_path, caplog):
    (tmp_path / SUBJECT / f"{key(1)}.npz").mkdir(parents=True)
    FeatureCache(tmp_path).write(SUBJECT, key(1), ARRAYS)
    assert f"{key(1)}.npz is a directory" in caplog.text


def test_files_are_readable_by_the_users_that_the_owner_permits(tmp_path):
    umask = os.umask(0o022)
    try:
        FeatureCache(tmp_path).write(SUBJECT, key(1), ARRAYS)
    finally:
        os.umask(umask)
    assert (tmp_path / SUBJECT / f"{key(1)}.npz").stat().st_mode & 0o777 == 0o644


def test_features_made_in_another_way_are_not_read(tmp_path, monkeypatch):
    features = FeatureStore(colour_subject(), devices(1), batch=4, folder=tmp_path)

    def kept():
        return len(list(tmp_path.rglob("*.npz")))

    for count, size in ((1, 16), (1, 16), (2, 24)):
        features(Motifs(4, size=size))
        assert kept() == count
    with jax.default_matmul_precision("bfloat16"):
        features(Motifs(4, size=16))
    assert kept() == 3
    monkeypatch.setattr(store, "code_fingerprint", lambda: "of another version")
    features(Motifs(4, size=16))
    assert kept() == 4
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS // 2)
    features(Motifs(4, size=16))
    assert kept() == 5


def test_images_that_are_replaced_while_they_are_read_have_no_features(tmp_path, monkeypatch):
    for index in range(6):
        file = tmp_path / "images" / "train" / "ab"[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * index, 0, 0)).save(file)
    source = open_folder(str(tmp_path / "images"), "train")
    part = Part(source, np.arange(4), "four")
    features = FeatureStore(colour_subject(), devices(1), batch=2, folder=tmp_path / "kept")
    features(part)
    read, kept = FolderSource.__getitem__, list(tmp_path.rglob("*.npz"))
    Image.new("RGB", (16, 16), (0, 200, 0)).save(new := tmp_path / "new.png")

    def replaced(self, index):
        with contextlib.suppress(FileNotFoundError):  # at once, as other threads read
            new.replace(file)
        return read(self, index)

    monkeypatch.setattr(FolderSource, "__getitem__", replaced)
    with pytest.raises(DataError, match="its images changed while they were read"):
        features(source)
    assert list(tmp_path.rglob("*.npz")) == kept
    monkeypatch.undo()
    assert len(features(open_folder(str(tmp_path / "images"), "train")).features) == 6


def test_a_damaged_image_is_reported_once_however_often_it_is_read(tmp_path, caplog):
    for index in range(4):
        file = tmp_path / "train" / "ab"[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(file)
    file.write_bytes(b"")
    source = open_folder(str(tmp_path), "train")
    features = FeatureStore(colour_subject(), devices(1), batch=2)
    assert len(features(source).features) == 3
    for _ in range(3):
        with closing(features.batches(source)) as batches:
            assert sum(int(each["mask"].sum()) for each in batches) == 3
    assert caplog.text.count("damaged image") == 1


def test_images_of_one_source_do_not_count_as_those_of_another_of_its_name(tmp_path):
    for index in range(20):
        file = tmp_path / "train" / "a" / f"{index:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(file)
        if index % 10 == 0:
            file.write_bytes(b"")
    whole = open_folder(str(tmp_path), "train")
    features = FeatureStore(colour_subject(), devices(1), batch=2)
    for first in (0, 10):  # each has one damaged image, which is tolerated
        part = Part(whole, np.arange(first, first + 10), "part")
        assert len(features(part).features) == 9


def test_what_reads_images_itself_reads_those_whose_features_there_are():
    source = Motifs(16, size=16)
    of_four = FeatureStore(colour_subject(), devices(1), batch=4, limit=4)
    limited = of_four.limited(source)
    names = [limited[index].name for index in range(len(limited))]
    assert names == [source[int(place)].name for place in of_four(source).places]
    assert of_four.limited(limited) is limited
