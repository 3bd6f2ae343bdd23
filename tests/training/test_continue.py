"""A run that was interrupted, in any way, ends as if it had not been."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from cassle_jax.training.loop import Diverged, Preempted, pretrain
from cassle_jax.training.metrics import MetricsWriter, read_metrics
from tests.tiny import tiny_config

ROOT = Path(__file__).parent.parent.parent
KILLS = int(os.environ.get("CASSLE_KILLS", "2"))
STEPS = 300 * KILLS


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
    config.probe.every_epochs = 3
    config.probe.train_images = config.probe.test_images = 32
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
    assert kept == {15, 20, 24}
    assert (workdir / "views.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "config.json").exists()
    assert list((workdir / "tensorboard").iterdir())


def test_sigterm_saves_and_the_same_call_continues(uninterrupted, tmp_path, monkeypatch):
    config, workdir, expected = uninterrupted
    write = MetricsWriter.write

    def interrupt(writer, step, metrics):
        write(writer, step, metrics)
        if step == 10:
            signal.raise_signal(signal.SIGTERM)

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


def test_a_finished_run_is_left_alone(uninterrupted):
    config, workdir, expected = uninterrupted
    assert_identical(values(pretrain(config, workdir)), expected)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = tiny_config("method=simclr")
    config.optimizer.base_learning_rate = 1e30
    config.checkpoint.every_steps = 1
    config.log.every_steps = 0
    with pytest.raises(Diverged, match=r"loss of step \d+ is not finite"):
        pretrain(config, tmp_path)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept and kept[0] >= 1


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


def test_killed_at_any_moment_it_ends_bit_identical(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(tmp_path / "warm", 1).wait(300) == 0
    began = time.monotonic()
    assert start(whole).wait(600) == 0
    # As long as starting takes and a share of the steps, so that every kill leaves some to do.
    length = (time.monotonic() - began) * (0.5 if KILLS < 4 else 4 / KILLS)
    expected = final_arrays(whole)

    moments = random.Random(time.time())
    for kill in range(KILLS):
        process = start(killed)
        moment = moments.uniform(0.2, 1.0) * length
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"kill {kill + 1}: {moment:.2f} s after the start, at step {newest_step(killed)}")
    assert start(killed).wait(600) == 0
    found = final_arrays(killed)
    assert found.keys() == expected.keys() and found
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
