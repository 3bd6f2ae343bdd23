"""Runs of one configuration in one process share their programs: tracing takes seconds each."""

import json

import jax
import pytest
from jax.sharding import NamedSharding

from cassle_jax.methods import METHODS
from cassle_jax.models import ENCODERS
from cassle_jax.parallel import REPLICATED
from cassle_jax.training import loop, run
from cassle_jax.training.step import make_train_step

# Settings that no program depends on, but for the shape of a batch: by that, JAX traces anew.
OUTSIDE = ("checkpoint", "compilation_cache", "data", "log", "probe", "weights")


def share_programs(patch: pytest.MonkeyPatch, module=loop):
    """Lets a module begin and train equal runs with the programs of the first of them."""
    build, make_step = run.build_run, make_train_step
    runs, states, steps = {}, {}, {}

    def shared_run(config, mesh, dataset_size):
        built = build(config, mesh, dataset_size)  # which refuses what cannot work
        settings = {name: value for name, value in config.to_dict().items() if name not in OUTSIDE}
        # What a test may have replaced.
        parts = ENCODERS[config.encoder.name], METHODS[config.method.name], run.make_optimizer
        steps_per_epoch = dataset_size // config.batch_size
        key = json.dumps(settings, sort_keys=True), mesh, steps_per_epoch, *parts
        return runs.setdefault(key, built)

    # The runs are kept, so that no other has the same id.
    def shared_state(make, mesh, *inputs):
        replicated = NamedSharding(mesh, REPLICATED)
        program = jax.jit(make, out_shardings=replicated)
        return states.setdefault((id(make.__self__), mesh), program)(*inputs)

    def shared_step(run, mesh):
        return steps.setdefault((id(run), mesh), make_step(run, mesh))

    patch.setattr(module, "build_run", shared_run)
    patch.setattr(module, "on_every_device", shared_state)
    patch.setattr(module, "make_train_step", shared_step)
