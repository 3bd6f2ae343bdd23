"""Whatever goes wrong around a run, nothing is lost, and it says in a line what went wrong."""

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from orbax.checkpoint._src.serialization import tensorstore_utils

from cassle_jax.checks import ConfigError
from cassle_jax.command import EXIT_NOT_SAVED, Stop
from cassle_jax.data import DataError
from cassle_jax.faults import passing
from cassle_jax.lock import folder_held
from cassle_jax.models import ENCODERS
from cassle_jax.pretrain import pretrain_command
from cassle_jax.training import checkpoints as checkpoints_module
from cassle_jax.training import loop as loop_module
from cassle_jax.training.checkpoints import Checkpoints, NotSaved
from cassle_jax.training.loop import Preempted, pretrain
from cassle_jax.training.metrics import MetricsWriter, read_lines, read_metrics
from cassle_jax.training.run_weights import read_run
from cassle_jax.training.saved_config import read_config
from cassle_jax.training.state import TrainState
from tests.tiny import TinyEncoder, cropped_only, tiny_config
from tests.training.processes import assert_same, ends, start, steps_saved

ROOT = Path(__file__).parents[2]
REPEATS = int(os.environ.get("CASSLE_FAULTS", "1"))


def values(state):
    parts = (state.params, state.batch_stats, state.target_params, state.memory, state.opt_state)
    return jax.device_get(parts)


def assert_identical(one, other):
    jax.tree.map(np.testing.assert_array_equal, values(one), values(other))


