"""A run begun on N devices continues on M: the same images, the same numbers but for rounding."""

import shutil
import signal

import jax
import numpy as np
import pytest

from cassle_jax.data.feed import DeviceFeed
from cassle_jax.models import ENCODERS
from cassle_jax.parallel import device_mesh
from cassle_jax.training import loop
from cassle_jax.training.loop import Preempted, pretrain
from cassle_jax.training.metrics import MetricsWriter, read_metrics
from tests.tiny import SmoothEncoder, tiny_config

# Each number is begun on once and continued on once, by more devices and by fewer.
PAIRS = [(1, 8), (8, 2), (2, 4), (4, 1)]
STEPS, STOPPED = 8, 4  # the next step begins a new epoch


def train(workdir, devices, stop=False):
    """Parameters after the last step, and the images of each step."""
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
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(ENCODERS, "tiny", SmoothEncoder)
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of one device, uninterrupted: its losses, its last parameters and its images."""
    workdir = tmp_path_factory.mktemp("whole")
    state, order = train(workdir, 1)
    return dict(read_metrics(workdir)["loss"]), state, order


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """stopped(devices) -> the workdir and the images of a run that was stopped."""
    runs = {}

    def run(devices):
        if devices not in runs:
            workdir = tmp_path_factory.mktemp(f"of-{devices}")
            runs[devices] = workdir, train(workdir, devices, stop=True)[1]
        return runs[devices]

    return run


@pytest.mark.exhaustive
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_run_begun_on_n_devices_continues_on_m(whole, stopped, tmp_path, pair):
    losses, expected, order = whole
    begun, continued = pair
    workdir, first = stopped(begun)
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    state, rest = train(tmp_path, continued)
    assert first + rest == order
    assert dict(read_metrics(tmp_path)["loss"]) == pytest.approx(losses, rel=1e-5)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5),
        state,
        expected,
    )
