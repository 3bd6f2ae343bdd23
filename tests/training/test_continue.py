"""A run that was interrupted, in any way, ends as if it had not been."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from cassle_jax.checks import ConfigError
from cassle_jax.data import DataError
from cassle_jax.parallel import device_mesh
from cassle_jax.training import loop
from cassle_jax.training.loop import Diverged, Preempted, pretrain
from cassle_jax.training.metrics import MetricsWriter, read_lines, read_metrics
from cassle_jax.training.probe import OnlineProbe
from cassle_jax.training.run import build_run
from cassle_jax.training.state import TrainState
from tests.tiny import cropped_only, tiny_config

ROOT = Path(__file__).parent.parent.parent
KILLS = int(os.environ.get("CASSLE_KILLS", "2"))
STEPS = 60 * KILLS


def values(state):
    carried = (state.params, state.batch_stats, state.target_params, state.memory, state.opt_state)
    return jax.device_get(carried)


def assert_identical(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    from cassle_jax.models import ENCODERS
    from tests.tiny import TinyEncoder

    ENCODERS["tiny"] = TinyEncoder
    workdir = tmp_path_factory.mktemp("uninterrupted")
    config = tiny_config("method=moco_v2,augself=main")
    cropped_only(config)
    config.probe.every_epochs = 3
    config.probe.train_images = config.probe.test_images = 32
    config.checkpoint.keep_every_steps = 12
    state = pretrain(config, workdir)
    return config, workdir, values(state)


def test_what_a_run_leaves(uninterrupted):
    _, workdir, _ = uninterrupted
    curves = read_metrics(workdir)
    assert [step for step, _ in curves["loss"]] == [5, 10, 15, 20, 24]
    assert [step for step, _ in curves["knn_accuracy"]] == [12, 24]
    assert all(0 <= value <= 1 for _, value in curves["knn_accuracy"])
    assert all(1 <= value <= 24 for _, value in curves["rank_me"])
    assert {"learning_rate", "images_per_second", "data_wait_share", "loss_method"} <= set(curves)
    assert {"positive_similarity", "negative_similarity"} <= set(curves)
    kept = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    assert kept == {12, 15, 20, 24}
    assert (workdir / "config.json").exists()
    assert list((workdir / "tensorboard").iterdir())


def test_sigterm_saves_and_the_same_call_continues(uninterrupted, tmp_path, monkeypatch):
    config, workdir, expected = uninterrupted
    write = MetricsWriter.write

    def interrupt(writer, step, metrics):
        write(writer, step, metrics)
        if step == 10:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # SLURM sends it to a job, and to its steps

    monkeypatch.setattr(MetricsWriter, "write", interrupt)
    with pytest.raises(Preempted, match="step 10"):
        pretrain(config, tmp_path)
    monkeypatch.undo()
    from cassle_jax.models import ENCODERS
    from tests.tiny import TinyEncoder

    ENCODERS["tiny"] = TinyEncoder
    assert_identical(values(pretrain(config, tmp_path)), expected)
    steps = [step for step, _ in read_metrics(tmp_path)["loss"]]
    assert steps == [5, 10, 15, 20, 24]
    losses = dict(read_metrics(workdir)["loss"])
    assert dict(read_metrics(tmp_path)["loss"]) == losses


@pytest.mark.exhaustive
def test_a_run_continues_with_an_optimiser_of_optax_and_its_settings(tmp_path):
    config = tiny_config("method=simclr,conditioning=none")
    cropped_only(config)
    config.optimizer.update({"name": "lamb", "clip_norm": 1.0})
    config.optimizer.settings.b2 = 0.95
    config.checkpoint.every_steps = 2
    config.steps = 4
    expected = values(pretrain(config, tmp_path))
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    assert_identical(values(pretrain(config, tmp_path)), expected)
    config.optimizer.settings.b2 = 0.9
    with pytest.raises(ConfigError, match=r"optimizer\.settings\.b2=0\.9 was 0\.95"):
        pretrain(config, tmp_path)


def test_a_finished_run_is_left_alone(uninterrupted):
    config, workdir, expected = uninterrupted
    assert_identical(values(pretrain(config, workdir)), expected)


def test_no_process_begins_its_steps_before_the_picture_is_drawn(tmp_path, monkeypatch):
    """Where the first one draws for long, the others' first step would give up the wait for it."""
    calls = []
    monkeypatch.setattr(loop, "write_contact_sheet", lambda *_: calls.append("picture"))
    monkeypatch.setattr(loop, "agree", lambda _: calls.append("wait"))
    monkeypatch.setattr(loop._Loop, "train", lambda run, _: (calls.append("steps"), run.state)[1])
    pretrain(tiny_config(), tmp_path)
    assert calls[-3:] == ["picture", "wait", "steps"]


