"""Faults of storage that pass cost time alone; those that stay lose nothing and say so."""

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from cassle_jax import faults
from cassle_jax.checks import ConfigError
from cassle_jax.command import EXIT_OUTAGE, EXIT_PREEMPTED, EXIT_WRONG_SETTING, code_of
from cassle_jax.data import DamagedLog, DataError, TooManyDamaged, open_source, sources
from cassle_jax.data.decode import DamagedImage
from cassle_jax.data.memory import KeptRecords
from cassle_jax.data.pipeline import training_batches
from cassle_jax.data.reading import RecordReader, UnreadableRecord
from cassle_jax.data.shards import Shards
from cassle_jax.data.splits import TenCrops
from cassle_jax.faults import Outage, passing, retried
from cassle_jax.lock import folder_held
from cassle_jax.models import ENCODERS
from cassle_jax.training import checkpoint_reading as reading
from cassle_jax.training import loop as loop_module
from cassle_jax.training.checkpoints import Checkpoints
from cassle_jax.training.loop import pretrain
from cassle_jax.training.metrics import MetricsWriter
from tests.everyday import everyday
from tests.tiny import TinyEncoder, cropped_only, tiny_config
from tests.training.processes import steps_saved
from tests.training.test_faults import small_state

IMAGES = 40