@pytest.fixture(scope="module")
def config():
    config = tiny_config("method=simclr")
    cropped_only(config)
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config):
    """A run that nothing happened to, and its last state."""
    ENCODERS["tiny"] = TinyEncoder
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, pretrain(config, workdir)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of the run that nothing happened to."""
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def at_step(monkeypatch):
    """Lets something happen when the metrics of a step have been written."""
    happens = {}
    write = MetricsWriter.write

    def and_then(writer, step, metrics):
        write(writer, step, metrics)
        if step in happens:
            happens.pop(step)()

    monkeypatch.setattr(MetricsWriter, "write", and_then)
    return happens


def once_saved(workdir, step, then):
    """What happens when the checkpoint of a step, which is written meanwhile, is complete."""

    def wait():
        until = time.monotonic() + 600
        while step not in steps_saved(workdir):
            assert time.monotonic() < until
            time.sleep(0.01)
        then()

    return wait


def leftovers(workdir):
    return [path.name for path in (workdir / "checkpoints").glob("*tmp*")]


# --- kill -9 during a checkpoint write


@pytest.mark.exhaustive
def test_killed_while_a_checkpoint_is_written_it_ends_bit_identical(tmp_path):
    """Every life of the run is ended in the middle of a write; `REPEATS` lives."""
    steps = f"steps={20 + 5 * REPEATS}"
    settings = (steps, "checkpoint.every_steps=1")
    codes, errors = ends(start(tmp_path / "whole", 1, *settings))
    assert codes == [0], errors
    killed, torn = tmp_path / "killed", 0
    for life in range(REPEATS):
        before = max(steps_saved(killed), default=0)
        (process,) = start(killed, 1, *settings)
        until = time.monotonic() + 300
        while max(steps_saved(killed), default=0) <= before or not leftovers(killed):
            assert process.poll() is None and time.monotonic() < until, ends([process])
        time.sleep(random.uniform(0, 0.02))
        seen = max(steps_saved(killed))
        process.send_signal(signal.SIGKILL)
        ends([process])
        half_written = leftovers(killed)
        torn += bool(half_written)
        print(f"life {life}: killed at {seen}, half written {half_written}, {steps_saved(killed)}")
        assert max(steps_saved(killed)) >= seen > before
    codes, errors = ends(start(killed, 1, *settings))
    assert codes == [0] and not leftovers(killed), errors
    print(f"{torn} of {REPEATS} kills left a half-written checkpoint")
    assert_same(killed, tmp_path / "whole")


# --- a full disk


class _Tmpfs:
    """A file system of a few megabytes; needs the right to mount one."""

    options = "size=6m"

    def __init__(self, folder):
        self.folder = folder / "disk"
        self.folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", self.options, "tmpfs", str(self.folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not permitted here")

    def fill(self):
        with contextlib.suppress(OSError), (self.folder / "ballast").open("wb", 0) as file:
            while True:
                file.write(bytes(4096))

    def free(self):
        (self.folder / "ballast").unlink()

    def close(self):
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


class _Inodes(_Tmpfs):
    """A file system that has room, and no number left for another file or folder."""

    options = "size=60m,nr_inodes=1000"

    def fill(self):
        (self.folder / "ballast").mkdir()
        with contextlib.suppress(OSError):
            for number in range(1000):
                (self.folder / "ballast" / str(number)).touch()

    def free(self):
        shutil.rmtree(self.folder / "ballast")


class _FileSizeLimit:
    """No file grows beyond a few kilobytes; the free space is unknown, as with a quota."""

    def __init__(self, folder):
        self.folder = folder
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, self._limits[1]))

    def free(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)

    close = free


DISKS = [_Tmpfs, _Inodes, _FileSizeLimit]


@pytest.fixture(params=DISKS)
def disk(request, tmp_path):
    disk = request.param(tmp_path)
    yield disk
    disk.close()


def awaited_threads():
    """The threads that a process waits for when it ends."""
    return {each for each in threading.enumerate() if not each.daemon}


def warnings_of(caplog):
    return [each.getMessage() for each in caplog.records if each.name.startswith("cassle_jax")]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("disk", "room_is_known"),
    [*itertools.product(DISKS, [True, False])],
    indirect=["disk"],
)
def test_a_full_disk_is_reported_once_and_training_goes_on(
    config, whole, disk, at_step, caplog, capfd, monkeypatch, room_is_known
):
    if not room_is_known:
        monkeypatch.setattr(checkpoints_module, "free_bytes", lambda folder: None)
    workdir = disk.folder / "run"
    while_full = {}

    def look():
        while_full["steps"] = steps_saved(workdir)

    def free():
        disk.free()
        while_full["leftovers"] = set(leftovers(workdir)) - {"15.orbax-checkpoint-tmp"}  # under way

    at_step |= {10: once_saved(workdir, 5, disk.fill), 15: look, 20: free}
    with caplog.at_level("WARNING", logger="cassle_jax"):
        state = pretrain(config, workdir)
    assert_identical(state, whole[1])
    assert while_full == {"steps": [5], "leftovers": set()}
    assert not leftovers(workdir)
    # What is being saved in the background at 15 may find the room that is made at 20.
    assert steps_saved(workdir) in ([5, 20, 24], [15, 20, 24])
    assert [step for step, _ in read_metrics(workdir)["loss"]] == [5, 10, 15, 20, 24]
    said = [each for each in warnings_of(caplog) if "checkpoint" in each]
    assert len(said) == 2, said
    assert "checkpoint 10 is not saved" in said[0] and str(workdir) in said[0]
    assert "training continues" in said[0] and "the newest saved is 5" in said[0]
    assert said[1] == f"checkpoint {min(set(steps_saved(workdir)) - {5})} is saved"
    assert not any("\n" in each for each in said)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("disk", "stopped"),
    [*itertools.product(DISKS, ["", "before", "meanwhile"])],
    indirect=["disk"],
)
def test_a_last_step_that_cannot_be_saved_is_an_error(
    config, whole, disk, at_step, monkeypatch, stopped
):
    seconds = 600.0 if stopped == "meanwhile" else 0.4
    monkeypatch.setattr(loop_module, "LAST_SAVE_SECONDS", seconds)
    monkeypatch.setattr(loop_module, "STOPPING_SAVE_SECONDS", 0.4)
    monkeypatch.setattr(checkpoints_module, "RETRY_SECONDS", 0.2)
    workdir, others = disk.folder / "run", awaited_threads()

    def fill():
        disk.fill()
        if stopped == "before":
            signal.raise_signal(signal.SIGTERM)

    class Stopping(logging.Handler):
        """Stops a run that says it tries again."""

        def emit(self, record):
            if stopped == "meanwhile" and "would be lost" in record.getMessage():
                signal.raise_signal(signal.SIGTERM)

    at_step[20] = once_saved(workdir, 15, fill)
    monkeypatch.setattr(checkpoints_module.LOG, "handlers", [Stopping()])
    with pytest.raises(
        Stop, match=r"step (20|24) could not be saved: .*newest saved is \d+"
    ) as end:
        pretrain_command(config, workdir)
    assert end.value.code == EXIT_NOT_SAVED and "\n" not in str(end.value)
    assert (" and 0 inodes free" in str(end.value)) == isinstance(disk, _Inodes)
    until = time.monotonic() + 20
    while awaited_threads() - others:  # the process would wait for them at its end
        assert time.monotonic() < until, awaited_threads() - others
        time.sleep(0.1)
    disk.free()
    assert_identical(pretrain(config, workdir), whole[1])


def test_the_last_step_is_saved_when_room_is_made_meanwhile(
    config, whole, disk, at_step, monkeypatch, caplog
):
    workdir = disk.folder / "run"
    monkeypatch.setattr(checkpoints_module, "RETRY_SECONDS", 0.2)

    def fill():
        while 5 in steps_saved(workdir):  # 20 replaces it, and makes room
            time.sleep(0.01)
        disk.fill()

    at_step[24] = once_saved(workdir, 20, fill)

    class Room(logging.Handler):
        """Frees room once the run has reported its trouble."""

        def emit(self, record):
            if "would be lost" in record.getMessage():
                disk.free()

    monkeypatch.setattr(checkpoints_module.LOG, "handlers", [Room()])
    with caplog.at_level("WARNING", logger="cassle_jax"):
        pretrain(config, workdir)
    assert steps_saved(workdir)[-1] == 24
    assert "step 24 would be lost" in caplog.text and "checkpoint 24 is saved" in caplog.text


# --- two runs in one workdir


HOLD = """
import sys, time
from etils import epath
from cassle_jax.lock import folder_held
with folder_held(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holding(workdir):
    command = [sys.executable, "-c", HOLD, str(workdir)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_until_the_first_is_gone_however_it_went(config, run):
    process = holding(run)
    try:
        with pytest.raises(
            ConfigError, match=f"in use by another run [(]process {process.pid} on "
        ):
            pretrain(config, run)
        assert read_run(run).card["step"] == 24  # reading is not refused
    finally:
        process.kill()
        process.wait()
    pretrain(config, run)


def test_killed_at_any_moment_it_holds_nothing(tmp_path):
    for _ in range(REPEATS):
        process = holding(tmp_path)
        with pytest.raises(ConfigError, match="in use"), folder_held(tmp_path):
            pass
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.wait()
        with folder_held(tmp_path):
            pass


def test_a_holder_that_could_not_write_its_name_still_holds(tmp_path):
    with folder_held(tmp_path):
        (tmp_path / "lock").write_text("")
        refused = pytest.raises(ConfigError, match=r"another run \(its lock does not name")
        with refused, folder_held(tmp_path):
            pass


def test_users_who_may_write_to_the_folder_may_hold_it(tmp_path, monkeypatch):
    tmp_path.chmod(0o775)
    previous = os.umask(0o022)
    try:
        with folder_held(tmp_path):
            pass
    finally:
        os.umask(previous)
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o664
    opened = os.open  # and a file that an older version has made

    def of_another_user(path, how, *mode):
        if str(path).endswith("lock") and how & (os.O_RDWR | os.O_EXCL) == os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, how, *mode)

    monkeypatch.setattr(os, "open", of_another_user)
    with (
        folder_held(tmp_path),
        pytest.raises(ConfigError, match="in use by another run"),
        folder_held(tmp_path),
    ):
        pass


@pytest.mark.parametrize("leaves_file", [True, False])
def test_a_file_that_cannot_be_locked_is_reported(tmp_path, monkeypatch, caplog, leaves_file):
    def refuses(*_):  # NFS: a folder, and a file that another user made
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr("fcntl.flock", refuses)
    with caplog.at_level(logging.INFO), folder_held(tmp_path, leaves_file=leaves_file):
        assert ("has no locks" in caplog.text) == leaves_file


def test_checkpoints_need_no_locks_of_their_file_system(tmp_path):
    # As the manifest is written here while another holds its lock, it is where none can be had.
    spec = tensorstore_utils.build_kvstore_tspec(os.fspath(tmp_path), use_ocdbt=True)
    with (tmp_path / "manifest.ocdbt.__lock").open("w") as held:
        whole_file = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(held, fcntl.F_OFD_SETLK, whole_file)
        store = ts.KvStore.open(spec, context=tensorstore_utils.get_ts_context()).result()
        store.write("step", b"7").result(timeout=20)
    again = ts.KvStore.open(spec, context=tensorstore_utils.get_ts_context()).result()
    assert again.read("step").result().value == b"7"


# --- a workdir that cannot be written


def test_a_read_only_workdir_is_reported_in_one_line(config, run):
    if os.geteuid():
        run.chmod(0o555)
    elif subprocess.run(["mount", "--bind", "-o", "ro", run, run], capture_output=True).returncode:
        pytest.skip("nothing is read-only to root where mounting is not permitted")
    try:
        with pytest.raises(ConfigError, match=r"workdir=\S+ cannot be written: [\w -]+$"):
            pretrain(config, run)
        assert read_run(run).card["step"] == 24
    finally:
        subprocess.run(["umount", "-l", run], capture_output=True)
        run.chmod(0o755)


@pytest.mark.parametrize("inside", ["", "run"])
def test_a_file_is_no_workdir(config, tmp_path, inside):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"workdir=\S+ is not a folder: \S+file is a file"):
        pretrain(config, tmp_path / "file" / inside)


