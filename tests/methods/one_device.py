"""A method on the tiny encoder and one device: its networks, first state and compiled update."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cassle_jax.methods import Networks, TrainingViews, ViewBatch
from cassle_jax.methods.augself import PREDICTED
from cassle_jax.methods.build import Conditioning, build_networks
from cassle_jax.optimizer import Clock, OptimizerSpec, learning_rate, make_optimizer
from cassle_jax.training.state import TrainState, initial_variables, state_from_variables
from cassle_jax.training.step import Update
from tests.tiny import TinyEncoder

BATCH = 4
PIXELS = 8
PLAIN = Conditioning(descriptors=())
# An epoch of two steps, a run of three epochs; a batch of 256 leaves the learning rate as it is.
CLOCK = Clock(steps_per_epoch=2, total_steps=6)
SPEC = OptimizerSpec(base_learning_rate=0.2, momentum=0.9, weight_decay=0.01)


class Training(NamedTuple):
    """What a test trains with.

    `embed(params, batch_stats, view)` gives what the networks make of a view in training mode, and
    the statistics that leaves; it is not compiled.
    """

    networks: Networks
    state: TrainState
    update: Callable
    embed: Callable


def training(method, conditioning=PLAIN, auxiliaries=(), *, encoder=TinyEncoder):
    networks = build_networks(method, encoder, encoder().feature_width, conditioning, auxiliaries)
    schedule = learning_rate(SPEC, CLOCK, 256)
    optimizer = make_optimizer(SPEC, method, schedule, 256)
    variables = random_variables(networks, random_views(0, conditioning.size).views[0])
    key = jax.random.key(0)
    state = state_from_variables(variables, method.initial_memory(key), method, optimizer, key)
    update = Update(networks, method, auxiliaries, optimizer, schedule, CLOCK, None)

    def embed(params, batch_stats, view):
        encoded, changed = nn.apply(
            lambda networks: networks.embed(view, train=True, predict="predictor" in params),
            networks,
            mutable=["batch_stats"],
        )({"params": params, "batch_stats": batch_stats})
        return encoded, changed["batch_stats"]

    return Training(networks, state, compiled(update), embed)


def compiled(function):
    """Compiled with few optimisations: the tests compile for seconds and run for milliseconds."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def random_variables(networks, view):
    """Drawn by NumPy, which has nothing to compile; norms are not at their usual 1 and 0."""
    draw = np.random.default_rng(0)

    def values(path, like):
        drawn = draw.normal(size=like.shape)
        if path[-1].key == "kernel":
            drawn /= np.sqrt(np.prod(like.shape[:-1]))
        else:
            drawn = 0.1 * drawn + (path[-1].key in ("scale", "var"))
        return jnp.asarray(drawn, jnp.float32)

    shapes = jax.eval_shape(lambda: initial_variables(networks, view, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(values, shapes)


def random_views(seed, descriptor_width=0, predicted=(), sizes=(PIXELS, PIXELS)):
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    def target(name):
        width = PREDICTED[name].size
        if name == "rotation":
            return jax.nn.one_hot(draw.integers(width, size=BATCH), width)
        if name == "flip":
            return jnp.asarray(draw.integers(2, size=(BATCH, width)), jnp.float32)
        return jnp.asarray(draw.uniform(-1, 1, (BATCH, width)), jnp.float32)

    views = tuple(
        ViewBatch(normal(BATCH, size, size, 3), normal(BATCH, descriptor_width)) for size in sizes
    )
    differences = tuple({name: target(name) for name in predicted} for _ in range(2))
    return TrainingViews(views, {"augself": differences} if predicted else {})


def unit(rows):
    return np.asarray(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
