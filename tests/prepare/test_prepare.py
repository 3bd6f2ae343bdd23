"""Preparing datasets: what is written, read back by tensorflow-datasets as a user would."""

import errno
import io
import logging
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from cassle_jax.checks import ConfigError
from cassle_jax.command import EXIT_NOT_SAVED, EXIT_OUTAGE, EXIT_PREEMPTED, Stop
from cassle_jax.data import DataError, open_source
from cassle_jax.data.decode import MAX_PIXELS
from cassle_jax.faults import Outage, hurry
from cassle_jax.prepare import Preparation, prepare
from cassle_jax.prepare import dataset as dataset_module
from cassle_jax.prepare import plan as plan_module
from cassle_jax.prepare import shards as shards_module
from cassle_jax.prepare.reencode import reencoded
from cassle_jax.storage import PARTIAL
from tests.commands import run_command

SHORT = 24
SPLITS = ("train", "val")
BAD = {"workers": 1, "max_bad_fraction": 0.1}
HOW = Preparation("animals", short_side=SHORT, quality=95, shard_mib=1)


def encoded(seed, height, width, form="JPEG"):
    """A smooth image, which survives JPEG."""
    y, x = np.mgrid[:height, :width]
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    waves = np.sin(x[..., None] / width * 5 + y[..., None] / height * 3 + phase)
    buffer = io.BytesIO()
    Image.fromarray((127 + 100 * waves).astype(np.uint8)).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of large and small images in two formats, one file damaged."""
    root = tmp_path_factory.mktemp("images")
    for number in range(24):
        folder = root / "train" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        height, width = (60, 90) if number % 3 else (20, 33)
        form, ending = (("JPEG", "jpg"), ("PNG", "png"))[number % 4 == 0]
        (folder / f"{number:02}.{ending}").write_bytes(encoded(number, height, width, form))
    (root / "train" / "dog" / "zz.jpg").write_bytes(encoded(99, 60, 90)[:200])
    return root


def settings(path, source="folder", name=""):
    return ConfigDict(
        {
            "source": source,
            "path": str(path),
            "name": name,
            "classes": "",
            "scenes": 0,
            "canvas": 1,
            "max_pixels": MAX_PIXELS,
        }
    )


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of a few images, though a MiB is the least that a user may choose."""
    real = plan_module.plan_of

    def plan_of(*args):
        plan = real(*args)
        return {**plan, "mean_bytes": dict.fromkeys(plan["mean_bytes"], 5 * 2**20 / 25)}

    monkeypatch.setattr("cassle_jax.prepare.dataset.plan_of", plan_of)


