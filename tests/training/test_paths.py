"""A path is a path: whatever its characters, what is written there is found there again."""

import contextlib
import errno
import os
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from ml_collections import ConfigDict
from PIL import Image

from cassle_jax.checks import ConfigError, UserError
from cassle_jax.command import EXIT_NOT_SAVED, Stop
from cassle_jax.config_files import CONFIGS
from cassle_jax.data import DamagedLog, DataError, check_outside, open_source
from cassle_jax.data.datasets import open_dataset
from cassle_jax.data.requested import datasets_in
from cassle_jax.evaluate import evaluate_command, named_path
from cassle_jax.export import export_command
from cassle_jax.faults import hurry, passing
from cassle_jax.models import ENCODERS
from cassle_jax.prepare.dataset import prepare
from cassle_jax.prepare.plan import Preparation
from cassle_jax.pretrain import pretrain_command, set_up_devices
from cassle_jax.storage import cache_folder, check_no_file, make_shared, path_of
from cassle_jax.subjects import open_subject
from cassle_jax.sweep.experiment import run_table
from cassle_jax.sweep.space import SweepRequest
from cassle_jax.sweep.sweep import sweep
from cassle_jax.sweep.table import Row, Table
from cassle_jax.training import checkpoints as checkpoints_module
from cassle_jax.training import read_back as read_back_module
from cassle_jax.training.checksums import checksums, checksums_of, host_checksum
from cassle_jax.training.loop import pretrain
from cassle_jax.training.metrics import read_metrics
from cassle_jax.training.read_back import ReadBack
from cassle_jax.training.run_weights import read_run
from cassle_jax.training.warm_start import check_weights_file
from tests.tiny import TinyEncoder, cropped_only, tiny_config
from tests.training.processes import steps_saved
from tests.training.test_faults import small_state

# Whatever a shell, a glob, a URL or a flag might take for something else.
AWKWARD = "a[1] {b}=*?\n#%20;$HOME'\"&|~ ü"


@pytest.fixture(scope="module")
def config():
    ENCODERS["tiny"] = TinyEncoder
    config = tiny_config("method=simclr")
    cropped_only(config)
    config.steps = 6
    return config


@pytest.mark.exhaustive
def test_a_run_lives_in_a_folder_of_any_name(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = f"runs/{AWKWARD}"
    state = pretrain(config, workdir)
    assert steps_saved(Path(workdir)) == [5, 6]
    again = pretrain(config, workdir)
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)
    assert read_run(workdir).card["step"] == 6
    assert [step for step, _ in read_metrics(workdir)["loss"]] == [5, 6]
    assert os.listdir("runs") == [AWKWARD]  # noqa: PTH208


