"""Workdirs on object stores: fsspec's store in memory stands in for one.

The arrays of checkpoints are written by TensorStore, which speaks to gs:// and s3:// itself; they
are not part of this.
"""

import contextlib
import errno
import os
import time
from typing import ClassVar

import fsspec
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from cassle_jax.checks import ConfigError
from cassle_jax.data import DamagedLog
from cassle_jax.interop.errors import WeightsError
from cassle_jax.lock import folder_held
from cassle_jax.storage import (
    GrowingFile,
    free_bytes,
    kept_json,
    make_shared,
    on_object_store,
    write_whole,
    written_whole,
)
from cassle_jax.training.checkpoints import Checkpoints
from cassle_jax.training.loop import pretrain
from cassle_jax.training.metrics import MetricsWriter, append_line, read_lines, read_metrics
from cassle_jax.training.run_weights import read_run
from cassle_jax.training.saved_config import read_config, write_config
from cassle_jax.training.workdir import known_path
from tests.tiny import tiny_config


class Bucket(MemoryFileSystem):
    """S3 in memory: nothing can be appended to."""

    protocol = ("s3",)
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("s3://").strip("/")

    def _open(self, path, mode="rb", **arguments):
        assert "a" not in mode and "+" not in mode
        return super()._open(path, mode, **arguments)


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setenv("EPATH_USE_TF", "false")
    bucket = Bucket()

    def file_system(self, path):
        return bucket if str(path).startswith("s3://") else fsspec.filesystem("file")

    monkeypatch.setattr(type(backend.fsspec_backend), "fs", file_system)
    return epath.Path("s3://bucket/run")


def test_what_is_an_object_store():
    assert on_object_store("gs://bucket/run") and on_object_store(epath.Path("s3://bucket/run"))
    assert not on_object_store("/gs/run") and not on_object_store("run")
    assert free_bytes("gs://bucket/run") is None and free_bytes(".") > 0


def test_metrics_are_kept_and_continued(bucket):
    for begin, end in ((0, 5), (3, 6)):
        writer = MetricsWriter(bucket, begin)
        for step in range(begin + 1, end + 1):
            writer.write(step, {"loss": float(step)})
            assert read_lines(bucket / "metrics.jsonl")[-1]["step"] == step
        writer.close()
    assert [step for step, _ in read_metrics(bucket)["loss"]] == [1, 2, 3, 4, 5, 6]
    assert len(list((bucket / "tensorboard").iterdir())) == 2


def test_checkpoints_lie_in_the_store_and_in_no_local_folder(bucket, tmp_path, monkeypatch):
    """An address that epath resolved was `s3:/bucket/run` in the current folder."""
    monkeypatch.chdir(tmp_path)
    (bucket / "checkpoints" / "7" / "commit_success.txt").write_text("")
    with contextlib.closing(Checkpoints(known_path(str(bucket)), keep=1)) as checkpoints:
        assert checkpoints.newest() == 7
    write_config(tiny_config(), bucket)
    with pytest.raises(WeightsError, match="has checkpoints, and none of them can be read"):
        read_run(bucket)
    assert not list(tmp_path.iterdir())


def test_the_other_files_of_a_run_are_kept(bucket):
    config = tiny_config()
    write_config(config, bucket)
    assert read_config(bucket).steps == config.steps
    append_line(bucket / "starts.jsonl", {"step": 0})
    append_line(bucket / "starts.jsonl", {"step": 7})
    assert [line["step"] for line in read_lines(bucket / "starts.jsonl")] == [0, 7]
    DamagedLog(10, 0.5, bucket / "damaged").add("a.png", "torn")
    assert DamagedLog(10, 0.5, bucket / "damaged").remembered == ("a.png",)
    with folder_held(bucket), folder_held(bucket):
        pass  # no locks there, and nobody is refused


def test_a_store_that_fails_for_a_while_ends_nothing(bucket, monkeypatch, caplog):
    file = GrowingFile(bucket / "metrics.jsonl")
    file.append(b"1\n")
    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "_open", lambda *_, **__: 1 / 0)
        file.append(b"2\n")
        file.append(b"3\n")
    assert (bucket / "metrics.jsonl").read_bytes() == b"1\n"
    file.append(b"4\n")
    assert (bucket / "metrics.jsonl").read_bytes() == b"1\n2\n3\n4\n"
    assert sum("cannot be written for now" in each for each in caplog.messages) == 1