def files_in(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_tensorflow_datasets_reads_what_was_written(images, tmp_path, small_shards):
    folder = prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
    builder = tfds.builder_from_directory(folder)
    assert builder.info.features["label"].names == ["cat", "dog"]
    assert builder.info.splits["train"].num_examples == 24
    assert builder.info.splits["train"].num_shards == 5
    decoders = {"image": tfds.decode.SkipDecoding()}
    examples = builder.as_data_source("train", decoders=decoders)
    names = [example["name"].decode() for example in examples]
    assert names == sorted(names)
    for example, name in zip(examples, names, strict=True):
        assert ("cat", "dog")[example["label"]] in name
        with open(name, "rb") as file:  # noqa: PTH123
            original = file.read()
        before, after = (Image.open(io.BytesIO(data)) for data in (original, example["image"]))
        if min(before.size) <= SHORT:
            assert example["image"] == original
        else:
            assert after.size == (36, 24) and after.format == "JPEG"
            reduced = before.convert("RGB").resize((36, 24), Image.Resampling.BICUBIC)
            difference = np.asarray(reduced, float) - np.asarray(after, float)
            assert np.abs(difference).mean() < 3


def test_a_run_reads_it_as_it_reads_any_builder(images, tmp_path, small_shards):
    prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
    before = open_source(settings(images), "train")
    after = open_source(settings(tmp_path, "tfds", "animals"), "train")
    assert after.class_names == before.class_names
    np.testing.assert_array_equal(after.labels, before.labels[:-1])  # the damaged one comes last


def test_what_cannot_be_read_is_listed(images, tmp_path, small_shards, caplog):
    with caplog.at_level(logging.WARNING):
        folder = prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
    split, name, reason = (folder / "unreadable.txt").read_text().rstrip("\n").split("\t")
    assert split == "train" and name.endswith("dog/zz.jpg") and reason
    assert "left out 1 images" in caplog.text


def test_processes_write_the_same_bytes(images, tmp_path, small_shards):
    one = prepare(settings(images), ["train"], str(tmp_path / "1"), HOW, **BAD)
    two = prepare(
        settings(images), ["train"], str(tmp_path / "2"), HOW, workers=2, max_bad_fraction=0.1
    )
    assert files_in(one) == files_in(two)


def prepared_here(images, to):
    before = threading.active_count(), signal.getsignal(signal.SIGINT)
    folder = prepare(settings(images), ["train"], to, HOW, **BAD)
    assert (threading.active_count(), signal.getsignal(signal.SIGINT)) == before
    return folder


@pytest.mark.exhaustive
def test_a_child_process_prepares_as_any_other_and_stays_as_it_is(images, tmp_path, small_shards):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(prepared_here, images, str(tmp_path)).result().is_dir()


def test_what_a_stopped_call_wrote_is_kept(images, tmp_path, small_shards, monkeypatch):
    whole = files_in(prepare(settings(images), ["train"], str(tmp_path / "1"), HOW, **BAD))
    written = []

    def fails_at_third(*args):
        written.append(1)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return shards_module.write_shard(*args)

    monkeypatch.setattr("cassle_jax.prepare.dataset.write_shard", fails_at_third)
    with pytest.raises(Stop, match=r"No space left .* the same command continues") as stop:
        prepare(settings(images), ["train"], str(tmp_path / "2"), HOW, **BAD)
    assert stop.value.code == EXIT_NOT_SAVED
    assert not (tmp_path / "2" / "animals" / "1.0.0" / "dataset_info.json").exists()
    folder = prepare(settings(images), ["train"], str(tmp_path / "2"), HOW, **BAD)
    assert files_in(folder) == whole
    assert len(written) == 3 + 5 - len([1, 1])  # the first two shards are not written again


def test_what_a_worker_of_a_killed_call_begins_meanwhile_does_not_stay(
    images, tmp_path, small_shards, monkeypatch
):
    def beside_another(path, *args):
        path.with_name(f"{path.name}.0badcafe{PARTIAL}").touch()
        return shards_module.write_shard(path, *args)

    monkeypatch.setattr("cassle_jax.prepare.dataset.write_shard", beside_another)
    folder = prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
    assert not list(folder.glob(f"*{PARTIAL}"))


@pytest.mark.exhaustive
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path):
    root = tmp_path / "images"
    (root / "train" / "a").mkdir(parents=True)
    for number in range(60):
        noise = np.random.default_rng(number).integers(0, 256, (300, 300, 3), np.uint8)
        Image.fromarray(noise).save(root / "train" / "a" / f"{number}.png")
    command = [sys.executable, "-m", "cassle_jax.prepare", f"--path={root}", "--shard_mib=1"]
    command += ["--short_side=256", "--quality=100", "--as=noise"]
    subprocess.run([*command, "--workers=1", f"--to={tmp_path / 'whole'}"], check=True)
    shards = tmp_path / "killed" / "noise" / "1.0.0"
    for wanted in (1, 3):
        process = subprocess.Popen([*command, "--workers=2", f"--to={tmp_path / 'killed'}"])
        while len(list(shards.glob("*.array_record-*-of-*[0-9]"))) < wanted:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (shards / "dataset_info.json").exists()
    subprocess.run([*command, "--workers=2", f"--to={tmp_path / 'killed'}"], check=True)
    assert files_in(shards) == files_in(tmp_path / "whole" / "noise" / "1.0.0")


