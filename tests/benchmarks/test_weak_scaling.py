import runpy

import jax
import pytest

from benchmarks.scaling import collectives_in, optimised, trace_step
from benchmarks.weak_scaling import run_processes
from cassle_jax.parallel import device_mesh
from tests.training.processes import ROOT

# The file makes the tiny encoder a choice, also in the benchmark's own processes.
LOCAL_BATCH, CONFIG, METHOD = 4, "tests/launch/tiny_run.py", "method=moco_v2"


@pytest.mark.exhaustive
def test_two_processes_exchange_what_two_devices_do(monkeypatch):
    config = runpy.run_path(str(ROOT / CONFIG))["get_config"](METHOD)
    config.batch_size, config.optimizer.warmup_epochs = 2 * LOCAL_BATCH, 0.0
    step = trace_step(config, device_mesh(jax.devices()[:2]))
    expected = collectives_in(optimised(step))

    monkeypatch.chdir(ROOT)
    arguments = [f"--config={CONFIG}:{METHOD}", f"--local_batch={LOCAL_BATCH}"]
    found = run_processes(2, [*arguments, "--steps=1", "--rounds=1"])
    assert found["exchanges"] == sum(each.times for each in expected) > 10
    assert found["bytes"] == sum(each.times * each.bytes for each in expected)
    assert len(found["step"]) == len(found["fed"]) == 1