# --- a clock that jumps


def test_no_order_depends_on_the_clock(config, whole, tmp_path, at_step, monkeypatch):
    workdir, now = tmp_path / "run", time.time
    jump = {"seconds": 0.0}
    monkeypatch.setattr(time, "time", lambda: now() + jump["seconds"])
    at_step |= {
        5: lambda: jump.update(seconds=86400.0),
        10: lambda: jump.update(seconds=-86400.0),
        15: lambda: signal.raise_signal(signal.SIGTERM),
    }
    with pytest.raises(Preempted):
        pretrain(config, workdir)
    for step in steps_saved(workdir):
        os.utime(workdir / "checkpoints" / str(step), (1e9 - step, 1e9 - step))
    jump["seconds"] = -10 * 86400.0
    assert_identical(pretrain(config, workdir), whole[1])
    metrics = read_metrics(workdir)
    assert [step for step, _ in metrics["loss"]] == [5, 10, 15, 20, 24]
    assert all(0 < value < 1e6 for _, value in metrics["images_per_second"])
    files = sorted(path.name for path in (workdir / "tensorboard").iterdir())
    seconds = [int(name.split(".")[3]) for name in files]
    assert seconds[1] == seconds[0] + 1  # TensorBoard reads them in this order


# --- a probe that fails


