"""Any number of devices computes what one device computes on the same global batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from cassle_jax.data import DamagedLog, open_source, training_batches
from cassle_jax.methods import METHODS, TrainingViews, ViewBatch
from cassle_jax.parallel import (
    REPLICATED,
    SHARDED,
    device_mesh,
    on_every_device,
    parallel,
    shard_batch,
)
from cassle_jax.training.run import build_run
from cassle_jax.training.step import make_train_step, update_of
from tests.states import filled_state
from tests.tiny import EVERY_AUXILIARY, tiny_config

STEPS = 4
ARGUMENTS = (
    *(f"method={name}" for name in METHODS),
    "method=moco_v2,follow=published",
    "method=byol,conditioning=byol_conditional",
)


def whole_steps(run, mesh, config):
    """The step from the images on, the first state as a run draws it, and the inputs."""
    source = open_source(config.data, "train")
    damaged = DamagedLog(len(source), 0.0)
    settings = {"batch": run.batch_size, "canvas": config.data.canvas, "seed": 0}
    batches = training_batches(source, **settings, damaged=damaged)
    inputs = (shard_batch(next(batches), mesh) for _ in range(STEPS))
    return make_train_step(run, mesh), on_every_device(run.initial_state, mesh), inputs


def updates(run, mesh, config):
    """The step from the views on, which compiles in half the time, a state, and the inputs."""
    del config
    update = parallel(
        update_of(run), mesh, inputs=(REPLICATED, SHARDED), outputs=(REPLICATED, REPLICATED)
    )
    state = filled_state(run, mesh)
    memory = jax.device_put(run.method.initial_memory(state.key), NamedSharding(mesh, REPLICATED))
    inputs = (shard_batch(random_views(run, seed), mesh) for seed in range(STEPS))
    return update, state.replace(memory=memory), inputs


def random_views(run, seed):
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(draw.normal(size=(run.batch_size, *shape)), jnp.float32)

    views = (
        ViewBatch(normal(spec.size, spec.size, 3), normal(run.conditioning.size))
        for spec in run.views
    )
    return TrainingViews(tuple(views))


def train(arguments, devices, steps_of):
    """The losses of four steps, and what the last one leaves."""
    config = tiny_config(arguments)
    # AdamW would make steps of the rounding that a vanishing gradient is.
    config.optimizer.name = "sgd"
    config.optimizer.base_learning_rate = 0.03
    mesh = device_mesh(jax.devices()[:devices])
    run = build_run(config, mesh, config.data.scenes)
    step, state, inputs = steps_of(run, mesh, config)
    losses = []
    for each in inputs:
        state, metrics = step(state, each)
        losses.append(float(metrics["loss"]))
    networks = (state.params, state.batch_stats, state.target_params, state.target_batch_stats)
    return losses, jax.device_get((networks, state.memory))


def assert_eight_devices_are_one(arguments, steps_of):
    losses, state = train(arguments, 1, steps_of)
    losses_of_eight, state_of_eight = train(arguments, 8, steps_of)
    # SimSiam's loss is a mean of cosines and may come near 0: their rounding is that of 1.
    rounding = np.finfo(np.float32).eps
    np.testing.assert_allclose(losses_of_eight, losses, rtol=1e-5, atol=rounding)
    jax.tree.map(
        lambda eight, one: np.testing.assert_allclose(eight, one, atol=1e-5), state_of_eight, state
    )
    assert losses[0] != losses[-1]


@pytest.mark.exhaustive
def test_a_whole_step_of_eight_devices_is_that_of_one():
    assert_eight_devices_are_one(f"method=simclr,{EVERY_AUXILIARY}", whole_steps)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_every_method_makes_the_same_update_of_the_same_views(arguments):
    assert_eight_devices_are_one(arguments, updates)


@pytest.mark.exhaustive
def test_local_negatives_depend_on_the_devices():
    config = "method=simclr,follow=published"
    assert abs(train(config, 1, updates)[0][0] - train(config, 8, updates)[0][0]) > 0.1