@pytest.mark.parametrize("stays", [True, False])
def test_what_could_not_be_written_is_tried_once_more_at_the_end(
    bucket, monkeypatch, caplog, stays
):
    file = GrowingFile(bucket / "metrics.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "_open", lambda *_, **__: 1 / 0)
        file.append(b"123\n")
        if stays:
            file.close()
    if not stays:
        file.close()
        assert (bucket / "metrics.jsonl").read_bytes() == b"123\n"
    assert ("metrics.jsonl lacks its last 4 bytes" in caplog.text) == stays


def test_a_file_system_without_locks_refuses_nobody(tmp_path, monkeypatch, caplog):
    def refused(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr("fcntl.flock", refused)
    with (
        caplog.at_level("INFO", logger="cassle_jax"),
        folder_held(tmp_path),
        folder_held(tmp_path),
    ):
        pass
    assert caplog.text.count("ensure that only one run uses it") == 2


def test_a_file_is_never_half_written(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "config.json")
    write_whole(path, b"old")
    with monkeypatch.context() as patched:
        patched.setattr(type(path), "write_bytes", refuse)
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["config.json"]


def test_two_writers_and_a_stopped_one_leave_whole_files(tmp_path, monkeypatch):
    path, killed = tmp_path / "found", tmp_path / "found.0a1b2c3d.partial"
    killed.write_bytes(b"half")
    with written_whole(path) as slow:
        slow.write(b"slow")
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: 1e10)  # a machine whose clock is ahead
            write_whole(path, b"quick")
        assert path.read_bytes() == b"quick" and killed.exists()  # it may be being written
    assert path.read_bytes() == b"slow"
    os.utime(killed, (0, 0))
    for stopped in (KeyboardInterrupt, MemoryError):
        with pytest.raises(stopped), written_whole(path) as file:
            file.write(b"half")
            raise stopped
    write_whole(path, "caf\udce9")
    assert path.read_bytes() == rb"caf\udce9"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("pattern", ["*", "a*", "[ab]?.txt", "*/c.txt", ".*", "none*", "a.txt/*"])
def test_only_a_pattern_is_one(tmp_path, pattern):
    folder = tmp_path / "run[1]*"
    (folder / "a.d").mkdir(parents=True)
    for name in ("a.txt", "b1.txt", ".hidden", "a.d/c.txt"):
        (folder / name).touch()
    found = folder.glob(pattern)
    expected = {str(path) for path in found if pattern[0] == "." or path.name[0] != "."}
    assert {str(path) for path in epath.Path(folder).glob(pattern)} == expected
    assert not list((epath.Path(folder) / "missing").glob(pattern))


def refuse(path, content):
    with path.open("wb") as file:
        file.write(content[:1])
    raise OSError(28, "No space left on device")


def test_an_empty_workdir_is_not_the_current_folder():
    with pytest.raises(ConfigError, match=r"^workdir='' names no folder"):
        pretrain(tiny_config(), "")


@pytest.mark.parametrize(
    "workdir", ["memory://run", "file:///tmp/run", "gcs://bucket/run", "s3:/bucket/run"]
)
def test_an_unknown_scheme_is_no_local_folder(workdir):
    with pytest.raises(ConfigError, match=r"workdir=\S+ has a scheme that is unknown; use a local"):
        pretrain(tiny_config(), workdir)


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"\0\0\0"])
def test_json_that_is_missing_or_torn_counts_as_none(tmp_path, content):
    if content is not None:
        (tmp_path / "plan.json").write_bytes(content)
    assert kept_json(tmp_path / "plan.json") is None
    write_whole(tmp_path / "plan.json", '{"a": 1}')
    assert kept_json(tmp_path / "plan.json") == {"a": 1}


def test_a_file_system_that_is_gone_is_noticed_through_a_link(tmp_path, monkeypatch):
    (tmp_path / "mount" / "runs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "mount" / "runs")
    mounts = {"/", str(tmp_path / "mount")}
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) in mounts)
    make_shared(tmp_path / "link" / "run")
    mounts.remove(str(tmp_path / "mount"))
    with pytest.raises(OSError, match="mount is not mounted any more"):
        make_shared(tmp_path / "link" / "run")