@pytest.mark.parametrize("error", [RuntimeError("RESOURCE_EXHAUSTED: out\nof memory"), OSError(5)])
def test_a_probe_that_fails_is_a_line_and_loses_no_step(
    config, whole, tmp_path, monkeypatch, caplog, error
):
    config = config.copy_and_resolve_references()
    config.probe.update({"every_epochs": 2, "train_images": 32, "test_images": 32})
    config.checkpoint.every_steps = 8
    saved_before = {}

    def fail(probe, state):
        step = int(state.step)
        if step == 16:
            return {"rank_me": 1.5}
        if step == 24:  # the last save is waited for
            saved_before[step] = steps_saved(tmp_path / "run")
        raise error

    monkeypatch.setattr(loop_module.OnlineProbe, "__call__", fail)
    with caplog.at_level("WARNING", logger="cassle_jax"):
        state = pretrain(config, tmp_path / "run")
    assert_identical(state, whole[1])
    assert saved_before == {24: steps_saved(tmp_path / "run")} and 24 in saved_before[24]
    curves = read_metrics(tmp_path / "run")
    assert curves["rank_me"] == [(16, 1.5)]
    assert [step for step, _ in curves["loss"]] == [5, 10, 15, 20, 24]
    lines = [each for each in caplog.messages if "probe" in each]
    assert [each.partition(" failed")[0] for each in lines] == [
        "the probe of step 8",
        "the probe of step 24",
    ]
    assert all(type(error).__name__ in each and "\n" not in each for each in lines)