def test_users_who_may_write_to_a_workdir_may_continue_the_run(config, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    workdir.chmod(0o2775)
    previous = os.umask(0o022)
    try:
        pretrain(config, workdir)
    finally:
        os.umask(previous)
    files = [each for each in workdir.glob("**/*") if each.is_file()]
    files = [each for each in files if each.name != "views.png"]  # the tests draw another
    assert {"metrics.jsonl", "config.json", "commit_success.txt"} <= {each.name for each in files}
    assert {oct(each.stat().st_mode & 0o777) for each in files} == {oct(0o664)}
    inside = [each for each in workdir.rglob("*") if each.is_dir()]
    assert {"checkpoints", "6", "damaged", "tensorboard"} <= {each.name for each in inside}
    assert {oct(each.stat().st_mode & 0o7777) for each in inside} == {oct(0o2775)}


@pytest.mark.skipif(not Path("/proc/fs").exists(), reason="no folder that not even root writes to")
def test_a_folder_of_checkpoints_that_takes_no_files_is_reported_before_the_first_step(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr("cassle_jax.training.loop.LAST_SAVE_SECONDS", 0.0)
    (tmp_path / "checkpoints").symlink_to("/proc/fs")
    with pytest.raises(ConfigError, match=f"^workdir={tmp_path}/checkpoints cannot be written: "):
        pretrain(config, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("file", "file/a"):
        with pytest.raises(OSError, match="file"):
            make_shared(tmp_path / folder)


@pytest.mark.parametrize(
    ("target", "reason"),
    [("link", "Too many levels of symbolic links"), ("gone", "is a link to what is not there")],
)
def test_a_link_that_leads_nowhere_is_one_line(config, tmp_path, target, reason):
    """In a circle, it was a traceback on Python 3.11; to nothing, it was said to exist."""
    (tmp_path / "link").symlink_to(tmp_path / target)
    for below in ("link", "link/run"):
        with pytest.raises(ConfigError, match=f"^workdir={tmp_path}/{below} cannot .*: .*{reason}"):
            pretrain(config, tmp_path / below)


def test_a_leading_tilde_is_the_home_folder(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pretrain(config, "~/run")
    assert steps_saved(tmp_path / "run") == [5, 6]
    assert read_run("~/run").card["step"] == 6
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run"]
    assert str(path_of("~no such user/x")) == "~no such user/x"
    assert str(path_of("gs://bucket/~/x")) == "gs://bucket/~/x"


def test_without_a_home_no_folder_is_called_tilde(config, tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # HOME unset, an unknown user
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    for takes_a_path in (lambda: pretrain(config, "~/run"), cache_folder):
        with pytest.raises(ConfigError, match=r"^~/.* no home is known; set HOME, or write it in"):
            takes_a_path()
    assert not list(tmp_path.iterdir())


def test_a_null_character_is_reported_in_one_line(config, tmp_path):
    with pytest.raises(ConfigError, match=r"run\\x00' is not a path: it has a null character"):
        pretrain(config, f"{tmp_path}/run\0")
    config = config.copy_and_resolve_references()
    config.data.update({"source": "folder", "path": f"{tmp_path}/\0"})
    with pytest.raises(ConfigError, match="null character"):
        open_source(config.data, "train")


@pytest.mark.parametrize("name", ["a\\b", "a\udcffb", "logs:"])
def test_what_arrays_cannot_be_written_to_is_refused_before_the_first_step(config, tmp_path, name):
    with pytest.raises(ConfigError, match=r"workdir='.*' has a backslash or bytes .* not UTF-8"):
        pretrain(config, tmp_path / name / "run")
    assert not (tmp_path / name).exists()
    row = Row("a", f"{CONFIGS}/quickstart.py:method=simclr", ("steps=1",))
    for many in (
        lambda: run_table(Table("A", "?", (row,), seeds=(0,)), tmp_path / name),
        lambda: sweep(SweepRequest(f"{CONFIGS}/quickstart.py", grid="seed=0"), tmp_path / name),
    ):
        with pytest.raises(ConfigError, match=r"^to='.*' has a backslash or bytes"):
            many()
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("root", ["/s3", "/gs", "/az", "/hf"])
def test_a_local_folder_that_libraries_take_for_an_address_is_refused(config, tmp_path, root):
    """Where a bucket is mounted; a run in /s3/run went to s3://run."""
    for setting, command in (
        ("workdir", lambda: pretrain(config, f"{root}/run")),
        ("to", lambda: evaluate_command(runs=["a"], datasets=["motifs"], to=f"{root}/run")),
        ("run", lambda: open_subject(f"{root}/run")),
        ("run", lambda: export_command(run=f"{root}/run", to=str(tmp_path))),
        ("data.path", lambda: open_source(of_tfds(config, f"{root}/run"), "train")),
    ):
        said = f"^{setting}={root}/run is a local path that libraries take for {root[1:]}://run; "
        with pytest.raises(ConfigError, match=said):
            command()
    with pytest.raises(ConfigError, match="is not a local file"):  # files may lie there
        check_weights_file(ConfigDict({"path": f"{root}/run"}), tmp_path)


def of_tfds(config, path):
    """The `data` settings of a tfds builder below a path."""
    data = config.data.copy_and_resolve_references()
    data.update({"source": "tfds", "name": "cifar10", "path": path})
    return data


def test_an_object_store_whose_package_is_missing_is_refused_in_one_line(config, monkeypatch):
    def missing(*_):
        raise ImportError("Please install gcsfs")

    monkeypatch.setenv("EPATH_USE_TF", "false")
    monkeypatch.setattr(type(backend.fsspec_backend), "fs", missing)
    for command in (
        lambda: pretrain(config, "gs://b/run"),
        lambda: open_subject("gs://b/run"),
        lambda: open_source(of_tfds(config, "gs://b/run"), "train"),
        lambda: open_dataset("cifar10", data_dir="gs://b/run"),
    ):
        with pytest.raises(UserError, match=r"gs://b/run is on an object store: .* gcsfs"):
            command()
    with pytest.raises(DataError, match=r"data_dir='s3://b' is on S3, .*; mount it"):
        open_dataset("celeba", data_dir="s3://b")
    with pytest.raises(DataError, match=r"path='s3://b/mit67' is on an object store; mount it"):
        open_dataset("mit67", data_dir="s3://b")


def test_a_path_below_a_folder_that_was_deleted_is_reported_in_one_line(
    config, tmp_path, monkeypatch
):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError, match=r"^run cannot be found: the current folder was deleted"):
        pretrain(config, "run")


@pytest.mark.parametrize("name", [AWKWARD, "a\\b", "a\udcffb", "comma,comma"])
def test_images_and_class_lists_lie_in_a_folder_of_any_name(config, tmp_path, name, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    root = tmp_path / name
    (root / "train" / "cats").mkdir(parents=True)
    (root / "train" / "cats" / "1.png").write_bytes(b"image")
    (root / "classes.txt").write_text("cats\n")
    data = config.copy_and_resolve_references().data
    for path in (root, f"~/{name}"):
        data.update({"source": "folder", "path": str(path), "classes": f"{path}/classes.txt"})
        assert open_source(data, "train")[0].image == b"image"
    assert datasets_in(f"cifar10,folder:{root}") == ("cifar10", f"folder:{root}")
    damaged = DamagedLog(10, 0.5, root / "damaged")
    damaged.add("1.png", "torn")
    assert DamagedLog(10, 0.5, root / "damaged").remembered == ("1.png",)


@pytest.mark.parametrize("split", ["", "train"])
def test_a_run_among_its_images_is_refused_before_it_adds_its_own(config, tmp_path, split):
    """Its sheet of views would be one more image: the same command could not continue it."""
    (tmp_path / split / "a").mkdir(parents=True)
    for number in range(16):
        Image.new("RGB", (20, 20)).save(tmp_path / split / "a" / f"{number}.png")
    config = config.copy_and_resolve_references()
    config.data.update({"source": "folder", "path": str(tmp_path), "train_split": split})
    for place in (tmp_path / split / "run", tmp_path / "link" / "run"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / split)
        with pytest.raises(ConfigError, match=f"workdir=.*run lies among the images of {tmp_path}"):
            pretrain(config, place)
        assert not place.exists()


def test_a_run_is_among_no_images_in_a_hidden_folder_but_in_those_of_its_probe(config, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for number in range(16):
            Image.new("RGB", (20, 20)).save(tmp_path / split / "a" / f"{number}.png")
    config = config.copy_and_resolve_references()
    config.data.update({"source": "folder", "path": str(tmp_path)})
    sources = [open_source(config.data, split) for split in ("train", "val")]
    check_outside("workdir", tmp_path / "train" / ".runs" / "a", sources[0])
    with pytest.raises(ConfigError, match=r"workdir=.*run lies among the images of .*val"):
        check_outside("workdir", tmp_path / "val" / "run", sources[1])
    config.probe.update({"every_epochs": 1, "test_split": "val"})
    with pytest.raises(ConfigError, match="lies among the images"):
        pretrain(config, tmp_path / "val" / "run")


def test_a_list_of_datasets_holds_paths_with_commas():
    listed = "motifs, cifar10=/a,b=c/[1],folder:/x y,z,food101"
    wanted = ("motifs", "cifar10=/a,b=c/[1]", "folder:/x y,z", "food101")
    assert datasets_in(listed) == wanted
    assert datasets_in("cifar10,cifra10") == ("cifar10", "cifra10")
    assert datasets_in("") == ()


def test_a_path_with_an_equals_sign_is_no_name(tmp_path):
    (tmp_path / "lr=0.1").mkdir()
    assert named_path(f"{tmp_path}/lr=0.1") == ("", f"{tmp_path}/lr=0.1")
    assert named_path(f"cassle={tmp_path}/lr=0.1") == ("cassle", f"{tmp_path}/lr=0.1")
    assert named_path("runs/plain") == ("", "runs/plain")
    assert named_path("cassle=gs://bucket/lr=0.1") == ("cassle", "gs://bucket/lr=0.1")


@pytest.mark.parametrize("written", ["https://host/moco_v2.pth", "runs/hdfs://x", "name=file:///x"])
def test_a_scheme_that_is_unknown_is_reported_in_one_line(written):
    """As in a link to weights that somebody copied."""
    with pytest.raises(ConfigError, match="has a scheme that is unknown; use a local path, gs://"):
        named_path(written), open_subject(written)


@pytest.mark.parametrize("place", ["/dev/null", "/dev/null/x", "file", "file/x/y"])
def test_a_file_or_device_in_the_place_of_a_folder_is_refused_before_anything_starts(
    config, tmp_path, monkeypatch, place
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    table = Table("t", "q", (Row("plain", f"{CONFIGS}/quickstart.py:method=simclr"),))
    preparation = Preparation("mine", short_side=8, quality=90, shard_mib=1)
    evaluated = {"runs": ["none"], "datasets": ["scenes"]}
    config = config.copy_and_resolve_references()
    config.compilation_cache = place
    for setting, command in (
        ("to", lambda: sweep(SweepRequest(f"{CONFIGS}/quickstart.py", grid="seed=0"), place)),
        ("to", lambda: run_table(table, place, toy=True)),
        ("to", lambda: export_command(run="run", to=place)),
        ("--to", lambda: prepare(config.data, ["train"], place, preparation)),
        ("to", lambda: evaluate_command(**evaluated, to=place)),
        ("cache", lambda: evaluate_command(**evaluated, to="page", cache=place)),
        ("workdir", lambda: pretrain(config, place)),
        ("compilation_cache", lambda: set_up_devices(config)),
    ):
        said = (
            f"^{setting}={place} is not a folder: "
            "(/dev/null is a pipe or a device|file is a file); "
        )
        with pytest.raises(ConfigError, match=said):
            command()
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("to", ["", "gs://bucket/x"])
def test_what_is_written_to_a_local_folder_names_one(to, tmp_path, monkeypatch):
    """`gs://bucket/x` would be `gs:/bucket/x` in the folder where the command runs."""
    monkeypatch.chdir(tmp_path)
    table = Table("t", "q", (Row("plain", f"{CONFIGS}/quickstart.py:method=simclr"),))
    for command in (
        lambda: sweep(SweepRequest(f"{CONFIGS}/quickstart.py", grid="seed=0"), to),
        lambda: run_table(table, to, toy=True),
        lambda: export_command(run="run", to=to),
        lambda: evaluate_command(runs=["run"], datasets=["motifs"], to=to),
    ):
        with pytest.raises(ConfigError, match=f"^to={to} is not a local folder; give the one"):
            command()
    assert not list(tmp_path.iterdir())


def test_nothing_lies_in_the_place_of_a_folder_of_an_object_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gs:").touch()  # a local path would begin here
    check_no_file("compilation_cache", "gs://bucket/compiled")


# --- the first checkpoint is read back


def test_a_checkpoint_that_lacks_its_arrays_ends_no_run_with_success(
    config, tmp_path, monkeypatch, caplog
):
    # What a library did that looked for the parts of a checkpoint in another folder.
    monkeypatch.setattr(type(epath.Path(".")), "glob", lambda folder, pattern: iter(()))
    with (
        caplog.at_level("WARNING", logger="cassle_jax"),
        pytest.raises(Stop, match=r"checkpoint 6 cannot be read back: .*nor could any") as stop,
    ):
        pretrain_command(config, tmp_path / "run")
    assert stop.value.code == EXIT_NOT_SAVED and "\n" not in str(stop.value)
    assert sum("checkpoint 5 cannot be read back" in each for each in caplog.messages) == 1


def test_a_run_that_never_saved_is_not_said_to_continue(tmp_path, monkeypatch):
    checkpoints = checkpoints_module.Checkpoints(tmp_path, keep=1)
    with contextlib.closing(checkpoints), monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_is_saved", lambda *_: False)
        said = "none is saved yet, so the same command starts from step 0$"
        with pytest.raises(checkpoints_module.NotSaved, match=said):
            checkpoints.save_surely(1, small_state(1), {}, seconds=0.0, after_stop=0.0)


def test_reading_back_notices_another_number(tmp_path, monkeypatch):
    saved = {"step": 1, "checksums": checksums(small_state(1), {"step": 1})}
    checkpoints = checkpoints_module.Checkpoints(tmp_path, keep=2)
    checkpoints.save_surely(1, small_state(1), {"step": 1}, seconds=0.0, after_stop=0.0)
    checkpoints.close()
    for state, problem in (
        (small_state(1), None),
        (small_state(2), "its step, params, memory differ"),
    ):
        sums = checksums(state, {"step": 1})
        sums["data"] = saved["checksums"]["data"]
        read_back = ReadBack(
            epath.Path(tmp_path, "checkpoints", "1"), state, {"step": 1, "checksums": sums}
        )
        read_back.start()
        assert read_back.ended(wait=True)
        assert (read_back.problem or "").startswith(problem or "")
        assert (read_back.problem is None) == (problem is None)


def test_a_checkpoint_that_its_successor_replaces_while_it_is_read_back_proves_nothing(
    tmp_path, monkeypatch, caplog
):
    """A stopped run waits for no reading; it ended with 74, although its last step was saved."""
    first, read = tmp_path / "checkpoints" / "1", ReadBack._read

    def read_late(self):
        while first.exists():
            time.sleep(0.01)
        read(self)

    def ended_by_now(self, *, wait):
        self._thread.join(0.0 if first.exists() else None)
        return not self._thread.is_alive()

    monkeypatch.setattr(ReadBack, "_read", read_late)
    checkpoints = checkpoints_module.Checkpoints(tmp_path, keep=1)
    with contextlib.closing(checkpoints), caplog.at_level("WARNING", logger="cassle_jax"):
        checkpoints.save(1, small_state(1), {"step": 1})
        checkpoints._settle()
        monkeypatch.setattr(ReadBack, "ended", ended_by_now)
        hurry.set()
        try:
            checkpoints.save_surely(2, small_state(2), {"step": 2}, seconds=0.0, after_stop=0.0)
        finally:
            hurry.clear()
    assert checkpoints.newest() == 2 and not caplog.messages


@pytest.mark.parametrize("stopped", [False, True])
def test_storage_that_cannot_be_read_for_now_does_not_end_a_run_for_good(
    tmp_path, monkeypatch, stopped
):
    """Nothing is known of the checkpoint: with 74, no launch script would start the run again."""

    def unreadable(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setenv("CASSLE_STORAGE_SECONDS", "0")
    monkeypatch.setattr(read_back_module, "read_checkpoint", unreadable)
    checkpoints = checkpoints_module.Checkpoints(tmp_path, keep=1)
    monkeypatch.setattr(checkpoints_module.hurry, "is_set", lambda: stopped)
    said = "checkpoint 1 cannot be read back: .* error, for 0 s; .*, nor could any before it$"
    fails = pytest.raises(checkpoints_module.NotSaved, match=said)
    with contextlib.closing(checkpoints), contextlib.nullcontext() if stopped else fails as failed:
        checkpoints.save_surely(1, small_state(1), {"step": 1}, seconds=0.0, after_stop=0.0)
    assert stopped or passing(failed.value).errno == errno.EIO  # so that it ends with 69


def test_the_host_computes_the_devices_checksums():
    parts = vars(small_state(3))
    on_host = {name: host_checksum(jax.device_get(part)) for name, part in parts.items()}
    assert on_host == checksums_of(parts)