def test_a_run_begins_with_a_picture_of_what_it_sees(tmp_path, contact_sheets, monkeypatch):
    monkeypatch.setattr("cassle_jax.training.loop._Loop.train", lambda loop, stop: loop.state)
    config = tiny_config()
    pretrain(config, tmp_path)
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.width > 8 * config.augment.size


@pytest.mark.exhaustive
def test_a_learning_rate_that_explodes_stops_the_run_and_saves_nothing(tmp_path):
    config = tiny_config("method=simclr")
    cropped_only(config)
    config.optimizer.base_learning_rate = 1e30
    config.checkpoint.every_steps = 1
    config.log.every_steps = 0
    with pytest.raises(Diverged, match=r"update of step \d+ is not finite"):
        pretrain(config, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def start(workdir, steps=STEPS):
    command = [sys.executable, "-m", "tests.training.run_tiny", str(workdir), f"steps={steps}"]
    return subprocess.Popen(command, cwd=ROOT)


def newest_step(workdir):
    folder = workdir / "checkpoints"
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)


def final_arrays(workdir):
    """The arrays of the last checkpoint, read without the project."""
    import orbax.checkpoint as ocp

    path = workdir / "checkpoints" / str(STEPS) / "state"
    restored = ocp.PyTreeCheckpointer().restore(path)
    return {
        jax.tree_util.keystr(key): np.asarray(
            jax.random.key_data(value) if "key" in str(getattr(value, "dtype", "")) else value
        )
        for key, value in jax.tree_util.tree_leaves_with_path(restored)
    }


@pytest.mark.exhaustive
def test_killed_at_any_moment_it_ends_bit_identical(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(tmp_path / "short", 1).wait(300) == 0  # compiles
    began = time.monotonic()
    process = start(whole)
    while not newest_step(whole):
        assert process.poll() is None
        time.sleep(0.01)
    starting = time.monotonic() - began
    assert process.wait(600) == 0
    # Each life is starting and at most its share of the steps, so that every kill leaves some.
    share = 0.9 * (time.monotonic() - began - starting) / KILLS
    expected = final_arrays(whole)

    moments, kills = random.Random(time.time()), 0
    while kills < KILLS:
        process = start(killed)
        moment = moments.uniform(0.3 * starting, starting + share)
        try:
            assert process.wait(moment) == 0
            if kills:
                break
            # A machine that has become faster finishes before the first kill.
            shutil.rmtree(killed)
            starting, share = starting / 2, share / 2
            continue
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kills += 1
        print(f"kill {kills}: {moment:.2f} s after the start, at step {newest_step(killed)}")
    assert kills
    assert start(killed).wait(600) == 0
    found = final_arrays(killed)
    assert found.keys() == expected.keys() and found
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_run_with_other_settings_is_not_continued(uninterrupted):
    config, workdir, _ = uninterrupted
    changed = config.copy_and_resolve_references()
    changed.optimizer.weight_decay = 0.5
    with pytest.raises(ConfigError, match=r"optimizer\.weight_decay=0\.5 was 0\.0001"):
        pretrain(changed, workdir)
    harmless = config.copy_and_resolve_references()
    harmless.log.every_steps = 3
    pretrain(harmless, workdir)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(uninterrupted, tmp_path, caplog):
    config, workdir, expected = uninterrupted
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "checkpoints" / "24" / "state" / "d").iterdir():
        file.write_bytes(b"")
    with caplog.at_level("WARNING", logger="cassle_jax"):
        state = pretrain(config, tmp_path)
    assert "checkpoint 24 cannot be read" in caplog.text
    assert_identical(values(state), expected)