def fault(code=errno.EIO):
    return OSError(code, os.strerror(code))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Faults are given half a second, not minutes."""
    monkeypatch.setenv(faults.SECONDS, "0.5")
    monkeypatch.setattr(faults, "_FIRST_PAUSE", 0.02)


class Failing:
    """A source of `IMAGES` images; `fails` says of an index whether reading it fails now."""

    code = 0

    def __init__(self, source, fails):
        self._source, self._fails = source, fails
        self.name, self.class_names = source.name, source.class_names
        self.reads = []

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        self.reads.append(index)
        if self._fails(index):
            raise fault(self.code or (errno.ESTALE if index % 2 else errno.EIO))
        return self._source[index]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for index in range(IMAGES):
        (root / "train" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(root / "train" / "ab"[index % 2] / f"{index:02}.png")
    return root


@pytest.fixture
def images(folder):
    settings = SimpleNamespace(source="folder", path=str(folder), classes="", max_pixels=10**8)
    return open_source(settings, "train")


def batches(source, damaged, count=4):
    settings = {"batch": IMAGES // 2, "canvas": 20, "seed": 1, "threads": 2}
    iterator = training_batches(source, damaged=damaged, **settings)
    with contextlib.closing(iterator):
        return [next(iterator)["image"].copy() for _ in range(count)]


# --- the mechanism


def test_what_passes_is_tried_again_and_what_stays_is_an_outage(caplog):
    tries = iter([fault(), fault(errno.ESTALE), None])

    def action():
        error = next(tries)
        if error:
            raise error
        return 7

    assert retried("it", action) == 7
    assert caplog.text.count("it: Input/output error; it is tried again for 0.5 s") == 1

    def never():
        raise RuntimeError("pread() failed: Stale file handle; reading x") from None

    with pytest.raises(Outage, match=r"^it: Stale file handle, for 0\.5 s; the same command"):
        retried("it", never)


def test_a_request_to_stop_ends_a_wait_after_one_more_try():
    tries = []

    def action():
        tries.append(time.monotonic())
        raise fault()

    threading.Timer(0.2, faults.hurry.set).start()
    try:
        with pytest.raises(Outage, match=r"^it: Input/output error, and the process is to end"):
            retried("it", action, seconds=60.0)
    finally:
        faults.hurry.clear()
    assert len(tries) > 1 and time.monotonic() - tries[0] < 10


def test_an_own_error_that_quotes_a_fault_is_none():
    assert passing(ConfigError("run='Input/output error' is no run")) is None
    assert code_of(TooManyDamaged("3 images are damaged: Input/output error")) == EXIT_WRONG_SETTING
    wrong = DataError("the split cannot be opened")
    wrong.__cause__ = fault()
    assert code_of(wrong) == EXIT_OUTAGE


def test_an_action_that_has_waited_itself_is_not_waited_for_again():
    tries = []

    def action():
        tries.append(1)
        raise Outage("gone") from fault()

    with pytest.raises(Outage, match=r"^gone$"):
        retried("it", action)
    assert len(tries) == 1


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), ValueError("wrong")])
def test_what_cannot_pass_is_not_tried_again(error):
    tries = []

    def action():
        tries.append(1)
        raise error

    with pytest.raises(type(error)):
        retried("it", action)
    assert len(tries) == 1


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("wrong"), EXIT_WRONG_SETTING),
        (DataError("wrong"), EXIT_WRONG_SETTING),
        (caused(DataError("cannot be listed"), fault()), EXIT_OUTAGE),
        (caused(ConfigError("cannot be written"), fault(errno.ENOSPC)), EXIT_OUTAGE),
        (Outage("gone"), EXIT_OUTAGE),
        (fault(errno.ENOTCONN), EXIT_OUTAGE),
        (OSError(errno.EACCES, "Permission denied", "/data/runs.jsonl"), EXIT_WRONG_SETTING),
        (OSError(errno.EISDIR, "Is a directory", "/data/runs.jsonl"), EXIT_WRONG_SETTING),
        (fault(errno.EACCES), None),
        (RuntimeError("Gloo: Connection reset by peer"), None),
    ],
)
def test_the_exit_code_distinguishes_a_mistake_from_an_outage(error, code):
    assert code_of(error) == code


# --- reading images


def test_one_failing_read_changes_nothing(images):
    undisturbed = batches(images, DamagedLog(IMAGES, 0.0))
    failed = set()

    def once(index):
        fails = index % 7 == 3 and index not in failed
        failed.add(index)
        return fails

    found = batches(Failing(images, once), DamagedLog(IMAGES, 0.0))
    np.testing.assert_array_equal(found, undisturbed)


def test_a_file_that_stays_unreadable_is_a_damaged_image_and_waited_for_once(images, caplog):
    damaged, source = DamagedLog(IMAGES, 0.05), Failing(images, lambda index: index == 13)
    batches(source, damaged)
    assert "is tried again" in caplog.text
    caplog.clear()
    batches(source, damaged)
    assert not caplog.text
    assert len(damaged) == 1 and "13" in damaged.names[0]
    with pytest.raises(TooManyDamaged):
        batches(Failing(images, lambda index: index == 13), DamagedLog(IMAGES, 0.0))


def test_a_file_larger_than_any_image_is_damaged_and_not_read(images, folder, monkeypatch):
    grown = folder / "train" / "a" / "02.png"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    os.truncate(grown, 2**27)
    damaged = DamagedLog(IMAGES, max_fraction=0.1)
    batches(images, damaged)
    assert damaged.names == (str(grown),)


def test_nothing_that_can_be_read_is_an_outage_and_no_damage(images):
    damaged = DamagedLog(IMAGES, 1.0)
    with pytest.raises(Outage, match="the same command continues"):
        batches(Failing(images, lambda index: True), damaged)
    assert len(damaged) == 0


@pytest.mark.parametrize("mount_point_stays", [True, False])
def test_a_folder_that_vanishes_is_an_outage_and_waited_for(images, folder, mount_point_stays):
    split, away = folder / "train", folder / "away"
    undisturbed = batches(images, DamagedLog(IMAGES, 0.0))
    split.rename(away)
    if mount_point_stays:
        split.mkdir()
    damaged = DamagedLog(IMAGES, 1.0)
    with pytest.raises(Outage, match="the folder is gone, or empty"):
        batches(images, damaged)
    assert len(damaged) == 0

    def back():
        if mount_point_stays:
            split.rmdir()
        away.rename(split)

    threading.Timer(0.2, back).start()
    np.testing.assert_array_equal(batches(images, damaged), undisturbed)
    assert len(damaged) == 0


@pytest.mark.parametrize("kind", ["images", "records"])
def test_a_folder_that_lost_its_permission_is_a_mistake_and_not_waited_for(
    images, folder, tmp_path, monkeypatch, kind
):
    def refused(at, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), at)

    (tmp_path / "records").write_bytes(b"")
    instruction = SimpleNamespace(filename=tmp_path / "records", examples_in_shard=1, take=1)
    shards, damaged = Shards("records", [instruction]), DamagedLog(IMAGES, 1.0)
    monkeypatch.setattr(os, "scandir", refused)
    monkeypatch.setattr(sources, "open_to_read", refused)
    where = folder / "train" if kind == "images" else tmp_path
    with pytest.raises(DataError, match=rf"^the folder {where} cannot be .*Permission denied") as e:
        if kind == "images":
            batches(images, damaged)
        shards.check(0, RuntimeError("open() failed: Permission denied; reading records"))
    assert code_of(e.value) == EXIT_WRONG_SETTING and len(damaged) == 0


def test_what_is_in_memory_does_not_prove_that_storage_is_there(images, folder):
    """An image that is kept, or cropped again, can be read without its file."""
    kept = KeptRecords(images, IMAGES // 2, 2**30)
    for index in range(IMAGES // 2):
        kept[index]
    crops = TenCrops(images, 8, 8)
    crops[0]
    away = folder / "away"
    (folder / "train").rename(away)
    for source in (kept, crops):
        read = RecordReader(source, lambda name: False)
        with pytest.raises(Outage, match="the folder is gone, or empty"):
            read(len(source) - 1, bytes)
    away.rename(folder / "train")
    broken = Path(images[IMAGES - 1].name)
    content = broken.read_bytes()
    for source in (kept, crops):
        broken.unlink()
        read = RecordReader(source, lambda name: False)
        with pytest.raises(UnreadableRecord, match=re.escape(str(broken))):
            read(len(source) - 1, bytes)
        broken.write_bytes(content)


def test_an_outage_while_a_split_is_listed_passes(folder, monkeypatch):
    scan, fails = os.scandir, iter([True, True])

    def scandir(path):
        if next(fails, False):
            raise fault()
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    settings = SimpleNamespace(source="folder", path=str(folder), classes="", max_pixels=10**8)
    assert len(open_source(settings, "train")) == IMAGES


def test_a_file_of_records_that_is_out_of_reach_is_not_taken_for_a_damaged_one(tmp_path):
    (tmp_path / "records").write_bytes(b"")
    instruction = SimpleNamespace(filename=tmp_path / "records", examples_in_shard=1, take=1)
    shards = Shards("records", [instruction])
    with pytest.raises(OSError, match="Input/output error"):
        shards.check(0, RuntimeError("pread() failed: Input/output error; reading records"))
    with pytest.raises(DataError, match="cannot be read"):
        shards.check(0, RuntimeError("open() failed: Permission denied; reading records"))


@pytest.mark.parametrize(
    ("code", "error"), [(errno.EIO, OSError), (errno.EACCES, DataError), (errno.ENOENT, DataError)]
)
def test_files_of_records_are_tried_before_a_run_begins(tmp_path, monkeypatch, code, error):
    def refused(*_):
        raise fault(code)

    monkeypatch.setattr(os, "open", refused)
    instruction = SimpleNamespace(filename=tmp_path / "records", examples_in_shard=1, take=1)
    with pytest.raises(error, match=rf"{os.strerror(code)}|it is not there"):
        Shards("records", [instruction])


@pytest.mark.parametrize("seconds", ["soon", "-1", "nan"])
def test_a_time_to_wait_that_is_none_is_refused(monkeypatch, seconds):
    monkeypatch.setenv(faults.SECONDS, seconds)
    with pytest.raises(
        ConfigError, match=rf"^{faults.SECONDS}='{seconds}' is not a number of sec.* 300"
    ):
        retried("a file", lambda: None)


def test_an_error_that_neither_passes_nor_is_of_one_file_is_said(images, monkeypatch):
    monkeypatch.setattr(Failing, "code", errno.EINVAL)
    with pytest.raises(DataError, match=r"train #\d+ cannot be read: Invalid argument"):
        batches(Failing(images, lambda index: True), DamagedLog(IMAGES, 1.0))


def test_one_file_out_of_reach_among_damaged_ones_is_no_outage(images):
    """What can be read of the others is damaged, but it can be read."""

    class Torn(Failing):
        def __getitem__(self, index):
            if index == 7:
                raise fault()
            raise DamagedImage("torn")

    damaged = DamagedLog(IMAGES, 1.0)
    with pytest.raises(DataError, match="no image of"):
        batches(Torn(images, lambda index: False), damaged)
    assert len(damaged) > 0


# --- a run


@pytest.fixture
def config(folder):
    ENCODERS["tiny"] = TinyEncoder
    config = tiny_config("method=simclr")
    cropped_only(config)
    config.update_from_flattened_dict(
        {"steps": 24, "log.every_steps": 2, "checkpoint.every_steps": 100, "data.cache_gib": 0.0}
    )
    config.data.update({"source": "folder", "path": str(folder), "on_device": "never"})
    return config


@pytest.mark.exhaustive
def test_a_run_whose_images_vanish_saves_and_the_same_command_continues(
    config, folder, tmp_path, monkeypatch
):
    whole = pretrain(config, tmp_path / "whole")
    write = MetricsWriter.write

    def vanish(writer, step, metrics):
        write(writer, step, metrics)
        if step == 4:
            folder.rename(tmp_path / "away")

    with monkeypatch.context() as patched:
        patched.setattr(MetricsWriter, "write", vanish)
        with pytest.raises(Outage) as outage:
            pretrain(config, tmp_path / "run")
    assert code_of(outage.value) == EXIT_OUTAGE and "\n" not in str(outage.value)
    assert steps_saved(tmp_path / "run")[-1] >= 4
    (tmp_path / "away").rename(folder)
    state = pretrain(config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, state.params, whole.params)


@pytest.mark.exhaustive
def test_a_stop_while_the_images_are_gone_is_heard_at_once(config, folder, tmp_path, monkeypatch):
    monkeypatch.setenv(faults.SECONDS, "60")
    config.steps = 10**6
    write, vanished = MetricsWriter.write, []

    def vanish(writer, step, metrics):
        write(writer, step, metrics)
        if step == 4:
            folder.rename(tmp_path / "away")
            vanished.append(time.monotonic())
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()

    monkeypatch.setattr(MetricsWriter, "write", vanish)
    with pytest.raises(Outage) as outage:
        pretrain(config, tmp_path / "run")
    assert time.monotonic() - vanished[0] < 40
    assert code_of(outage.value) == EXIT_OUTAGE and steps_saved(tmp_path / "run")


@pytest.mark.exhaustive
def test_a_command_that_ends_waits_for_no_reading_thread(tmp_path):
    """Python joins the threads of its pools before it ends."""
    program = """