@pytest.mark.parametrize("killed_at", [16, 24])
def test_the_probe_of_a_run_that_was_killed_in_it_is_run_when_it_continues(
    config, whole, tmp_path, monkeypatch, killed_at
):
    config = config.copy_and_resolve_references()
    config.probe.update({"every_epochs": 2, "train_images": 32, "test_images": 32})
    config.checkpoint.every_steps = 8
    probed, killed = [], [killed_at]

    def probe(self, state):
        step = int(state.step)
        if step in killed:
            killed.clear()
            raise KeyboardInterrupt
        probed.append(step)
        return {"rank_me": float(step)}

    monkeypatch.setattr(loop_module.OnlineProbe, "__call__", probe)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, tmp_path / "run")
    assert_identical(pretrain(config, tmp_path / "run"), whole[1])
    assert probed == [8, 16, 24]
    assert read_metrics(tmp_path / "run")["rank_me"] == [(step, float(step)) for step in probed]
    pretrain(config, tmp_path / "run")
    assert probed == [8, 16, 24]


# --- changed settings


@pytest.mark.exhaustive
def test_changes_are_accepted_on_request_and_noted(config, run, tmp_path, caplog):
    changed = config.copy_and_resolve_references()
    changed.steps, changed.optimizer.weight_decay = 30, 0.5
    with pytest.raises(ConfigError, match=r"weight_decay=0\.5 was .*--accept_changes"):
        pretrain(changed, run)
    with caplog.at_level("WARNING", logger="cassle_jax"):
        state = pretrain(changed, run, accept_changes=True)
    assert int(state.step) == 30
    change = "optimizer.weight_decay=0.5 was 0.0001"
    assert change in caplog.text
    assert change in read_lines(run / "starts.jsonl")[-1]["changes"]
    assert json.loads((run / "config.json").read_text())["optimizer"]["weight_decay"] == 0.5
    pretrain(changed, run)  # they are the run's settings now


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 32}, r"cannot continue with batch_size=32 was 16;"),
        ({"seed": 7}, r"cannot continue with seed=7 was 0;"),
        ({"data.scenes": 128}, r"cannot continue with data\.scenes=128 was 64;"),
        ({"encoder.width": 32}, r"of other networks.*encoder/.* is 24 in checkpoint 24 and 32 now"),
        ({"optimizer.name": "adamw"}, r"another optimizer: opt_state"),
    ],
)
def test_changes_that_cannot_be_continued_are_refused_all_the_same(config, run, settings, said):
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(settings)
    before = (run / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=said) as raised:
        pretrain(changed, run, accept_changes=True)
    assert "\n" not in str(raised.value)
    assert (run / "config.json").read_bytes() == before
    assert steps_saved(run) == [15, 20, 24]


# --- damaged checkpoints


def small_state(step):
    keys = jax.random.split(jax.random.key(step), 3)
    return TrainState(
        step=jnp.int32(step),
        key=jax.random.key(0),
        params={"a": jax.random.normal(keys[0], (64, 32)), "b": jax.random.normal(keys[1], (7,))},
        batch_stats={},
        target_params={},
        target_batch_stats={},
        memory={"queue": jax.random.normal(keys[2], (16, 8)).astype(jnp.bfloat16)},
        opt_state=(jnp.zeros((64, 32)), jnp.bool_(True)),
        diverged_at=jnp.int32(-1),
    )