@pytest.mark.exhaustive
def test_an_update_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    """A finite loss with an infinite gradient would leave a checkpoint nobody can continue."""
    config = tiny_config("method=simclr")
    cropped_only(config)
    config.checkpoint.every_steps = 1
    from cassle_jax.training import run as run_module

    make = run_module.make_optimizer

    def exploding(*arguments):
        optimizer = make(*arguments)

        def update(gradients, state, params=None):
            updates, state = optimizer.update(gradients, state, params)
            count = state[-1].inner_states["default"].inner_state.count
            return jax.tree.map(lambda x: jnp.where(count == 4, jnp.inf, x), updates), state

        return optax.GradientTransformation(optimizer.init, update)

    monkeypatch.setattr(run_module, "make_optimizer", exploding)
    with pytest.raises(Diverged, match="step 4 is not finite"):
        pretrain(config, tmp_path)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [1, 2, 3]


def test_too_many_damaged_images_lose_no_step(tmp_path, monkeypatch):
    from cassle_jax.data import TooManyDamaged
    from cassle_jax.data.feed import DeviceFeed

    config = tiny_config("method=simclr")
    cropped_only(config)
    config.checkpoint.every_steps = 100
    read = DeviceFeed.__next__
    count = iter(range(100))

    def fail_at_eighth(feed):
        if next(count) == 7:
            raise TooManyDamaged("2 of 64 images are damaged")
        return read(feed)

    monkeypatch.setattr(DeviceFeed, "__next__", fail_at_eighth)
    with pytest.raises(TooManyDamaged):
        pretrain(config, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["7"]


def test_splits_of_different_classes_are_not_compared(tmp_path):
    from PIL import Image

    for split, classes in (("train", "ab"), ("test", "ac")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(16):
                Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{index}.png")
    config = tiny_config("method=simclr")
    config.data.source, config.data.path = "folder", str(tmp_path)
    config.probe.every_epochs = 1
    with pytest.raises(DataError, match=r"probe\.test_split='test' .*'b' is in one"):
        pretrain(config, tmp_path / "run")
    config.probe.test_split = "val"
    with pytest.raises(DataError, match=r"probe\.test_split='val' cannot be opened"):
        pretrain(config, tmp_path / "run")


@pytest.mark.exhaustive
def test_a_damaged_image_is_named_once_however_often_the_features_are_probed(tmp_path, caplog):
    from PIL import Image

    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for index in range(32):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / split / "a" / f"{index}.png")
    (tmp_path / "test" / "a" / "torn.png").write_bytes(b"not an image")
    config = tiny_config("method=simclr")
    cropped_only(config)
    config.steps = 4
    config.data.source, config.data.path = "folder", str(tmp_path)
    config.data.max_bad_fraction = 0.1
    config.probe.every_epochs = 1
    with caplog.at_level("WARNING", logger="cassle_jax"):
        pretrain(config, tmp_path / "run")
    assert sum("torn.png" in message for message in caplog.messages) == 1


@pytest.fixture
def of_images(tmp_path):
    """Writes images of one colour each into a folder without classes; the configuration of it."""
    for index in range(33):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index:02d}.png")
    config = tiny_config("method=simclr")
    cropped_only(config)
    config.steps, config.checkpoint.every_steps = 4, 2
    config.data.update({"source": "folder", "path": str(tmp_path), "cache_gib": 0.0})
    return config