import errno, time
from concurrent.futures import ThreadPoolExecutor
from cassle_jax import command
from cassle_jax.faults import retried

def gone():
    raise OSError(errno.EIO, "gone")

def main():
    ThreadPoolExecutor().submit(retried, "it", gone, seconds=600.0)
    time.sleep(0.5)
    raise command.Stop("stopped", 3)

command.run(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=120, check=False)
    assert ended.returncode == 3


@pytest.mark.parametrize("passes", everyday([True, False], False))
def test_no_space_at_the_start_is_waited_for(config, tmp_path, monkeypatch, passes):
    write, fails = loop_module.write_config, iter([True] * (2 if passes else 1000))

    def full(*arguments):
        if next(fails, False):
            raise fault(errno.ENOSPC)
        write(*arguments)

    monkeypatch.setattr(loop_module, "write_config", full)
    config.steps = 1
    if passes:
        assert int(pretrain(config, tmp_path / "run").step) == 1
        return
    with pytest.raises(Outage, match=r"workdir=.*: No space left on device, for 0\.5 s") as ended:
        pretrain(config, tmp_path / "run")
    assert code_of(ended.value) == EXIT_OUTAGE


def test_a_lock_of_another_host_is_waited_for(tmp_path):
    holder = json.dumps({"host": "a-host-that-died", "pid": 7, "since": "today"})
    (tmp_path / "lock").write_text(holder)
    descriptor = os.open(tmp_path / "lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)

    def take():
        return folder_held(tmp_path).__enter__()

    with pytest.raises(
        Outage, match=r"in use by another run .process 7 on a-host-that-died"
    ) as held:
        take()
    assert code_of(held.value) == EXIT_OUTAGE
    threading.Timer(0.2, lambda: os.close(descriptor)).start()
    take()


def test_a_checkpoint_that_fails_to_be_read_once_is_not_given_up(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, small_state(step), {"step": step})
    checkpoints.close()
    read, fails = reading.read_checkpoint, iter([True, True])

    def failing(checkpoint, like):
        if next(fails, False):
            raise fault(errno.ESTALE)
        return read(checkpoint, like)

    monkeypatch.setattr(reading, "read_checkpoint", failing)
    monkeypatch.setenv(faults.SECONDS, "60")
    checkpoints = Checkpoints(tmp_path, keep=2)
    state, _ = checkpoints.restore(small_state(0))
    assert int(state.step) == 2
    monkeypatch.setattr(reading, "read_checkpoint", lambda *_: (_ for _ in ()).throw(fault()))
    monkeypatch.setenv(faults.SECONDS, "0.5")
    with pytest.raises(Outage, match="checkpoint 2: Input/output error"):
        checkpoints.restore(small_state(0))
    checkpoints.close()
    assert steps_saved(tmp_path) == [1, 2] and not (tmp_path / "unreadable").exists()


def of_a_library(name, *bases, **attributes):
    """An error of an object store's library, which sets no errno."""
    kind = type(name, bases or (Exception,), {"__module__": "botocore.exceptions", **attributes})
    return kind("it failed")


@pytest.mark.parametrize(
    "error",
    [
        *map(fault, (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EHOSTDOWN)),
        *map(fault, (errno.ENOTCONN, errno.EREMOTEIO, errno.EDQUOT, errno.ENOSPC)),
        TimeoutError("no answer"),
        ConnectionResetError("by peer"),
        of_a_library("ReadTimeoutError"),
        of_a_library("EndpointConnectionError"),
        of_a_library("ServerDisconnectedError", OSError),
        of_a_library("HttpError", code=503),
        of_a_library("ClientResponseError", status=429),
        RuntimeError("open() failed: Too many open files; opening x"),
    ],
)
def test_faults_of_a_machine_or_a_store_pass(error):
    assert passing(error)


@pytest.mark.parametrize(
    "error",
    [
        *map(fault, (errno.EACCES, errno.EROFS, errno.ENOENT, errno.EFBIG, errno.EINVAL)),
        of_a_library("HttpError", code=404),
        of_a_library("HttpError", code=lambda: 503),
        of_a_library("NoCredentialsError"),
    ],
)
def test_what_somebody_must_mend_does_not_pass(error):
    assert passing(error) is None


def test_too_many_open_files_are_no_wrong_setting(images, monkeypatch):
    failing = Failing(images, lambda index: True)
    monkeypatch.setattr(Failing, "code", errno.EMFILE)
    with pytest.raises(Outage, match=r"Too many open files.*; the same command continues") as ended:
        batches(failing, DamagedLog(IMAGES, 0.0))
    assert code_of(ended.value) == EXIT_OUTAGE


@pytest.mark.parametrize("source", ["folder", "tfds", "webdataset"])
def test_a_folder_out_of_reach_is_not_missing(folder, monkeypatch, source):
    """Some paths' own `is_dir` says that it is not a folder."""
    monkeypatch.setenv(faults.SECONDS, "60")
    fails, look = iter([True, True]), os.stat

    def stat(path, *arguments, **settings):
        if not isinstance(path, int) and os.fspath(path) == str(folder) and next(fails, False):
            raise fault(errno.ESTALE)
        return look(path, *arguments, **settings)

    monkeypatch.setattr(os, "stat", stat)
    names = {"name": "mnist", "path": str(folder), "classes": "", "max_pixels": 10**8}
    settings = SimpleNamespace(source=source, **names)
    if source == "folder":
        assert len(open_source(settings, "train")) == IMAGES
    else:
        with pytest.raises(DataError, match=r"is not prepared|has no tar files"):
            open_source(settings, "train")
    assert not next(fails, False)


def test_the_page_has_the_codes_and_faults_of_the_program():
    page = (Path(__file__).parents[1] / "docs" / "storage.md").read_text()
    listed = re.split(r"faults\s+are\s+temporary", page)[1].split("Everything else")[0]
    assert re.findall(r"\bE[A-Z]{2,}\b", listed) == list(faults.TEMPORARY)
    table = page.split("| exit code | started again |")[1].split("\n\n")[0]
    for row in table.splitlines()[2:]:
        _, _, codes, again = (cell.strip() for cell in row.strip("|").split("|"))
        known = {int(code) for code in re.findall(r"\d+", codes)}
        assert known <= {1, 2, 3, 69, 74, 75, 134}, row
        if again in ("yes", "no"):
            assert known and (known <= {EXIT_OUTAGE, EXIT_PREEMPTED, 134}) == (again == "yes"), row


def test_passing_looks_at_causes_and_at_what_libraries_say():
    assert passing(caused(DataError("x"), fault())).errno == errno.EIO
    assert passing(ValueError("INTERNAL: [os_error_code: 'ESTALE' Stale file handle]"))
    assert passing(ValueError("File exists")) is None and passing(None) is None