def test_the_command_prints_settings_with_which_a_run_reads_the_result(images, tmp_path, capsys):
    flags = [f"--path={images}", "--as=p", "--short_side=24", "--max_bad_fraction=0.1"]
    assert run_command("prepare", *flags, f"--to={tmp_path / 'a b'}", "--workers=1") == 0
    *_, printed = capsys.readouterr().out.splitlines()
    given = dict(each.removeprefix("--config.data.").split("=") for each in shlex.split(printed))
    assert given["path"] == str(tmp_path / "a b")
    source = open_source(settings(**given), "train")
    assert len(source) == 24 and list(source.class_names) == ["cat", "dog"]


def test_a_complete_one_is_not_written_again_and_another_is_refused(images, tmp_path):
    data = settings(images)
    folder = prepare(data, ["train"], str(tmp_path), HOW, **BAD)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare(data, ["train"], str(tmp_path), HOW, **BAD) == folder
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"begun with short_side=24, and this is 32; choose ano"):
        prepare(data, ["train"], str(tmp_path), HOW._replace(short_side=32), **BAD)


@pytest.fixture
def rewritten(monkeypatch):
    """The numbers of the shards that are written."""
    write, numbers = shards_module.write_shard, []

    def noted(path, *args):
        numbers.append(int(path.name.split("-")[2]))
        return write(path, *args)

    monkeypatch.setattr("cassle_jax.prepare.dataset.write_shard", noted)
    return numbers


@pytest.mark.parametrize("left", [None, 100])
def test_only_a_shard_that_was_lost_or_cut_short_since_is_written_again(
    images, tmp_path, small_shards, rewritten, caplog, left
):
    folder = prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
    before = files_in(folder)
    shard = next(folder.glob("animals-*.array_record-00002-*"))
    if left is None:
        shard.unlink()
    else:
        os.truncate(shard, left)
    rewritten.clear()
    prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
    assert rewritten == [2] and files_in(folder) == before
    assert f"{folder} was finished, and has lost a shard or a part of one; 1 of its" in caplog.text


def test_a_finished_one_of_an_earlier_version_has_no_notes_and_is_left_alone(
    images, tmp_path, rewritten
):
    folder = prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
    for note in folder.glob(".*.written.json"):
        note.unlink()
    rewritten.clear()
    before = files_in(folder)
    prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
    assert rewritten == [] and files_in(folder) == before


def test_only_shards_of_images_that_were_repaired_are_written_again(
    images, tmp_path, small_shards, rewritten
):
    root, to = tmp_path / "images", str(tmp_path / "to")
    shutil.copytree(images, root)
    with pytest.raises(DataError, match=r"1 of the 25 images .* the same command continues"):
        prepare(settings(root), ["train"], to, HOW, workers=1)
    (root / "train" / "dog" / "zz.jpg").write_bytes(encoded(99, 60, 90))
    (root / "train" / "cat" / "00.png").write_bytes(encoded(0, 20, 30, "PNG"))  # in shard 0
    rewritten.clear()
    folder = prepare(settings(root), ["train"], to, HOW, workers=1)
    assert rewritten == [0, 4]
    decoders = {"image": tfds.decode.SkipDecoding()}
    examples = tfds.builder_from_directory(folder).as_data_source("train", decoders=decoders)
    assert len(examples) == 25
    assert examples[0]["image"] == (root / "train" / "cat" / "00.png").read_bytes()
    assert examples[24]["name"].endswith(b"dog/zz.jpg")


