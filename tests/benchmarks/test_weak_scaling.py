import runpy

import jax
import pytest

from benchmarks.scaling import collectives_in, lower_step, optimised
from benchmarks.weak_scaling import run_processes
from cassle_jax.parallel import device_mesh
from tests.training.processes import ROOT

LOCAL_BATCH, CONFIG = 4, "configs/quickstart.py"
SETTINGS = {
    "encoder.width": 4,
    "augment.size": 16,
    "data.canvas": 16,
    "data.scenes": 64,
    "method.queue_size": 64,
    **dict.fromkeys(
        ["augment.jitter", "augment.grayscale", "augment.blur"], 0.0
    ),  # compiles sooner
}


@pytest.mark.exhaustive
def test_two_processes_exchange_what_two_devices_do(monkeypatch):
    config = runpy.run_path(str(ROOT / CONFIG))["get_config"]("method=moco_v2")
    config.update_from_flattened_dict(SETTINGS)
    config.batch_size, config.optimizer.warmup_epochs = 2 * LOCAL_BATCH, 0.0
    step = lower_step(config, device_mesh(jax.devices()[:2]))
    expected = collectives_in(optimised(step))

    monkeypatch.chdir(ROOT)
    arguments = [f"--config={CONFIG}:method=moco_v2", f"--local_batch={LOCAL_BATCH}"]
    arguments += [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    found = run_processes(2, [*arguments, "--steps=1", "--rounds=1"])
    assert found["exchanges"] == sum(each.times for each in expected) > 10
    assert found["bytes"] == sum(each.times * each.bytes for each in expected)
    assert len(found["step"]) == len(found["fed"]) == 1