def test_a_run_whose_damaged_images_were_removed_continues_where_that_is_wanted(
    of_images, tmp_path
):
    config, run = of_images, tmp_path / ".run"
    torn = [tmp_path / f"{index}.png" for index in range(90, 93)]
    for file in torn:
        file.write_bytes(b"torn")
    config.data.max_bad_fraction = 0.1
    pretrain(config, run)
    assert (run / "damaged" / "damaged-00000.txt").read_text().count("\n") == 3
    shutil.rmtree(run / "checkpoints" / "4")

    config.data.max_bad_fraction = 0.0
    torn[0].write_bytes((tmp_path / "00.png").read_bytes())
    for file in torn[1:]:
        file.unlink()
    with pytest.raises(DataError, match=r"length=36, this run 34: .*--accept_changes"):
        pretrain(config, run)
    assert int(pretrain(config, run, accept_changes=True).step) == 4
    assert "34 training images were 36" in (run / "starts.jsonl").read_text()


def test_a_folder_without_labels_is_probed_by_rank_me_alone(of_images, tmp_path, caplog):
    of_images.probe.every_epochs = 1
    images = tmp_path / "train"
    images.mkdir()
    for file in tmp_path.glob("*.png"):
        file.rename(images / file.name)
    with caplog.at_level("INFO", logger="cassle_jax"):
        pretrain(of_images, tmp_path / ".run")
    assert {"rank_me", "knn_accuracy"} & read_metrics(tmp_path / ".run").keys() == {"rank_me"}
    assert f"without k-NN accuracy: {images} has no labels" in caplog.text


def test_training_images_are_not_their_own_nearest_neighbours(of_images, tmp_path, caplog):
    mesh = device_mesh()
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            shutil.copy(tmp_path / "00.png", tmp_path / split / name)

    def measured(split):
        of_images.probe.test_split = split
        probe = OnlineProbe(of_images, build_run(of_images, mesh, 33), mesh)
        read = iter([np.eye(2, 3), features, np.eye(2, 3), features])
        probe._read = lambda *_: (next(read), np.arange(2))  # without a network
        first, _ = (probe(TrainState(*[None] * 9)) for _ in range(2))
        return first

    with caplog.at_level("WARNING", logger="cassle_jax"):
        features = 0.5 * np.eye(2, 3)
        assert measured("test").keys() == {"rank_me", "knn_accuracy"} and not caplog.messages
        features = np.eye(2, 3)[::-1]  # of the same images in another order
        measured("test")
        line = "2 of the probe's 2 test images have exactly the features of a training image"
        assert [line in message for message in caplog.messages] == [True]  # once, not per probe
        assert measured("train").keys() == {"rank_me"}
    assert "probe.test_split='train' has the images of the training split" in caplog.text


def test_images_of_more_pixels_than_allowed_are_damaged(of_images, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # is put back
    of_images.data.max_pixels = 63
    with pytest.raises(DataError, match=r"8x8 pixels are more than data\.max_pixels=63"):
        pretrain(of_images, tmp_path / ".run")


def test_a_dataset_with_other_files_of_the_same_number_continues_where_that_is_wanted(
    of_images, tmp_path
):
    config, run = of_images, tmp_path / ".run"
    pretrain(config, run)
    shutil.rmtree(run / "checkpoints" / "4")
    starts = run / "starts.jsonl"
    (tmp_path / "00.png").rename(tmp_path / "99.png")
    with pytest.raises(DataError, match=r"33 images have other names.*--accept_changes"):
        pretrain(config, run)
    older = [{**line, "names": None} for line in read_lines(starts)]
    kept = starts.read_text()
    starts.write_text("".join(json.dumps(line) + "\n" for line in older))
    assert int(pretrain(config, run).step) == 4  # begun by an older version
    starts.write_text(kept)
    assert int(pretrain(config, run, accept_changes=True).step) == 4
    assert "33 training images have other names" in starts.read_text()
    pretrain(config, run)  # they are the run's images now