@pytest.fixture
def saved(tmp_path):
    """Checkpoints 1 and 2, and the files of the second."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, small_state(step), {"step": step})
    checkpoints.close()
    folder = tmp_path / "checkpoints" / "2"
    return tmp_path, sorted(path for path in folder.rglob("*") if path.is_file())


def restored_after(damage, workdir, caplog):
    """The step that is restored from a damaged copy of the workdir; its values are right."""
    copy = workdir.with_name("copy")
    shutil.copytree(workdir, copy)
    damage(copy)
    caplog.clear()
    checkpoints = Checkpoints(copy, keep=2)
    with caplog.at_level("WARNING", logger="cassle_jax"):
        state, data_state = checkpoints.restore(small_state(0))
    checkpoints.close()
    shutil.rmtree(copy)
    step = int(state.step)
    assert data_state == {"step": step}
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get((state.params, state.memory, state.opt_state)),
        jax.device_get(
            (small_state(step).params, small_state(step).memory, small_state(0).opt_state)
        ),
    )
    assert (step == 1) == ("checkpoint 2 cannot be read" in caplog.text)
    return step


def test_checkpoints_at_multiples_stay_and_of_the_others_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, keep_every_steps=3)
    for step in range(1, 6):
        checkpoints.save(step, small_state(step), {})
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [3, 5]


def test_a_folder_out_of_reach_costs_no_checkpoint_once_it_is_back(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, small_state(1), {})
    with monkeypatch.context() as out_of_reach:
        out_of_reach.setattr(ocp, "CheckpointManager", fails)
        out_of_reach.setattr(Checkpoints, "_check_room", fails)
        checkpoints.save(2, small_state(2), {})
        with pytest.raises(NotSaved, match=r"2 is not saved: .*: Input/output error; ") as end:
            checkpoints.save_surely(2, small_state(2), {}, seconds=0.0, after_stop=0.0)
    assert passing(end.value)  # the exit code lets launchers start the run again
    checkpoints.save(3, small_state(3), {})
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [1, 3]


def test_a_run_of_which_no_checkpoint_can_be_read_does_not_begin_anew(saved):
    workdir, _ = saved
    for path in (workdir / "checkpoints").glob("*/state/**/*"):
        if path.is_file():
            path.write_bytes(b"")
    checkpoints = Checkpoints(workdir, keep=2)
    with pytest.raises(ConfigError, match=r"has checkpoints, and none of them can be read; move"):
        checkpoints.restore(small_state(0))
    checkpoints.close()


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_of_a_checkpoint_does_no_harm(saved, caplog, kind):
    workdir, files = saved
    for file in files:
        if file.stat().st_size == 0:
            continue
        name = file.relative_to(workdir)
        step = restored_after(lambda copy: DAMAGES[kind](copy / name), workdir, caplog)  # noqa: B023
        print(f"{name} {kind}: {step}")
        if "/d/" in str(name) or name.name in ("_METADATA", "manifest.ocdbt"):
            assert step == 1 or "ocdbt.process" in str(name), name


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"step": "2"}, "its place in the images is damaged"),
        ({"step": None, "checksums": {}}, "its place in the images is damaged"),
        ({"step": 2, "checksums": 3}, "its checksums are damaged"),
        ({"step": 2, "checksums": {"params": "x"}}, "its checksums are damaged"),
        ({"step": 2, "checksums": [3]}, "its checksums are damaged"),
    ],
)
def test_a_place_in_the_images_of_another_type_does_no_harm(saved, caplog, changed, said):
    workdir, _ = saved
    name = Path("checkpoints", "2", "data", "metadata")

    def damage(copy):
        content = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(content | changed))

    assert restored_after(damage, workdir, caplog) == 1
    assert f"checkpoint 2 cannot be read, trying the one before: {said}" in caplog.text


def test_a_flipped_bit_anywhere_does_no_harm(saved, caplog):
    workdir, files = saved
    arrays = [file for file in files if "/d/" in str(file)]
    for repeat in range(4 * REPEATS):
        file = random.choice(arrays if repeat % 2 else files)
        content = bytearray(file.read_bytes() or b"\0")
        place, bit = random.randrange(len(content)), random.randrange(8)
        content[place] ^= 1 << bit
        name = file.relative_to(workdir)
        step = restored_after(lambda copy: (copy / name).write_bytes(content), workdir, caplog)  # noqa: B023
        print(f"bit {bit} of byte {place} of {name}: {step}")


def test_another_number_in_an_array_is_noticed(saved, caplog, monkeypatch):
    """What no format notices: the values differ, and everything about them is sound."""
    workdir, _ = saved
    read = checkpoints_module.ocp.StandardCheckpointHandler.restore

    def altered(handler, folder, args):
        found = read(handler, folder, args=args)
        if folder.parent.name == "2":
            found.params["a"] = found.params["a"].at[3, 5].multiply(1.0000002)
        return found

    monkeypatch.setattr(checkpoints_module.ocp.StandardCheckpointHandler, "restore", altered)
    assert restored_after(lambda copy: None, workdir, caplog) == 1
    assert "its params differ from what was saved" in caplog.text


def test_weights_that_are_not_what_was_saved_are_not_exported(run, caplog, monkeypatch):
    handler = checkpoints_module.ocp.PyTreeCheckpointHandler
    read = handler.restore

    def altered(self, folder, args):
        found = read(self, folder, args=args)
        if folder.parent.name == "24":
            jax.tree.leaves(found["params"])[0].ravel()[0] *= 1.0000002
        return found

    monkeypatch.setattr(handler, "restore", altered)
    with caplog.at_level("WARNING", logger="cassle_jax"):
        assert read_run(run).card["step"] == 20
    assert "checkpoint 24 cannot be read: its params differ from what was saved" in caplog.text


# --- an unreadable file of records


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A tfds data_dir with 64 images in four array_record files."""
    import io

    import tensorflow_datasets as tfds
    from PIL import Image

    def png(number):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
        buffer.seek(0)
        return buffer

    class FourFiles(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "generated"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(20, 20, 3))})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": ((number, {"image": png(number)}) for number in range(64))}

        def _generate_examples(self):
            raise NotImplementedError

    folder = tmp_path_factory.mktemp("records")
    builder = FourFiles(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
    return folder


@pytest.fixture
def of_records(config, records, tmp_path):
    """A configuration that reads a copy of the records at every epoch, and its files."""
    shutil.copytree(records, tmp_path / "records")
    config = config.copy_and_resolve_references()
    config.data.update({"source": "tfds", "name": "four_files", "path": str(tmp_path / "records")})
    config.data.update({"cache_gib": 0.0, "on_device": "never", "max_bad_fraction": 0.5})
    files = sorted((tmp_path / "records").rglob("*.array_record*"))
    assert len(files) == 4
    return config, files


def half(file):
    content = file.read_bytes()
    os.truncate(file, len(content) // 2)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "it is not there"),
        (half, r"0 of its 16 records can be found|failed"),
        (lambda file: file.write_bytes(b""), r"0 of its 16 records can be found|failed"),
    ],
    ids=["missing", "half", "empty"],
)
def test_an_unreadable_file_of_records_is_named_before_it_is_replaced(
    of_records, tmp_path, damage, said
):
    config, files = of_records
    damage(files[2])
    with pytest.raises(DataError, match=f"the file {files[2]} of .* cannot be read .*({said})"):
        pretrain(config, tmp_path / "run")
    assert not list((tmp_path / "run").glob("damaged/*"))