def test_a_finished_one_whose_images_changed_is_left_alone(images, tmp_path):
    root, to = tmp_path / "images", str(tmp_path / "to")
    shutil.copytree(images, root)
    before = files_in(prepare(settings(root), ["train"], to, HOW, **BAD))
    os.utime(root / "train" / "cat" / "00.png", (0, 0))
    with pytest.raises(
        ConfigError, match=r"is finished, and images of split 'train' have changed since; choose"
    ):
        prepare(settings(root), ["train"], to, HOW, **BAD)
    assert files_in(tmp_path / "to" / "animals" / "1.0.0") == before


def test_what_another_preparation_differs_in_is_a_few_words(images, tmp_path):
    root, to = tmp_path / "images", str(tmp_path / "to")
    shutil.copytree(images, root)
    shutil.copytree(root / "train", root / "val")
    prepare(settings(root), ["train", "val"], to, HOW, **BAD)
    cat, fox = (root / "val" / name for name in ("cat", "fox"))
    for change, undo, splits, said in (
        (lambda: None, lambda: None, ["val"], "splits=train,val, and this is val"),
        (
            lambda: shutil.copy(cat / "00.png", cat / "0.png"),
            lambda: (cat / "0.png").unlink(),
            ["train", "val"],
            "val's images=25, and this is 26",
        ),
        (
            lambda: [(root / split / "cat").rename(root / split / "fox") for split in SPLITS],
            lambda: [(root / split / "fox").rename(root / split / "cat") for split in SPLITS],
            ["train", "val"],
            "class 0=cat, and this is dog",
        ),
    ):
        change()
        with pytest.raises(ConfigError, match=rf"was begun with {said}; choose") as caught:
            prepare(settings(root), splits, to, HOW, **BAD)
        assert len(str(caught.value)) < 250
        undo()
    assert not fox.exists()


@pytest.mark.parametrize("version", ["1.0.0", "3.0.2"])
def test_the_name_of_another_dataset_is_refused(images, tmp_path, version):
    other = tmp_path / "animals" / version
    other.mkdir(parents=True)
    (other / "dataset_info.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=rf"^--as='animals': {other} holds another dataset of this name; choose"
    ):
        prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["dataset_info.json"]


def test_a_second_call_on_the_folder_is_refused_while_the_first_works(
    images, tmp_path, monkeypatch
):
    second = f"--to={tmp_path}/animals is in use by another call .process {os.getpid()} on .*; wait"

    def meanwhile(*args):
        with pytest.raises(ConfigError, match=second):
            prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
        return shards_module.write_shard(*args)

    monkeypatch.setattr("cassle_jax.prepare.dataset.write_shard", meanwhile)
    folder = prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
    assert prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD) == folder


@pytest.mark.parametrize("file", ["prepared.json", "unreadable.txt", "dataset_info.json"])
def test_a_disk_that_is_full_beside_the_shards_is_said_and_the_same_command_continues(
    images, tmp_path, monkeypatch, file
):
    write = dataset_module.write_whole

    def full(path, content):
        if path.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "write_whole", full)
        with pytest.raises(
            Stop, match="No space left on device; free some space; the same"
        ) as stop:
            prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
    assert stop.value.code == EXIT_NOT_SAVED
    assert prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD).is_dir()


def test_a_full_disk_is_refused_before_anything_is_written(images, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "free_bytes", lambda _: 100)
    with pytest.raises(Stop, match=r"needs about 0\.00 GiB and has 0\.00 GiB free"):
        prepare(settings(images), ["train"], str(tmp_path / "to"), HOW, **BAD)
    assert [path.name for path in (tmp_path / "to").rglob("*") if path.is_file()] == ["lock"]


def test_what_a_killed_call_left_half_written_does_not_count_as_written(
    images, tmp_path, monkeypatch
):
    folder = tmp_path / "animals" / "1.0.0"
    folder.mkdir(parents=True)
    half = folder / f"animals-train.array_record-00000-of-00001.0badcafe{PARTIAL}"
    with half.open("wb") as file:
        file.truncate(1 << 30)
    monkeypatch.setattr(plan_module, "free_bytes", lambda _: 100)
    with pytest.raises(Stop, match="free some"):
        prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
    assert not half.exists()


