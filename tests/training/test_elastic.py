"""A run begun on N devices continues on M: the same images, the same numbers but for rounding."""

import shutil
import signal

import jax
import numpy as np
import pytest

from cassle_jax.data.feed import DeviceFeed
from cassle_jax.parallel import device_mesh
from cassle_jax.training import loop
from cassle_jax.training.loop import Preempted, pretrain
from cassle_jax.training.metrics import MetricsWriter, read_metrics
from tests.tiny import tiny_config

COUNTS = (1, 2, 4, 8)
STEPS, STOPPED = 8, 4  # the next step begins a new epoch


@pytest.fixture
def train(monkeypatch):
    """`train(workdir, devices, stop)`: parameters and the images of each step."""

    def run(workdir, devices, stop=False):
        seen, read, write = [], DeviceFeed.__next__, MetricsWriter.write

        def noting(feed):
            batch, state = read(feed)
            seen.append(np.asarray(batch["index"]).tolist())
            return batch, state

        def stopping(writer, step, metrics):
            write(writer, step, metrics)
            if stop and step == STOPPED:
                signal.raise_signal(signal.SIGTERM)

        config = tiny_config("method=moco_v2")
        config.steps, config.log.every_steps = STEPS, 1
        with monkeypatch.context() as patched:
            patched.setattr(DeviceFeed, "__next__", noting)
            patched.setattr(MetricsWriter, "write", stopping)
            patched.setattr(loop, "device_mesh", lambda: device_mesh(jax.devices()[:devices]))
            if stop:
                with pytest.raises(Preempted, match=f"step {STOPPED}"):
                    pretrain(config, workdir)
                return None, seen
            state = pretrain(config, workdir)
        kept = (state.params, state.batch_stats, state.target_params, state.memory, state.opt_state)
        return jax.device_get(kept), seen

    return run


def test_a_run_begun_on_n_devices_continues_on_m(train, tmp_path):
    whole, order = train(tmp_path / "whole", 1)
    losses = dict(read_metrics(tmp_path / "whole")["loss"])
    for begun in COUNTS:
        _, first = train(tmp_path / f"{begun}", begun, stop=True)
        for continued in set(COUNTS) - {begun}:
            workdir = tmp_path / f"{begun}-{continued}"
            shutil.copytree(tmp_path / f"{begun}", workdir)
            state, rest = train(workdir, continued)
            assert first + rest == order, (begun, continued)
            found = dict(read_metrics(workdir)["loss"])
            assert found == pytest.approx(losses, rel=1e-5), (begun, continued)
            jax.tree.map(
                lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5),
                state,
                whole,
            )