def test_a_workdir_that_is_deleted_is_made_anew_with_all_that_evaluation_needs(
    config, whole, tmp_path, at_step, caplog
):
    workdir = tmp_path / "run"
    tmp_path.chmod(0o777)
    at_step[10] = once_saved(workdir, 5, lambda: shutil.rmtree(workdir))
    assert_identical(pretrain(config, workdir), whole[1])
    assert caplog.text.count("was deleted") == 1
    assert oct(workdir.stat().st_mode & 0o777) == oct(0o777)
    assert read_config(workdir).to_dict() == json.loads(json.dumps(config.to_dict()))
    assert read_run(workdir).card["step"] == config.steps
    assert "in use" not in caplog.text


def test_a_file_system_that_is_gone_for_a_time_is_not_replaced_by_a_folder(
    config, whole, tmp_path, at_step, caplog, monkeypatch
):
    mount, elsewhere = tmp_path / "mount", tmp_path / "elsewhere"
    (workdir := mount / "runs" / "one").mkdir(parents=True)
    (mount / "mounted").touch()
    monkeypatch.setattr(
        "os.path.ismount", lambda path: str(path) == "/" or Path(path, "mounted").exists()
    )

    def gone():
        mount.rename(elsewhere)
        mount.mkdir()

    def there_again():
        mount.rmdir()  # it is empty
        elsewhere.rename(mount)

    monkeypatch.setattr(loop_module, "LAST_SAVE_SECONDS", 20.0)
    at_step[10] = once_saved(workdir, 5, gone)
    at_step[20] = there_again
    assert_identical(pretrain(config, workdir), whole[1])
    assert read_metrics(workdir)["loss"] == read_metrics(whole[0])["loss"]
    assert read_run(workdir).card["step"] == config.steps
    assert f"cannot be written for now: {mount} is not mounted any more" in caplog.text
    assert "was deleted" not in caplog.text


@pytest.mark.exhaustive
def test_records_that_become_unreadable_lose_no_step(of_records, tmp_path, at_step):
    config, files = of_records
    config.checkpoint.every_steps = 100
    whole = pretrain(config, tmp_path / "whole")
    content = files[1].read_bytes()
    at_step[10] = lambda: os.truncate(files[1], 0)
    with pytest.raises(DataError, match=f"the file {files[1]} of .* cannot be read"):
        pretrain(config, tmp_path / "run")
    assert steps_saved(tmp_path / "run")[-1] >= 10
    files[1].write_bytes(content)
    assert_identical(pretrain(config, tmp_path / "run"), whole)
