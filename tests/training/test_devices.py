"""Any number of devices computes what one device computes on the same global batch."""

import jax
import numpy as np
import pytest

from cassle_jax.data import DamagedLog, open_source, training_batches
from cassle_jax.methods import METHODS
from cassle_jax.parallel import device_mesh, on_every_device, shard_batch
from cassle_jax.training.run import build_run
from cassle_jax.training.step import make_train_step
from tests.everyday import everyday
from tests.tiny import tiny_config

STEPS = 4
WITH_AUXILIARIES = "method=simclr,augself=main,equimod=main,essl=main"
ARGUMENTS = (
    *(f"method={name}" for name in METHODS),
    WITH_AUXILIARIES,
    "method=moco_v2,follow=published",
)


def train(arguments, devices):
    config = tiny_config(arguments)
    # AdamW would make steps of the rounding that a vanishing gradient is.
    config.optimizer.name = "sgd"
    config.optimizer.base_learning_rate = 0.03
    source = open_source(config.data, "train")
    mesh = device_mesh(jax.devices()[:devices])
    run = build_run(config, mesh, len(source))
    batches = training_batches(
        source,
        batch=run.batch_size,
        canvas=config.data.canvas,
        seed=0,
        damaged=DamagedLog(len(source), 0.0),
    )
    step = make_train_step(run, mesh)
    state = on_every_device(run.initial_state, mesh)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, shard_batch(next(batches), mesh))
        losses.append(float(metrics["loss"]))
    networks = (state.params, state.batch_stats, state.target_params, state.target_batch_stats)
    return losses, jax.device_get((networks, state.memory))


@pytest.mark.parametrize("arguments", everyday(ARGUMENTS, WITH_AUXILIARIES))
def test_eight_devices_are_one(arguments):
    losses, state = train(arguments, 1)
    losses_of_eight, state_of_eight = train(arguments, 8)
    # SimSiam's loss is a mean of cosines and may come near 0: their rounding is that of 1.
    rounding = np.finfo(np.float32).eps
    np.testing.assert_allclose(losses_of_eight, losses, rtol=1e-5, atol=rounding)
    jax.tree.map(
        lambda eight, one: np.testing.assert_allclose(eight, one, atol=1e-5), state_of_eight, state
    )
    assert losses[0] != losses[-1]


def test_local_negatives_depend_on_the_devices():
    config = "method=simclr,follow=published"
    assert abs(train(config, 1)[0][0] - train(config, 8)[0][0]) > 0.1
