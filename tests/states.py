"""States of runs with numbers in them, without compiling the program that draws a first one."""

import jax
import numpy as np
from jax.sharding import NamedSharding

from cassle_jax.parallel import REPLICATED
from tests.interop.states import filled


def filled_state(run, mesh, seed=0):
    """The state at step 0 around networks filled by `filled`, on every device of the mesh."""
    shapes = jax.eval_shape(run.initial_state)
    params, statistics = filled(shapes.params, seed), filled(shapes.batch_stats, seed)
    state = shapes.replace(
        step=np.int32(0),
        key=jax.random.key(run.seed),
        params=params,
        batch_stats=statistics,
        target_params={name: params[name] for name in shapes.target_params},
        target_batch_stats={name: statistics[name] for name in shapes.target_batch_stats},
        memory=_zeros(shapes.memory),
        opt_state=_zeros(shapes.opt_state),
        diverged_at=np.int32(-1),
    )
    return jax.device_put(state, NamedSharding(mesh, REPLICATED))


def _zeros(shapes):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