def test_a_shard_that_reads_back_differently_is_no_shard(images, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_sums_in", lambda _: [])
    with pytest.raises(OSError, match="cannot be read back"):
        prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
    assert not list((tmp_path / "animals" / "1.0.0").glob("*.array_record*"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "My data"}, "--as='My data' is not a name"),
        ({"short_side": 0}, "--short_side=0 is out of range; use 1 to"),
        ({"quality": 101}, "--quality=101 is out of range; use 1 to 100"),
        ({"shard_mib": 0}, "--shard_mib=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(images, tmp_path, changed, message):
    with pytest.raises(ConfigError, match=message):
        prepare(settings(images), ["train"], str(tmp_path), HOW._replace(**changed))


def test_a_split_without_a_readable_image_is_refused(images, tmp_path):
    root = tmp_path / "bad"
    shutil.copytree(images / "train" / "cat", root / "train" / "cat")
    for path in (root / "train" / "cat").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"12 of the 12 images of split 'train' cannot be read"):
        prepare(settings(root), ["train"], str(tmp_path / "to"), HOW, **BAD)


def test_more_unreadable_images_than_allowed_are_refused_unless_that_is_raised(
    images, tmp_path, rewritten
):
    to = str(tmp_path)
    with pytest.raises(
        DataError, match=r"1 of the 25 .* more than --max_bad_fraction=0\.01; repair"
    ):
        prepare(settings(images), ["train"], to, HOW, workers=1)
    rewritten.clear()
    folder = prepare(settings(images), ["train"], to, HOW, **BAD)
    assert rewritten == []  # what the first call wrote is kept
    assert len((folder / "unreadable.txt").read_text().splitlines()) == 1


def test_a_folder_that_vanishes_is_an_outage_and_not_damage(images, tmp_path, monkeypatch):
    root = tmp_path / "gone"
    shutil.copytree(images, root)
    real = shards_module.reencoded

    def unmounts(*args, **settings):
        shutil.rmtree(root, ignore_errors=True)
        return real(*args, **settings)

    monkeypatch.setattr(shards_module, "reencoded", unmounts)
    monkeypatch.setenv("CASSLE_STORAGE_SECONDS", "0.1")
    with pytest.raises(Outage, match="the folder is gone"):
        prepare(settings(root), ["train"], str(tmp_path / "to"), HOW, **BAD)
    assert not list((tmp_path / "to").rglob("*.array_record*"))


def test_an_outage_of_the_images_is_none_of_the_shard(images, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "_mean_size", lambda *_: 1.0)
    monkeypatch.setenv("CASSLE_STORAGE_SECONDS", "0.1")

    def fails(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr("cassle_jax.data.folder.read_image", fails)
    with pytest.raises(Outage, match=r"^.*images.*/train #0: Input/output error, for 0\.1 s; the"):
        prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)


def test_reasons_name_flags(images, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # what the process had
    data = settings(images)
    data.max_pixels = 60 * 90 - 1
    folder = prepare(data, ["train"], str(tmp_path), HOW, workers=1, max_bad_fraction=0.9)
    said = (folder / "unreadable.txt").read_text().splitlines()
    assert len(said) == 17 and all("than --max_pixels=5399" in line for line in said[:-1])


def test_a_split_without_labels_beside_one_with_labels_is_refused(images, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(images, root)
    (root / "val").mkdir()
    shutil.copy(root / "train" / "cat" / "00.png", root / "val")
    with pytest.raises(ConfigError, match=r"^--splits: 'val' has no labels, and another split has"):
        prepare(settings(root), ["train", "val"], str(tmp_path / "to"), HOW, **BAD)


def test_splits_of_other_classes_are_refused(images, tmp_path):
    root = tmp_path / "two"
    shutil.copytree(images / "train", root / "train")
    shutil.copytree(images / "train" / "dog", root / "val" / "dog")
    with pytest.raises(ConfigError, match=r"--splits: 'val' has other classes .* such as 'dog'"):
        prepare(settings(root), ["train", "val"], str(tmp_path / "to"), HOW, **BAD)


@pytest.mark.parametrize(
    "name", [b"\xff", b"new\nline", b"carriage\rreturn", b"cat ", b" ", "\u00a0cat".encode()]
)
def test_classes_that_cannot_be_kept_are_refused_before_anything_is_written(tmp_path, name):
    folder = os.fsencode(tmp_path / "train") + b"/" + name
    os.makedirs(folder)  # noqa: PTH103
    with open(folder + b"/1.png", "wb") as file:  # noqa: PTH123
        file.write(encoded(1, 20, 20, "PNG"))
    with pytest.raises(ConfigError, match=r"class '.*' has a line break, a blank at an end, or"):
        prepare(settings(tmp_path), ["train"], str(tmp_path / "to"), HOW, **BAD)
    assert not list((tmp_path / "to").rglob("*.json"))


def test_a_place_that_would_confuse_is_refused(images):
    with pytest.raises(ConfigError, match=r"--to=.*cat lies among the images of .*train; use"):
        prepare(settings(images), ["train"], str(images / "train" / "cat"), HOW, **BAD)
    with pytest.raises(ConfigError, match=r"--to=.* has bytes that are not UTF-8"):
        prepare(settings(images), ["train"], str(images / os.fsdecode(b"\xff")), HOW, **BAD)


def test_a_place_that_cannot_be_written_is_one_line(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--to=.*file is not a folder: .*is a file"):
        prepare(settings(images), ["train"], str(tmp_path / "file"), HOW, **BAD)
    with pytest.raises(ConfigError, match="--to=gs://b is not a local folder"):
        prepare(settings(images), ["train"], "gs://b", HOW, **BAD)
    with pytest.raises(DataError, match="--path='' is not a folder; give the root of"):
        prepare(settings(""), ["train"], str(tmp_path / "to"), HOW, **BAD)


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (KeyboardInterrupt(), "stopped; the same command continues", EXIT_PREEMPTED),
        (BrokenProcessPool("terminated"), r"a worker was killed.*\(--workers\); the", EXIT_OUTAGE),
    ],
)
def test_what_ends_it_from_outside_is_one_line(images, tmp_path, monkeypatch, error, said, code):
    def ended(*args):
        raise error

    monkeypatch.setattr("cassle_jax.prepare.dataset.as_completed", ended)
    with pytest.raises(Stop, match=said) as stop:
        prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
    assert stop.value.code == code and "\n" not in str(stop.value)


def test_a_request_to_stop_is_heard_within_a_shard(images, tmp_path, monkeypatch):
    real, read = shards_module.reencoded, []

    def interrupted(*args, **settings):
        read.append(1)
        if len(read) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        return real(*args, **settings)

    monkeypatch.setattr(shards_module, "reencoded", interrupted)
    with pytest.raises(Stop, match="stopped; the same command continues"):
        prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
    assert len(read) < 10
    assert not hurry.is_set() and not list(tmp_path.rglob(f"*{PARTIAL}"))


@pytest.mark.exhaustive
def test_no_worker_writes_any_more_when_an_error_leaves():
    before = multiprocessing.active_children()
    settings = {}, shards_module.Encoding(24, 90, ()), MAX_PIXELS
    with pytest.raises(Outage), dataset_module._pool(2, settings) as pool:
        written = pool.submit(time.sleep, 2)
        while not written.running():
            time.sleep(0.05)
        raise Outage("gone")
    assert written.done()
    assert multiprocessing.active_children() == before


@pytest.mark.exhaustive
def test_a_request_to_stop_ends_processes_within_a_shard():
    settings = {}, shards_module.Encoding(24, 90, ()), MAX_PIXELS
    with pytest.raises(KeyboardInterrupt), dataset_module._pool(2, settings) as pool:
        assert pool.submit(time.sleep, 0).result() is None
        pool.submit(time.sleep, 600)
        raise KeyboardInterrupt
    until = time.monotonic() + 60
    while multiprocessing.active_children():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("splits", [[], ["train", "train"], ["train/"], ["all"]])
def test_names_of_splits_that_cannot_be_are_refused(images, tmp_path, splits):
    said = (
        r"names no split, or one twice|'train/' is not a name of a split, such as train|"
        r"'all' is tensorflow-datasets' word for every split"
    )
    with pytest.raises(ConfigError, match=rf"^--splits.*({said})"):
        prepare(settings(images), splits, str(tmp_path / "to"), HOW, **BAD)
    assert not (tmp_path / "to").exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_how_far_it_is_is_a_bar_on_a_terminal_and_lines_elsewhere(
    images, tmp_path, monkeypatch, caplog, terminal
):
    monkeypatch.setattr("cassle_jax.prepare.progress._PAUSE", -1.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    with caplog.at_level("INFO", logger="cassle_jax"):
        prepare(settings(images), ["train"], str(tmp_path), HOW, **BAD)
    lines = [each for each in caplog.messages if "of 25 images, " in each]
    assert (lines == []) == terminal == ("25/25" in sys.stderr.getvalue())
    assert terminal or len(lines) >= 2


def test_pixels_that_are_small_enough_are_kept_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 14, 3), np.uint8)
    with Image.open(io.BytesIO(reencoded(pixels, 10, 90))) as kept:
        np.testing.assert_array_equal(np.asarray(kept), pixels)
    with Image.open(io.BytesIO(reencoded(pixels, 5, 90))) as reduced:
        assert (reduced.format, reduced.size) == ("JPEG", (7, 5))


@pytest.mark.parametrize("upright", [True, False])
def test_a_strip_longer_than_any_jpeg_is_kept_as_a_png(upright):
    strip = np.random.default_rng(0).integers(0, 256, (70_000, 2, 3), np.uint8)
    strip = strip if upright else strip.transpose(1, 0, 2)
    with Image.open(io.BytesIO(reencoded(strip, 1, 90))) as reduced:
        assert (reduced.format, sorted(reduced.size)) == ("JPEG", [1, 35_000])
    longer = np.repeat(strip, 2, axis=0 if upright else 1)
    with Image.open(io.BytesIO(reencoded(longer, 1, 90))) as reduced:
        assert (reduced.format, sorted(reduced.size)) == ("PNG", [1, 70_000])
        expected = Image.fromarray(longer).resize(reduced.size, Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(np.asarray(reduced), np.asarray(expected))


def test_a_source_that_cannot_be_prepared_is_refused(capsys):
    assert run_command("prepare", "--source=scenes", "--path=x", "--to=y") == 2
    said = "error: --source='scenes' is unknown; use folder, tfds, webdataset\n"
    assert capsys.readouterr().err == said


def test_an_error_of_the_system_that_array_record_words_is_one_of_its_file(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(OSError, match="No space left") as full, shards_module._system_errors(path):
        raise RuntimeError("write() failed: No space left on device; writing a")
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(path))
    with pytest.raises(RuntimeError, match=r"^data loss$"), shards_module._system_errors(path):
        raise RuntimeError("data loss")


@pytest.mark.exhaustive
def test_a_limit_of_a_files_size_is_one_line(images, tmp_path, monkeypatch):
    # Python would leave compiled modules that end at the limit, and fail at them from then on.
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # nor could it keep its lines
    command = f"ulimit -f 8; exec {sys.executable} -m cassle_jax.prepare --path={images} --as=p"
    ended = subprocess.run(
        ["bash", "-c", f"{command} --splits=train --max_bad_fraction=1 --to={tmp_path}/to"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.endswith(": File too large\n")
